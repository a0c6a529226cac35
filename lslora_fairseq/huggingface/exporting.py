"""A model of fairseq becomes a folder of Hugging Face transformers."""

import json
import os
import re
from dataclasses import dataclass
from typing import Optional

import torch
from safetensors.torch import save_file

from lslora_fairseq import checkpoints
from lslora_fairseq.adapters import stock
from lslora_fairseq.adapters.folder import CARD, new, umask
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.huggingface import cards, sentencepiece_model
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
from lslora_fairseq.keys import EMBEDDINGS

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


def write(out, model, dictionary, spm):
    """Writes a folder.

    Args:
        out: a new folder
        model: :class:`Model`
        dictionary: path of the dictionary file of the model
        spm: path of its SentencePiece model

    Returns:
        a warning, or None

    Raises:
        ConfigError: the other class has no such model; with all reasons.
    """
    embeddings = model.weights.get(EMBEDDINGS[0])
    if embeddings is None:
        raise ConfigError(f"{model.path} holds no {EMBEDDINGS[0]}: name a transformer's checkpoint")
    kept = {k: w for k, w in model.weights.items() if k not in EMBEDDINGS and k not in VERSIONS}
    kept = {key: weight for key, weight in kept.items() if not _COMPUTED.fullmatch(key)}
    dtypes = {weight.dtype for weight in (embeddings, *kept.values())}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    kept[EMBEDDINGS[0]] = embeddings
    options = stock.completed(model.options)
    config, reasons = config_of(options, len(embeddings), str(dtype).removeprefix("torch."))
    copies = (model.weights[key] for key in EMBEDDINGS[1:] if key in model.weights)
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
    tokenizer, tokens = _tokenizer(model, len(embeddings), dictionary, spm)
    before, forced = _told(model, tokens)
    generation = {**TOKEN_IDS, "max_length": 200, "num_beams": 5, "early_stopping": True}
    if forced is not None:
        generation["forced_bos_token_id"] = tokenizer.vocab[tokenizer.langs[forced]]
    tensors = {PREFIX + key: w.to(dtype).contiguous() for key, w in kept.items()}
    tensors[SHARED_KEY] = tensors.pop(PREFIX + EMBEDDINGS[0])
    card = cards.model(model, tokenizer, before, forced)
    files = {"config.json": config, "generation_config.json": generation}
    with new(out) as beside:
        path = os.path.join(beside, WEIGHTS)
        save_file(tensors, path, {"format": "pt"})
        os.chmod(path, 0o666 & ~umask())
        for name, content in {**files, **tokenizer.files(before)}.items():
            indent = None if name == "tokenizer.json" else 2  # which is long, and slow to indent
            _write(beside, name, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")
        with open(spm, "rb") as file, open(os.path.join(beside, SPM), "wb") as copy:
            copy.write(file.read())
        _write(beside, CARD, card)
    return tokenizer.warning()


def _tokenizer(model, rows, dictionary, spm):
    """The :class:`Tokenizer`, and code of each language -> its token."""
    from fairseq.data import Dictionary

    try:
        lines = Dictionary.load(dictionary).symbols
    except Exception as error:
        raise ConfigError(  # fairseq raises Exception itself
            f"--dict {dictionary} cannot be read ({error}): name the dict.txt of the model"
        ) from None
    symbols = model.identity.symbols(lines) or lines
    if len(symbols) != rows:
        raise ConfigError(
            f"{model.path} has {rows:,} embedding rows, --dict {dictionary} and language tokens "
            f"make {len(symbols):,}: name the dictionary file that the model was trained with"
        )
    langs = model.identity.langs
    if langs is None:
        langs = [s.strip("_") for s in symbols if re.fullmatch(r"__[A-Za-z]\w*__", s)]
    known = {*symbols}
    tokens = {code: model.identity.token(code) for code in langs}
    tokens = {code: token for code, token in tokens.items() if token in known}
    return Tokenizer(symbols, tokens, sentencepiece_model.read(spm)), tokens


def _told(model, tokens):
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
