"""What ``lslora evaluate`` left in its folder, read back."""

import json
import os
from hashlib import sha256

from lslora_fairseq.errors import ConfigError, listed

VERSION = 1
FILE = "scores.json"
AGAIN = "run lslora evaluate again, with the same arguments"
KEYS = ("models", "data", "subset", "tiers", "tokenizers", "spm", "metrics", "directions")


def read(folder):
    """What the scores.json of a folder holds, complete or not.

    Raises:
        ConfigError: it is not there, damaged, or of a later version of this package.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder}: no such folder: name one that lslora evaluate wrote")
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        raise ConfigError(f"{folder} holds no {FILE}: name a folder that lslora evaluate wrote")
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        is_later = results["version"] > VERSION
        if not is_later:
            results["directions"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete the folder and {AGAIN}"
        ) from None
    if is_later:
        raise ConfigError(
            f"{path} is of version {results['version']}, this lslora_fairseq reads up to "
            f"{VERSION}: update it, or evaluate again with this one"
        )
    return results


def load(folder):
    """The complete results in a folder of ``lslora evaluate``.

    Returns:
        the content of its scores.json, which names at least one direction

    Raises:
        ConfigError: :func:`read` refuses it, or it is incomplete.
    """
    results, path = read(folder), os.path.join(folder, FILE)
    missing = [key for key in KEYS if key not in results]
    if missing:
        raise ConfigError(f"{path} lacks {listed(missing)}: {AGAIN}")
    incomplete = [
        pair
        for pair, direction in results["directions"].items()
        if not all(metric in direction.get("scores", {}) for metric in results["metrics"])
    ]
    if incomplete or not results["directions"]:
        raise ConfigError(f"{path} lacks scores of {listed(incomplete) or 'directions'}: {AGAIN}")
    return results


def read_lines(folder, pair, kind, checksums):
    """The sentences of one direction, checked to be those that were scored.

    Args:
        kind: ``src``, ``ref`` or ``hyp``
        checksums: kind -> sha256, the ``sha256`` of the direction in scores.json

    Raises:
        ConfigError: the file is gone or has changed.
    """
    path = os.path.join(folder, f"{pair}.{kind}")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from None
    if sha256(content).hexdigest() != checksums[kind]:
        raise ConfigError(f"{path} has changed since it was scored: {AGAIN}")
    # not splitlines(): a sentence may hold other characters that it takes for line ends
    return content.decode("utf-8").removesuffix("\n").split("\n")
