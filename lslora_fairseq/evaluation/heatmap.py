"""Heat maps of directions: scores of one system, differences between systems."""

import numpy as np

from lslora_fairseq.evaluation import groups, reports
from lslora_fairseq.rendering import figures

SCORES, DIFFERENCES = "YlGnBu", "RdBu"
FEW, READABLE = 16, 60  # languages: up to which numbers have full size, and are there at all
WIDE, NARROW = 0.42, 0.3  # width of a cell in inches
FAINT = "#8a8a8a"


def figure(results):
    """Draws the main metric of all directions.

    Args:
        results: the content of scores.json

    Returns:
        a matplotlib Figure; its axes ``scores`` hold the heat map: source languages in rows, target
        languages in columns, by tier; their means in the last column and row
    """
    metric = results["metrics"][0]
    scores = reports.scores(results, metric)
    most = max(scores.values()) or 1
    made, (axes,) = _axes(scores, results["tiers"], ["scores"])
    signature = reports.short_signature(results, metric)
    made.suptitle(f"{metric} of {len(scores)} directions\n{signature}", fontsize=9)
    image, heat, size = _draw(axes, scores, results["tiers"], SCORES, (0, most))
    if size:
        text, is_dark = reports.one_decimal, lambda score: score > 0.6 * most
        figures.write_cells(axes, heat, text, is_dark, fontsize=size)
    _colour_bar(made, image, metric)
    return made


def differences(comparison, tiers):
    """Draws how much each system differs from the baseline, one below the other, on one scale.

    Blue is better. The number of a direction that the test decides is bold, that of another faint.

    Args:
        comparison: what :func:`~lslora_fairseq.evaluation.comparison.compare` returns
        tiers: language -> resource tier; {} where unknown

    Returns:
        a matplotlib Figure, with axes that have the systems' names
    """
    metric, baseline = comparison["metric"], comparison["baseline"]
    found = {s["system"]: s["directions"] for s in comparison["systems"]}
    most = max(abs(d["difference"]) for rows in found.values() for d in rows.values()) or 1
    made, panels = _axes(next(iter(found.values())), tiers, list(found))
    made.suptitle(
        f"{metric} minus that of {baseline}\nbold: p < {comparison['level']}, faint: undecided",
        fontsize=9,
    )
    for axes, (name, rows) in zip(panels, found.items()):
        values = {pair: row["difference"] for pair, row in rows.items()}
        image, heat, size = _draw(axes, values, tiers, DIFFERENCES, (-most, most))
        axes.set_title(name, fontsize=9, pad=22)
        if size:
            is_dark = lambda value: abs(value) > 0.6 * most  # noqa: E731
            texts = figures.write_cells(axes, heat, signed, is_dark, fontsize=size)
            _mark_undecided(texts, rows, tiers)
    _colour_bar(made, image, f"difference in {metric}")
    return made


def signed(difference):
    return f"{difference:+.1f}"


def _mark_undecided(texts, rows, tiers):
    """Makes the numbers of decided directions bold, those of others faint.

    Args:
        texts: (row, column) -> the number in that cell
        rows: pair -> its comparison
    """
    sources, targets = _codes(rows, tiers)
    for pair, row in rows.items():
        source, target = groups.sides(pair)
        text = texts[sources.index(source), targets.index(target)]
        if row["verdict"] != "undecided":
            text.set_fontweight("bold")
        elif text.get_color() == figures.INK:  # on a dark cell, white stays
            text.set_color(FAINT)


def _codes(pairs, tiers):
    return [[c for codes in side.values() for c in codes] for side in groups.axes(pairs, tiers)]


def _axes(pairs, tiers, labels):
    """A figure with axes below each other, with room for all languages and a row of means."""
    from matplotlib.figure import Figure

    rows, columns = (len(codes) + 1 for codes in _codes(pairs, tiers))
    width = columns * (WIDE if columns - 1 <= FEW else NARROW if columns - 1 <= READABLE else 0.14)
    height = max(2, figures.rows_height(rows))
    made = Figure(
        figsize=(max(7, width + 2.4), 0.9 + len(labels) * (height + 1.1)), layout="constrained"
    )
    return made, [
        made.add_subplot(len(labels), 1, number, label=label)
        for number, label in enumerate(labels, 1)
    ]


def _draw(axes, values, tiers, colours, limits):
    """Draws one heat map.

    Returns:
        image; (rows, columns) values with means in the last column and row, nan where there is no
        direction; the size of numbers, None where they cannot be read
    """
    sources, targets = _codes(values, tiers)
    heat = np.full((len(sources) + 1, len(targets) + 1), np.nan)
    for pair, value in values.items():
        source, target = groups.sides(pair)
        heat[sources.index(source), targets.index(target)] = value
    heat[:-1, -1] = np.nanmean(heat[:-1, :-1], axis=1)
    heat[-1, :-1] = np.nanmean(heat[:-1, :-1], axis=0)
    heat[-1, -1] = np.nanmean(heat[:-1, :-1])
    image = axes.imshow(heat, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_facecolor(figures.GREY)  # shines through where there is no direction
    axes.tick_params(length=0, labelsize=8)
    figures.name_rows(axes, [*sources, "mean"])
    languages = max(len(sources), len(targets))
    axes.set_xticks(
        range(len(targets) + 1), [*targets, "mean"], fontsize=8 if languages <= figures.MANY else 6,
        rotation=0 if max(map(len, targets)) <= 3 else 90,
    )  # fmt: skip
    axes.set_ylabel("source language", fontsize=9)
    axes.set_xlabel("target language", fontsize=9)
    axes.spines[:].set_visible(False)
    by_side = zip(groups.axes(values, tiers), ("right", "top"), (axes.axhline, axes.axvline))
    for by_tier, side, line in by_side:
        figures.part_tiers([*map(len, by_tier.values()), 1], line)
        if tiers:
            figures.name_tiers(axes, {t: c for t, c in by_tier.items() if t is not None}, side)
    return image, heat, 7 if languages <= FEW else 5 if languages <= READABLE else None


def _colour_bar(made, image, label):
    bar = made.colorbar(image, ax=made.axes, fraction=0.04, pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)
    bar.outline.set_visible(False)
