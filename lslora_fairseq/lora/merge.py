"""Folding one language's adapter into the frozen weight."""

import torch
from torch import nn


@torch.no_grad()
def merged(linear, language):
    """A plain linear that computes what an ``LSLoLinear`` does for one language (its index).

    It takes the frozen weight over and adds ΔW to it in place, summed in fp32, so that no second
    copy of the weights is in memory; the *linear* is of no use afterwards.
    """
    plain = nn.Linear(
        linear.in_features, linear.out_features, linear.bias is not None, device="meta"
    )
    plain.weight, plain.bias = linear.weight, linear.bias
    plain.weight.copy_(plain.weight.float() + linear.delta_weight(language))
    return plain
