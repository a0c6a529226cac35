"""Folders of PEFT's LoRA adapters: what is in them, reading and writing.

PEFT takes from a file what it looks for, and passes over the rest without a word. So a folder is
read back with PEFT's own rules once it is written, and has to hold exactly what they ask for.
"""

import json
import math
import os
import re
from collections import Counter
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lslora_fairseq.adapters.folder import CARD, umask
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.huggingface.folder import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# of a linear, and of an embedding, which has the factors the other way round: names of A and B
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
# settings of adapters that are more than B A, or of a base that is no longer the same -> the values
# without effect
_PLAIN = {
    "use_dora": (False,),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


class Factors(NamedTuple):
    """The adapter of one module, which adds alpha / rank · B A.

    Attributes:
        A, B: (rank, in) and (out, rank); of an embedding (rank, words) and (d, rank)
        alpha: a number
    """

    A: torch.Tensor
    B: torch.Tensor
    alpha: float


def write(folder, modules, base, card):
    """Writes a folder.

    Args:
        folder: a folder that is there
        modules: full name of each module in the base model -> :class:`Factors`
        base: name of the base model, or None
        card: text of the model card

    Raises:
        ConfigError: PEFT would take other adapters from it than these.
    """
    ranks = {name: len(factors.A) for name, factors in modules.items()}
    alphas = {name: factors.alpha for name, factors in modules.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    config = {
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": base,
        "inference_mode": True, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "target_modules": [*modules], "rank_pattern": ranks, "alpha_pattern": alphas,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False,
    }  # fmt: skip
    tensors = {}
    for name, factors in modules.items():
        for ending, tensor in zip(_endings(name), factors):
            tensors[f"{_PREFIX}{name}{ending}"] = tensor.float().contiguous()
    path = os.path.join(folder, WEIGHTS)
    save_file(tensors, path, {"format": "pt"})
    os.chmod(path, 0o666 & ~umask())
    for name, text in ((CONFIG, json.dumps(config, indent=2) + "\n"), (CARD, card)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    found, reasons = read(folder)
    if reasons or found.keys() != modules.keys():
        raise ConfigError(
            f"PEFT would not take these adapters as they are: {'; '.join(reasons) or 'others'}"
        )


def _endings(name):
    return _EMBEDDING if name.endswith(".embed_tokens") else _LINEAR


def read(folder):
    """The adapters in a folder, as PEFT takes them.

    Returns:
        full name of each module -> :class:`Factors`; and what is not plain LoRA: a list

    Raises:
        ConfigError: a file is missing or damaged.
    """
    config = read_json(folder, CONFIG)
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        raise ConfigError(f"{folder} holds no {WEIGHTS}: name a folder that PEFT wrote")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path} ({error}): copy it again") from None
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"it is {config.get('peft_type')} and not LORA")
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            reasons.append(f"it has {name} {config[name]}")
    modules = {}
    for key in list(tensors):
        for first, second in (_LINEAR, _EMBEDDING):
            if key.endswith(first) and key.removesuffix(first) + second in tensors:
                A, B = tensors.pop(key), tensors.pop(key.removesuffix(first) + second)
                modules[key.removesuffix(first).removeprefix(_PREFIX)] = A, B
    if tensors:
        some = sorted(tensors)[:3]
        reasons.append(f"it holds {', '.join(some)}, which are not both factors of an adapter")
    targets = config.get("target_modules") or []
    if not isinstance(targets, (str, list)):
        reasons.append(f"its target_modules are {targets}")
        targets = []
    found = {}
    for name, (A, B) in modules.items():
        if not _is_target(name, targets):
            reasons.append(f"it holds {name}, which is none of its target modules")
        rank = _setting(config, "rank_pattern", name, config.get("r"))
        alpha = _setting(config, "alpha_pattern", name, config.get("lora_alpha"))
        if A.dim() != 2 or B.dim() != 2 or len(A) != rank or B.size(1) != rank:
            reasons.append(f"{name} has rank {len(A)}, and its settings say {rank}")
        elif not isinstance(alpha, (int, float)):
            reasons.append(f"{name} has the alpha {alpha}")
        elif config.get("use_rslora"):
            alpha *= math.sqrt(rank)
        found[name] = Factors(A, B, alpha)
    if not isinstance(targets, str):
        lacking = [t for t in targets if t.startswith("model.") and t not in modules]
        if lacking:
            reasons.append(f"it lacks the adapter of {listed(lacking)}")
    return found, reasons


def _is_target(name, targets):
    if isinstance(targets, str):
        return targets == "all-linear" or _fits(targets, name)
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _setting(config, pattern, name, usual):
    """What PEFT finds for a module: the first of the patterns that fits its name."""
    for key, value in (config.get(pattern) or {}).items():
        if _fits(rf"(.*\.)?({key})", name):
            return value
    return usual


def _fits(pattern, name):
    try:
        return bool(re.fullmatch(pattern, name))
    except re.error:
        return False
