"""What the figures share: where they are written, cells with numbers, tiers kept apart."""

import os
from importlib.util import find_spec

import numpy as np

from lslora_fairseq.errors import ConfigError

EXTENSIONS = (".png", ".pdf", ".svg")
INK, GREY = "#333333", "#d9d9d9"
CENTRED = {"ha": "center", "va": "center"}
ROW, NARROW_ROW = 0.26, 0.14  # height of a language in inches
MANY = 40  # languages from which rows are narrow


def check(path):
    """Whether a figure can be drawn and written there, told before the work for it.

    Raises:
        ConfigError: another extension, matplotlib is missing, or the file cannot be written.
    """
    if os.path.splitext(path)[1].lower() not in EXTENSIONS:
        raise ConfigError(
            f"--plot {path} must end in one of {', '.join(EXTENSIONS)}: the ending picks the format"
        )
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'matplotlib>=3.8', or leave it out")
    is_new = not os.path.exists(path)
    try:
        open(path, "ab").close()
    except OSError as error:
        raise _unwritable(path, error) from None
    if is_new:
        os.remove(path)


def save(figure, path):
    """Writes a figure in the format of its extension."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path, error):
    return ConfigError(
        f"--plot {path} cannot be written ({error.strerror or error}): name a file in a folder "
        "that is there and has room"
    )


def rows_height(languages):
    """Inches for so many rows, each a language."""
    return languages * (ROW if languages <= MANY else NARROW_ROW)


def name_rows(axes, codes):
    """Names the rows of a heat map on the left."""
    axes.set_yticks(range(len(codes)), codes, fontsize=8 if len(codes) <= MANY else 6)


def write_cells(axes, values, text, is_dark, fontsize=7):
    """Writes a number into each cell of a heat map that has one.

    Args:
        values: (rows, columns), nan where there is none
        text: value -> what to write
        is_dark: value -> whether the cell is dark, so that white can be read on it

    Returns:
        (row, column) -> matplotlib Text
    """
    written = {}
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if is_dark(value) else INK
            written[row, column] = axes.text(
                column, row, text(value), color=colour, fontsize=fontsize, **CENTRED
            )
    return written


def part_tiers(sizes, line):
    """Draws a white line between neighbouring tiers.

    Args:
        sizes: languages of each tier, in the order of the rows or columns
        line: ``axes.axhline`` or ``axes.axvline``
    """
    for border in np.cumsum(sizes)[:-1]:
        line(border - 0.5, color="white", linewidth=4)


def name_tiers(axes, tiers, side="right"):
    """Names the tiers beside their rows, or with *side* ``top`` above their columns.

    Args:
        tiers: tier -> its languages, in the order of the rows or columns
    """
    sizes = np.array([len(codes) for codes in tiers.values()])
    places = np.cumsum(sizes) - sizes / 2 - 0.5
    names = axes.secondary_xaxis(side) if side == "top" else axes.secondary_yaxis(side)
    (names.set_xticks if side == "top" else names.set_yticks)(places, tiers, fontsize=9)
    names.tick_params(length=0)
    names.spines[:].set_visible(False)
