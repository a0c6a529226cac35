"""How the languages of a batch are stacked, and the rows and scaling of each sentence."""

import math
from threading import Thread

import pytest
import torch

from lslora_fairseq.lora import routing
from lslora_fairseq.lora.routing import (
    AdapterLayout,
    Block,
    Present,
    Route,
    current_pass,
    routed,
)

LAYOUT = AdapterLayout((1, 3, 2, 1), (1, 6, 1, 1))  # de en fr ja


def costs(monkeypatch, **changes):
    """Other costs on a CPU."""
    monkeypatch.setitem(routing.COSTS, "cpu", routing.COSTS["cpu"]._replace(**changes))


def present(ids):
    lang_ids = torch.tensor(ids)
    return Present(LAYOUT, lang_ids), lang_ids


def test_the_languages_present_are_stacked_in_ascending_order():
    languages, _ = present([2, 0, 2, 2])
    assert languages.languages == (0, 2) and languages.ranks == [1, 2]
    assert languages.owners.tolist() == [0, 2, 2]


def test_a_sorted_route_shares_the_rows_of_neighbouring_languages():
    languages, ids = present([0, 1, 1, 2])
    (block,) = languages.sorted(ids, 5).blocks
    assert (block.start, block.stop, block.rows) == (0, 4, slice(0, 6))
    assert not block.gathers
    assert block.scaling.flatten(1).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 0, 0],
        [0, 2, 2, 2, 0, 0],
        [0, 0, 0, 0, 0.5, 0.5],
    ]


@pytest.mark.parametrize(
    "columns, expected",
    [
        (6, [(0, 5, 0, 6)]),
        (5, [(0, 3, 0, 4), (3, 5, 4, 6)]),
        (4, [(0, 3, 0, 4), (3, 5, 4, 6)]),
        (1, [(0, 2, 0, 1), (2, 3, 1, 4), (3, 5, 4, 6)]),
    ],
)
def test_a_block_ends_before_its_languages_have_too_many_columns(monkeypatch, columns, expected):
    costs(monkeypatch, columns=columns)
    languages, ids = present([0, 0, 1, 2, 2])
    blocks = languages.sorted(ids, 5).blocks
    assert [(b.start, b.stop, b.rows.start, b.rows.stop) for b in blocks] == expected
    for block in blocks:
        columns = block.rows.stop - block.rows.start
        assert block.scaling.shape == (block.stop - block.start, 1, 1, columns)


def test_on_a_cpu_a_block_ends_before_its_columns_are_mostly_other_languages(monkeypatch):
    expected = {
        100: [(0, 4)],
        99: [(0, 3), (3, 4)],  # fr in its block would be 10 tokens · (3 · 2 + 1 · 4)
        69: [(0, 2), (2, 4)],  # en in that of de 10 · (2 · 3 + 1 · 1), fr in that of en 10 · 5
        0: [(0, 2), (2, 3), (3, 4)],
    }
    for allowed, spans in expected.items():
        costs(monkeypatch, waste=allowed)
        languages, ids = present([0, 0, 1, 2])
        blocks = languages.sorted(ids, 10).blocks
        found = [(block.start, block.stop) for block in blocks]
        assert found == spans, allowed
    costs(monkeypatch, waste=math.inf)
    languages, ids = present([0, 0, 1, 2])
    assert len(languages.sorted(ids, 10**9).blocks) == 1


def test_languages_absent_from_the_batch_cost_nothing():
    languages, ids = present([0, 2])
    (block,) = languages.sorted(ids, 5).blocks
    assert block.rows == slice(0, 3)


def test_an_unsorted_route_shares_all_rows_while_they_are_few():
    languages, ids = present([2, 0, 2])
    (block,) = languages.unsorted(ids).blocks
    assert (block.start, block.stop, block.rows) == (0, 3, slice(0, 3))
    assert block.scaling.flatten(1).tolist() == [[0, 0.5, 0.5], [1, 0, 0], [0, 0.5, 0.5]]


def test_an_unsorted_route_looks_up_each_sentence_otherwise(monkeypatch):
    """A short language is filled up with the row of zeros at the end of the stack."""
    costs(monkeypatch, unsorted_columns=5)
    languages, ids = present([2, 0, 1, 2])
    (block,) = languages.unsorted(ids).blocks
    assert (block.start, block.stop) == (0, 4) and block.gathers
    assert block.rows.tolist() == [[4, 5, 6], [0, 6, 6], [1, 2, 3], [4, 5, 6]]
    assert block.scaling.flatten().tolist() == [0.5, 1, 2, 0.5]
    # later steps of a beam search have fewer sentences
    (block,) = languages.unsorted(torch.tensor([1])).blocks
    assert block.rows.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("batch, expected", [(6, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4]), (1, [0])])
def test_without_beams_keeps_one_row_for_the_beams_of_a_sentence(batch, expected):
    numbers = torch.arange(6).unsqueeze(1)
    for rows in (numbers, slice(0, 1)):
        route = Route(None, (Block(0, 6, rows, numbers + 10.0),))
        (reduced,) = route.without_beams(batch).blocks
        assert (reduced.start, reduced.stop) == (0, batch)
        assert reduced.scaling.flatten().tolist() == [n + 10 for n in expected]
        if reduced.gathers:
            assert reduced.rows.flatten().tolist() == expected


def test_the_layout_follows_the_model_and_stays_out_of_checkpoints():
    assert LAYOUT.state_dict() == {}
    assert AdapterLayout((1, 2), (1, 2)).to("meta").scaling.device.type == "meta"
    assert AdapterLayout((1, 2), (1, 2)).half().scaling.dtype == torch.half


def test_routes_end_with_the_pass_and_are_seen_by_its_thread_alone():
    seen = []
    with routed({"source": "outer"}):
        current_pass().stacks["layer"] = "stack"
        with pytest.raises(KeyError), routed({"source": "inner"}):
            assert current_pass() == ({"source": "inner"}, {}, {})
            thread = Thread(target=lambda: seen.append(current_pass()))
            thread.start()
            thread.join()
            raise KeyError  # as when a forward pass fails
        assert current_pass() == ({"source": "outer"}, {"layer": "stack"}, {})
    assert seen == [({}, {}, {})] and current_pass() == ({}, {}, {})


@pytest.mark.parametrize("ids, told", [([0, -1], "-1, 0"), ([2, 1], "1, 2")])
def test_an_index_of_no_language_is_an_error(ids, told):
    with pytest.raises(ValueError, match=f"language indices {told}: the model has adapters of 2"):
        Present(AdapterLayout((1, 2), (1, 2)), torch.tensor(ids))
