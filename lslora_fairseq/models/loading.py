"""Fitting a checkpoint to the model: what may be missing, and matching embedding rows."""

from dataclasses import dataclass
from typing import Optional

import torch
from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.keys import is_adapter_key

SPECIALS = 4  # fairseq's <s> <pad> </s> <unk> come before the lines of a dictionary


@dataclass
class BaseModel:
    """What is known of the checkpoint named by ``--finetune-from-model``.

    Attributes:
        path: the file
        arch: its architecture, or None if the checkpoint does not tell
        langs: the languages in the order in which it appended their tokens, or None
        lang_tok_style: how it writes a language token
    """

    path: str
    arch: Optional[str] = None
    langs: Optional[list] = None
    lang_tok_style: str = "multilingual"

    @classmethod
    def from_args(cls, path, args):
        """From the options that the checkpoint was trained with."""
        langs = args.get("langs")
        if isinstance(langs, str):
            langs = langs.split(",")
        if langs is None and args.get("lang_dict") is None and args.get("lang_pairs"):
            pairs = args["lang_pairs"]
            pairs = pairs.split(",") if isinstance(pairs, str) else pairs
            langs = sorted({lang for pair in pairs for lang in pair.split("-")})
        return cls(path, args.get("arch"), langs, args.get("lang_tok_style") or "multilingual")

    def symbols(self, lines):
        """Its dictionary: *lines* (specials included) and the tokens appended to them, or None."""
        if self.langs is None:
            return None
        tokens = [get_lang_tok(lang, self.lang_tok_style) for lang in self.langs]
        if self.lang_tok_style == "mbart":
            tokens.append("<mask>")  # fairseq appends it after the tokens of this style
        known = set(lines)
        return list(lines) + [t for t in dict.fromkeys(tokens) if t not in known]


def match_rows(rows, dictionary, base):
    """Finds the row of every symbol in a base model's embeddings.

    Args:
        rows: number of rows in the base model
        dictionary: this run's dictionary; its attribute ``rows_in_file`` tells how many symbols
            came from the dictionary file (specials included), the rest are language tokens
        base: a :class:`BaseModel`

    Returns:
        (len(dictionary),) row numbers, -1 for a symbol that the base does not have; None if
        the rows can be taken as they are.

    Raises:
        ConfigError: with the rows expected and found, and the usual remedy.
    """
    ours = dictionary.symbols
    lines = ours[: dictionary.rows_in_file]
    told = theirs = base.symbols(lines)
    if told is None or len(told) != rows:
        # a base that tells another order may have as many rows as we do by chance
        same = rows == len(ours) and (told is None or ours[: len(told)] == told)
        theirs = lines if rows == len(lines) else ours if same else None
    if theirs is None:
        trained = f", trained with {len(base.langs)} languages," if base.langs else ""
        expected = f"this run expects {len(ours):,}"
        if rows == len(ours):
            expected = "as many as this run but for other tokens"
        raise ConfigError(
            f"{base.path}{trained} has {rows:,} embedding rows, {expected}: "
            f"{len(lines) - SPECIALS:,} dictionary lines + {SPECIALS} specials + "
            f"{len(ours) - len(lines)} "
            "language tokens that the dictionary lacks; use the dictionary of the base model and "
            "its --langs in its order, or, for rows beyond the language tokens such as NLLB's "
            "data-source tags, write every row in order into one file and pass it as "
            "--fixed-dictionary"
        )
    if theirs == ours:
        return None
    row_of = {symbol: row for row, symbol in enumerate(theirs)}
    return torch.tensor([row_of.get(symbol, -1) for symbol in ours])


def take_rows(own, found, matched):
    """Embedding rows for this run's dictionary; a symbol new to the base keeps its fresh row.

    Args:
        own: (rows, d) the model's freshly initialised embeddings
        found: (base rows, d) the base model's
        matched: result of :func:`match_rows`
    """
    known = (matched >= 0).unsqueeze(1)
    return torch.where(known, found[matched.clamp(min=0)], own.to(found.dtype))


def check_keys(own, found, source, arch):
    """Raises ConfigError unless *found* holds every key of *own* in the same shape.

    Args:
        own, found: state dicts
        source: what *found* was read from, for the message
        arch: its architecture if known
    """
    problems = [f"{key}: missing" for key in own if key not in found]
    problems += [f"{key}: not in this model" for key in found if key not in own]
    problems += [
        f"{key}: {tuple(found[key].shape)} in the checkpoint, {tuple(own[key].shape)} here"
        for key in own
        if key in found and own[key].shape != found[key].shape
    ]
    if not problems:
        return
    if all(is_adapter_key(problem.split(":")[0]) for problem in problems):
        cause = (
            "its adapters do not fit: give the --lora-* options and index sides it was trained "
            "with, or none of them"
        )
    else:
        cause = f"choose the --arch and sizes of the checkpoint{f' ({arch})' if arch else ''}"
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ConfigError(f"{source} does not fit this model: {'; '.join(problems[:3])}{more}: {cause}")
