"""The guarantees in every precision that fairseq offers."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import toy
from fairseq.criterions import CRITERION_REGISTRY
from toy import adapters, batch, build, set_adapters
from updates import (
    ALL,
    PRECISIONS,
    SIDES,
    in_precision,
    optimizer_for,
    same,
    snapshot,
    update,
    wrapped,
)

from lslora_fairseq.criterions import frozen_projection
from lslora_fairseq.lora.adapters import Adapter


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
    for master in pruned.optimizer.masters:
        assert master.weight.dtype == torch.float32
        for piece in master.pieces:
            assert not piece.master[~piece.mask].any()
            assert torch.equal(piece.weight, piece.master.to(dtype))
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_the_loss_in_pieces_agrees_with_fairseqs(precision, monkeypatch):
    """Over eight updates; fairseq scales the loss, whose gradient is computed before that."""
    monkeypatch.setitem(frozen_projection.BUFFER, "cpu", 2000)  # five tokens at a time
    task = SimpleNamespace(target_dictionary=toy.dictionary())
    net_input = batch(ALL)
    target = net_input["src_tokens"].flip(1)  # padded on the right
    sample = {"net_input": net_input, "target": target, "ntokens": int(target.ne(1).sum())}
    losses = {}
    for name in ("label_smoothed_cross_entropy", "lslora_label_smoothed_cross_entropy"):
        criterion = CRITERION_REGISTRY[name](task, False, 0.1)
        options = {"lora_embedding_rank": 3}
        model, build_optimizer = in_precision(precision, lr=[0.002], model=options)
        optimizer, losses[name] = build_optimizer(), []
        for number in range(8):
            wrapped(optimizer).prune_at(number + 1, number)
            optimizer.zero_grad()
            loss, *_ = criterion(model, sample)
            losses[name].append(loss.item())
            optimizer.backward(loss)
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
    expected, found = losses.values()
    assert expected[-1] < 0.97 * expected[0]
    rel = 1e-5 if precision == "amp" else LOSSES[precision.rpartition(" ")[2]]
    assert found == pytest.approx(expected, rel=rel)
