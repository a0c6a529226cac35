"""The share of <unk> in binarised data."""

import logging
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from fairseq.data import data_utils
from tqdm import tqdm

from lslora_fairseq.doctor.report import ERROR, OK, WARNING, Line
from lslora_fairseq.errors import ConfigError, listed

# Shares of <unk> in one file from which on it is a warning, and an error. A dictionary and a
# SentencePiece model that belong together leave rare characters; a wrong one loses whole words.
WARN_FROM, FAIL_FROM = 0.01, 0.05
SAMPLE = 20_000  # sentences read of each file, evenly spread


@dataclass(frozen=True)
class Share:
    """Tokens that were read of one file, and what is wrong with them.

    Attributes:
        file: the :class:`DataFile`
        tokens, unknown: how many were read, and how many of these are <unk>; ends of sentences
            are not counted
        largest: the largest token number
        sentences, read: how many the file has, and how many were read
    """

    file: object
    tokens: int
    unknown: int
    largest: int
    sentences: int
    read: int

    @property
    def share(self):
        return self.unknown / max(self.tokens, 1)


def measure(files, dictionary):
    """Reads a sample of every file; shows progress where stderr is a terminal.

    Raises:
        ConfigError: a file is damaged.
    """
    bar = tqdm(files, "reading data", unit="file", file=sys.stderr, disable=None, leave=False)
    logging.getLogger(data_utils.__name__).setLevel(logging.WARNING)
    return [_measure(file, dictionary) for file in bar]


def _measure(file, dictionary):
    try:
        dataset = data_utils.load_indexed_dataset(file.prefix, dictionary)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset)), dtype=int))
        if getattr(dataset, "supports_prefetch", False):
            dataset.prefetch(chosen)
        tokens = torch.cat([torch.empty(0, dtype=torch.long), *(dataset[i] for i in chosen)])
    except (OSError, ValueError, TypeError, AssertionError, struct.error) as error:
        raise ConfigError(
            f"cannot read {file.prefix} ({type(error).__name__}: {error}): it is damaged or cut "
            "short; run fairseq-preprocess again"
        ) from None
    words = tokens[tokens != dictionary.eos()]
    return Share(
        file=file,
        tokens=len(words),
        unknown=int((words == dictionary.unk()).sum()),
        largest=int(words.max()) if len(words) else 0,
        sentences=len(dataset),
        read=len(chosen),
    )


def judge(split, shares, rows_in_file):
    """One line for a split, its status that of the worst file.

    Args:
        shares: a :class:`Share` for each file of the split
        rows_in_file: lines of the dictionary file, and the specials
    """
    check = f"<unk> in {split}"
    beyond = [s for s in shares if s.largest >= rows_in_file]
    if beyond:
        return Line(
            ERROR,
            check,
            f"{beyond[0].file.name} holds token {beyond[0].largest}, the dictionary ends at "
            f"{rows_in_file - 1}",
            "the data was binarised with another dictionary: name that one, or run "
            "fairseq-preprocess again with --srcdict and --tgtdict",
        )
    tokens = sum(s.tokens for s in shares)
    worst = max(shares, key=lambda s: s.share)
    by_lang = _by_language(shares)
    found = f"{sum(s.unknown for s in shares) / max(tokens, 1):.2%} of {tokens:,} tokens"
    if any(s.read < s.sentences for s in shares):
        found += f" (a sample, {SAMPLE:,} sentences of each file)"
    status, remedy = OK, ""
    if worst.share >= WARN_FROM:
        status = ERROR if worst.share >= FAIL_FROM else WARNING
        many = [f"{lang} {share:.1%}" for lang, share in by_lang.items() if share >= WARN_FROM]
        found += f"; {listed(many)}; most in {worst.file.name}: {worst.share:.1%}"
        remedy = (
            "encode the text with the SentencePiece model of the base model, and give its "
            "dictionary to fairseq-preprocess as --srcdict and --tgtdict"
        )
    elif worst.unknown:
        found += f"; most in {worst.file.name}: {worst.share:.2%}"
    values = {"tokens": tokens, "share": by_lang, "worst_file": worst.file.name}
    return Line(status, check, found, remedy, values)


def _by_language(shares):
    """Language -> share of <unk> in all of its files, the largest first."""
    tokens, unknown = defaultdict(int), defaultdict(int)
    for share in shares:
        tokens[share.file.lang] += share.tokens
        unknown[share.file.lang] += share.unknown
    found = {lang: unknown[lang] / max(tokens[lang], 1) for lang in tokens}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
