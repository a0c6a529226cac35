"""Dictionaries of many languages: files that hold the same are read once, into one object.

fairseq reads the dictionary of every language twice and keeps one for each. Those of a multilingual
model are the same; 200 of 256,000 words would take minutes and gigabytes.
"""

import hashlib
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_loaded = ContextVar("lslora_dictionaries", default=None)


@contextmanager
def shared_dictionaries():
    """Inside, :func:`load` returns one object for all files that hold the same. Not beyond: another
    task may append other languages to its own."""
    token = _loaded.set({})
    try:
        yield
    finally:
        _loaded.reset(token)


def load(read, path):
    """A dictionary from a file.

    Args:
        read: function of the path that reads it

    Returns:
        the dictionary; its attribute ``rows_in_file`` tells how many symbols it had, specials
        included, before language tokens are appended
    """
    loaded = _loaded.get()
    digest = None if loaded is None else hashlib.sha256(Path(path).read_bytes()).digest()
    if digest is not None and digest in loaded:
        return loaded[digest]
    dictionary = read(path)
    dictionary.rows_in_file = len(dictionary)
    if digest is not None:
        loaded[digest] = dictionary
    return dictionary
