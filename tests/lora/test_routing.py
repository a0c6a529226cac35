"""How languages are stacked, and the rows and scaling of each sentence."""

import pytest
import torch

from lslora_fairseq.lora import routing
from lslora_fairseq.lora.routing import AdapterLayout, RouteSlot, without_beams

# de owns row 0, en rows 1-3, fr rows 4-5
LAYOUT = AdapterLayout((1, 3, 2), (1, 6, 1))


def test_languages_own_consecutive_rows():
    assert LAYOUT.ranks == (1, 3, 2)
    assert LAYOUT.offsets == (0, 1, 4)
    assert LAYOUT.total_rank == 6
    assert [LAYOUT.language_rows(i) for i in range(3)] == [slice(0, 1), slice(1, 4), slice(4, 6)]


def test_a_short_language_repeats_its_last_row_with_no_weight():
    assert LAYOUT.rows.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 5]]
    assert LAYOUT.scaling.tolist() == [[1, 0, 0], [2, 2, 2], [0.5, 0.5, 0]]


def test_a_gathered_route_looks_up_each_sentence():
    (block,) = LAYOUT.gathered(torch.tensor([2, 0, 1, 2]))
    assert (block.start, block.stop) == (0, 4)
    assert block.rows.tolist() == [[4, 5, 5], [0, 0, 0], [1, 2, 3], [4, 5, 5]]
    assert block.scaling.squeeze(1).tolist() == [[0.5, 0.5, 0], [1, 0, 0], [2, 2, 2], [0.5, 0.5, 0]]


def test_a_sorted_route_shares_the_rows_of_neighbouring_languages():
    (block,) = LAYOUT.sorted(torch.tensor([0, 1, 1, 2]))
    assert (block.start, block.stop) == (0, 4)
    assert block.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert block.scaling.squeeze(1).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 0, 0],
        [0, 2, 2, 2, 0, 0],
        [0, 0, 0, 0, 0.5, 0.5],
    ]


@pytest.mark.parametrize(
    "columns, expected",
    [
        (6, [(0, 5, [0, 1, 2, 3, 4, 5])]),
        (4, [(0, 3, [0, 1, 2, 3]), (3, 5, [4, 5])]),
        (1, [(0, 2, [0]), (2, 3, [1, 2, 3]), (3, 5, [4, 5])]),
    ],
)
def test_a_block_ends_before_its_languages_have_too_many_columns(monkeypatch, columns, expected):
    monkeypatch.setattr(routing, "BLOCK_RANK", columns)
    route = LAYOUT.sorted(torch.tensor([0, 0, 1, 2, 2]))
    assert [(b.start, b.stop, b.rows.tolist()) for b in route] == expected
    assert [b.scaling.size(0) for b in route] == [b.stop - b.start for b in route]


def test_languages_absent_from_the_batch_cost_nothing():
    (block,) = LAYOUT.sorted(torch.tensor([0, 2]))
    assert block.rows.tolist() == [0, 4, 5]


@pytest.mark.parametrize("batch, expected", [(6, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4]), (1, [0])])
def test_without_beams_keeps_one_row_for_the_beams_of_a_sentence(batch, expected):
    numbers = torch.arange(6).unsqueeze(1)
    block = routing.Block(0, 6, numbers, numbers + 10.0)
    (reduced,) = without_beams((block,), batch)
    assert (reduced.start, reduced.stop) == (0, batch)
    assert reduced.rows.flatten().tolist() == expected
    assert reduced.scaling.flatten().tolist() == [n + 10 for n in expected]


def test_the_layout_follows_the_model_and_stays_out_of_checkpoints():
    assert LAYOUT.state_dict() == {}
    moved = AdapterLayout((1, 2), (1, 2)).to("meta")
    assert moved.rows.device.type == moved.scaling.device.type == "meta"
    half = AdapterLayout((1, 2), (1, 2)).half()
    assert half.scaling.dtype == torch.half and half.rows.dtype == torch.long


def test_slots_are_independent():
    first, second = RouteSlot(), RouteSlot()
    first.routes["source"] = "here"
    assert second.routes == {}
