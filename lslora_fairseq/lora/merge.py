"""Folding the adapters of one direction into the frozen weights."""

import torch
from torch import nn


def delta_weight(shape, A, B, scaling, share=None):
    """What an adapter adds to a weight: ΔW, or p · ΔW where weights of sides are learned.

    Args:
        shape: (out, in) of the weight
        A, B: (rank, in) and (rank, out) of the adapted part
        scaling: alpha / rank, a scalar tensor
        share: p, a scalar tensor, or None

    Returns:
        (out, in) fp32, zero outside the adapted part
    """
    delta = A.new_zeros(shape, dtype=torch.float)
    delta[: B.size(1), : A.size(1)] = scaling.float() * B.float().T @ A.float()
    return delta if share is None else delta * share.float()


def folded(weight, deltas):
    """A weight and what adapters add to it, in their order: fp32."""
    return weight.float() + sum(deltas)


def folded_embeddings(weight, A, B):
    """Embeddings (words, d) and what their adapter of A (r, d) and B (r, words) adds: fp32."""
    return torch.addmm(weight.float(), B.float().t(), A.float())


@torch.no_grad()
def merged(linear, direction):
    """A plain linear that computes what an ``LSLoLinear`` does for one direction.

    It takes the frozen weight over and adds ΔW to it in place, summed in fp32, so that no second
    copy of the weights is in memory; the *linear* is of no use afterwards.

    Args:
        direction: side -> language (its index)
    """
    plain = nn.Linear(
        linear.in_features, linear.out_features, linear.bias is not None, device="meta"
    )
    plain.weight, plain.bias = linear.weight, linear.bias
    deltas = (linear.delta_weight(direction[side], side) for side in linear.adapters)
    plain.weight.copy_(folded(plain.weight, deltas))
    return plain
