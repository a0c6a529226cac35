"""The criterion beside fairseq's own, on small models: loss, logged values and every gradient."""

import logging
from types import SimpleNamespace

import pytest
import torch
import toy
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models.transformer import TransformerModel
from toy import adapters, batch, build, set_adapters

from lslora_fairseq.criterions import frozen_projection, label_smoothed_cross_entropy

PAIRS = [(0, 1), (3, 2), (1, 0), (0, 1)]
STOCK, OURS = "label_smoothed_cross_entropy", "lslora_label_smoothed_cross_entropy"
WORDS = 38


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    monkeypatch.setitem(frozen_projection.BUFFER, "cpu", 10 * WORDS * 4)


def criterion(name, smoothing=0.1, ignore_prefix_size=0, report_accuracy=False, sentence_avg=False):
    task = SimpleNamespace(target_dictionary=toy.dictionary())
    options = smoothing, ignore_prefix_size, report_accuracy
    return CRITERION_REGISTRY[name](task, sentence_avg, *options)


def sample(model, seed=3):
    net_input = batch(PAIRS, seed=seed)
    if type(model) is TransformerModel:
        net_input = {key: value for key, value in net_input.items() if "lang_ids" not in key}
    target = net_input["prev_output_tokens"].roll(-1, 1)
    target[target == 0] = 5
    target[:, -1] = 1
    with torch.no_grad():  # some of them are hit
        likeliest = model(**net_input)[0].argmax(-1)
    target[:, 2] = likeliest[:, 2].where(target[:, 2] != 1, target[:, 2])
    return {"net_input": net_input, "target": target, "ntokens": int(target.ne(1).sum())}


def results(name, model, inputs, reduce=True, **options):
    """(loss, sample size, logged values, gradient of each trained parameter or None)."""
    model.zero_grad(set_to_none=True)
    loss, size, log = criterion(name, **options)(model, inputs, reduce=reduce)
    if loss.requires_grad:
        loss.sum().backward()
    return loss.detach(), size, log, [p.grad for p in adapters(model)]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected[3] != [None] * len(expected[3])


MODELS = {
    "languages alone": {},
    "embeddings": {"lora_embedding_rank": 3},
    "embeddings alone": {"lora_embedding_rank": 3, "lora_rank": "0"},
    "all, checkpointed": {
        "lora_embedding_rank": 3, "lora_shared_rank": 2, "checkpoint_activations": True,
    },
    "a projection of its own": {
        "share_all_embeddings": False, "share_decoder_input_output_embed": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.0, "report_accuracy": True},
        {"ignore_prefix_size": 1, "report_accuracy": True, "sentence_avg": True},
    ],
    ids=str,
)
def test_it_is_fairseqs_in_training_and_validation(kind, options):
    model = set_adapters(build(**MODELS[kind]), 0.2).train()
    inputs = sample(model)
    expected = results(STOCK, model, inputs, **options)
    found = results(OURS, model, inputs, **options)
    assert_same(found, expected)
    assert not options or expected[2].get("n_correct", 1) > 0
    model.eval()
    with torch.no_grad():
        loss, size, log, _ = results(OURS, model, inputs, **options)
    torch.testing.assert_close((loss, size, log), expected[:3], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_the_embeddings_that_is_kept_gets_no_gradient():
    model = build(lora_embedding_rank=3, lora_train_languages="de,en")
    set_adapters(model, 0.2)
    with torch.no_grad():
        model.embedding_adapters.lora_shared.normal_().mul_(0.2)
    inputs = sample(model)
    assert_same(results(OURS, model, inputs), results(STOCK, model, inputs))
    assert model.embedding_adapters.lora_shared.grad is None


def test_a_merged_model_is_validated():
    model = set_adapters(build(lora_embedding_rank=3), 0.2).eval()
    inputs = sample(model)
    for _ in range(2):
        with torch.no_grad():
            found, expected = (results(name, model, inputs)[:3] for name in (OURS, STOCK))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        model.merge_embeddings()


@pytest.mark.parametrize("rank", [0, 3])
def test_under_autocast(rank):
    """bf16 has eight bits; the gradients of its products differ by some of their roundings."""
    model = set_adapters(build(lora_embedding_rank=rank), 0.2)
    inputs = sample(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (results(name, model, inputs) for name in (OURS, STOCK))
    assert found[0].dtype == torch.float and not torch.equal(
        found[0], results(OURS, model, inputs)[0]
    )
    torch.testing.assert_close(found[0], expected[0], rtol=0.01, atol=0)
    for mine, theirs in zip(found[3], expected[3]):
        assert mine is theirs is None or (mine - theirs).norm() < 0.03 * theirs.norm() + 1e-3


class Another(torch.nn.Linear):
    """That might do anything."""


def test_where_the_projection_is_not_frozen_the_loss_is_fairseqs_and_that_is_told(caplog):
    adapted, biased, other = (build() for _ in range(3))
    adapted.decoder.output_projection.weight.requires_grad_(True)
    biased.decoder.output_projection.bias = torch.nn.Parameter(torch.randn(WORDS))
    other.decoder.output_projection.__class__ = Another
    adaptive = build(share_all_embeddings=False, adaptive_softmax_cutoff="10,20")
    stock = build(model=TransformerModel)
    for model, reason in (
        (adapted, "the output projection is trained"),
        (biased, "the output projection is more than a matrix"),
        (other, "the output projection is more than a matrix"),
        (adaptive, "the model has an adaptive softmax"),
        (stock, "the model has no adapters"),
    ):
        label_smoothed_cross_entropy._say_once.cache_clear()
        caplog.clear()
        inputs = sample(model)
        with (
            torch.set_grad_enabled(model is not adaptive),  # fairseq's own backward fails there
            caplog.at_level(logging.WARNING, label_smoothed_cross_entropy.__name__),
        ):
            found = [results(OURS, model, inputs, report_accuracy=True) for _ in range(2)]
            expected = results(STOCK, model, inputs, report_accuracy=True)
        torch.testing.assert_close(found, [expected] * 2, rtol=0, atol=0)
        assert [record.getMessage() for record in caplog.records] == [
            "the loss is computed over the whole output distribution, as by "
            f"label_smoothed_cross_entropy: {reason}"
        ]


def test_losses_by_token_are_fairseqs():
    model = set_adapters(build(), 0.2)
    inputs = sample(model)
    found, expected = (results(name, model, inputs, reduce=False) for name in (OURS, STOCK))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0].numel() == inputs["target"].numel()
