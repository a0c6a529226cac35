"""The adapters of one layer: their parameters, what is pruned, and what an optimizer sees."""

import torch

from lslora_fairseq.lora.adapters import Adapter, LayerAdapters
from lslora_fairseq.lora.plan import Site
from lslora_fairseq.lora.routing import AdapterLayout, Present
from lslora_fairseq.lora.stacked import stack

SITES = [
    Site("decoder", 2, "self_attn.q_proj", "target", 4, 3),
    Site("decoder", 2, "fc1", "target", 9, 2),
]
CODES, RANKS = ("to", "type", "zh-Hans"), (1, 3, 2)  # the first two are names that modules have


def make():
    return LayerAdapters(SITES, CODES, RANKS, torch.zeros(1))


def test_a_language_has_one_parameter_with_a_and_b_side_by_side():
    adapters = make()
    assert [name for name, _ in adapters.named_parameters()] == [f"lora_{c}" for c in CODES]
    assert [p.shape for p in adapters.parameters()] == [(1, 18), (3, 18), (2, 18)]
    assert adapters.width_A == 13
    assert adapters.columns == {
        "self_attn.q_proj": (slice(0, 4), slice(13, 16)),
        "fc1": (slice(4, 13), slice(16, 18)),
    }
    assert set(adapters.state_dict()) == {*(f"lora_{c}" for c in CODES), "pruned"}


def test_a_is_kaiming_and_b_zero():
    weight = LayerAdapters(SITES, ["en"], [500], torch.zeros(1)).weight(0)
    assert not weight[:, 13:].any()
    for columns, fan_in in ((slice(0, 4), 4), (slice(4, 13), 9)):
        bound = fan_in**-0.5  # Kaiming-uniform with a = √5
        assert 0.98 * bound < weight[:, columns].abs().max() <= bound


def test_languages_own_consecutive_rows_of_the_mask():
    adapters = make()
    assert [adapters.rows(i) for i in range(3)] == [slice(0, 1), slice(1, 4), slice(4, 6)]
    assert adapters.mask.shape == (6, 18) and adapters.mask.all()
    for language, param in enumerate(adapters.parameters()):
        assert adapters.weight(language) is param
        assert adapters.mask[adapters.rows(language)].shape == param.shape


def test_the_stack_holds_the_languages_present_alone():
    adapters, layout = make(), AdapterLayout(RANKS, RANKS)
    for ids, languages in (([2, 0, 2], [0, 2]), ([1], [1])):
        ids = torch.tensor(ids)
        tensor, _ = stack((adapters,), Present(layout, ids).unsorted(ids))
        assert torch.equal(tensor, torch.cat([adapters.weight(i) for i in languages]))


def test_pruned_entries_are_noticed_also_when_loaded():
    adapters, again = make(), make()
    adapters.mask[4, 5] = False
    adapters.refresh_pruned()
    assert adapters.is_pruned and not again.is_pruned
    again.load_state_dict(adapters.state_dict())
    assert again.is_pruned
    assert adapters.pruned_rows((0, 2)).nonzero().tolist() == [[1, 5]]


def test_what_an_optimizer_sees():
    adapters = make()
    adapters.mask[2, 7] = False
    adapter = Adapter.of(adapters.weight(1))
    assert (adapter.side, adapter.language) == ("target", 1)
    assert adapter.weight is adapters.weight(1)
    assert (~adapter.mask).nonzero().tolist() == [[1, 7]]
    assert Adapter.of(torch.nn.Parameter(torch.zeros(1))) is None
