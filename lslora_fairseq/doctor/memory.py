"""How much memory a run takes, and how much there is; pure but for the readings at the end."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from lslora_fairseq.criterions.frozen_projection import pieces

GIB = 1024**3
HALF_BASES = ("bf16 base", "fp16 base")  # --lora-base-dtype
WEIGHT_BYTES = {"fp32": 4, "amp": 4, "fp16": 2, "memory-efficient-fp16": 2}
WEIGHT_BYTES.update(dict.fromkeys(HALF_BASES, 2))  # of the base; adapters are in fp32
# Bytes of one entry that is kept for the backward pass. Under AMP the inputs of layer norms stay
# in fp32 and the rest is in half precision, on average 2.5.
ACTIVATION_BYTES = {**WEIGHT_BYTES, "amp": 2.5}
# Bytes of one entry of the output distribution at the peak, of fairseq's own criterions: logits,
# log-probabilities and their gradients; they compute in fp32 whatever the precision.
LOGIT_BYTES = {**dict.fromkeys(WEIGHT_BYTES, 14), "fp32": 16}

# On a CPU, measured with label smoothing: log-probabilities and two gradients; and what a layer's
# backward pass computes with, with what the C allocator keeps, in decoder layers.
CPU_LOGIT_BYTES = {**LOGIT_BYTES, "fp32": 12}
CPU_LAYERS = 2.2
STARTED = 100 * 2**20  # what a run imports and starts beyond what the doctor does
DICTIONARY_LINE = 180  # bytes of a line of a dictionary, as fairseq holds it

# Adam's two moments, and fp32 masters unless the weights are; --fp16 has fp32 gradients beside them
OPTIMIZER_BYTES = {**dict.fromkeys(WEIGHT_BYTES, 8), "fp16": 16, "memory-efficient-fp16": 12}


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model.

    Attributes:
        base_parameters: frozen parameters, shared ones counted once
        adapter_entries: trainable entries of all languages, shared ones, and the side weights
        encoder_layers, decoder_layers, dim, ffn_dim: sizes of the transformer
        rows: embedding rows
        kept_entries: of adapters that are not trained
    """

    base_parameters: int
    adapter_entries: int
    encoder_layers: int
    decoder_layers: int
    dim: int
    ffn_dim: int
    rows: int
    kept_entries: int = 0


def estimate(shape, precision, max_tokens, checkpointed=False, process=None, in_pieces=False):
    """Peak memory of a training step with ``pruned_adam``, a rough estimate.

    On a CPU it is all that the process takes, on a GPU the tensors alone (CUDA itself takes some
    hundred MiB more). Sentences are taken to be so short that attention weights do not matter.

    Of a layer the backward pass needs, per token, 6.5 d entries and the inner dimension of its
    feed-forward part, and 5.25 d more for cross-attention. A checkpointed layer keeps its input, d;
    one layer at a time is then computed again.

    Args:
        shape: a :class:`Shape`
        precision: ``fp32``, ``amp``, ``fp16``, ``memory-efficient-fp16`` or of :data:`HALF_BASES`
        max_tokens: tokens of a batch, on either side
        checkpointed: ``--checkpoint-activations``
        process: bytes of the process without model and batch on a CPU; None on a GPU
        in_pieces: ``--criterion lslora_label_smoothed_cross_entropy``

    Returns:
        dict of part -> bytes
    """
    weight, entries = _adapter_bytes(precision), shape.adapter_entries
    encoder, decoder = 6.5 * shape.dim + shape.ffn_dim, 11.75 * shape.dim + shape.ffn_dim
    kept = shape.encoder_layers * encoder + shape.decoder_layers * decoder
    if checkpointed:
        kept = (shape.encoder_layers + shape.decoder_layers) * shape.dim + decoder
    # AMP keeps a half-precision copy of every weight until the backward pass is through
    base = WEIGHT_BYTES[precision] + (2 if precision == "amp" else 0)
    logits, more = LOGIT_BYTES, {}
    if process is not None:
        kept, logits, more = kept + CPU_LAYERS * decoder, CPU_LOGIT_BYTES, {"process": process}
    distribution = logits[precision] * shape.rows * max_tokens
    if in_pieces:
        dtype = torch.float if precision == "fp32" else torch.half
        device = "cuda" if process is None else "cpu"
        _, distribution = pieces(max_tokens, shape.rows, dtype, device)
    return {
        "base model": base * shape.base_parameters,
        "adapters": (weight + 1) * (entries + shape.kept_entries),  # and their masks
        "gradients": weight * entries,
        "optimizer": OPTIMIZER_BYTES[precision] * entries,
        "activations": int(ACTIVATION_BYTES[precision] * kept * max_tokens),
        "output distribution": distribution,
        **more,
    }


def _adapter_bytes(precision):
    return 4 if precision in HALF_BASES else WEIGHT_BYTES[precision]


def checkpoint_size(shape, precision):
    """Bytes of a checkpoint: base model, adapters with masks, optimizer state."""
    weight = _adapter_bytes(precision)  # that of the base, too: it is saved as it was
    masters = 4 if weight == 2 else 0
    kept = weight * shape.base_parameters + (weight + 1) * shape.kept_entries
    return kept + (weight + 1 + masters + 8) * shape.adapter_entries


def loading_peak(shape, file_size, precision="fp32"):
    """Bytes of CPU memory while the model, still in fp32 unless its base alone is in another dtype,
    is filled from a checkpoint."""
    adapters = 5 * (shape.adapter_entries + shape.kept_entries)
    base = 2 if precision in HALF_BASES else 4
    return base * shape.base_parameters + adapters + file_size


def own_size():
    """Bytes of memory that this process takes now; a usual size where the system does not tell."""
    pages = _read(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 350 * 2**20


def free_on_cpu(root="/"):
    """Bytes of memory that a new process may take, or None where the system does not tell.

    The least of what the machine has available and what the limits of the container (control
    groups of version 1 and 2) leave.
    """
    root = Path(root)
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = [int(available[1]) * 1024] if available else []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            free += _left(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            folder, used = root / "sys/fs/cgroup/memory", "memory.usage_in_bytes"
            free += _left(folder, path, "memory.limit_in_bytes", used, "total_")
    return max(min(free), 0) if free else None


def _left(top, path, limit, used, prefix):
    """Of a control group and those around it that have a limit: what it leaves, in bytes.

    Inside of a container *path* may be one of the machine's, not there; its group is then *top*.
    File pages that were not used lately count as used, and are given up first.
    """
    group, left = top / path.lstrip("/"), []
    for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
        numbers = [_read(folder / name).strip() for name in (limit, used)]
        if all(number.isdecimal() for number in numbers):
            most, now = map(int, numbers)
            stat = _read(folder / "memory.stat")
            cached = re.search(rf"^{prefix}inactive_file (\d+)", stat, re.MULTILINE)
            left.append(most - now + (int(cached[1]) if cached else 0))
    return left


def _read(path):
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


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
