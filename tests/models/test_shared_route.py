"""The adapters that all languages share inside a model: what they cost, and what they do not."""

import pytest
import torch
from toy import ALL_CODES, Work, adapters, batch, build, set_adapters

from lslora_fairseq.lora.adapters import Adapter
from lslora_fairseq.lora.plan import SHARED
from lslora_fairseq.lora.routing import AdapterLayout, Present, Route
from lslora_fairseq.lora.stacked import StackedAdapters

PAIRS = [(0, 1), (3, 2), (1, 0), (0, 1)]
FROZEN = {"lora_shared_rank": 3, "lora_shared_alpha": 6.0, "lora_train_languages": ALL_CODES}


def frozen_beside_trained(**options):
    """Two models of the same weights, of which the first keeps its shared adapters."""
    trained = set_adapters(build(**{**FROZEN, "lora_train_languages": None}, **options), 0.2)
    frozen = build(seed=9, **FROZEN, **options)
    frozen.load_state_dict(trained.state_dict())
    return frozen, trained


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint_activations": True}, {"lora_dropout": 0.3}, {"lora_shape": "square"}],
    ids=str,
)
def test_frozen_they_pass_gradients_on_and_have_none(options):
    found = []
    for model in frozen_beside_trained(**options):
        torch.manual_seed(3)
        model(**batch(PAIRS))[0].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    frozen, trained = found
    shared = {name for name in trained if ".shared_adapters." in name}
    assert len(shared) == 6 and frozen.keys() == trained.keys() - shared
    for name, grad in frozen.items():
        torch.testing.assert_close(grad, trained[name], atol=1e-6, rtol=1e-5)


def test_frozen_they_take_no_part_in_the_backward_pass(monkeypatch):
    """But for what they hand to the layers below: no gradient of theirs is computed."""
    filled, gradients = [], StackedAdapters.gradients

    def watched(self, *args):
        filled.extend(adapters.side for adapters in self.adapters)
        return gradients(self, *args)

    monkeypatch.setattr(StackedAdapters, "gradients", watched)
    monkeypatch.setattr(Route, "join", lambda self, shared: self)  # products are then comparable
    products = []
    for model in frozen_beside_trained():
        filled.clear()
        loss = model(**batch(PAIRS))[0].square().mean()
        with Work() as work:
            loss.backward()
        assert (SHARED in filled) == (model.plan.trained is None) and "target" in filled
        products.append(sum("mm" in name for name, _ in work.done))
    assert products[0] < products[1]


def test_a_language_that_all_have_is_known_without_a_transfer():
    """Neither its ids nor its rows are read from, or copied to, the device of the batch."""
    layout = AdapterLayout([3], [6.0])
    ids = torch.zeros(5, dtype=torch.long)
    with Work() as work:
        present = Present(layout, ids, [0] * len(ids))
        (block,) = present.unsorted(ids).blocks
    assert (block.rows, block.scaling.flatten().tolist()) == (slice(0, 3), [2.0] * 5)
    moved = ("_local_scalar_dense", "_to_copy", "copy_", "lift_fresh", "item", "nonzero")
    assert work.done and not [name for name, _ in work.done if any(m in name for m in moved)]


def test_alone_they_serve_sentences_of_no_known_language():
    model = set_adapters(build(lora_rank="0", lora_shared_rank=3), 0.2)
    assert {Adapter.of(p).side for p in adapters(model)} == {SHARED}
    net_input = batch(PAIRS)
    expected = model(**net_input)[0]
    plain = {key: value for key, value in net_input.items() if "lang_ids" not in key}
    assert torch.equal(model(**plain)[0], expected)
    model.eval()
    for direction in ((0, 1), (2, 3), (None, None)):  # the second time there is nothing to merge
        model.merge(*direction)
        torch.testing.assert_close(model(**plain)[0], expected, atol=1e-5, rtol=1e-5)
    assert not model.adapted_linears()


@pytest.mark.parametrize(
    "options, known, is_merged",
    [
        ({"lora_rank": "0", "lora_shared_rank": 3}, {}, True),
        ({"lora_shared_rank": 3}, {"target_lang": "en"}, False),
        ({"encoder_index_side": "target"}, {"target_lang": "en", "source_lang": "xx"}, True),
    ],
)
def test_what_is_needed_to_merge_is_what_layers_are_indexed_by(options, known, is_merged):
    model = build(**options)
    task = type("Task", (), {"source_lang": None, "target_lang": None, **known})
    generation = type("Generation", (), {"beam": 5})
    model.prepare_for_inference_(type("Config", (), {"task": task, "generation": generation}))
    assert (not model.adapted_linears()) == is_merged
