"""Reading a folder of transformers: its JSON files, and its weights without loading them all."""

import json
import os

import torch
from safetensors import SafetensorError, safe_open

from lslora_fairseq.checkpoints import UNREADABLE
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.huggingface.twin import PREFIX, SHARED_KEY, misfits, shapes
from lslora_fairseq.keys import EMBEDDINGS

# files of weights, in the order in which transformers looks for them
WHOLE = ("model.safetensors", "pytorch_model.bin")
# one matrix under other names
TIED = (*(PREFIX + key for key in EMBEDDINGS[:2]), "lm_head.weight")
# tables that are computed
TABLES = (".embed_positions.weights", ".embed_positions._float_tensor")
BIAS = "final_logits_bias"


def read_json(folder, name, default=None):
    """The content of a JSON file, a dict; *default* where there is no such file.

    Raises:
        ConfigError: it cannot be read, or is missing without a default.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        if default is not None:
            return default
        raise ConfigError(
            f"{folder} holds no {name}: name a folder that transformers' save_pretrained wrote"
        )
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} ({error}): copy it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object: copy it again")
    return found


class Weights:
    """The weights in a folder, of one file or of several.

    Nothing is copied: tensors stay in the files, memory-mapped, until somebody touches them.

    Args:
        folder: path

    Raises:
        ConfigError: there are none, or they cannot be read.

    Attributes:
        tensors: name -> tensor
    """

    def __init__(self, folder):
        self.folder, self.tensors = folder, {}
        for name in self._files():
            path = os.path.join(folder, name)
            try:
                self.tensors.update(_read(path))
            except (*UNREADABLE, SafetensorError) as error:
                raise ConfigError(
                    f"cannot read {path} ({str(error)[:200]}): it is damaged or no file of "
                    "weights; copy it again"
                ) from None

    def _files(self):
        for name in WHOLE:
            if os.path.isfile(os.path.join(self.folder, name)):
                return [name]
            parts = read_json(self.folder, f"{name}.index.json", {}).get("weight_map")
            if parts:
                return sorted(set(map(os.path.basename, parts.values())))
        raise ConfigError(
            f"{self.folder} holds no weights ({' or '.join(WHOLE)}, or an index of several): name "
            "a folder that is complete"
        )

    def state(self, options):
        """The state dict of fairseq's model, and why there is none: a list.

        Args:
            options: of fairseq, by name
        """
        left, reasons = dict(self.tensors), []
        matrices = {name: left.pop(name) for name in (SHARED_KEY, *TIED) if name in left}
        if not matrices:
            return {}, [f"it lacks {SHARED_KEY}"]
        embeddings, *others = matrices.values()
        if not all(torch.equal(embeddings, other) for other in others):
            reasons.append(f"its embeddings are not shared ({', '.join(matrices)} differ)")
        bias = left.pop(BIAS, None)
        if bias is not None and bias.any():
            reasons.append(f"it has {BIAS}")
        found = {EMBEDDINGS[0]: embeddings}
        for name, tensor in left.items():
            if not name.endswith(TABLES):
                found[name.removeprefix(PREFIX)] = tensor
        expected = shapes(options, len(embeddings))
        reasons += misfits(expected, {key: tensor.shape for key, tensor in found.items()})
        if not reasons:
            found = {key: found[key] for key in expected}
        return {**found, **dict.fromkeys(EMBEDDINGS, embeddings)}, reasons


def _read(path):
    """Name -> tensor of a file, memory-mapped."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # a file of torch's old format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
