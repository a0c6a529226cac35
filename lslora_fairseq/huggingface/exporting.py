"""A model of fairseq becomes a folder of Hugging Face transformers."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import Optional

import torch
from safetensors.torch import save_file

from lslora_fairseq import checkpoints
from lslora_fairseq.adapters import stock
from lslora_fairseq.adapters.folder import CARD, new, umask
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.huggingface import cards, dictionary, sentencepiece_model
from lslora_fairseq.huggingface.tokenizer import Tokenizer
from lslora_fairseq.huggingface.twin import (
    CLASS,
    PREFIX,
    SHARED_KEY,
    TOKEN_IDS,
    VERSIONS,
    config_of,
    misfits,
    shapes,
)
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import EMBEDDINGS, FUSED_COPIES

WEIGHTS, SPM = "model.safetensors", "sentencepiece.bpe.model"
_COMPUTED = re.compile(r"(en|de)coder\.embed_positions\.(_float_tensor|weights)")


@dataclass(frozen=True)
class Model:
    """What is written.

    Attributes:
        path: of the checkpoint, for messages
        options: of model and task, by name
        identity: :class:`~lslora_fairseq.identity.Identity`
        weights: the state dict, without adapters
        pair: the direction whose adapters are folded in; None if it is a model of all
    """

    path: str
    options: dict
    identity: Identity
    weights: dict
    pair: Optional[tuple] = None


def base(path):
    """The :class:`Model` of a checkpoint without adapters, or None if it has some.

    Raises:
        ConfigError: no such file, or no checkpoint.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such file: name a checkpoint that fairseq-train wrote")
    checkpoints.allow_fairseq_checkpoints()
    options, weights = checkpoints.read_checkpoint(path)
    if options.get("lora_tiers") is not None:
        return None
    return Model(path, options, Identity.from_options(path, options), weights)


def write(out, model, words, spm):
    """Writes a folder.

    Args:
        out: a new folder
        model: :class:`Model`
        words: path of the dictionary file of the model
        spm: path of its SentencePiece model

    Returns:
        a warning, or None

    Raises:
        ConfigError: the other class has no such model; with all reasons.
    """
    config, tensors = _twin(model)
    tokenizer = _tokenizer(model, config["vocab_size"], words, spm)
    before, forced = _told(model)
    generation = {**TOKEN_IDS, "max_length": 200, "num_beams": 5, "early_stopping": True}
    if forced is not None:
        generation["forced_bos_token_id"] = tokenizer.vocab[tokenizer.langs[forced]]
    card = cards.model(model, tokenizer, before, forced)
    files = {"config.json": config, "generation_config.json": generation}
    with new(out) as beside:
        path = os.path.join(beside, WEIGHTS)
        save_file(tensors, path, {"format": "pt"})
        os.chmod(path, 0o666 & ~umask())
        for name, content in {**files, **tokenizer.files(before)}.items():
            indent = None if name == "tokenizer.json" else 2  # which is long, and slow to indent
            _write(beside, name, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")
        shutil.copyfile(spm, os.path.join(beside, SPM))
        _write(beside, CARD, card)
    return tokenizer.warning()


def _twin(model):
    """The content of config.json, and name -> tensor: shared embeddings once, all in one dtype."""
    weights = model.weights
    if EMBEDDINGS[0] not in weights:
        raise ConfigError(f"{model.path} holds no {EMBEDDINGS[0]}: name a transformer's checkpoint")
    kept = {key: weight for key, weight in weights.items() if not _is_left_out(key)}
    embeddings = kept[EMBEDDINGS[0]]
    dtypes = {weight.dtype for weight in kept.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    options = stock.completed(model.options)
    config, reasons = config_of(options, len(embeddings), str(dtype).removeprefix("torch."))
    copies = [weights[key] for key in EMBEDDINGS[1:] if key in weights]
    if not all(torch.equal(embeddings, copy) for copy in copies):
        reasons.append("its embeddings are not one matrix")
    if not reasons:
        expected = shapes(options, len(embeddings))
        reasons = misfits(expected, {key: weight.shape for key, weight in kept.items()})
    if reasons:
        several = f" ({len(reasons)} reasons)" if len(reasons) > 1 else ""
        raise ConfigError(
            f"{model.path} cannot become a {CLASS}{several}: {'; '.join(reasons)}; lslora merge "
            "writes checkpoints of fairseq of any shape"
        )
    tensors = {PREFIX + key: weight.to(dtype).contiguous() for key, weight in kept.items()}
    tensors[SHARED_KEY] = tensors.pop(PREFIX + EMBEDDINGS[0])
    return config, tensors


def _is_left_out(key):
    """Whether it is a copy, a table or a version, which the other class has not."""
    is_copy = key in EMBEDDINGS[1:] or key.rpartition(".")[2] in FUSED_COPIES
    return is_copy or key in VERSIONS or bool(_COMPUTED.fullmatch(key))


def _tokenizer(model, rows, words, spm):
    """The :class:`Tokenizer`."""
    _, symbols = dictionary.symbols(words, model.identity, rows)
    langs = model.identity.langs
    if langs is None:
        langs = [s.strip("_") for s in symbols if re.fullmatch(r"__[A-Za-z]\w*__", s)]
    tokens = {code: model.identity.token(code) for code in langs}
    known = {*symbols}
    tokens = {code: token for code, token in tokens.items() if token in known}
    return Tokenizer(symbols, tokens, sentencepiece_model.read(spm))


def _told(model):
    """The languages whose tokens stand in front of a text, and of its translation; or None."""
    if model.pair is None:
        return None, None
    options = model.options
    usual = options.get("encoder_langtok"), "tgt" if options.get("decoder_langtok") else None
    source, target = (options.get("langtoks") or {}).get("main") or usual
    languages = dict(zip(("src", "tgt"), model.pair))
    odd = [spec for spec in (source, target) if spec not in (None, *languages)]
    if odd:
        raise ConfigError(
            f"{model.path} has tokens of the kind {odd[0]}, which the tokenizer cannot put in "
            "front of a text: name another checkpoint"
        )
    return languages.get(source), languages.get(target)


def _write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)
