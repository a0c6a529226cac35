"""Adapters of a checkpoint become folders of PEFT: of directions, or of languages by side."""

import os

import torch

from lslora_fairseq.adapters.folder import new
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.huggingface import cards, peft
from lslora_fairseq.huggingface.peft import Factors
from lslora_fairseq.huggingface.twin import PREFIX
from lslora_fairseq.keys import EMBEDDINGS
from lslora_fairseq.lora.plan import SHARED, SIDES

LM_HEAD = "lm_head"


def halves(merging):
    """Name of each half -> its owners: every language by side, and what all share.

    Args:
        merging: :class:`~lslora_fairseq.adapters.merging.Merging`
    """
    plan, found = merging.plan, {}
    for code in plan.languages.codes if plan.sites else ():
        for side in SIDES:
            if plan.needs(side):
                found[f"{code}-{side}"] = {side: code}
    if plan.shared_sites or plan.embedding_site:
        found[SHARED] = {SHARED: SHARED}
    return found


def of_pair(pair):
    """The owners of all adapters of a direction, such as ``en-fr``."""
    return {**dict(zip(SIDES, pair.split("-"))), SHARED: SHARED}


def modules(merging, owners):
    """The adapters of some owners: name of a module of the other class -> :class:`Factors`.

    Args:
        merging: :class:`~lslora_fairseq.adapters.merging.Merging`
        owners: as for its ``factors``
    """
    found = {}
    for name, sides in merging.factors(owners).items():
        key = f"{name}.weight"
        factors = _joined([*sides.values()], merging.trained.weights[key].shape)
        if key not in EMBEDDINGS:
            found[PREFIX + name] = factors
            continue
        A, B, alpha = factors
        found[LM_HEAD] = factors
        for embedding in EMBEDDINGS[:2]:  # which have the factors the other way round
            found[PREFIX + embedding.removesuffix(".weight")] = Factors(B.t(), A.t(), alpha)
    return found


def _joined(parts, shape):
    """What several adapters of a linear add together, as one.

    Args:
        parts: (A, B, alpha, share) of each
        shape: (out, in) of the weight; the adapted part may be smaller
    """
    ((A, B, alpha, share), *others) = parts
    if others or share is not None:
        scaled = [
            B.float() * (alpha / len(A)) * (1 if share is None else share.float())
            for A, B, alpha, share in parts
        ]
        A, B = torch.cat([part[0].float() for part in parts]), torch.cat(scaled)
        alpha = len(A)
    whole = A.new_zeros(len(A), shape[1]), B.new_zeros(shape[0], len(B))
    whole[0][:, : A.size(1)] = A
    whole[1][: B.size(1)] = B.t()
    return Factors(*whole, alpha)


def write(out, merging, pairs, base):
    """Writes the folders.

    Args:
        out: a new folder
        merging: :class:`~lslora_fairseq.adapters.merging.Merging`
        pairs: directions, each of which gets a folder; None for a folder of each half
        base: name of the base model for the cards, or None

    Returns:
        name of each folder -> how many modules and entries it has

    Raises:
        ConfigError: a folder cannot be written.
    """
    chosen = halves(merging) if pairs is None else {pair: of_pair(pair) for pair in pairs}
    for name in chosen:
        if "." in name or os.sep in name:
            raise ConfigError(
                f"{merging.trained.path} has adapters of a language that cannot name a folder "
                f"({name}): rename the language"
            )
    found = {}
    with new(out) as beside:
        for name, owners in chosen.items():
            adapted = modules(merging, owners)
            os.mkdir(os.path.join(beside, name))
            card = cards.adapter(name, base, merging, chosen, adapted)
            peft.write(os.path.join(beside, name), adapted, base, card)
            entries = sum(factors.A.numel() + factors.B.numel() for factors in adapted.values())
            found[name] = len(adapted), entries
    return found
