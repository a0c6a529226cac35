"""What a section returns, tables of medians with their spread, and the figure."""

import statistics
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple


class Spread(NamedTuple):
    """What repeated measurements came to."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values):
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self):
        if isinstance(self.median, int):
            return f"{self.median:,}"
        large = self.median >= 100
        text = f"{self.median:,.0f}" if large else f"{self.median:.3f}"
        if self.min == self.max:
            return text
        form = ",.0f" if large else ".2f" if self.median >= 0.1 else ".3f"
        return f"{text} ({self.min:{form}}-{self.max:{form}})"


def ratios(values, reference):
    """The spread of the ratios within each repetition, which a drift of the clock cannot move."""
    return Spread.of([value / other for value, other in zip(values, reference)])


@dataclass
class Result:
    """Attributes:
    tables: list of :class:`Table`
    raw: every single measurement, plain values
    notes: lines to print below the tables
    """

    tables: list
    raw: dict
    notes: list = field(default_factory=list)


@dataclass
class Table:
    """Attributes:
    title: what is measured, and in which unit
    columns: headings
    rows: label -> a :class:`Spread` for each column, or None where nothing was measured
    """

    title: str
    columns: list
    rows: dict

    def __str__(self):
        lines = [["", *map(str, self.columns)]]
        for label, cells in self.rows.items():
            lines.append([label, *("" if cell is None else str(cell) for cell in cells)])
        widths = [max(map(len, column)) for column in zip(*lines)]
        text = [self.title]
        for label, *cells in lines:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
            text.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
        return "\n".join(text)

    def as_json(self):
        rows = {
            label: [None if cell is None else cell._asdict() for cell in cells]
            for label, cells in self.rows.items()
        }
        return {"title": self.title, "columns": self.columns, "rows": rows}


def can_draw():
    return find_spec("matplotlib") is not None


def draw(table, reference, subtitle, path):
    """Draws a table whose columns are numbers of languages as one line per row.

    Args:
        reference: what the table's ratios are relative to: a line at 1
        subtitle: the setting
        path: an SVG file
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(1, color="black", linewidth=1, label=reference)
    for (label, cells), marker in zip(table.rows.items(), "osD^vP"):
        points = [(x, cell) for x, cell in zip(table.columns, cells) if cell is not None]
        middle = [cell.median for _, cell in points]
        below = [cell.median - cell.min for _, cell in points]
        above = [cell.max - cell.median for _, cell in points]
        where = [x for x, _ in points]
        axes.errorbar(where, middle, (below, above), marker=marker, capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(table.columns, [str(n) for n in table.columns])
    top = max(cell.max for cells in table.rows.values() for cell in cells if cell is not None)
    ticks = [t for t in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if t <= 1.3 * top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("languages")
    axes.set_ylabel(f"time of a training step ÷ {reference}")
    axes.set_title(f"What a training step costs\n{subtitle}", fontsize=11)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
