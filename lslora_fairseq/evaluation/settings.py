"""What hypotheses are made with: models, options and versions, to tell results apart."""

import hashlib
import os
from functools import cache

import fairseq
import torch
from fairseq.checkpoint_utils import get_maybe_sharded_checkpoint_filename
from fairseq.dataclass.configs import GenerationConfig
from fairseq.utils import split_paths

from lslora_fairseq.evaluation.folder import sha256
from lslora_fairseq.evaluation.search import BeamSearch
from lslora_fairseq.identity import plugin_version

ALWAYS_TOLD = ("beam", "lenpen", "max_len_a", "max_len_b")


def made_with(cfg, task, text):
    """By name, in plain values.

    Args:
        cfg: fairseq's configuration
        task: the task, set up from it
        text: a :class:`~lslora_fairseq.evaluation.decoding.Text`

    Raises:
        ConfigError: a checkpoint cannot be read.
    """
    return {
        "models": [{"path": path, "sha256": sha256(path)} for path in _files(cfg, task)],
        "data": cfg.task.data,
        "subset": cfg.dataset.gen_subset,
        "decoding": _decoding(cfg, task),
        "tokens": {
            "langs": ",".join(task.langs),
            "main": list(task.args.langtoks["main"]),
            "style": task.args.lang_tok_style,
            "replacing_bos_eos": bool(task.args.lang_tok_replacing_bos_eos),
        },
        "text": _text(cfg, text),
        "versions": {
            "lslora_fairseq": plugin_version(),
            "fairseq": fairseq.__version__,
            "torch": torch.__version__,
        },
    }


def _files(cfg, task):
    """The checkpoints, and the adapter files that are loaded onto them."""
    shards = cfg.checkpoint.checkpoint_shard_count
    adapters = [file.path for file in task.adapters.files.values()] if task.adapters else []
    checkpoints = [
        get_maybe_sharded_checkpoint_filename(path, cfg.checkpoint.checkpoint_suffix, i, shards)
        for path in split_paths(cfg.common_eval.path)
        for i in range(shards)
    ]
    return checkpoints + adapters


def _decoding(cfg, task):
    usual = GenerationConfig()
    options = {
        name: getattr(cfg.generation, name)
        for name in BeamSearch.OPTIONS
        if name in ALWAYS_TOLD or getattr(cfg.generation, name) != getattr(usual, name)
    }
    if options["max_len_a"]:  # the longest length is that of a batch
        options.update(max_tokens=cfg.dataset.max_tokens, batch_size=cfg.dataset.batch_size)
    if cfg.common.fp16:
        options["fp16"] = True
    if task.base_dtype is not None:
        options["lora_base_dtype"] = str(task.base_dtype).removeprefix("torch.")
    if cfg.common_eval.model_overrides != "{}":
        options["model_overrides"] = cfg.common_eval.model_overrides
    return options


def _text(cfg, text):
    """How tokens became plain text, in fairseq's options."""
    found = {
        "--remove-bpe": text.symbol,
        "--bpe": getattr(cfg.bpe, "_name", None),
        "--tokenizer": getattr(cfg.tokenizer, "_name", None),
    }
    return " ".join(f"{option} {value}" for option, value in found.items() if value) or "as it is"


_sum = cache(sha256)  # directions share dictionaries, and texts


def data_sum(folder, subset, pair):
    """Checksum of what a direction is decoded from: its texts and their dictionaries."""
    source, target = pair.split("-")
    found = hashlib.sha256()
    for a, b in ((source, target), (target, source)):
        for language in (source, target):
            for ending in ("bin", "idx"):
                path = os.path.join(folder, f"{subset}.{a}-{b}.{language}.{ending}")
                if os.path.exists(path):
                    found.update(_sum(path).encode())
    for language in (source, target):
        path = os.path.join(folder, f"dict.{language}.txt")
        if os.path.exists(path):
            found.update(_sum(path).encode())
    return found.hexdigest()
