"""A folder of transformers becomes a checkpoint of fairseq, with dictionary and languages."""

import os
import shutil
from dataclasses import dataclass

import torch

from lslora_fairseq import checkpoints
from lslora_fairseq.adapters import stock
from lslora_fairseq.adapters.folder import new
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.huggingface import vocabulary
from lslora_fairseq.huggingface.folder import Weights, read_json
from lslora_fairseq.huggingface.twin import CLASS, VERSION, VERSIONS, options_of
from lslora_fairseq.keys import EMBEDDINGS

MODEL, DICTIONARY, SPM, LANGS = "model.pt", "dict.txt", "sentencepiece.bpe.model", "langs.txt"


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        path: the folder
        options: of the model, by name
        tokens: the options that tell which sentence has which token, by name
        vocabulary: :class:`~lslora_fairseq.huggingface.vocabulary.Vocabulary`
        parameters: how many; shared embeddings count once
        dtype: of the weights, such as ``float32``
    """

    path: str
    options: dict
    tokens: dict
    vocabulary: vocabulary.Vocabulary
    parameters: int
    dtype: str

    def flags(self):
        """The options of fairseq-train for a model that starts from it, as words."""
        words = ["--finetune-from-model", os.path.join(self.path, MODEL)]
        words += ["--fixed-dictionary", os.path.join(self.path, DICTIONARY)]
        words += ["--lang-dict", os.path.join(self.path, LANGS)]
        words += stock.flags({**self.tokens, "langs": None})
        words += ["--arch", "lslora_transformer"]
        for name in _SIZES:
            value = self.options[name]
            if value is not False:
                words.append(f"--{name.replace('_', '-')}")
                words += [] if value is True else [str(value)]
        return words


_SIZES = (
    *(
        f"{stack}_{name}"
        for stack in ("encoder", "decoder")
        for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads", "normalize_before")
    ),
    "share_all_embeddings", "no_scale_embedding", "activation_fn", "dropout", "attention_dropout",
    "activation_dropout", "max_source_positions", "max_target_positions",
)  # fmt: skip


def write(folder, out):
    """Writes the checkpoint, its dictionary, SentencePiece model and languages.

    Args:
        folder: that transformers' save_pretrained wrote
        out: a new folder

    Returns:
        :class:`Imported`

    Raises:
        ConfigError: a file cannot be read, or fairseq has no such model; with all reasons.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder}: no such folder: name one that save_pretrained wrote")
    options, reasons = options_of(read_json(folder, "config.json"))
    if reasons:  # the weights of another class would only add noise
        raise _refused(folder, reasons)
    state, reasons = Weights(folder).state(options)
    words = None
    if EMBEDDINGS[0] in state:
        words, odd = vocabulary.read(folder, len(state[EMBEDDINGS[0]]))
        reasons += odd
    if reasons:
        raise _refused(folder, reasons)
    weights = [tensor for key, tensor in state.items() if key not in EMBEDDINGS[1:]]
    tokens = {
        "langs": words.langs,
        "encoder_langtok": "tgt" if words.prefix_is_target else "src",
        "decoder_langtok": not words.prefix_is_target,
    }
    for key in VERSIONS:
        state[key] = torch.tensor([VERSION])
    made = stock.options(stock.completed(options), tokens, words.langs[:2])
    with new(out) as beside:
        checkpoints.write_checkpoint(os.path.join(beside, MODEL), stock.content(state, made))
        _write(beside, DICTIONARY, (f"{symbol} 1" for symbol in words.symbols))
        _write(beside, LANGS, words.langs)
        shutil.copyfile(words.spm, os.path.join(beside, SPM))
    count = sum(tensor.numel() for tensor in weights)
    dtype = str(weights[0].dtype).removeprefix("torch.")
    return Imported(os.path.normpath(out), made, tokens, words, count, dtype)


def _refused(folder, reasons):
    several = f" ({len(reasons)} reasons)" if len(reasons) > 1 else ""
    return ConfigError(
        f"{folder} cannot become a model of fairseq{several}: {'; '.join(reasons)}; name a folder "
        f"of {CLASS}, such as M2M-100, M2M-124, NLLB-200 (dense) or SMALL-100"
    )


def _write(folder, name, lines):
    with open(os.path.join(folder, name), "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
