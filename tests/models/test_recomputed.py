"""Outputs of layer norms that linears read are computed again in the backward pass, not kept."""

import pytest
import torch
from toy import Work, adapters, batch, build, set_adapters

from lslora_fairseq.lora import linear
from lslora_fairseq.lora.routing import routed
from lslora_fairseq.models.layers import BatchFirstLayerNorm

PAIRS = [(0, 1), (3, 2), (1, 0), (1, 3), (2, 2), (0, 1)]
POST_NORM = {"encoder_normalize_before": False, "decoder_normalize_before": False}


def gradients(autocast, **options):
    """Of the adapters, and how many layer norms the backward pass computes."""
    model = set_adapters(build(dropout=0.1, **options)).train()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch(PAIRS))[0].float().square().mean()
    with Work() as work:
        loss.backward()
    norms = sum("native_layer_norm.default" in name for name, _ in work.done)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, norms


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    "options, recomputed",
    [
        ({}, 4 * 2 + 2 * 3),
        (POST_NORM, 4 + 2 * 2),  # the first norm of a layer ends the one before
        ({"lora_weight_learning": True, "lora_shared_rank": 2}, 4 * 2 + 2 * 3),
        ({"lora_dropout": 0.3}, 0),  # the adapters read something else, which is kept
        ({"encoder_target_modules": "fc2", "decoder_target_modules": "fc1"}, 2),
    ],
    ids=["pre-norm", "post-norm", "learned", "dropout", "some"],
)
def test_gradients_are_the_same_to_the_last_bit(options, recomputed, autocast, monkeypatch):
    found, norms = gradients(autocast, **options)
    monkeypatch.setattr(linear, "_normed", lambda x: None)
    expected, none = gradients(autocast, **options)
    assert (norms, none) == (recomputed, 0)
    assert found.keys() == expected.keys() and len(found) > 8
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


CHANGES = {
    "itself": (lambda y: y, 1),
    "a part": (lambda y: y[:, :3], 0),
    "another order": (lambda y: y.transpose(0, 1), 0),
    "a sum": (lambda y: y + 1, 0),
    "changed in place": (lambda y: y.mul_(2), 0),
}


@pytest.mark.parametrize("change, recomputed", CHANGES.values(), ids=list(CHANGES))
def test_what_is_not_the_whole_output_is_kept(change, recomputed):
    """The gradient is that of the two modules one after the other."""
    model = set_adapters(build())
    fc1, norm = model.decoder.layers[0].fc1, BatchFirstLayerNorm(16)
    x = torch.randn(5, 5, 16)
    ids = {"source": torch.zeros(5).long(), "target": torch.arange(5) % 4}
    found = []
    for normed in (norm, torch.nn.LayerNorm(16)):
        fc1.zero_grad()
        model.zero_grad()
        stack = model.decoder
        with stack.routed(ids, stack.present(ids)):
            y = fc1(change(normed(x)))
        with Work() as work:
            y.square().sum().backward()
        norms = sum("native_layer_norm.default" in name for name, _ in work.done)
        assert norms == (recomputed if normed is norm else 0)
        found.append([p.grad for p in adapters(model) if p.grad is not None])
    assert len(found[0]) == 4
    for gradient, expected in zip(*found):
        torch.testing.assert_close(gradient, expected)


def test_nothing_is_remembered_outside_of_a_layer():
    norm = BatchFirstLayerNorm(16)
    norm(torch.randn(3, 2, 16))
    assert linear.current_pass().norms == {}
    with routed({}), torch.no_grad():
        norm(torch.randn(3, 2, 16))
        assert linear.current_pass().norms == {}
