"""Embedding rows of a checkpoint in the order of this run's dictionary.

A base model numbers its words by its own dictionary file and languages; symbols are matched by what
they are, and those that it does not have start afresh, or as another one.
"""

import logging

import torch

from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.keys import EMBEDDINGS
from lslora_fairseq.lora.adapters import PRUNED
from lslora_fairseq.lora.plan import SHARED

logger = logging.getLogger(__name__)
SPECIALS = 4  # fairseq's <s> <pad> </s> <unk> come before the lines of a dictionary


def match_rows(rows, dictionary, base):
    """Finds the row of every symbol in a base model's embeddings.

    Args:
        rows: number of rows in the base model
        dictionary: this run's dictionary; its attribute ``rows_in_file`` tells how many symbols
            came from the dictionary file (specials included), the rest are language tokens
        base: the base model's :class:`~lslora_fairseq.identity.Identity`

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


def match_embeddings(model, own, found, base):
    """Brings the embeddings of a checkpoint into the order of the model's dictionary, in place, and
    what its embeddings' adapter has for each word.

    Args:
        model: the :class:`~lslora_fairseq.models.lslora_transformer.LSLoTransformerModel`
        own, found: state dicts of the model and of the checkpoint
        base: the :class:`~lslora_fairseq.identity.Identity` of *found*

    Raises:
        ConfigError: its rows cannot be told, or a token starts as one that is new, too.
    """
    for key in EMBEDDINGS:
        stack = key.partition(".")[0]
        dictionary = getattr(model, stack).dictionary
        weight = found.get(key)
        if weight is None or key not in own or weight.size(1) != own[key].size(1):
            continue
        matched = match_rows(weight.size(0), dictionary, base)
        if matched is not None:
            found[key] = take_rows(own[key], weight, matched)
            if stack == "encoder":
                _tell_of_new_rows(model, matched)
                _match_words(model.plan, own, found, matched)
            _start_rows(model, found, key, matched)


def _tell_of_new_rows(model, matched):
    symbols = model.encoder.dictionary.symbols
    new = [symbols[row] for row in (matched < 0).nonzero().flatten().tolist()]
    trained = [model.identity.token(code) for code in model.plan.tokens]
    kept = [symbol for symbol in new if symbol not in trained]
    if kept:
        logger.warning(
            "%d embedding rows are new to the base model and stay untrained, since the base is "
            "frozen: %s",
            len(kept),
            listed(kept, " "),
        )
    if len(kept) < len(new):
        new = [symbol for symbol in new if symbol in trained]
        logger.info("new to the base model, with a row that is trained: %s", listed(new, " "))


def _match_words(plan, own, found, matched):
    """Brings the columns of the embeddings' adapter, which belong to words, into our order."""
    for key in (f"embedding_adapters.{name}" for name in (f"lora_{SHARED}", PRUNED)):
        if key in own and key in found and len(own[key]) == len(found[key]):
            d = plan.embedding_site.in_features
            ours, theirs = (w[key][:, d:].t() for w in (own, found))
            B = take_rows(ours, theirs, matched).t()
            found[key] = torch.cat([found[key][:, :d], B], 1)


def _start_rows(model, found, key, matched):
    """Rows of tokens that are new to the base start as those of others (``--lora-init-from``), with
    what the embeddings' adapter adds to these."""
    index, token = model.encoder.dictionary.index, model.identity.token
    for code, source in model.init_from.items():
        row, like = index(token(code)), index(token(source))
        if matched[row] >= 0:
            continue
        if matched[like] < 0:
            raise ConfigError(
                f"--lora-init-from {code}={source}: the token of {source} is new to the base "
                "model, too: name a language that it knows"
            )
        found[key][row] = found[key][like]
        adapter = found.get(f"embedding_adapters.lora_{SHARED}")
        if adapter is not None and model.plan.embedding_site:
            d = model.plan.embedding_site.in_features
            found[key][row] += adapter[:, d + like].float() @ adapter[:, :d].float()
