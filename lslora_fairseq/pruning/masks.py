"""Magnitudes to masks (method, section 4): pure functions."""

import torch


def prune_count(sparsity, entries):
    """How many of *entries* a *sparsity* removes, to the nearest entry."""
    return int(sparsity * entries + 0.5)


def smallest(values, count):
    """Marks the *count* smallest of a 1-D tensor; among equals evenly spread ones.

    Exact and the same on every process, also where many values are equal: after one step of Adam
    they nearly all are, and the first ones would be whole layers.

    Returns:
        (n,) bool tensor with exactly *count* True entries.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    below = values < threshold
    ties = values == threshold
    number, missing = ties.cumsum(0), count - below.sum()
    # of n ties the i-th is taken where i · missing / n reaches the next whole number
    taken = number * missing // ties.sum() > (number - 1) * missing // ties.sum()
    return below | (ties & taken)


def prune(weights, masks, sparsity):
    """Updates the masks of one scope so that *sparsity* of its entries is removed.

    Args:
        weights: tensors of the scope
        masks: bool tensors of the same shapes, True = keep; changed in place. An entry removed
            before stays removed and counts towards the share.
        sparsity: share of the scope's entries to remove, in [0, 1)
    """
    magnitude = torch.cat(
        [w.detach().float().abs().masked_fill(~m, -1).flatten() for w, m in zip(weights, masks)]
    ).nan_to_num_(nan=float("inf"))  # of unknown size: the last to go
    # a schedule only rises, but never bring back what is gone
    gone = sum(int((~m).sum()) for m in masks)
    count = max(prune_count(sparsity, magnitude.numel()), gone)
    removed = smallest(magnitude, count).split([m.numel() for m in masks])
    for mask, part in zip(masks, removed):
        mask.copy_(~part.view_as(mask))
