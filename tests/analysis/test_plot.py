"""The figure of ``lslora demand``: what its axes hold, and what keeps it from being drawn."""

import sys

import handmade
import numpy as np
import pytest
from console import lslora
from test_demand import NEED, keep, measured

from lslora_fairseq.analysis import plot
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.rendering import figures


def axes_of(figure):
    return {axes.get_label(): axes for axes in figure.axes}


def test_a_heat_map_of_each_stack_on_one_scale(tmp_path):
    def kept(site, code):  # the last encoder layer keeps half as much of oc
        return keep(site, code) // (2 if code == "oc" and site.layer == 2 else 1)

    # rows by tier: oc comes last although the inventory has it in between
    figure = plot.figure(measured(tmp_path, kept, lora_tiers="high=en,de;low=oc"))
    axes = axes_of(figure)
    (encoder,), (decoder,) = axes["encoder layers"].images, axes["decoder layers"].images
    expected = np.array([[7, 7, 7], [14, 14, 14], [28, 28, 14]]) / 48
    np.testing.assert_allclose(encoder.get_array(), expected, rtol=1e-12)
    expected = np.array([[10, 10], [20, 20], [40, 40]]) / 72
    np.testing.assert_allclose(decoder.get_array(), expected, rtol=1e-12)
    assert encoder.get_clim() == decoder.get_clim() == (0, 28 / 48)
    assert [t.get_text() for t in axes["encoder layers"].get_yticklabels()] == list(NEED)
    assert [t.get_text() for t in axes["encoder layers"].texts[:3]] == ["15%"] * 3
    assert axes["encoder layers"].get_xlabel() == (
        "encoder layer\nadapters of the source language in 0-1, of the target language in 2"
    )
    assert "3 languages, rank 2 for all; 68% of all entries" in figure.get_suptitle()


def test_tiers_are_named_and_kept_apart(tmp_path):
    tiers = "low=en;medium=oc;high=de"
    figure = plot.figure(measured(tmp_path, lora_tiers=tiers))
    axes = axes_of(figure)
    rows = [t.get_text() for t in axes["encoder layers"].get_yticklabels()]
    assert rows == ["en", "oc", "de"]
    np.testing.assert_allclose(
        axes["encoder layers"].images[0].get_array()[:, 0], np.array([14, 28, 7]) / 48
    )
    (names,) = axes["decoder layers"].child_axes
    assert [t.get_text() for t in names.get_yticklabels()] == ["low", "medium", "high"]
    assert list(names.get_yticks()) == [0, 1, 2]
    assert [line.get_ydata()[0] for line in axes["encoder layers"].lines] == [0.5, 1.5]


def test_bars_for_the_module_types_of_each_tier(tmp_path):
    figure = plot.figure(measured(tmp_path))
    axes = axes_of(figure)["encoder modules"]
    high, low = axes.containers
    assert (high.get_label(), low.get_label()) == ("high", "low")
    assert [t.get_text() for t in axes.get_xticklabels()] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1", "fc2",
    ]  # fmt: skip
    heights = [bar.get_height() for bar in low]
    assert heights == pytest.approx([4 / 8, 4 / 8, 4 / 8, 12 / 16, 4 / 8])
    assert [bar.get_height() for bar in high][3] == pytest.approx(4.5 / 16)
    (average,) = axes.lines
    assert average.get_ydata()[0] == pytest.approx(7 / 3 * 7 / 48)
    (legend,) = [a.get_legend() for a in figure.axes if a.get_legend()]
    assert {t.get_text() for t in legend.get_texts()} == {
        "high", "low", "all languages, all modules",
    }  # fmt: skip


def test_layers_without_adapters_are_empty_and_a_stack_without_is_left_out(tmp_path):
    options = {"encoder_lora_layers": "0,2", "decoder_target_modules": "none"}
    axes = axes_of(plot.figure(measured(tmp_path, **options)))
    assert "decoder layers" not in axes and "decoder modules" not in axes
    heat = axes["encoder layers"].images[0].get_array()
    assert np.isnan(np.ma.filled(heat[:, 1], np.nan)).all()
    np.testing.assert_allclose(np.ma.filled(heat[:, 2], np.nan), np.array([7, 14, 28]) / 48)
    assert axes["encoder layers"].get_xlabel().endswith("in 2; grey: no adapters")


@pytest.mark.parametrize(
    "name, starts", [("d.png", b"\x89PNG"), ("d.PDF", b"%PDF"), ("d.svg", b"<?xml")]
)
def test_the_ending_picks_the_format(tmp_path, name, starts):
    path = tmp_path / name
    figures.check(str(path))
    assert not path.exists()
    figures.save(plot.figure(measured(tmp_path)), str(path))
    assert path.read_bytes().startswith(starts)


def test_many_languages_have_narrow_rows_and_no_numbers(tmp_path):
    tiers = ",".join(f"l{number}" for number in range(50))
    found = measured(tmp_path, lambda *_: 1, lora_tiers=f"high={tiers}", pruning_final_sparsity=0.1)
    figure = plot.figure(found)
    assert figure.get_size_inches()[1] == pytest.approx(50 * figures.NARROW_ROW + 5.2)
    assert not axes_of(figure)["encoder layers"].texts


def test_an_ending_that_is_no_format():
    with pytest.raises(ConfigError) as caught:
        figures.check("demand.jpg")
    assert str(caught.value) == (
        "--plot demand.jpg must end in one of .png, .pdf, .svg: the ending picks the format"
    )


def test_a_place_that_cannot_be_written(tmp_path):
    path = tmp_path / "none" / "demand.png"
    with pytest.raises(ConfigError) as caught:
        figures.check(str(path))
    assert str(caught.value) == (
        f"--plot {path} cannot be written (No such file or directory): name a file in a folder "
        "that is there and has room"
    )


def test_a_file_that_is_there_is_not_touched_by_the_check(tmp_path):
    path = tmp_path / "demand.png"
    path.write_bytes(b"old")
    figures.check(str(path))
    assert path.read_bytes() == b"old"


def test_without_matplotlib_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as caught:
        figures.check(str(tmp_path / "demand.png"))
    assert str(caught.value) == (
        "--plot needs matplotlib: pip install 'matplotlib>=3.8', or leave it out"
    )


def test_on_the_command_line(tmp_path):
    """Told before the checkpoint is read; else the figure is there, and the table as without it."""
    status, out, err = lslora("demand", "none.pt", "--plot", "demand.jpg", check=False)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("lslora: error: --plot demand.jpg must end in one of")
    path = handmade.save(tmp_path, handmade.make(keep))
    _, out, _ = lslora("demand", path, "--plot", tmp_path / "demand.png")
    assert out == lslora("demand", path)[1]
    assert (tmp_path / "demand.png").read_bytes().startswith(b"\x89PNG")
