"""Which entries the pruned_* optimizers remove, and that these stay removed."""

import itertools

import pytest
import torch
from toy import build, set_adapters
from updates import ALL, optimizer_for, update

from lslora_fairseq.optim.pruned import INNER_OPTIMIZERS


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
    assert optimizer.prune_at(5, 0) == pytest.approx(0.6, abs=1e-3)
    for linear, language in itertools.product(model.adapted_linears(), range(4)):
        for factor, mask in zip(linear.factors(language), linear.masks(language)):
            assert not factor[~mask].any()
        assert linear.masks(language)[0].all() or target == "AB"
    states = 0
    language_optimizer = optimizer.optimizer
    for master in language_optimizer.masters:
        weight, pruned = master.weight, master.pruned
        if pruned is None:
            continue
        assert not weight[pruned].any()
        for value in language_optimizer.inner.state[weight].values():
            if torch.is_tensor(value) and value.shape == weight.shape:
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
