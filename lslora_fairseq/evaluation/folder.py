"""The folder that ``lslora evaluate`` fills: plain text of every direction, and ``scores.json``."""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager

from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.evaluation import saved

PLACES = ("data", "path")  # told; where a file lies does not matter


def sha256(path):
    """Of a file's contents, in hexadecimal.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            found = hashlib.sha256()
            while chunk := file.read(1 << 20):
                found.update(chunk)
            return found.hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a file that can be read") from None


def of_lines(lines):
    """What :func:`sha256` gives for the file of these lines."""
    return hashlib.sha256(_text(lines).encode()).hexdigest()


def _text(lines):
    return "".join(line + "\n" for line in lines)


class Folder:
    """Results of one model, direction by direction, each whole or not there.

    Args:
        path: the folder, which is made if need be, and locked until the process ends
        made_with: what the hypotheses are made with, by name; plain values that JSON keeps

    Raises:
        ConfigError: it cannot be written, another run is at work in it, it holds something else,
            or results that were made with something else.

    Attributes:
        results: what ``scores.json`` holds
    """

    def __init__(self, path, made_with):
        self.path = path
        with self._writing():
            os.makedirs(path, exist_ok=True)
            self._lock = open(os.path.join(path, ".lock"), "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another run is at work in {path}: wait for its end, or name another --out"
            ) from None
        self.results = self._found() or {"version": saved.VERSION, **made_with, "directions": {}}
        for name, value in made_with.items():
            was = self.results.get(name)
            if name not in PLACES and _without_places(was) != _without_places(value):
                raise ConfigError(
                    f"{path} was made with {_told(name, was, value)}, this run has "
                    f"{_told(name, value, was)}: name another --out, or delete the folder"
                )
        self.results.update(made_with)

    def _found(self):
        """What was there before, or None."""
        if not os.path.exists(self.file(saved.FILE)):
            texts = sorted(name for name in os.listdir(self.path) if name.endswith(".hyp"))
            if texts:
                raise ConfigError(
                    f"{self.path} has {listed(texts)}, and no {saved.FILE} that tells what made "
                    "them: name another --out"
                )
            return None
        return saved.read(self.path)

    def file(self, name):
        return os.path.join(self.path, name)

    def is_decoded(self, pair, data):
        """Whether the hypotheses of a direction are there, and are those that were written.

        Args:
            data: checksum of what it is decoded from

        Raises:
            ConfigError: they were made from other data.
        """
        facts = self.results["directions"].get(pair)
        if not facts:
            return False
        if facts["data"] != data:
            raise ConfigError(
                f"{self.path} has {pair} of other data (checksum {facts['data'][:8]}, here "
                f"{data[:8]}): name another --out, or delete the folder"
            )
        return all(self.is_intact(pair, suffix) for suffix in facts["sha256"])

    def is_intact(self, pair, suffix):
        """Whether a text of a direction is there, and is what was written."""
        path, sums = self.file(f"{pair}.{suffix}"), self.results["directions"][pair]["sha256"]
        return os.path.exists(path) and sha256(path) == sums[suffix]

    def write(self, pair, facts=None, **texts):
        """Writes texts of a direction; they appear together with what is known of it.

        Args:
            facts: what ``scores.json`` is to say of the direction, if that changes
            texts: suffix of the file -> lines
        """
        known = self.results["directions"].get(pair, {"sha256": {}})
        for suffix, lines in texts.items():
            self._replace(f"{pair}.{suffix}", _text(lines))
        sums = {suffix: of_lines(lines) for suffix, lines in texts.items()}
        known = {**known, **(facts or {}), "sha256": {**known["sha256"], **sums}}
        known.pop("scores", None)  # of other texts
        known.pop("off_target", None)
        self.results["directions"][pair] = known
        self.save()

    def lines(self, pair, suffix):
        """The sentences of a text of a direction."""
        sums = self.results["directions"][pair]["sha256"]
        return saved.read_lines(self.path, pair, suffix, sums)

    def save(self):
        """Writes ``scores.json`` anew."""
        self.results["directions"] = dict(sorted(self.results["directions"].items()))
        self._replace(saved.FILE, json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")

    def _replace(self, name, text):
        """A file appears under its name once it is complete."""
        path = self.file(name)
        with self._writing():
            with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.replace(path + ".tmp", path)

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"cannot write to --out {self.path} ({error.strerror or error}): free some space "
                "or name another folder; the directions already there are kept"
            ) from error


def _without_places(value):
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_places(v) for k, v in value.items() if k not in PLACES}
    return value


def _told(name, value, other):
    """A setting for a message: of several values, those that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        odd = [k for k in {**value, **other} if value.get(k) != other.get(k)]
        return f"{name} " + ", ".join(f"{k}={value.get(k)}" for k in odd)
    return f"{name} {json.dumps(value)}"
