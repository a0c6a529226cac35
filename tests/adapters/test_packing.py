"""Factors come back as they were, and take few bytes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lslora_fairseq.adapters import packing

SHARES = st.sampled_from([0.0, 0.01, 0.03, 0.5, 0.9, 1.0])
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 70))
few = settings(max_examples=150, deadline=None, database=None)


def drawn(seed, sizes, share_A, share_B):
    """Random factors of (rank, in, out) with masks, their pruned entries zero."""
    generator = torch.Generator().manual_seed(seed)
    rank, n_in, n_out = sizes
    masks = tuple(
        torch.rand(shape, generator=generator) >= share
        for shape, share in (((rank, n_in), share_A), ((n_out, rank), share_B))
    )
    factors = tuple(
        torch.randn(mask.shape, generator=generator)
        * (torch.rand(mask.shape, generator=generator) > 0.1)  # zeros of either sign
        * mask
        for mask in masks
    )
    return factors, masks


@few
@given(st.integers(0, 2**32), SIZES, SHARES, SHARES, st.sampled_from([*packing.DTYPES]))
def test_what_was_packed_comes_back(seed, sizes, share_A, share_B, dtype):
    (A, B), masks = drawn(seed, sizes, share_A, share_B)
    kind = packing.DTYPES[dtype]
    rank, n_in, n_out = sizes
    packed = packing.pack("x", (A, B), masks, kind)
    (A_again, B_again), masks_again = packing.unpack("x", packed, n_in, n_out, rank)
    A = A.masked_fill(~masks[1].any(0).unsqueeze(1), 0)  # components that add nothing
    for weight, again, mask, mask_again in zip((A, B), (A_again, B_again), masks, masks_again):
        assert torch.equal(again, weight.to(kind)) and torch.equal(mask_again, mask)
        # the sign of a zero as well, where an entry is kept
        assert torch.equal(weight.to(kind).signbit() & mask, again.signbit() & mask)


@few
@given(st.integers(0, 2**32), SIZES, SHARES, SHARES)
def test_never_larger_than_dense(seed, sizes, share_A, share_B):
    factors, masks = drawn(seed, sizes, share_A, share_B)
    factors = tuple(w + 0.0 for w in factors)  # no negative zero
    dense = sum(w.nbytes for w in factors)
    packed = packing.pack("x", factors, masks, torch.float)
    assert sum(w.nbytes for w in packed.values()) <= dense


def test_what_is_kept_of_a_pruned_factor():
    """Two of three components are left, three entries of B, and a bit for each of its eight."""
    A, B = torch.arange(1.0, 7).view(3, 2), torch.zeros(3, 3)
    B[0, 0], B[2, 0], B[1, 2] = 1, 2, 3
    packed = packing.pack("x", (A, B), (torch.ones(3, 2, dtype=torch.bool), B != 0), torch.float)
    assert {name: w.tolist() for name, w in packed.items()} == {
        "x.lora_A": [[1, 2], [5, 6]],
        "x.lora_B.values": [1, 3, 2],
        "x.lora_B.mask": [0b01100001, 0],
    }


def test_an_entry_that_is_minus_zero_and_kept_is_not_taken_for_a_pruned_one():
    B = torch.ones(40, 1)
    mask = torch.ones_like(B, dtype=torch.bool)
    mask[3], B[3], B[5] = False, 0.0, -0.0
    masks = torch.ones(1, 2, dtype=torch.bool), mask
    for value, form in ((0.0, packing.SIGNED), (-0.0, packing.VALUES)):
        B[5] = value
        packed = packing.pack("x", (torch.ones(1, 2), B), masks, torch.float)
        assert f"x.lora_B{form}" in packed
        _, (_, again) = packing.unpack("x", packed, 2, 40, 1)
        assert torch.equal(again, mask)
