"""Checksums by which weights are known again; pure torch."""

import hashlib
import re

import torch

from lslora_fairseq.keys import EMBEDDINGS, is_adapter_key

# parameters of fairseq's transformer; not its buffers, nor 0.12.2's fused copies of weights
_PARAMETER = re.compile(r"(encoder|decoder)\.(.+\.)?(weight|bias)")


def fingerprint(tensors, exact=False):
    """Of named tensors, whatever their order.

    Args:
        exact: to the last bit; otherwise values are rounded to fp16, so that a copy in half
            precision is the same

    Returns:
        64 hexadecimal digits
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {list(tensor.shape)}\n".encode())
        if exact:
            found.update(f"{tensor.dtype}\n".encode())
        if tensor.numel():
            values = tensor.detach().cpu()
            values = values.contiguous().view(torch.uint8) if exact else values.half().contiguous()
            found.update(values.numpy())
    return found.hexdigest()


def of_base(weights, lines, exact=False):
    """The :func:`fingerprint` of a base model.

    Adapters are passed over, and so are the rows of the embeddings beyond the dictionary file's:
    those of language tokens, of which each run may have others.

    Args:
        weights: a state dict, with adapters or without
        lines: symbols of the dictionary file, specials included
        exact: to the last bit
    """
    base = {
        key: weight
        for key, weight in weights.items()
        if _PARAMETER.fullmatch(key) and not is_adapter_key(key) and key not in EMBEDDINGS
    }
    embeddings = {}
    for key in EMBEDDINGS:  # one matrix may stand there under several names, or under one
        rows = weights[key][:lines] if key in weights else None
        if rows is not None and not any(torch.equal(rows, other) for other in embeddings.values()):
            embeddings[key] = rows
    return fingerprint({**base, **embeddings}, exact)
