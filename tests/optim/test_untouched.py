"""What was never updated takes no part in pruning until it is; the share that is logged."""

import copy
import logging

import pytest
import torch
from toy import CODES, Work, adapters, batch, build, set_adapters
from updates import ALL, SIDES, optimizer_for, update

from lslora_fairseq.lora.adapters import Adapter

ONE_WAY = [(0, 1), (2, 1), (3, 1)]  # de, fr, ja into en
TOUCHED = {("source", 0), ("source", 2), ("source", 3), ("target", 1)}
WITHOUT_JA = [(0, 1), (1, 2), (2, 0)]
SCOPES = ["language", "layer"]
AT_ONCE = dict(pruning_final_sparsity=0.9, pruning_begin=1, pruning_duration=1)


def pruned_by(model, wanted, factor="B"):
    """Counts in the model's masks, by any key.

    Args:
        wanted: (linear, language) -> a key, or None to leave it out

    Returns:
        dict of key -> (pruned entries, entries)
    """
    found = {}
    for linear in model.adapted_linears():
        for language in range(len(CODES)):
            key = wanted(linear, language)
            if key is not None:
                mask = linear.masks(language)["AB".index(factor)]
                pruned, entries = found.get(key, (0, 0))
                found[key] = pruned + int((~mask).sum()), entries + mask.numel()
    return found


def side_of(linear, language):
    return linear.site.side, language


def masks_of(model):
    return {
        key: value.clone() for key, value in model.state_dict().items() if key.endswith(".pruned")
    }


def touched_scopes(scope):
    def key(linear, language):
        if side_of(linear, language) in TOUCHED:
            return language if scope == "language" else (linear.site.stack, linear.site.layer)

    return key


@pytest.mark.parametrize("target", ["B", "AB"])
@pytest.mark.parametrize("scope", SCOPES)
def test_an_untouched_side_fills_no_quota_and_is_logged(scope, target, caplog):
    caplog.set_level(logging.INFO)
    model = build()
    optimizer = optimizer_for(model, pruning_scope=scope, pruning_target=target, **AT_ONCE)
    for seed in range(3):
        assert optimizer.prune_at(1, seed) == 0
        update(model, optimizer, ONE_WAY, seed=seed)
    logged = optimizer.prune_at(2, 3)
    counts = {}
    for factor in target:
        found = pruned_by(model, touched_scopes(scope), factor)
        assert found and all(removed == int(0.9 * n + 0.5) for removed, n in found.values())
        counts[factor] = tuple(map(sum, zip(*found.values())))
        by_side = pruned_by(model, side_of, factor)
        assert {key for key, (removed, _) in by_side.items() if removed} <= TOUCHED
    removed, entries = map(sum, zip(*counts.values()))
    assert logged == pytest.approx(removed / entries, abs=1e-12)
    assert caplog.messages[-1] == (
        f"pruned to sparsity {logged:.4f} at epoch 2 (never updated and left alone: as source en; "
        "as target de, fr, ja)"
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_a_language_that_comes_late_is_pruned_at_the_next_epoch_and_not_emptied(scope):
    model = build()
    optimizer = optimizer_for(model, pruning_scope=scope, **AT_ONCE)
    step = 0

    def epoch(number, *pairs):
        nonlocal step
        for sentences in pairs:
            shares.append(optimizer.prune_at(number, step))
            update(model, optimizer, sentences, seed=step)
            step += 1

    shares = []
    epoch(1, WITHOUT_JA, WITHOUT_JA)
    epoch(2, WITHOUT_JA)
    before = masks_of(model)
    epoch(3, WITHOUT_JA, ALL, ALL)  # the schedule is over; ja comes
    assert all(torch.equal(before[key], mask) for key, mask in masks_of(model).items())
    epoch(4, ALL)
    assert shares[:2] == [0, 0]
    assert shares[2:4] == [pytest.approx(0.9, abs=0.002)] * 2 and shares[5] < 0.6
    assert shares[6] == pytest.approx(0.9, abs=0.002)
    scopes = pruned_by(
        model,
        lambda linear, la: la if scope == "language" else (linear.site.stack, linear.site.layer),
    )
    assert all(removed == int(0.9 * n + 0.5) for removed, n in scopes.values())
    own = pruned_by(model, lambda linear, la: (linear.site.stack, linear.site.layer, la == 3))
    if scope == "language":  # with scope layer nothing promises this
        assert all(removed < n for (_, _, is_ja), (removed, n) in own.items() if is_ja)


@pytest.mark.parametrize(
    "scope, unit",
    [
        ("language", "epoch"),
        ("language", "update"),
        ("layer", "epoch"),
        ("layer", "update"),
    ],
)
def test_a_run_resumed_between_has_the_same_masks(scope, unit):
    """Killed after any update, also between a language's first one and its pruning."""
    begin, duration = (1, 2) if unit == "epoch" else (2, 300)  # every third update
    more = dict(
        pruning_scope=scope, pruning_unit=unit, pruning_begin=begin, pruning_duration=duration
    )
    offset = 0 if unit == "epoch" else 292  # of the updates; the schedule ends at 302
    steps = [(1 + number // 3, offset + number) for number in range(15)]

    def train(model, optimizer, steps):
        states = {}
        for epoch, number in steps:
            share = optimizer.prune_at(epoch, number)
            pairs = WITHOUT_JA if number - offset < 10 else ALL
            update(model, optimizer, pairs, seed=number)
            state = model.state_dict(), optimizer.state_dict()
            states[number] = copy.deepcopy((share, masks_of(model), *state))
        return states

    model = build()
    whole = train(model, optimizer_for(model, **more), steps)
    for killed in (9, 10, 12):
        *_, weights, state = whole[offset + killed]
        second = build(seed=5)
        second.load_state_dict(weights)
        optimizer = optimizer_for(second, **more)
        optimizer.load_state_dict(copy.deepcopy(state))
        for number, (share, masks, *_) in train(second, optimizer, steps[killed + 1 :]).items():
            assert share == whole[number][0], (killed, number)
            assert all(torch.equal(masks[key], mask) for key, mask in whole[number][1].items())
    removed = pruned_by(model, lambda linear, language: language)
    assert all(count > 0 for count, _ in removed.values()), "ja as well"


def test_a_learning_rate_of_zero_touches_nothing():
    model = build()
    optimizer = optimizer_for(model, **AT_ONCE)
    optimizer.set_lr(0.0)
    update(model, optimizer, ALL)
    assert optimizer.prune_at(2, 1) == 0 and not pruned_by(model, lambda *_: 0)[0][0]
    optimizer.set_lr(0.01)
    update(model, optimizer, ALL)
    assert optimizer.prune_at(3, 2) == pytest.approx(0.9, abs=0.002)


def test_nothing_is_computed_between_prunings():
    """No work in prune_at, and none for what is untouched in an update of what is not."""
    model = build()
    optimizer = optimizer_for(model, pruning_unit="update", pruning_begin=0, pruning_duration=1000)
    prunings, looks = [], []
    for number in range(12):
        with Work() as pruning:
            optimizer.prune_at(1, number)
        prunings.append(bool(pruning.done))
        optimizer.zero_grad()
        model(**batch(ONE_WAY, seed=number))[0].square().mean().backward()
        with Work() as stepping:
            optimizer.step()
        looks.append(any("aten.any" in name for name, _ in stepping.done))
    assert [number for number, worked in enumerate(prunings) if worked] == [10]
    assert [number for number, looked in enumerate(looks) if looked] == [0]


@pytest.mark.parametrize("unit", ["epoch", "update"])
def test_the_share_is_that_of_the_masks_as_soon_as_they_are_loaded(unit):
    """In a second stage, before its own schedule begins, and in a resumed run between prunings."""
    first = set_adapters(build())
    more = dict(
        pruning_unit=unit, pruning_begin=0, pruning_duration=10 if unit == "epoch" else 1000
    )
    optimizer = optimizer_for(first, **more)
    for epoch in range(1, 6):
        share = optimizer.prune_at(epoch, 100 * epoch)
    removed, entries = pruned_by(first, lambda *_: 0)[0]
    assert 0.4 < share == removed / entries
    resumed = build(seed=5)
    resumed.load_state_dict(first.state_dict())
    again = optimizer_for(resumed, **more)
    again.load_state_dict(optimizer.state_dict())
    assert again.prune_at(5, 506) == optimizer.prune_at(5, 506) == share
    second = optimizer_for(resumed, pruning_begin=600)
    assert second.prune_at(1, 0) == share


@pytest.mark.parametrize("inner", ["adam", "adafactor"])
def test_masks_that_came_back_with_an_average_are_pruned_at_the_next_epoch(inner):
    """Averaging keeps what is pruned in some checkpoints only."""
    model = set_adapters(build())
    optimizer = optimizer_for(model, inner, **AT_ONCE)
    for epoch in range(1, 4):
        optimizer.prune_at(epoch, epoch)
        update(model, optimizer, ALL, seed=epoch)
    averaged = build()
    averaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        for param in adapters(averaged):
            Adapter.of(param).mask[:, -8:] = True
            param[:, -8:] = 1.0
    for layer in {Adapter.of(param).layer for param in adapters(averaged)}:
        layer.refresh_pruned()
    resumed = optimizer_for(averaged, inner, **AT_ONCE)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    between = resumed.prune_at(3, 9)
    assert between < 0.89
    removed, entries = pruned_by(averaged, lambda *_: 0)[0]
    assert between == removed / entries
    resumed.prune_at(4, 10)
    languages = pruned_by(averaged, lambda linear, language: language).values()
    assert all(count == int(0.9 * n + 0.5) for count, n in languages)


@pytest.mark.parametrize("side", SIDES)
def test_what_lost_everything_is_not_untouched(side):
    """Its zeros come from pruning, and they count."""
    model = set_adapters(build())
    with torch.no_grad():
        for linear in model.adapted_linears():
            if linear.site.side == side:
                linear.factors(3)[1].mul_(1e-6)
    optimizer = optimizer_for(model, pruning_scope="layer", **AT_ONCE)
    for epoch in range(1, 5):
        optimizer.prune_at(epoch, 0)
    counts = pruned_by(model, side_of)
    assert counts[side, 3][0] == counts[side, 3][1]
    assert optimizer.prune_at(5, 0) == pytest.approx(0.9, abs=0.002)
    again = optimizer_for(model, pruning_scope="layer", **AT_ONCE)
    assert again.optimizer.pruner.untouched == set()
