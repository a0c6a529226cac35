"""Fitting a checkpoint to the model: languages that it lacks, and what may be missing."""

import torch

from lslora_fairseq.analysis.trained import by_adapters
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.lora.adapters import PRUNED


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
