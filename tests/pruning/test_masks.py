"""Magnitudes to masks as pure functions."""

import pytest
import torch

from lslora_fairseq.pruning.masks import prune, prune_count, smallest


@pytest.mark.parametrize("count", [0, 1, 4, 9, 10])
def test_smallest_is_exact_to_one_entry(count):
    values = torch.randn(10)
    marked = smallest(values, count)
    assert marked.sum() == count
    assert set(values[marked].tolist()) == set(sorted(values.tolist())[:count])


def test_among_equals_evenly_spread_ones_are_taken():
    values = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert smallest(values, 3).tolist() == [False, False, True, True, False, True]
    assert smallest(torch.zeros(6), 2).tolist() == [False, False, True, False, False, True]
    marked = smallest(torch.ones(1000), 900).view(10, 100)
    assert marked.sum(1).tolist() == [90] * 10  # not the first nine tenths


def test_entries_that_are_no_number_go_last():
    weights, mask = torch.tensor([float("nan"), 1.0, -3.0, float("nan")]), torch.ones(4).bool()
    prune([weights], [mask], 0.5)
    assert mask.tolist() == [True, False, False, True]
    prune([weights], [mask], 0.75)
    assert mask.sum() == 1


def test_prune_count_rounds_to_the_nearest_entry():
    assert prune_count(0.9, 100) == 90
    assert prune_count(0.25, 10) == 3
    assert prune_count(0.0, 10) == 0


def test_one_threshold_for_the_whole_scope():
    weights = [torch.tensor([[3.0, -0.1], [0.2, 5.0]]), torch.tensor([[-4.0, 0.3]])]
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    prune(weights, masks, 0.5)
    assert masks[0].tolist() == [[True, False], [False, True]]
    assert masks[1].tolist() == [[True, False]]


def test_what_is_gone_stays_gone_and_counts():
    weights = [torch.tensor([9.0, 1.0, 2.0, 3.0])]
    masks = [torch.tensor([False, True, True, True])]
    prune(weights, masks, 0.5)
    assert masks[0].tolist() == [False, False, True, True]
    prune(weights, masks, 0.5)  # again at the same share: nothing changes
    assert masks[0].tolist() == [False, False, True, True]
    prune(weights, masks, 0.1)  # a lower share brings nothing back
    assert masks[0].tolist() == [False, False, True, True]


def test_views_of_a_stacked_mask_are_changed_in_place():
    stacked = torch.ones(4, 3, dtype=torch.bool)
    prune([torch.arange(6.0).view(2, 3)], [stacked[1:3]], 0.5)
    assert stacked.tolist() == [[True] * 3, [False] * 3, [True] * 3, [True] * 3]
