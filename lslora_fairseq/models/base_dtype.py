"""A frozen base that computes in half precision, and its weights as they were before.

Adapters keep their fp32 parameters; where they meet activations they are cast to the dtype of the
base. The kernels of layer norm and softmax compute in fp32 whatever their input.
"""

import torch
from fairseq.modules import SinusoidalPositionalEmbedding

from lslora_fairseq.keys import EMBEDDINGS, is_adapter_key
from lslora_fairseq.light import weights_in_files

# --lora-base-dtype -> what the base is cast to, if it is
BASE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.half}


def frozen_base(model):
    """The base's parameters of a model with adapters: name -> parameter, each under one name."""
    return {n: param for n, param in model.named_parameters() if not is_adapter_key(n)}


def cast_base(model, dtype):
    """Casts the base of a model, in place, parameter by parameter; and its positions, which are
    added to embeddings."""
    for param in frozen_base(model).values():
        param.data = param.data.to(dtype)
    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            module.to(dtype)


def restore_base(model, state, prefix):
    """Gives a state dict the base of a cast model as it was loaded, in place: what its
    :class:`Originals` hold, if it has any, and trained rows of tokens with all their digits."""
    weights = {} if model.originals is None else model.originals.whole()
    if hasattr(model, "token_rows"):
        name = EMBEDDINGS[0]
        weights[name] = weights.get(name, state[prefix + name]).to(torch.float, copy=True)
        model.token_rows.write(weights[name])
    base = frozen_base(model)
    of = {base[name]: weight for name, weight in weights.items()}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param in of:
            state[prefix + name] = of[param]


class Originals:
    """The weights of a base as the checkpoint has them that a model was loaded from.

    They are compared with the checkpoint's file to the last bit and stay there, mapped into memory:
    they take none of the process's own, and a file that is renamed, replaced or removed
    meanwhile stays readable. What the file lacks, such as rows of tokens that are new, is kept.

    Args:
        weights: name -> tensor, as it was loaded
        path: of the checkpoint
        lines: symbols of the dictionary file; rows beyond may have been brought into another order

    Raises:
        ConfigError: the file can no longer be read.
    """

    def __init__(self, weights, path, lines):
        files = weights_in_files(path)
        self._parts = {
            name: _parts(weight, _candidates(name, files), lines)
            for name, weight in weights.items()
        }

    def whole(self):
        """name -> tensor, in memory that is not to be written to."""
        return {
            name: parts[0] if len(parts) == 1 else torch.cat(parts)
            for name, parts in self._parts.items()
        }


def _candidates(name, files):
    names = EMBEDDINGS if name in EMBEDDINGS else (name,)  # one matrix under several names
    return [weights[key] for weights in files for key in names if key in weights]


def _parts(weight, candidates, lines):
    """What a weight consists of: the equal one of a file, or its first rows and the others, or
    itself."""
    for rows in (len(weight), lines or len(weight)):
        for found in candidates:
            if found.dtype == weight.dtype and torch.equal(found[:rows], weight[:rows]):
                others = [weight[rows:].clone()] if rows < len(weight) else []
                return [found[:rows], *others]
    return [weight]
