"""Errors that a user can mend, told in one line."""

import os
from contextlib import contextmanager

LISTED_IN_FULL = 12  # of more items, a message names a few
NAMED = 8


class ConfigError(ValueError):
    """A setting, file or checkpoint is wrong; the message names the cause and the remedy."""


class UserError(SystemExit):
    """Ends the command with one line on stderr and exit status 1, without a traceback.

    fairseq answers any ``Exception`` during loading with its own advice; a ``SystemExit`` gets
    through with ours.
    """


def listed(items, separator=", ", start=0):
    """Items for a message: all of them, or of many a few from number *start* on, and the count."""
    items = list(items)
    if len(items) <= LISTED_IN_FULL:
        return separator.join(items)
    shown = items[start : start + NAMED]
    before, after = ["…"] * (start > 0), ["…"] * (start + NAMED < len(items))
    return f"{separator.join([*before, *shown, *after])} ({len(items)} in all)"


@contextmanager
def one_line_errors(*also):
    """Turns a :class:`ConfigError` (and the exception types in *also*) into a one-line exit.

    Set ``LSLORA_TRACEBACK=1`` to see the traceback instead.
    """
    try:
        yield
    except (ConfigError, *also) as error:
        if os.environ.get("LSLORA_TRACEBACK"):
            raise
        raise UserError(f"lslora: error: {_message(error)}") from None


def _message(error):
    """What an error says; of one from a process that loads data, of which torch makes a traceback
    in words, the last line."""
    text = str(error)
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(f"\n{name}")[2].strip() if text.startswith("Caught ") else text
