"""Optimizers of small models and updates of them, for the tests of this folder."""

import copy
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest
import torch
import toy
from fairseq.optim import OPTIMIZER_REGISTRY, AMPOptimizer, FP16Optimizer
from fairseq.optim import MemoryEfficientFP16Optimizer as MemoryEfficient
from toy import adapters, batch, build, set_adapters

ALL = [(0, 1), (1, 2), (2, 3), (3, 0)]

SIDES = ("source", "target")

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
    """Everything a language owns on one side: weights, masters, state and group."""
    weights = [
        factor.clone()
        for linear in model.adapted_linears()
        if side in linear.adapters
        for factor in linear.factors(language, side)
    ]
    inner = wrapped(optimizer).optimizer
    owned = []
    for master, group in zip(inner.masters, inner.inner.param_groups):
        if master.key == (side, language):
            state = inner.inner.state.get(master.weight)
            kept = {key: value for key, value in group.items() if key != "params"}
            owned.append(copy.deepcopy((master.weight.detach(), state, kept)))
    return weights, owned


def same(a, b):
    """Equality to the last bit, through tuples, lists and dicts of tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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


def in_precision(precision, inner="adam", model=(), **more):
    """A model in this precision, and the builder of its optimizer, fairseq's wrapper included.

    Args:
        model: its options
        more: options of the optimizer
    """
    cls, dtype, common = PRECISIONS[precision]
    if dtype == torch.float16 and not toy.HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    model = set_adapters(build(**dict(model))).to(dtype)
    args = options(inner, weight_decay=0.1, **more)
    args.optimizer = f"pruned_{inner}"
    config = fairseq_config(args)
    vars(config.common).update(common)
    return model, lambda: cls.build_optimizer(config, adapters(model))
