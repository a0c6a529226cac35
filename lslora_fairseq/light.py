"""Checkpoints that leave the frozen base model out (``--lora-save adapters``).

Such a file holds, under :data:`BASE`, which of its weights are those of the base model's
checkpoint, and where that is. Whoever reads it gets them back, bit by bit.
"""

import functools
import os
from contextvars import ContextVar

import torch

from lslora_fairseq.adapters import fingerprint
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import EMBEDDINGS, RECORD, is_adapter_key

BASE = "lslora_base"  # under which a checkpoint tells what it leaves out
given_base = ContextVar("lslora_given_base", default=None)  # --lora-base, or None


class Light:
    """Leaves out of a model's state dicts what a base model's checkpoint holds.

    Args:
        path: of that checkpoint; of one that leaves its own base out, that base is taken

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, path):
        from lslora_fairseq.checkpoints import read_file

        content = read_file(path)
        self.path = path
        if BASE in content:
            self.path = find(content[BASE], path)
            content = read_file(self.path)
        self._weights = content["model"]
        self._about = None

    @property
    def is_checked(self):
        """Whether :meth:`check` was called."""
        return self._about is not None

    def check(self, weights):
        """Finds out what can be left out.

        Args:
            weights: the state dict of a model whose base is loaded

        Raises:
            ConfigError: the model's base is another one.
        """
        lines = Identity.from_record(weights[RECORD], "this model").lines
        taken = {}
        for key, weight in weights.items():
            if is_adapter_key(key):
                continue
            # rows beyond the dictionary file are of tokens, of which each run may have others
            rows = lines if key in EMBEDDINGS else None
            sources = EMBEDDINGS if key in EMBEDDINGS else (key,)
            found = next((s for s in sources if self._holds(s, weight, rows)), None)
            if found is not None:
                taken[key] = [found, rows, str(weight.dtype).removeprefix("torch.")]
            elif key in self._weights and key.endswith((".weight", ".bias")):
                raise ConfigError(
                    f"--lora-save adapters: {self.path} is not the base model of this run, {key} "
                    "differs: name that with --lora-base"
                )
        self._about = {
            "path": os.path.abspath(self.path),
            "fingerprint": fingerprint.of_base(self._weights, lines, exact=True),
            "lines": lines,
            "taken": taken,
        }
        self._weights = None

    def _holds(self, key, weight, rows):
        other = self._weights.get(key)
        if other is None or other.shape[1:] != weight.shape[1:]:
            return False
        return torch.equal(weight.cpu()[:rows], other[:rows].to(weight.dtype))

    def left_out(self, content):
        """A checkpoint's content without what the base model's holds."""
        taken, model = self._about["taken"], {}
        for key, weight in content["model"].items():
            if key not in taken:
                model[key] = weight
            elif taken[key][1] is not None:
                model[key] = weight[taken[key][1] :].clone()
        return {**content, "model": model, BASE: self._about}


def completed(content, path):
    """A checkpoint's content with the weights of the base model that it leaves out, if it does.

    Args:
        path: of the file that it was read from

    Raises:
        ConfigError: the base model is gone, or is another one.
    """
    about = content.get(BASE) if isinstance(content, dict) else None
    if about is None:
        return content
    from lslora_fairseq.checkpoints import read_file

    base = find(about, path)
    weights = read_file(base)["model"]
    if fingerprint.of_base(weights, about["lines"], exact=True) != about["fingerprint"]:
        raise ConfigError(
            f"{path} leaves its base model out, and {base} is another one, or a copy in another "
            f"precision: name it with --lora-base, or bring it back to {about['path']}"
        )
    model, whole = dict(content["model"]), {}
    for key, (source, rows, dtype) in about["taken"].items():
        own = model.get(key)
        # one matrix may stand there under several names
        same = [w for s, o, w in whole.values() if s == source and _equal(o, own)]
        if same:
            model[key] = same[0]
            continue
        weight = weights[source][:rows].to(getattr(torch, dtype))
        model[key] = weight if own is None else torch.cat([weight, own.to(weight.device)])
        whole[key] = source, own, model[key]
    return {**{name: part for name, part in content.items() if name != BASE}, "model": model}


def _equal(one, other):
    return other is None if one is None else other is not None and torch.equal(one, other)


def weights_in_files(path):
    """The state dicts that hold the weights of a checkpoint, memory-mapped where the files allow
    it: its own, and that of the base model if it leaves that out.

    Raises:
        ConfigError: a file cannot be read, or the base model is gone.
    """
    from lslora_fairseq.checkpoints import read_file

    content = read_file(path)
    found = [content["model"]]
    if BASE in content:
        found.append(read_file(find(content[BASE], path))["model"])
    return found


def find(about, path):
    """The base model of a checkpoint.

    Args:
        about: what the checkpoint tells of it
        path: of the checkpoint

    Raises:
        ConfigError: it is in none of the places where it may be.
    """
    places = [about["path"], os.path.join(os.path.dirname(path), os.path.basename(about["path"]))]
    if given_base.get() is not None:
        places = [given_base.get()]
    for place in places:
        if os.path.isfile(place):
            return place
    raise ConfigError(
        f"{path} leaves its base model out, which is not at {' or '.join(places)}: bring it back, "
        "or name it with --lora-base (commands of fairseq, lslora evaluate)"
    )


def complete_what_is_loaded():
    """fairseq gets checkpoints with their base model, and writes them without if the task says
    so."""
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    load, get = checkpoint_utils.load_checkpoint_to_cpu, Trainer.state_dict
    if getattr(load, "completing", False):
        return

    @functools.wraps(load)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        return completed(load(path, *args, **kwargs), path)

    @functools.wraps(get)
    def state_dict(self):
        content, light = get(self), getattr(self.task, "light", None)
        return content if light is None else light.left_out(content)

    load_checkpoint_to_cpu.completing = True
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    Trainer.state_dict = state_dict
