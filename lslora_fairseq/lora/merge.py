"""Folding the adapters of one direction into the frozen weight."""

import torch
from torch import nn


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
    delta = sum(linear.delta_weight(direction[side], side) for side in linear.adapters)
    plain.weight.copy_(plain.weight.float() + delta)
    return plain
