"""The adapters that all languages share: stepped on their own, never pruned, or kept."""

import pytest
import torch
from toy import ALL_CODES, CODES, adapters, build, set_adapters
from updates import ALL, SIDES, optimizer_for, same, snapshot, update

from lslora_fairseq.lora.adapters import Adapter
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


SHARED_KEYS = (".shared_adapters.", "embedding_adapters.")


@pytest.mark.parametrize("options", [{"lora_shared_rank": 3}, {"lora_embedding_rank": 2}, RANKS])
@pytest.mark.parametrize("target", ["B", "AB"])
@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("inner", ["adam", "adafactor"])
def test_they_are_trained_and_not_pruned(inner, scope, target, options):
    """What is pruned of the languages is the same as without them."""
    masks, weights = [], {}
    for more in (options, {}):
        model = set_adapters(build(**more))
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(weights.setdefault(name, param.clone()))
        how = {"pruning_scope": scope, "pruning_target": target}
        optimizer = optimizer_for(model, inner, weight_decay=0.1, **how)
        assert optimizer.prune_at(3, 0) == pytest.approx(0.6, abs=1e-3)
        masks.append({k: v for k, v in model.state_dict().items() if k.endswith(".pruned")})
        shared = {
            name: (param, param.detach().clone())
            for name, param in model.named_parameters()
            if name.endswith(".lora_shared")
        }
        assert len(shared) == (6 if "lora_shared_rank" in more else 0) + (
            1 if "lora_embedding_rank" in more else 0
        )
        update(model, optimizer, ALL)
        for param, before in shared.values():
            assert (param.detach() != before).float().mean() > 0.9
    for key in [key for key in masks[0] if any(name in key for name in SHARED_KEYS)]:
        assert not masks[0].pop(key).any()
    assert masks[0].keys() == masks[1].keys()
    for key in masks[0]:
        assert torch.equal(masks[0][key], masks[1][key]), key


def test_alone_they_leave_nothing_to_prune():
    model = set_adapters(build(lora_rank="0", **RANKS))
    optimizer = optimizer_for(model)
    assert optimizer.prune_at(3, 0) == 0
    assert not any(v.any() for k, v in model.state_dict().items() if k.endswith(".pruned"))
    assert model.count_pruned() == (0, 0)


@pytest.mark.parametrize("scope", ["language", "layer"])
@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_frozen_they_keep_every_bit_while_languages_train(inner, scope):
    """The optimizer sees none of them."""
    first = set_adapters(build(**RANKS))
    model = build(seed=5, **RANKS, lora_train_languages=ALL_CODES)
    model.load_state_dict(first.state_dict())
    model.reset_masks()
    optimizer = optimizer_for(model, inner, weight_decay=0.1, pruning_scope=scope)
    assert {master.key for master in optimizer.optimizer.masters} == {*OWNERS} - {(SHARED, 0)}
    for epoch in range(1, 5):
        optimizer.prune_at(epoch, 0)
        update(model, optimizer, ALL, seed=epoch)
    for key, value in first.state_dict().items():
        if any(name in key for name in SHARED_KEYS):
            assert torch.equal(model.state_dict()[key], value), key
        elif ".lora_" in key:
            assert not torch.equal(model.state_dict()[key], value), key
    languages = [p for p in adapters(model) if Adapter.of(p).side in SIDES]
    assert model.count_pruned()[1] == sum(p.numel() for p in languages)
