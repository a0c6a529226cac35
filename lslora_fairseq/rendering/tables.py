"""How results are printed: aligned columns, CSV, JSON, and flags for the next run."""

import csv
import io
import json
import math
import shlex


def aligned(alignment, header, rows):
    """Columns of text.

    Args:
        alignment: ``<`` or ``>`` for each column
        header, rows: texts by column
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, alignment, widths))
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def percent(share):
    """A share in per cent; ``-`` where there is none (nan)."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def csv_text(header, rows):
    """CSV with a header; None is an empty field."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([header, *rows])
    return file.getvalue().rstrip("\n")


def json_text(content):
    """JSON that any reader takes: no value (nan) is null."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False)


def _plain(content):
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def shell_line(flags):
    """Options for a command line, quoted for a shell.

    Args:
        flags: option -> value
    """
    return shlex.join(word for flag in flags.items() for word in flag)


def flag_words(flags):
    """One word per line, unquoted, for ``mapfile -t``."""
    return "\n".join(word for flag in flags.items() for word in flag)
