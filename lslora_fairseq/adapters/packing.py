"""The two factors of a linear as few bytes; pure torch.

Of a pruned factor only the values that survive are kept, beside a bit for each of its entries.
Components of which all of B is pruned add nothing, whatever their row of A holds: it is left out,
and comes back as zero. Masks come back as they were.

A factor is stored under its name in one of three forms:

- ``lora_A``, ``lora_B``: nothing of it is pruned. Of A only the rows that B needs.
- ``….values`` and ``….mask``: the surviving values, and 1 bit for each entry, 1 where it is kept,
  the first entry in the lowest bit of the first byte.
- ``….signed``: all entries, those that are pruned as -0.0. It is chosen where so little is pruned
  that the bits would take more than they save.
"""

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VALUES, MASK, SIGNED = ".values", ".mask", ".signed"
_SHIFTS = torch.arange(8, dtype=torch.uint8)


def bits(mask):
    """A bool tensor as (⌈entries / 8⌉,) uint8; the spare bits are 0."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    return (flat.view(-1, 8) << _SHIFTS).sum(1, dtype=torch.uint8)


def from_bits(packed, shape):
    """The bool tensor of :func:`bits`."""
    flat = (packed.unsqueeze(1) >> _SHIFTS & 1).bool().flatten()
    return flat[: torch.Size(shape).numel()].view(shape)


def pack(name, factors, masks, dtype):
    """The tensors that keep two factors.

    Args:
        name: the linear's module path
        factors: A (rank, in) and B (out, rank)
        masks: of either, bool; False where an entry is pruned
        dtype: of the values

    Returns:
        dict of name -> tensor
    """
    (A, B), (keep_A, keep_B) = (w.to(dtype) for w in factors), masks
    needed = keep_B.any(0)
    A = A[needed] if keep_A.all() else A.masked_fill(~needed.unsqueeze(1), 0)
    stored = keep_A & needed.unsqueeze(1)
    return {
        **_pack(f"{name}.lora_A", A, keep_A, stored),
        **_pack(f"{name}.lora_B", B, keep_B, keep_B),
    }


def _pack(name, weight, keep, stored):
    if keep.all():
        return {name: weight.contiguous()}
    values, mask = weight[stored], bits(keep)
    is_larger = values.nbytes + mask.nbytes > weight.nbytes
    if is_larger and not (_negative_zero(weight) & keep).any():
        return {name + SIGNED: weight.masked_fill(~keep, -0.0)}
    return {name + VALUES: values, name + MASK: mask}


def _negative_zero(weight):
    return (weight == 0) & weight.signbit()


def forms(name, n_in, n_out, rank):
    """The forms that the factors of a linear may have in a file.

    Returns:
        for A and for B a list of forms; a form is a dict of name -> shape, with None for a size
        that is known once the masks are
    """
    return [
        [
            {name: dense},
            {name + VALUES: [None], name + MASK: [-(-rank * size // 8)]},
            {name + SIGNED: full},
        ]
        for name, size, dense, full in (
            (f"{name}.lora_A", n_in, [None, n_in], [rank, n_in]),
            (f"{name}.lora_B", n_out, [n_out, rank], [n_out, rank]),
        )
    ]


def unpack(name, tensors, n_in, n_out, rank):
    """The factors that :func:`pack` was given, and their masks.

    Args:
        tensors: dict of name -> tensor, in one of :func:`forms`

    Returns:
        (A, B), (mask of A, mask of B)

    Raises:
        ValueError: the tensors contradict each other.
    """
    keep_A, keep_B = check(name, tensors, n_in, n_out, rank)
    needed, kept = keep_B.any(0), torch.ones(rank, n_in, dtype=torch.bool)
    stored = (kept if keep_A is None else keep_A) & needed.unsqueeze(1)
    A = _unpacked(f"{name}.lora_A", tensors, stored)
    return (A, _unpacked(f"{name}.lora_B", tensors, keep_B)), (
        kept if keep_A is None else keep_A,
        keep_B,
    )


def _unpacked(name, tensors, stored):
    if name + SIGNED in tensors:
        return tensors[name + SIGNED].masked_fill(~stored, 0)
    values = tensors[name if name in tensors else name + VALUES]
    weight = values.new_zeros(stored.shape)
    weight[stored] = values.flatten()
    return weight


def check(name, tensors, n_in, n_out, rank):
    """As :func:`unpack`, without the factors: takes no more memory than the tensors, by a constant.

    Returns:
        mask of A, or None where nothing of it is pruned; mask of B

    Raises:
        ValueError: the tensors contradict each other.
    """
    keep_A, keep_B = (
        _mask(f"{name}.lora_{factor}", tensors, shape)
        for factor, shape in (("A", (rank, n_in)), ("B", (n_out, rank)))
    )
    if keep_B is None:
        keep_B = torch.ones(n_out, rank, dtype=torch.bool)
    needed = keep_B.any(0)
    counts = {f"{name}.lora_B{VALUES}": keep_B.sum()}
    if keep_A is None:
        counts[f"{name}.lora_A"] = needed.sum()
    else:
        counts[f"{name}.lora_A{VALUES}"] = (keep_A & needed.unsqueeze(1)).sum()
    for key, count in counts.items():
        if key in tensors and len(tensors[key]) != count:
            raise ValueError(f"{key} has {len(tensors[key])} entries, and the masks {int(count)}")
    return keep_A, keep_B


def _mask(name, tensors, shape):
    if name in tensors:
        return None
    if name + SIGNED in tensors:
        return ~_negative_zero(tensors[name + SIGNED])
    packed = tensors[name + MASK]
    mask = from_bits(packed, shape)
    if not torch.equal(bits(mask), packed):
        raise ValueError(f"{name}{MASK} has bits beyond its last entry")
    return mask
