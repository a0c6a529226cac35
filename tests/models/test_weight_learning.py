"""Weight learning: a layer's adapters of both sides, each times its learned share."""

import pytest
import torch
from test_lslora_transformer import PAIRS, base_state
from toy import batch, build, rows, set_adapters, stock

from lslora_fairseq.lora import routing

LEARNING = dict(lora_weight_learning=True)
SIDES = ("source", "target")


def learning(**options):
    """A model with adapters of both sides, and a w of its own in every layer."""
    return set_adapters(build(**LEARNING, **options), scale=0.2)


def test_every_layer_starts_with_half_of_each():
    model = build(**LEARNING)
    found = model.source_shares()
    assert [*found] == [f"encoder.{i}" for i in range(4)] + ["decoder.0", "decoder.1"]
    assert {share.item() for share in found.values()} == {0.5}
    assert build().source_shares() == {}


@pytest.mark.parametrize("train", [True, False])
def test_a_fresh_model_changes_no_bit(train):
    model, plain = build(**LEARNING).train(train), build().train(train)
    plain.load_state_dict({**plain.state_dict(), **base_state(model)})
    assert torch.equal(model(**batch(PAIRS))[0], plain(**batch(PAIRS))[0])


@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}])
@pytest.mark.parametrize("columns", [64, 1], ids=["shared rows", "gathered rows"])
def test_output_and_gradients_are_those_of_the_formula(monkeypatch, columns, options):
    """W + p_src ΔW_src + p_tgt ΔW_tgt (method, section 3) as the weights of a stock model, and
    autograd through them to w and the factors."""
    costs = routing.COSTS["cpu"]._replace(unsorted_columns=columns)
    monkeypatch.setitem(routing.COSTS, "cpu", costs)
    model, pairs = learning(**options), sorted(set(PAIRS))
    base, mixed = stock(model), batch(pairs)
    outputs = model(**mixed)[0]
    outputs.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for number, (source, target) in enumerate(pairs):
        weights = {}
        for linear in model.adapted_linears():
            layer = model.get_submodule(f"{linear.site.stack}.layers.{linear.site.layer}")
            p = layer.side_weights.logits.softmax(-1)[0]
            name = f"{linear.site.name}.weight"
            weights[name] = base.get_parameter(name).detach()
            for share, side, language in zip(p, SIDES, (source, target)):
                A, B = linear.factors(language, side)
                weights[name] = weights[name] + share * B.T @ A
        alone = {k: v for k, v in rows(mixed, [number]).items() if "lang_ids" not in k}
        out = torch.func.functional_call(base, weights, kwargs=alone, args=())[0]
        torch.testing.assert_close(outputs[number], out[0], atol=1e-5, rtol=1e-5)
        out.square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert sum(name.endswith("side_weights.logits") for name in found) == 6
    for name, grad in wanted.items():
        assert grad.any()
        torch.testing.assert_close(found[name], grad, atol=1e-3, rtol=1e-3, msg=name)


def test_pruned_entries_get_no_gradient_and_add_none_to_w():
    model = learning()
    layer = model.encoder.layers[0]
    for side in SIDES:
        adapters = getattr(layer, f"{side}_adapters")
        adapters.mask[:, adapters.width_A :] = False
        adapters.refresh_pruned()
        for param in adapters.parameters():
            param.data[:, adapters.width_A :] = 0
    model(**batch(PAIRS))[0].square().mean().backward()
    assert not layer.side_weights.logits.grad.any()
    assert model.encoder.layers[1].side_weights.logits.grad.all()


def test_w_is_saved_and_a_base_model_lacks_it():
    model = learning()
    again = build(seed=4, **LEARNING)
    again.load_state_dict(model.state_dict())
    assert {k: v.item() for k, v in again.source_shares().items()} == {
        k: v.item() for k, v in model.source_shares().items()
    }
    fresh = build(seed=4, **LEARNING)
    fresh.load_state_dict(base_state(model))
    assert {share.item() for share in fresh.source_shares().values()} == {0.5}
    assert torch.equal(fresh(**batch(PAIRS))[0], build()(**batch(PAIRS))[0])


def test_table_counts_w():
    model = build(**LEARNING)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = model.plan.table(1000).splitlines()
    assert table[-1].split()[4] == f"{trained:,}"
    assert table[-2].split()[:4] == ["both", "side", "weights", "12"]


def test_weights_of_sides_belong_to_all_languages_and_stay_where_some_are_trained():
    model = build(**LEARNING, lora_train_languages="fr")
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_fr"}
    set_adapters(model)(**batch([(0, 2), (2, 1)]))[0].square().mean().backward()
    assert {
        name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None
    } == {"lora_fr"}
    assert "side weights" not in model.plan.table(1000)
