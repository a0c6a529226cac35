"""Fitting a checkpoint to the model: what may be missing, and matching embedding rows."""

import torch

from lslora_fairseq.analysis.trained import by_adapters
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.lora.adapters import PRUNED

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


def add_languages(own, found, source, plan, starts):
    """Gives a checkpoint the fresh adapters of languages that it does not have, in place.

    Args:
        own, found: state dicts of the model and of the checkpoint
        source: the :class:`~lslora_fairseq.identity.Identity` of *found*
        plan: the model's :class:`~lslora_fairseq.config.AdapterPlan`
        starts: code of each of these languages -> the one whose adapters it starts with, or None

    Raises:
        ConfigError: the checkpoint does not tell whose its adapters are, or a language starts with
            adapters of another rank.
    """
    if source.adapters is None:
        raise ConfigError(
            f"{source.path} does not tell its adapters, as an earlier version wrote it: load it in "
            "one more run (--lr 0 --max-update 1), and start from what that saves"
        )
    theirs = source.adapters["ranks"]
    for key in by_adapters(plan.sites):
        name = f"{key}.{PRUNED}"
        pruned = found.get(name)
        if pruned is None or len(pruned) != sum(theirs.values()):
            continue  # the checks that follow tell what is odd
        rows = dict(zip(theirs, pruned.split([*theirs.values()])))
        for code, like in starts.items():
            fresh = own[f"{key}.lora_{code}"]
            rows.setdefault(code, pruned.new_zeros(len(fresh), pruned.size(1)))
            if like is not None:
                fresh = _started(found[f"{key}.lora_{like}"], fresh, code, like)
            found.setdefault(f"{key}.lora_{code}", fresh)
        found[name] = torch.cat([rows[code] for code in plan.languages.codes if code in rows])


def _started(other, fresh, code, like):
    if other.shape == fresh.shape:
        return other.clone()
    raise ConfigError(
        f"--lora-init-from {code}={like}: {like} has rank {len(other)} and {code} {len(fresh)}: "
        "give both the same with --lora-rank, or leave it out"
    )


def check_keys(own, found, source):
    """Raises ConfigError unless *found* holds every key of *own* in the same shape.

    Args:
        own, found: state dicts
        source: the :class:`~lslora_fairseq.identity.Identity` of *found*
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
        known = f" ({source.arch})" if source.arch else ""
        cause = f"choose the --arch and sizes of the checkpoint{known}"
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ConfigError(
        f"{source.path} does not fit this model: {'; '.join(problems[:3])}{more}: {cause}"
    )
