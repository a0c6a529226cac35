"""The adapters that all languages share: stepped and pruned on their own, or kept as they are."""

import logging

import pytest
import torch
from toy import CODES, adapters, build, set_adapters
from updates import ALL, SIDES, optimizer_for, same, snapshot, update

from lslora_fairseq.lora.plan import SHARED
from lslora_fairseq.optim.pruned import INNER_OPTIMIZERS

RANKS = {"lora_shared_rank": 3, "lora_embedding_rank": 2}
OWNERS = [*((side, language) for side in SIDES for language in range(len(CODES))), (SHARED, 0)]


def snapshots(model, optimizer):
    return {owner: snapshot(model, optimizer, *reversed(owner)) for owner in OWNERS}


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_they_step_with_every_batch_and_absent_languages_keep_every_bit(inner):
    model = set_adapters(build(lora_shared_rank=3))
    optimizer = optimizer_for(model, inner, weight_decay=0.1)
    update(model, optimizer, ALL)
    before = snapshots(model, optimizer)
    update(model, optimizer, [(1, 3), (1, 3)])
    after = snapshots(model, optimizer)
    moved = {owner for owner in OWNERS if not same(before[owner], after[owner])}
    assert moved == {("source", 1), ("target", 3), (SHARED, 0)}


@pytest.mark.parametrize("target", ["B", "AB"])
@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_they_are_a_scope_of_their_own(scope, target, size):
    """However small or large, they take nothing of the languages' share, nor the other way."""
    model = set_adapters(build(lora_shared_rank=3))
    with torch.no_grad():
        for linear in model.adapted_linears():
            for factor in linear.factors(0, SHARED):
                factor.mul_(size)
    optimizer = optimizer_for(model, pruning_scope=scope, pruning_target=target)
    assert optimizer.prune_at(3, 0) == pytest.approx(0.6, abs=1e-3)
    scopes = {}
    for linear in model.adapted_linears():
        place = (linear.site.stack, linear.site.layer) if scope == "layer" else None
        for side in linear.adapters:
            for language in [0] if side == SHARED else range(len(CODES)):
                owner = side == SHARED, None if scope == "layer" else language
                masks = linear.masks(language, side)
                assert target == "AB" or masks[0].all()
                for factor in target:
                    mask = masks["AB".index(factor)]
                    removed, entries = scopes.get((place, owner, factor), (0, 0))
                    counts = removed + int((~mask).sum()), entries + mask.numel()
                    scopes[place, owner, factor] = counts
    assert len(scopes) == len(target) * (4 + 1 if scope == "language" else 2 * 6)
    assert all(removed == int(0.6 * entries + 0.5) for removed, entries in scopes.values())


@pytest.mark.parametrize("inner", ["adam", "adafactor"])
def test_a_pruned_entry_of_theirs_stays_zero(inner):
    model = set_adapters(build(lora_shared_rank=3))
    optimizer = optimizer_for(model, inner, weight_decay=0.1)
    for epoch in range(1, 5):
        optimizer.prune_at(epoch, 0)
        update(model, optimizer, ALL, seed=epoch)
    for linear in model.adapted_linears():
        (_, B), (_, mask) = linear.factors(0, SHARED), linear.masks(0, SHARED)
        assert not mask.all() and mask.any() and not B[~mask].any() and B[mask].all()


@pytest.mark.parametrize("target", ["B", "AB"])
@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_that_of_the_embeddings_is_a_scope_of_its_own(scope, target, size):
    """Also beside shared adapters: words and linears are of other magnitudes."""
    model = set_adapters(build(lora_shared_rank=3, lora_embedding_rank=2))
    holder = model.embedding_adapters
    holder.lora_shared.data.mul_(size)
    plain = set_adapters(build(lora_shared_rank=3))
    for each in (model, plain):
        options = {"pruning_scope": scope, "pruning_target": target}
        assert optimizer_for(each, **options).prune_at(3, 0) == pytest.approx(0.6, abs=1e-3)
    for name, adapters_of_layer in plain.named_modules():
        if hasattr(adapters_of_layer, "refresh_pruned"):
            assert torch.equal(model.get_submodule(name).mask, adapters_of_layer.mask), name
    A, B = holder.mask.split([16, 38], 1)
    assert int((~B).sum()) == int(0.6 * B.numel() + 0.5)
    assert int((~A).sum()) == (int(0.6 * A.numel() + 0.5) if target == "AB" else 0)
    kept = holder.lora_shared.detach().abs()
    assert kept[holder.mask].all() and not kept[~holder.mask].any()


@pytest.mark.parametrize("options", [{}, {"lora_shared_rank": 3}, {"lora_rank": "0"}])
@pytest.mark.parametrize("inner", ["adam", "adafactor"])
def test_that_of_the_embeddings_is_trained_and_pruned(inner, options, caplog):
    """With every batch; what is pruned stays zero, and nothing is before its first update."""
    caplog.set_level(logging.INFO)
    model = build(lora_embedding_rank=2, **options)
    optimizer = optimizer_for(model, inner, weight_decay=0.1)
    optimizer.prune_at(2, 0)
    assert "never updated and left alone" in caplog.messages[-1]
    assert "the shared adapters" in caplog.messages[-1]
    holder, removed = model.embedding_adapters, []
    for epoch in range(2, 6):
        optimizer.prune_at(epoch, 0)
        before = holder.lora_shared.detach().clone()
        update(model, optimizer, ALL[: epoch - 1], seed=epoch)
        after = holder.lora_shared.detach()
        assert not after[~holder.mask].any()
        assert (after != before)[holder.mask].float().mean() > 0.9
        removed.append(int((~holder.mask).sum()))
    assert removed == [0, 46, 46, 46]  # 0.6 of 2 · 38
    assert "the shared adapters" not in caplog.messages[-1]
    made = build(seed=5, lora_embedding_rank=2, **options)
    made.load_state_dict(model.state_dict())
    made.reset_masks()
    assert not made.embedding_adapters.is_pruned and model.count_pruned()[0] >= 46


@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_frozen_they_keep_every_bit_while_languages_train(inner, scope):
    """Also what is pruned of them, and with --pruning-masks reset; the optimizer sees none."""
    first = set_adapters(build(**RANKS))
    optimizer_for(first).prune_at(3, 0)
    model = build(seed=5, **RANKS, lora_freeze_shared=True)
    model.load_state_dict(first.state_dict())
    model.reset_masks()
    optimizer = optimizer_for(model, inner, weight_decay=0.1, pruning_scope=scope)
    assert {master.key for master in optimizer.optimizer.masters} == {*OWNERS} - {(SHARED, 0)}
    for epoch in range(1, 5):
        optimizer.prune_at(epoch, 0)
        update(model, optimizer, ALL, seed=epoch)
    kept = []
    for key, value in first.state_dict().items():
        if ".shared_adapters." in key or key.startswith("embedding_adapters."):
            assert torch.equal(model.state_dict()[key], value), key
            kept += [int(value.sum())] if key.endswith(".pruned") else []
        elif ".lora_" in key:
            assert not torch.equal(model.state_dict()[key], value), key
    assert len(kept) == 6 + 1 and all(kept)
    assert model.count_pruned()[1] == sum(p.numel() for p in adapters(model))


def test_what_was_never_updated_of_them_is_named_in_the_log(caplog):
    """As where a run begins with them at zero and the languages' adapters not."""
    caplog.set_level(logging.INFO)
    model = set_adapters(build(lora_shared_rank=3))
    with torch.no_grad():
        for linear in model.adapted_linears():
            linear.factors(0, SHARED)[1].zero_()
            if "source" in linear.adapters:
                linear.factors(1, "source")[1].zero_()
    optimizer = optimizer_for(model)
    share = optimizer.prune_at(3, 0)
    assert caplog.messages[-1] == (
        f"pruned to sparsity {share:.4f} at epoch 3 (never updated and left alone: the shared "
        "adapters; as source en)"
    )
