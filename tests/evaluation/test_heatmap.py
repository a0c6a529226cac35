"""Heat maps of directions: what their axes hold."""

import numpy as np
import pytest
import results
from matplotlib.colors import same_color, to_rgba

from lslora_fairseq.evaluation import heatmap
from lslora_fairseq.rendering import figures

NAN = np.nan


def values(axes):
    return np.ma.filled(axes.images[0].get_array().astype(float), NAN)


def texts(axes):
    """(column, row) -> matplotlib Text"""
    return {tuple(map(int, text.get_position())): text for text in axes.texts}


def axes_of(figure):
    return {axes.get_label(): axes for axes in figure.axes}


def labels(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def test_scores_by_tier_with_means():
    figure = heatmap.figure(results.make())
    axes = axes_of(figure)["scores"]
    expected = [
        [NAN, 30.04, 4.04, 17.04],
        [36.04, NAN, NAN, 36.04],
        [8.04, NAN, NAN, 8.04],
        [22.04, 30.04, 4.04, 19.54],
    ]
    np.testing.assert_allclose(values(axes), expected)
    assert axes.images[0].get_clim() == (0, 36.04)
    assert labels(axes.yaxis) == labels(axes.xaxis) == ["en", "de", "wo", "mean"]
    written = texts(axes)
    assert written[1, 0].get_text() == "30.0" and (0, 0) not in written
    assert written[0, 1].get_color() == "white" and written[2, 0].get_color() == figures.INK
    assert same_color(axes.get_facecolor(), figures.GREY)
    assert figure.get_suptitle() == f"spBLEU of 4 directions\n{results.PIECES}"
    rows, columns = axes.child_axes
    assert labels(rows.yaxis) == labels(columns.xaxis) == ["high", "low"]
    assert list(rows.get_yticks()) == list(columns.get_xticks()) == [0.5, 2]
    lines = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    assert [y[0] for x, y in lines[:2]] == [x[0] for x, y in lines[2:]] == [1.5, 2.5]


def test_without_tiers_only_the_means_are_apart():
    axes = axes_of(heatmap.figure(results.make(tiers={})))["scores"]
    assert not axes.child_axes and len(axes.lines) == 2


def test_one_source_language():
    scores = {"en-de": (1.0, 0), "en-wo": (0.0, 0)}
    axes = axes_of(heatmap.figure(results.make(scores)))["scores"]
    np.testing.assert_allclose(values(axes), [[1, 0, 0.5], [1, 0, 0.5]])
    assert labels(axes.yaxis) == ["en", "mean"]


@pytest.mark.parametrize("languages, size", [(16, 7), (17, 5), (60, 5), (61, None)])
def test_numbers_get_smaller_and_are_left_out(languages, size):
    scores = {f"en-l{number}": (1.0, 0) for number in range(languages)}
    axes = axes_of(heatmap.figure(results.make(scores, {})))["scores"]
    assert {text.get_fontsize() for text in axes.texts} == ({size} if size else set())


def test_scores_of_zero():
    axes = axes_of(heatmap.figure(results.make({"en-de": (0.0, 0)})))["scores"]
    assert axes.images[0].get_clim() == (0, 1)


def comparison(**systems):
    """As comparison.compare returns it; *systems*: name -> pair -> (difference, verdict)."""
    return {
        "baseline": "base", "metric": "spBLEU", "level": 0.05,
        "systems": [
            {
                "system": name,
                "directions": {
                    pair: {"difference": difference, "verdict": verdict}
                    for pair, (difference, verdict) in rows.items()
                },
            }
            for name, rows in systems.items()
        ],
    }  # fmt: skip


def test_differences_on_one_scale_with_white_at_zero():
    tuned = {"en-de": (2.0, "better"), "de-en": (-0.04, "undecided"), "wo-en": (-1.0, "worse")}
    merged = {"en-de": (0.0, "undecided"), "de-en": (4.0, "better"), "wo-en": (0.5, "undecided")}
    figure = heatmap.differences(comparison(tuned=tuned, merged=merged), results.TIERS)
    axes = axes_of(figure)
    np.testing.assert_allclose(
        values(axes["tuned"]),
        [[NAN, 2, 2], [-0.04, NAN, -0.04], [-1, NAN, -1], [-0.52, 2, 0.32]],
    )
    for name in ("tuned", "merged"):
        (image,) = axes[name].images
        assert image.get_clim() == (-4, 4) and axes[name].get_title() == name
        assert min(image.cmap(0.5)[:3]) > 0.95  # nearly white
    blue, red = image.cmap(0.9), image.cmap(0.1)
    assert blue[2] > blue[0] and red[0] > red[2]
    written = texts(axes["tuned"])
    assert {place: (t.get_text(), t.get_fontweight()) for place, t in written.items()} == {
        (1, 0): ("+2.0", "bold"), (0, 1): ("-0.0", "normal"), (0, 2): ("-1.0", "bold"),
        (2, 0): ("+2.0", "normal"), (2, 1): ("-0.0", "normal"), (2, 2): ("-1.0", "normal"),
        (0, 3): ("-0.5", "normal"), (1, 3): ("+2.0", "normal"), (2, 3): ("+0.3", "normal"),
    }  # fmt: skip
    assert to_rgba(written[0, 1].get_color()) == to_rgba(heatmap.FAINT)
    assert texts(axes["merged"])[0, 1].get_color() == "white"
    assert figure.get_suptitle() == "spBLEU minus that of base\nbold: p < 0.05, faint: undecided"
