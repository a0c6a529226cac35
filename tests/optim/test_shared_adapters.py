"""The adapters that all languages share: stepped and pruned on their own, or kept as they are."""

import logging

import pytest
import torch
from toy import ALL_CODES, CODES, adapters, build, set_adapters
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


@pytest.mark.parametrize("options", [{}, {"lora_shared_rank": 3}, {"lora_rank": "0"}])
@pytest.mark.parametrize("target", ["B", "AB"])
@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("inner", ["adam", "adafactor"])
def test_that_of_the_embeddings_is_trained_and_not_pruned(inner, scope, target, options):
    """With every batch, and what is pruned of the others is the same as without it."""
    masks = []
    for rank in (2,) if options == {"lora_rank": "0"} else (2, 0):
        model = build(lora_embedding_rank=rank, **options)
        how = {"pruning_scope": scope, "pruning_target": target}
        optimizer = optimizer_for(set_adapters(model), inner, weight_decay=0.1, **how)
        share = optimizer.prune_at(3, 0)
        assert share == pytest.approx(0.6 if model.plan.all_sites else 0, abs=1e-3)
        masks.append({k: v for k, v in model.state_dict().items() if k.endswith(".pruned")})
        if rank:
            holder = model.embedding_adapters
            before = holder.lora_shared.detach().clone()
            update(model, optimizer, ALL)
            assert (holder.lora_shared.detach() != before).float().mean() > 0.9
            assert not masks[0].pop("embedding_adapters.pruned").any()
    for key in masks[-1]:
        assert torch.equal(masks[0][key], masks[-1][key]), key


@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_frozen_they_keep_every_bit_while_languages_train(inner, scope):
    """Also what is pruned of them, and with --pruning-masks reset; the optimizer sees none."""
    first = set_adapters(build(**RANKS))
    optimizer_for(first).prune_at(3, 0)
    model = build(seed=5, **RANKS, lora_train_languages=ALL_CODES)
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
    assert len(kept) == 6 + 1 and sorted(kept)[0] == 0 and all(sorted(kept)[1:])
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
