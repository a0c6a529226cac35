"""Languages without a sentence in the update: they keep every bit and take no part."""

import itertools

import pytest
import torch
from toy import Work, adapters, batch, build, set_adapters
from updates import ALL, SIDES, optimizer_for, same, snapshot, update

from lslora_fairseq.lora.adapters import Adapter
from lslora_fairseq.optim.pruned import INNER_OPTIMIZERS


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


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_weight_learning_keeps_absent_languages_and_never_prunes_w(inner):
    model = set_adapters(build(lora_weight_learning=True), scale=0.2)
    optimizer = optimizer_for(model, inner, weight_decay=0.1, pruning_scope="layer")
    update(model, optimizer, ALL)
    owned = [
        (p.param_group.side, p.param_group.language, p, p.detach().clone()) for p in adapters(model)
    ]
    optimizer.prune_at(4, 0)
    logits = [(p, before) for side, _, p, before in owned if side is None]
    assert len(logits) == 6 and all(torch.equal(p, before) for p, before in logits)
    for linear, side in itertools.product(model.adapted_linears(), SIDES):
        assert all(linear.masks(language, side)[0].all() for language in range(4))
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        masks = [getattr(layer, f"{side}_adapters") for side in SIDES]
        masks = torch.cat([m.mask[:, m.width_A :].flatten() for m in masks])
        assert int((~masks).sum()) == int(0.6 * masks.numel() + 0.5)
    owned = [(side, language, p, p.detach().clone()) for side, language, p, _ in owned]
    update(model, optimizer, [(1, 3), (1, 3)])
    for side, language, param, before in owned:
        moved = side is None or (side, language) in {("source", 1), ("target", 3)}
        assert torch.equal(param, before) != moved, (side, language)


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


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_a_layer_that_was_left_out_has_zeros_for_the_languages_present(inner):
    """As by --encoder-layerdrop: momentum and decay go on there as in any other layer."""
    ended = []
    for is_none in (True, False):
        model = set_adapters(build())
        optimizer = optimizer_for(model, inner, weight_decay=0.1)
        update(model, optimizer, ALL)
        model(**batch(ALL))[0].square().mean().backward()
        for param in adapters(model.encoder.layers[0]):
            param.grad = None if is_none else torch.zeros_like(param)
        optimizer.step()
        ended.append([snapshot(model, optimizer, la, s) for s in SIDES for la in range(4)])
    assert same(*ended)
