"""How languages are stacked, and the rows and scaling of each sentence."""

import pytest
import torch

from lslora_fairseq.lora.routing import AdapterLayout, Route, RouteSlot

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


def test_a_route_looks_up_each_sentence():
    route = LAYOUT.route(torch.tensor([2, 0, 1, 2]))
    assert route.rows.tolist() == [[4, 5, 5], [0, 0, 0], [1, 2, 3], [4, 5, 5]]
    assert route.scaling.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [2, 2, 2], [0.5, 0.5, 0]]


def test_no_ids_give_no_route():
    assert LAYOUT.route(None) is None


@pytest.mark.parametrize("batch, expected", [(6, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4]), (1, [0])])
def test_reduced_to_keeps_one_row_for_the_beams_of_a_sentence(batch, expected):
    numbers = torch.arange(6.0).unsqueeze(1)
    reduced = Route(numbers, numbers + 10).reduced_to(batch)
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
