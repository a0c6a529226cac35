"""The optimizer's state: what a resumed run takes from it, and what it refuses."""

import copy
import logging

import pytest
import torch
from toy import CODES, build, set_adapters
from updates import ALL, PRECISIONS, in_precision, optimizer_for, same, update, wrapped

from lslora_fairseq.errors import UserError
from lslora_fairseq.optim.pruned import INNER_OPTIMIZERS

RATES = [0.002, 0.008, 0.01, 0.006, 0.003, 0.001]
PAIRS = [ALL[:3], ALL, ALL[:2], ALL[2:], ALL, [(0, 1)]]
HALF = [name for name in PRECISIONS if name != "amp"]


def train(model, optimizer, epochs):
    for epoch in epochs:
        wrapped(optimizer).prune_at(epoch, 0)
        optimizer.set_lr(RATES[epoch - 1])
        update(model, optimizer, PAIRS[epoch - 1], seed=epoch)


@pytest.mark.parametrize(
    "inner, more, options",
    [
        *((inner, {}, {}) for inner in INNER_OPTIMIZERS),
        ("sgd", {"momentum": 0.9}, {}),
        ("adafactor", {"scale_parameter": True, "beta1": 0.9}, {"lora_embedding_rank": 2}),
        ("adam", {"pruning_scope": "layer"}, {"lora_shared_rank": 3, "lora_embedding_rank": 2}),
        ("adam", {}, {"lora_rank": "0", "lora_shared_rank": 3}),
    ],
)
def test_resume_is_exact_in_the_middle_of_the_schedule(inner, more, options):
    """Under a changing learning rate, languages coming and going."""
    more = {**more, "weight_decay": 0.1}
    whole = set_adapters(build(**options))
    whole_optimizer = optimizer_for(whole, inner, **more)
    train(whole, whole_optimizer, range(1, 7))
    first = set_adapters(build(**options))
    first_optimizer = optimizer_for(first, inner, **more)
    train(first, first_optimizer, range(1, 3))
    second = build(seed=5, **options)
    second.load_state_dict(first.state_dict())
    second_optimizer = optimizer_for(second, inner, **more)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    wrapped(second_optimizer).prune_at(2, 0)  # a run killed in epoch 2 begins epoch 2 again
    train(second, second_optimizer, range(3, 7))
    assert same(whole.state_dict(), second.state_dict())
    assert same(whole_optimizer.state_dict(), second_optimizer.state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_resume_is_exact_in_every_precision(precision):
    model, build_optimizer = in_precision(precision)
    optimizer = build_optimizer()
    train(model, optimizer, range(1, 4))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert (state["masters"] is None) == (precision == "amp"), "fp32 weights are not stored twice"
    train(model, optimizer, range(4, 7))
    second, build_optimizer = in_precision(precision)
    second.load_state_dict(weights)
    resumed = build_optimizer()
    resumed.load_state_dict(state)
    if precision == "amp":  # its scaler starts anew, at the scale that has not changed since
        assert optimizer.scaler.get_scale() == resumed.scaler.get_scale()
    train(second, resumed, range(4, 7))
    assert same(model.state_dict(), second.state_dict())
    assert same(optimizer.state_dict(), resumed.state_dict())


def average(model, optimizer):
    """Three epochs, and the mean of the last two's weights, as average_checkpoints.py makes it.

    Returns:
        the averaged state dict of the model, the optimizer's state after the last epoch
    """
    train(model, optimizer, [1, 2])
    first = copy.deepcopy(model.state_dict())
    train(model, optimizer, [3])
    second = model.state_dict()
    mean = {
        key: (value.float() + second[key].float()).div(2) if ".lora_" in key else value
        for key, value in first.items()  # the first's masks: what is pruned in both
    }
    return mean, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("inner", ["adam", "adafactor"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_averaged_weights_win_over_the_masters_beside_them(precision, inner, caplog):
    dtype = PRECISIONS[precision][1]
    model, build_optimizer = in_precision(precision, inner)
    mean, state = average(model, build_optimizer())
    averaged, build_resumed = in_precision(precision, inner)
    averaged.load_state_dict(mean)
    resumed = build_resumed()
    resumed.load_state_dict(copy.deepcopy(state))
    assert same(wrapped(resumed).optimizer.inner.state_dict()["state"], state["state"])
    wanted = {key: value.to(dtype) for key, value in mean.items() if ".lora_" in key}
    differ = 0
    for master, saved in zip(wrapped(resumed).optimizer.masters, state["masters"] or []):
        weight = master.joined([piece.weight for piece in master.pieces])
        agrees = saved.to(dtype) == weight
        assert torch.equal(master.weight, torch.where(agrees, saved, weight.float()))
        differ += int((~agrees).sum())
    assert differ > 0 or precision == "amp"
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == (precision != "amp") and all("the weights are taken" in t for t in told)
    before = {key: value.clone() for key, value in averaged.state_dict().items() if key in wanted}
    assert same(before, wanted)
    update(averaged, resumed, [(0, 1)])  # the others stay at the average
    for name in CODES[2:]:
        keys = [key for key in wanted if key.endswith(f"lora_{name}")]
        assert keys and all(torch.equal(averaged.state_dict()[key], wanted[key]) for key in keys)


@pytest.mark.parametrize("precision", HALF)
def test_the_masters_digits_survive_a_change_of_precision(precision, caplog):
    """Trained in half precision, resumed in fp32."""
    model, build_optimizer = in_precision(precision)
    optimizer = build_optimizer()
    train(model, optimizer, range(1, 3))
    second = build(seed=5)
    second.load_state_dict(model.state_dict())
    resumed = optimizer_for(second, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(resumed.optimizer.masters, wrapped(optimizer).optimizer.masters):
        assert torch.equal(ours.weight, theirs.weight)
        for piece in ours.pieces:
            assert torch.equal(piece.weight, piece.master)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_moments_of_entries_that_the_model_has_pruned_are_cleared():
    model = set_adapters(build())
    optimizer = optimizer_for(model)
    update(model, optimizer, ALL)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.prune_at(3, 1)
    resumed = optimizer_for(model)
    resumed.load_state_dict(state)
    for master in resumed.optimizer.masters:
        kept = resumed.optimizer.inner.state[master.weight]
        assert master.pruned.any() and not kept["exp_avg"][master.pruned].any()
        assert kept["exp_avg"].any()


def test_a_changed_schedule_is_refused():
    model = set_adapters(build())
    optimizer = optimizer_for(model)
    update(model, optimizer, ALL)
    changed = optimizer_for(model, pruning_duration=7)
    with pytest.raises(UserError, match="--pruning-duration was 2, now 7.*--save-dir"):
        changed.load_state_dict(optimizer.state_dict())


def test_state_of_another_optimizer_is_refused():
    model = set_adapters(build())
    with pytest.raises(UserError, match="not that of a pruned_.*--reset-optimizer"):
        optimizer_for(model).load_state_dict({"state": {}, "param_groups": []})
    other = set_adapters(build(lora_rank="2"))
    with pytest.raises(UserError, match="other adapters.*--reset-optimizer"):
        optimizer_for(model).load_state_dict(optimizer_for(other).state_dict())


def test_state_of_an_earlier_version_is_refused():
    """It had one group for all languages, and what nag and Adafactor kept there was lost."""
    model = set_adapters(build())
    optimizer = optimizer_for(model)
    update(model, optimizer, ALL)
    new = optimizer.state_dict()
    groups = [{**new["param_groups"][0], "params": list(range(len(new["shapes"])))}]
    masters = [master.weight for master in optimizer.optimizer.masters]
    old = {"settings": new["settings"], "state": new["state"], "param_groups": groups}
    with pytest.raises(UserError, match="by an earlier version.*add --reset-optimizer"):
        optimizer.load_state_dict({**old, "masters": masters})
