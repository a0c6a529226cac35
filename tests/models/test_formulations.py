"""Whatever the costs of a device choose, a pass computes the same."""

import math

import pytest
import torch
from toy import batch, build, set_adapters

from lslora_fairseq.lora import routing
from lslora_fairseq.lora.adapters import LayerAdapters
from lslora_fairseq.lora.routing import COSTS, Costs, Route

PAIRS = [(0, 1), (3, 2), (1, 0), (1, 3), (2, 2), (0, 1), (3, 0), (2, 1)]
EACH_ALONE = Costs(columns=1, waste=0, unsorted_columns=64, gathers_below=0)
OTHERS = {
    "as on a GPU": COSTS["cuda"],
    "sorted gather": Costs(columns=2, waste=0, unsorted_columns=64, gathers_below=math.inf),
    "all gather": Costs(columns=0, waste=0, unsorted_columns=0, gathers_below=math.inf),
}
MODELS = {
    "plain": {},
    "shared": {"lora_shared_rank": 3, "lora_shared_alpha": 2.0, "lora_embedding_rank": 2},
    "scaled": {"lora_alpha": "de=4,en=2,fr=1,ja=5", "lora_shape": "square"},
    "learned": {"lora_weight_learning": True, "lora_shared_rank": 2},
    "checkpointed": {"checkpoint_activations": True, "lora_shared_rank": 3},
    "dropout": {"lora_dropout": 0.3},
}


def prune(model):
    generator = torch.Generator().manual_seed(1)
    for layer in (m for m in model.modules() if isinstance(m, LayerAdapters)):
        if layer.sites:
            layer.mask.copy_(torch.rand(layer.mask.shape, generator=generator) > 0.3)
            layer.refresh_pruned()


def run(monkeypatch, costs, options):
    """Output and gradients of a model of these options, pruned, in double precision."""
    monkeypatch.setitem(routing.COSTS, "cpu", costs)
    model = set_adapters(build(**options)).double().train()
    prune(model)
    torch.manual_seed(7)
    out = model(**batch(PAIRS))[0]
    out.square().mean().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("costs", OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("options", MODELS.values(), ids=list(MODELS))
def test_output_and_gradients_do_not_depend_on_the_formulation(costs, options, monkeypatch):
    (expected, gradients), (found, others) = (
        run(monkeypatch, each, options) for each in (EACH_ALONE, costs)
    )
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    assert others.keys() == gradients.keys() and len(others) > 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-12, rtol=1e-8, msg=name)


@pytest.mark.parametrize("options", [MODELS["shared"], {"lora_shared_rank": 3}])
def test_joining_what_all_share_changes_nothing(options, monkeypatch):
    together = run(monkeypatch, COSTS["cuda"], options)
    monkeypatch.setattr(Route, "join", lambda self, shared: self)
    torch.testing.assert_close(run(monkeypatch, COSTS["cuda"], options), together)


@pytest.mark.parametrize(
    "time, sentences_gather",
    [(9, False), (10, True)],
)
def test_sentences_gather_while_the_largest_rank_is_small(time, sentences_gather, monkeypatch):
    """And the languages are too many for a block; otherwise there are several blocks."""
    costs = Costs(columns=4, waste=math.inf, unsorted_columns=4, gathers_below=0.5)
    monkeypatch.setitem(routing.COSTS, "cpu", costs)
    layout = routing.AdapterLayout((1, 2, 3, 5), (1, 2, 3, 5))
    ids = torch.tensor([0, 1, 1, 3])
    route = routing.Present(layout, ids).sorted(ids, time)
    assert route.gathers == sentences_gather
    assert len(route.blocks) == (1 if sentences_gather else 2)
    few = torch.tensor([0, 1, 1])
    assert not routing.Present(layout, few).sorted(few, time).gathers


def test_an_unknown_device_is_taken_for_a_gpu():
    ids = torch.zeros(2, dtype=torch.long, device="meta")
    layout = routing.AdapterLayout((1,), (1,))
    assert routing.Present(layout, ids, [0, 0]).costs == COSTS["cuda"]
