"""The pruned_* optimizers: their guarantees, as equalities, for every inner optimizer."""

import copy
import itertools
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import toy
from fairseq.optim import OPTIMIZER_REGISTRY, AMPOptimizer, FP16Optimizer
from fairseq.optim import MemoryEfficientFP16Optimizer as MemoryEfficient
from torch.utils._python_dispatch import TorchDispatchMode
from toy import adapters, batch, build, set_adapters

from lslora_fairseq.errors import UserError
from lslora_fairseq.lora.adapters import Adapter
from lslora_fairseq.optim.pruned import INNER_OPTIMIZERS

ALL = [(0, 1), (1, 2), (2, 3), (3, 0)]
PRUNING = dict(pruning_final_sparsity=0.6, pruning_begin=1, pruning_duration=2)


def options(inner="adam", **more):
    """The command line's defaults for this optimizer, and *more*."""
    parser = ArgumentParser()
    OPTIMIZER_REGISTRY[f"pruned_{inner}"].add_args(parser)
    args = vars(parser.parse_args([]))
    return Namespace(**{**args, "lr": [0.01], "tpu": False, **PRUNING, **more})


def optimizer_for(model, inner="adam", **more):
    cls = OPTIMIZER_REGISTRY[f"pruned_{inner}"]
    return cls(options(inner, **more), adapters(model))


def update(model, optimizer, pairs, seed=3):
    optimizer.zero_grad()
    loss = model(**batch(pairs, seed=seed))[0].float().square().mean()
    optimizer.backward(loss)
    optimizer.clip_grad_norm(1.0)
    optimizer.step()


def wrapped(optimizer):
    for name in ("fp32_optimizer", "wrapped_optimizer"):
        optimizer = getattr(optimizer, name, optimizer)
    return optimizer


def snapshot(model, optimizer, language, side):
    """Everything a language owns on one side: weights, masters, state (step count included)."""
    weights = [
        factor.clone()
        for linear in model.adapted_linears()
        if linear.site.side == side
        for factor in linear.factors(language)
    ]
    inner = wrapped(optimizer).optimizer
    owned = [m for m, _, key in inner.masters if key == (side, language)]
    return weights, [(m.detach().clone(), copy.deepcopy(inner.inner.state.get(m))) for m in owned]


def same(a, b):
    """Equality to the last bit, through tuples, lists and dicts of tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_a_language_without_a_sentence_keeps_every_bit(inner):
    model = set_adapters(build())
    optimizer = optimizer_for(model, inner, weight_decay=0.1)
    update(model, optimizer, ALL)  # momentum for everyone
    # en (1) as a source only, ja (3) as a target only
    before = {(s, la): snapshot(model, optimizer, la, s) for s in SIDES for la in range(4)}
    update(model, optimizer, [(1, 3), (1, 3)])
    for key, state in before.items():
        unchanged = same(state, snapshot(model, optimizer, key[1], key[0]))
        assert unchanged == (key not in {("source", 1), ("target", 3)}), key


SIDES = ("source", "target")


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("target", ["B", "AB"])
def test_a_pruned_entry_stays_zero_everywhere(inner, scope, target):
    model = set_adapters(build())
    optimizer = optimizer_for(
        model, inner, weight_decay=0.1, pruning_scope=scope, pruning_target=target
    )
    for epoch in range(1, 6):
        optimizer.prune_at(epoch, 0)
        for number in range(2):
            update(model, optimizer, ALL, seed=10 * epoch + number)
    assert optimizer.prune_at(5, 0) == 0.6
    for linear, language in itertools.product(model.adapted_linears(), range(4)):
        for factor, mask in zip(linear.factors(language), linear.masks(language)):
            assert not factor[~mask].any()
        assert linear.masks(language)[0].all() or target == "AB"
    states = 0
    language_optimizer = optimizer.optimizer
    for number, (master, _, _) in enumerate(language_optimizer.masters):
        pruned = language_optimizer._pruned[number]
        if pruned is None:
            continue
        assert not master[pruned].any()
        for value in language_optimizer.inner.state[master].values():
            if torch.is_tensor(value) and value.shape == master.shape:
                states += 1
                assert not value[pruned].any()
    assert states > 0 or inner in ("sgd", "adafactor")  # these keep no moment of each entry


@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("final", [0.9, 0.333])
def test_final_sparsity_is_exact_to_one_entry(scope, final):
    model = set_adapters(build())
    optimizer = optimizer_for(model, pruning_scope=scope, pruning_final_sparsity=final)
    for epoch in range(1, 4):
        optimizer.prune_at(epoch, 0)
        update(model, optimizer, ALL)
    scopes = {}
    for linear in model.adapted_linears():
        for language in range(4):
            key = language if scope == "language" else (linear.site.stack, linear.site.layer)
            _, mask = linear.masks(language)
            removed, entries = scopes.get(key, (0, 0))
            scopes[key] = removed + int((~mask).sum()), entries + mask.numel()
    assert len(scopes) == (4 if scope == "language" else 6)
    for removed, entries in scopes.values():
        assert removed == int(final * entries + 0.5)


def test_scope_layer_lets_languages_compete():
    model = set_adapters(build())
    with torch.no_grad():
        for linear in model.adapted_linears():
            linear.factors(3)[1].mul_(100)
    optimizer = optimizer_for(model, pruning_scope="layer", pruning_final_sparsity=0.4)
    optimizer.prune_at(3, 0)
    for linear in model.adapted_linears():
        assert linear.masks(3)[1].float().mean() > 0.9


def test_the_largest_entries_of_a_language_survive():
    model = set_adapters(build())
    before = [
        [linear.factors(language)[1].detach().clone() for linear in model.adapted_linears()]
        for language in range(4)
    ]
    optimizer_for(model).prune_at(3, 0)
    for language in range(4):
        kept, removed = [], []
        for linear, weights in zip(model.adapted_linears(), before[language]):
            _, mask = linear.masks(language)
            kept.append(weights[mask].abs())
            removed.append(weights[~mask].abs())
        assert torch.cat(kept).min() >= torch.cat(removed).max()


def test_every_language_steps_as_if_it_were_alone():
    """Its own step count: a language that joins late is not under-corrected by others' steps."""
    together, alone = set_adapters(build()), set_adapters(build())
    both, single = optimizer_for(together), optimizer_for(alone)
    for seed in range(3):
        update(together, both, [(0, 1)], seed=seed)
    update(together, both, [(2, 3)], seed=9)
    update(alone, single, [(2, 3)], seed=9)
    for a, b in zip(together.adapted_linears(), alone.adapted_linears()):
        language = 2 if a.site.side == "source" else 3
        assert same(a.factors(language), b.factors(language))


@pytest.mark.parametrize("inner", ["adam", "sgd", "adamax", "nag"])
def test_with_all_languages_present_it_is_the_inner_optimizer(inner):
    """One language, no pruning: the wrapper adds nothing to what the inner optimizer does."""
    one = dict(lora_tiers="high=en", lora_rank="2")
    ours, theirs = set_adapters(build(**one)), set_adapters(build(**one))
    optimizer = optimizer_for(ours, inner, pruning_final_sparsity=0.0, weight_decay=0.1)
    plain = optimizer._build_inner(options(inner, weight_decay=0.1), adapters(theirs))
    for seed in range(4):
        for model, opt in ((ours, optimizer), (theirs, plain)):
            update(model, opt, [(0, 0)] * 3, seed=seed)
    for a, b in zip(adapters(ours), adapters(theirs)):
        assert torch.equal(a, b)


def test_adafactor_sees_every_factor_as_a_matrix_of_its_own():
    """Its statistics of rows and columns would otherwise mix factors of other scales."""
    model = set_adapters(build())
    optimizer = optimizer_for(model, "adafactor", pruning_final_sparsity=0.0)
    linear = model.adapted_linears()[3]
    columns = linear.adapters[linear.site.side].columns[linear.site.module]
    copies = [torch.nn.Parameter(f.detach().clone()) for f in linear.factors(0)]
    plain = optimizer._build_inner(options("adafactor"), copies)
    for seed in range(3):
        update(model, optimizer, ALL, seed=seed)
        for copied, part in zip(copies, columns):
            copied.grad = linear.adapters[linear.site.side].weight(0).grad[:, part].clone()
        plain.step()
    assert same(linear.factors(0), tuple(copies))


def test_learning_rate_reaches_the_inner_optimizer():
    model = set_adapters(build())
    optimizer = optimizer_for(model)
    update(model, optimizer, ALL)
    before = [p.detach().clone() for p in adapters(model)]
    optimizer.set_lr(0.0)
    update(model, optimizer, ALL)
    assert all(map(torch.equal, before, adapters(model)))


@pytest.mark.parametrize("inner", ["adam", "adafactor", "sgd"])
def test_resume_is_exact_in_the_middle_of_the_schedule(inner):
    def run(model, optimizer, epochs):
        for epoch in epochs:
            optimizer.prune_at(epoch, 0)
            update(model, optimizer, ALL[:3], seed=epoch)

    whole = set_adapters(build())
    whole_optimizer = optimizer_for(whole, inner)
    run(whole, whole_optimizer, range(1, 7))
    first = set_adapters(build())
    first_optimizer = optimizer_for(first, inner)
    run(first, first_optimizer, range(1, 3))
    second = build(seed=5)
    second.load_state_dict(first.state_dict())
    second_optimizer = optimizer_for(second, inner)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    second_optimizer.prune_at(2, 0)  # a run killed in epoch 2 begins epoch 2 again
    run(second, second_optimizer, range(3, 7))
    assert same(whole.state_dict(), second.state_dict())
    assert same(whole_optimizer.state_dict(), second_optimizer.state_dict())


def test_a_changed_schedule_is_refused():
    model = set_adapters(build())
    optimizer = optimizer_for(model)
    update(model, optimizer, ALL)
    changed = optimizer_for(model, pruning_duration=7)
    with pytest.raises(UserError, match="--pruning-duration was 2, now 7.*--save-dir"):
        changed.load_state_dict(optimizer.state_dict())


def test_state_of_another_optimizer_is_refused():
    model = set_adapters(build())
    with pytest.raises(UserError, match="--reset-optimizer"):
        optimizer_for(model).load_state_dict({"state": {}, "param_groups": []})
    other = set_adapters(build(lora_rank="2"))
    with pytest.raises(UserError, match="other adapters"):
        optimizer_for(model).load_state_dict(optimizer_for(other).state_dict())


def test_other_parameters_are_refused():
    with pytest.raises(UserError, match="--fp16-no-flatten-grads"):
        OPTIMIZER_REGISTRY["pruned_adam"](options(), [torch.nn.Parameter(torch.zeros(3))])


def fairseq_config(args, **common):
    common = dict(
        fp16_scale_window=None, fp16_init_scale=4, fp16_scale_tolerance=0.0, bf16=False,
        threshold_loss_scale=None, min_loss_scale=1e-4, model_parallel_size=1,
        fp16_no_flatten_grads=True, amp_scale_window=None, amp_batch_retries=2, **common,
    )  # fmt: skip
    config = {
        "common": common,
        "optimization": {"update_freq": [1]},
        "distributed_training": {"distributed_world_size": 1},
    }
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in config.items()}, optimizer=args)


PRECISIONS = {
    "fp16": (FP16Optimizer, torch.float16, {}),
    "bf16": (FP16Optimizer, torch.bfloat16, {"bf16": True}),
    "memory-efficient fp16": (MemoryEfficient, torch.float16, {}),
    "memory-efficient bf16": (MemoryEfficient, torch.bfloat16, {"bf16": True}),
    "amp": (AMPOptimizer, torch.float32, {}),
}


def in_precision(precision, inner="adam", **more):
    """A model in this precision, and the builder of its optimizer, fairseq's wrapper included."""
    cls, dtype, common = PRECISIONS[precision]
    if dtype == torch.float16 and not toy.HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    model = set_adapters(build()).to(dtype)
    args = options(inner, weight_decay=0.1, **more)
    args.optimizer = f"pruned_{inner}"
    config = fairseq_config(args)
    vars(config.common).update(common)
    return model, lambda: cls.build_optimizer(config, adapters(model))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inner", ["adam", "adafactor"])
@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_guarantees_hold_in_every_precision(precision, inner):
    dtype = PRECISIONS[precision][1]
    model, build_optimizer = in_precision(precision, inner)
    optimizer = build_optimizer()
    pruned = wrapped(optimizer)
    for epoch in range(1, 5):
        pruned.prune_at(epoch, 0)
        for param in adapters(model):  # already in the forward pass that follows
            assert not param[~Adapter.of(param).mask].any()
        update(model, optimizer, ALL, seed=epoch)
    before = {(s, la): snapshot(model, optimizer, la, s) for s in SIDES for la in range(4)}
    update(model, optimizer, [(1, 3), (1, 3)])
    for key, state in before.items():
        unchanged = same(state, snapshot(model, optimizer, key[1], key[0]))
        assert unchanged == (key not in {("source", 1), ("target", 3)}), key
    for master, pieces, _ in pruned.optimizer.masters:
        assert master.dtype == torch.float32
        for piece in pieces:
            assert not piece.master[~piece.mask].any()
            weight = piece.adapter.weight[:, piece.columns]
            assert torch.equal(weight, piece.master.to(dtype))
    masks = [lin.masks(la)[1] for lin in model.adapted_linears() for la in range(4)]
    removed = sum(int((~mask).sum()) for mask in masks)
    entries = sum(mask.numel() for mask in masks)
    assert removed == pytest.approx(0.6 * entries, abs=4)
    state = copy.deepcopy(optimizer.state_dict())
    again = build_optimizer()
    again.load_state_dict(state)
    assert same(state, again.state_dict())


def cross_entropies(model, optimizer, autocast=None):
    """The loss of each of eight updates, pruning meanwhile; on the batches of two seeds."""
    losses = []
    for number in range(8):
        wrapped(optimizer).prune_at(number + 1, number)
        optimizer.zero_grad()
        net_input = batch(ALL, seed=number % 2)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = model(**net_input)[0].float().flatten(0, 1)
        loss = F.cross_entropy(out, net_input["src_tokens"].flatten())
        losses.append(loss.item())
        optimizer.backward(loss)
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
    return losses


LOSSES = {"fp16": 0.005, "bf16": 0.02, "amp": 0.02}  # a rounding: 0.05 % in fp16, 0.4 % in bf16


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_losses_agree_with_fp32(precision):
    """For amp with the autocast of a CPU, in bf16; fairseq's is that of a GPU, in fp16.

    The tolerances are a few roundings: Adam's first steps follow the sign of tiny gradients too.
    """
    model, build_optimizer = in_precision(precision, lr=[0.002])
    reference = set_adapters(build())
    expected = cross_entropies(reference, optimizer_for(reference, weight_decay=0.1, lr=[0.002]))
    assert expected[-1] < 0.95 * expected[0]
    autocast = torch.bfloat16 if precision == "amp" else None
    found = cross_entropies(model, build_optimizer(), autocast)
    assert found != expected
    assert found == pytest.approx(expected, rel=LOSSES[precision.rpartition(" ")[2]])


class Work(TorchDispatchMode):
    """Records every operation and the sizes of what it gives."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        tensors = given if isinstance(given, (tuple, list)) else [given]
        sizes = [tuple(t.shape) for t in tensors if torch.is_tensor(t)]
        self.done.append((str(function), sizes))
        return given


def test_languages_absent_from_the_batch_take_no_part():
    """A step among 200 languages is that among the three of the batch: in its operations and
    their sizes, in what is kept for backward, in gradients and in the optimizer's state."""
    found = []
    for codes, (a, b, c) in ((3, (0, 1, 2)), (200, (17, 50, 199))):
        tiers = "all=" + ",".join(f"l{number:03}" for number in range(codes))
        model = set_adapters(build(lora_tiers=tiers, lora_rank="2"))
        optimizer = optimizer_for(model)
        saved, work = [], Work()
        optimizer.zero_grad()
        with (
            work,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(tuple(t.shape)) or t, lambda t: t
            ),
        ):
            model(**batch([(a, b), (b, c), (a, c)]))[0].square().mean().backward()
            optimizer.step()
        given = [p for p in adapters(model) if p.grad is not None]
        owners = {(Adapter.of(p).side, Adapter.of(p).language) for p in given}
        assert owners == {("source", a), ("source", b), ("target", b), ("target", c)}
        state = optimizer.optimizer.inner.state
        kept = [m.shape for m in state] + [
            v.shape for s in state.values() for v in s.values() if torch.is_tensor(v)
        ]
        assert len(state) == 4
        found.append((work.done, saved, [p.grad.shape for p in given], kept))
    for few, many in zip(*found):
        assert few == many


def test_flat_gradients_are_refused_with_the_option():
    """What fairseq hands over to code that sets fp16_no_flatten_grads to False: one flat copy."""
    model = set_adapters(build()).half()
    flat = torch.nn.Parameter(torch.cat([p.flatten() for p in adapters(model)]).float())
    with pytest.raises(UserError, match="--fp16-no-flatten-grads on"):
        OPTIMIZER_REGISTRY["pruned_adam"](options(), [flat])
