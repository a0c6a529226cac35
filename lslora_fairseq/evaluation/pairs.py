"""Which directions a subset of binarised data holds, and which of them are asked for."""

import os
import re
from fnmatch import fnmatchcase

from lslora_fairseq.errors import ConfigError, listed


def in_data(folder, subset):
    """The directions of a subset in the folder that fairseq-preprocess wrote, sorted; one file of
    a pair serves both of them.

    Raises:
        ConfigError: no such folder, or nothing of this subset in it.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: {error.strerror}: name the folder that fairseq-preprocess wrote"
        ) from None
    pattern = re.compile(rf"{re.escape(subset)}\.([^.-]+)-([^.-]+)\.(\1|\2)\.(idx|bin)")
    sides = {}  # the pair of a file -> the languages that have text
    for match in filter(None, map(pattern.fullmatch, names)):
        sides.setdefault(match.group(1, 2), set()).add(match[3])
    both = {pair for pair, languages in sides.items() if languages == set(pair)}
    found = sorted({f"{a}-{b}" for pair in both for a, b in (pair, pair[::-1])})
    if not found:
        subsets = sorted({name.split(".")[0] for name in names if name.endswith(".idx")})
        raise ConfigError(
            f"{folder} has no {subset} data of two languages: choose another --gen-subset"
            + (f" (there is {listed(subsets)})" if subsets else "")
        )
    return found


def chosen(spec, found, option="--pairs", where="the data"):
    """The directions that an option asks for, in the order of *found*.

    Args:
        spec: ``all``, directions and patterns such as ``en-fr,*-en``, or a file of them, separated
            by commas or white space
        found: the directions that there are
        option, where: its name, and what has these directions, for messages

    Raises:
        ConfigError: a direction or pattern fits none of them.
    """
    if spec == "all":
        return list(found)
    if os.path.isfile(spec):
        with open(spec, encoding="utf-8") as file:
            spec = file.read()
    asked = [word for word in re.split(r"[\s,]+", spec) if word]
    if not asked:
        raise ConfigError(f"{option} names no direction: write all, or such as en-fr,'*-en'")
    wanted = set()
    for pattern in asked:
        fitting = [pair for pair in found if fnmatchcase(pair, pattern)]
        if not fitting:
            raise ConfigError(
                f"{option}: no direction of {where} fits {pattern!r}: there are {listed(found)}"
            )
        wanted.update(fitting)
    return [pair for pair in found if pair in wanted]
