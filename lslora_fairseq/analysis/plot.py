"""The demand as a figure: a heat map of languages and layers, and bars for module types."""

import numpy as np

from lslora_fairseq.lora.plan import MODULES, SIDES
from lslora_fairseq.rendering import figures

COLOURS = "YlGnBu"


def figure(demand):
    """Draws the demand.

    Args:
        demand: a :class:`~lslora_fairseq.analysis.survivors.Demand`

    Returns:
        a matplotlib Figure; the labels of its axes are such as ``encoder layers`` (a heat map of
        languages by tier and layers) and ``encoder modules`` (bars for tiers and module types)
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    stacks = [stack for stack in MODULES if demand.modules(stack)]
    maps = {stack: _heat(demand, stack) for stack in stacks}
    columns = [max(heat.shape[1], 3) for heat in maps.values()]
    map_height = max(2.4, figures.rows_height(len(demand.plan.languages)))
    made = Figure(
        figsize=(max(10, 2.6 + 0.42 * sum(columns)), map_height + 5.2), layout="constrained"
    )
    made.suptitle(_title(demand), fontsize=12)
    grid = made.add_gridspec(2, len(stacks), width_ratios=columns, height_ratios=[map_height, 2.4])
    most = max(np.nanmax(heat) for heat in maps.values())
    left = top = None
    for number, stack in enumerate(stacks):
        top = made.add_subplot(grid[0, number], sharey=top, label=f"{stack} layers")
        image = _draw_map(top, demand, stack, maps[stack], most)
        if number == 0:
            figures.name_rows(top, [c for codes in demand.tiers.values() for c in codes])
            top.set_ylabel("language", fontsize=9)
        else:
            top.tick_params(labelleft=False)
        left = made.add_subplot(grid[1, number], sharey=left, label=f"{stack} modules")
        _draw_bars(left, demand, stack)
    figures.name_tiers(top, demand.tiers)
    bar = made.colorbar(
        image, ax=made.axes[::2], fraction=0.04, pad=0.02, format=PercentFormatter(1, 0)
    )
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of entries that survive", fontsize=9)
    bar.outline.set_visible(False)
    made.axes[1].set_ylabel("share that survives", fontsize=9)
    left.legend(
        title="mean of", fontsize=8, title_fontsize=8, frameon=False, loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )  # fmt: skip
    return made


def _title(demand):
    ranks = sorted(set(demand.plan.ranks))
    rank = f"rank {ranks[0]} for all" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return (
        "How much of its adapters (factor B) each language needs: what is left after pruning\n"
        f"{len(demand.plan.languages)} languages, {rank}; {demand.sparsity:.0%} of all entries "
        "were removed, the smallest ones"
    )


def _heat(demand, stack):
    """(languages by tier, layers) shares; nan in a layer without adapters."""
    order = [demand.plan.languages.index(c) for codes in demand.tiers.values() for c in codes]
    layers = 1 + max(site.layer for site in demand.sites(stack=stack))
    shares = [demand.shares(demand.sites(stack=stack, layer=layer)) for layer in range(layers)]
    return np.stack(shares, axis=1)[order]


def _draw_map(axes, demand, stack, heat, most):
    image = axes.imshow(heat, cmap=COLOURS, vmin=0, vmax=most, aspect="auto")
    axes.set_facecolor(figures.GREY)  # shines through where there are no adapters
    axes.set_title(f"{stack}: languages and layers", fontsize=10)
    axes.set_xlabel(f"{stack} layer\n{_whose(demand, stack)}", fontsize=9)
    axes.set_xticks(range(heat.shape[1]))
    axes.tick_params(length=0, labelsize=8)
    figures.part_tiers([len(codes) for codes in demand.tiers.values()], axes.axhline)
    axes.spines[:].set_visible(False)
    if len(heat) <= 16:
        figures.write_cells(axes, heat, _percent, lambda share: share > 0.6 * most)
    return image


def _draw_bars(axes, demand, stack):
    from matplotlib.ticker import PercentFormatter

    modules = demand.modules(stack)
    shares = {m: demand.shares(demand.sites(stack=stack, module=m)) for m in modules}
    width = 0.8 / len(demand.tiers)
    for number, tier in enumerate(demand.tiers):
        places = np.arange(len(modules)) - 0.4 + (number + 0.5) * width
        axes.bar(places, [demand.mean(shares[m], tier) for m in modules], width, label=tier)
    average = demand.mean(demand.shares(demand.sites(stack=stack)))
    axes.axhline(
        average, color=figures.INK, linewidth=1, linestyle="--", label="all languages, all modules"
    )
    axes.set_title(f"{stack}: module types", fontsize=10)
    axes.set_xticks(range(len(modules)), modules, rotation=30, ha="right", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share):
    """Two digits where there are two."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _whose(demand, stack):
    """Whose adapters the layers have, such as ``of the source language in 0-8, …``."""
    parts = []
    for side in SIDES:
        layers = sorted({site.layer for site in demand.sites(stack=stack, side=side)})
        if layers:
            parts.append(f"of the {side} language in {_ranges(layers)}")
    adapted = {site.layer for site in demand.sites(stack=stack)}
    grey = "; grey: no adapters" if len(adapted) <= max(adapted) else ""
    return f"adapters {', '.join(parts)}{grey}"


def _ranges(numbers):
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
