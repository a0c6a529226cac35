"""How much memory a run takes, and how much there is; pure but for the two readings at the end."""

import os
import re
import shutil
from dataclasses import dataclass

import torch

GIB = 1024**3
WEIGHT_BYTES = {"fp32": 4, "amp": 4, "fp16": 2, "memory-efficient-fp16": 2}
# Bytes of one entry that is kept for the backward pass. Under AMP the inputs of layer norms stay
# in fp32 and the rest is in half precision, on average 2.5.
ACTIVATION_BYTES = {"fp32": 4, "amp": 2.5, "fp16": 2, "memory-efficient-fp16": 2}
# Bytes of one entry of the output distribution at the peak: logits, log-probabilities and their
# gradients; the criterion computes in fp32 whatever the precision.
LOGIT_BYTES = {"fp32": 16, "amp": 14, "fp16": 14, "memory-efficient-fp16": 14}

# Adam's two moments, and fp32 masters unless the weights are; --fp16 has fp32 gradients beside them
OPTIMIZER_BYTES = {"fp32": 8, "amp": 8, "fp16": 16, "memory-efficient-fp16": 12}


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model.

    Attributes:
        base_parameters: frozen parameters, shared ones counted once
        adapter_entries: trainable entries of all languages, and the side weights
        encoder_layers, decoder_layers, dim, ffn_dim: sizes of the transformer
        rows: embedding rows
    """

    base_parameters: int
    adapter_entries: int
    encoder_layers: int
    decoder_layers: int
    dim: int
    ffn_dim: int
    rows: int


def estimate(shape, precision, max_tokens, checkpointed=False):
    """Peak memory of a training step with ``pruned_adam``, a rough estimate.

    Of a layer the backward pass needs, per token, 8.5 d entries and the inner dimension of its
    feed-forward part, and 6.25 d more for cross-attention. A checkpointed layer keeps its input, d;
    one layer at a time is then computed again.

    Args:
        shape: a :class:`Shape`
        precision: ``fp32``, ``amp``, ``fp16`` or ``memory-efficient-fp16``
        max_tokens: tokens of a batch, on either side
        checkpointed: ``--checkpoint-activations``

    Returns:
        dict of part -> bytes
    """
    weight, entries = WEIGHT_BYTES[precision], shape.adapter_entries
    encoder, decoder = 8.5 * shape.dim + shape.ffn_dim, 14.75 * shape.dim + shape.ffn_dim
    kept = shape.encoder_layers * encoder + shape.decoder_layers * decoder
    if checkpointed:
        kept = (shape.encoder_layers + shape.decoder_layers) * shape.dim + decoder
    # AMP keeps a half-precision copy of every weight until the backward pass is through
    base = weight + (2 if precision == "amp" else 0)
    return {
        "base model": base * shape.base_parameters,
        "adapters": (weight + 1) * entries,  # and their masks
        "gradients": weight * entries,
        "optimizer": OPTIMIZER_BYTES[precision] * entries,
        "activations": int(ACTIVATION_BYTES[precision] * kept * max_tokens),
        "output distribution": LOGIT_BYTES[precision] * shape.rows * max_tokens,
    }


def checkpoint_size(shape, precision):
    """Bytes of a checkpoint: base model, adapters with masks, optimizer state."""
    weight = WEIGHT_BYTES[precision]
    masters = 4 if weight == 2 else 0
    return weight * shape.base_parameters + (weight + 1 + masters + 8) * shape.adapter_entries


def loading_peak(shape, file_size):
    """Bytes of CPU memory while the model, still in fp32, is filled from a checkpoint."""
    return 4 * shape.base_parameters + 5 * shape.adapter_entries + file_size


def free_on_cpu():
    """Bytes of memory that a new process may take, or None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            match = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def free_on_device(cpu):
    """(device, free bytes or None) of the device that a run would take.

    Args:
        cpu: whether the run is told to stay on the CPU
    """
    if cpu or not torch.cuda.is_available():
        return "CPU", free_on_cpu()
    try:
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    except RuntimeError:  # the device is taken, or out of order
        return "GPU", None


def free_on_disk(folder):
    """Bytes free where *folder* is, or will be made."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free
