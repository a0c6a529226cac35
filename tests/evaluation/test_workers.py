"""How directions are cut into batches and spread over processes."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import workers
from lslora_fairseq.evaluation.decoding import Direction, batches


def direction(pair, lengths, limits=None):
    lengths = np.array(lengths)
    return Direction(pair, None, None, lengths, lengths + 1, limits or [9] * len(lengths))


def translator(device="cpu", words=1000, beam=2, max_tokens=50):
    dataset = SimpleNamespace(max_tokens=max_tokens, batch_size=None)
    return SimpleNamespace(
        cfg=SimpleNamespace(dataset=dataset),
        models=[None],
        device=torch.device(device),
        task=SimpleNamespace(target_dictionary=range(words)),
        beams=SimpleNamespace(beam=beam),
    )


def test_batches_hold_sentences_of_about_one_length():
    directions = [direction("a-b", [3, 9, 5]), direction("c-b", [9, 4, 8, 2], [9, 9, -1, 9])]
    cut = batches(directions, max_tokens=20, max_sentences=None)
    assert cut == [[(0, 1), (1, 0)], [(0, 2), (1, 1), (0, 0)], [(1, 3)]]
    assert [len(b) for b in batches(directions, None, 2)] == [2, 2, 2]
    assert batches(directions, 1, None) == [[place] for batch in cut for place in batch]


def test_a_direction_after_the_other(monkeypatch):
    """Few are taken together, so that the first are soon whole."""
    directions = [direction(f"{code}-en", [9] * 40) for code in "abcdefgh"]
    cut, processes = workers.schedule(translator("cuda"), directions)
    assert processes == 1
    assert sorted(item for batch in cut for item in batch) == [
        (place, number) for place in range(8) for number in range(40)
    ]
    last = {place: max(i for i, b in enumerate(cut) if place in dict(b)) for place in range(8)}
    assert last[0] < len(cut) / 7 and sorted(last.values()) == list(last.values())
    monkeypatch.setattr(workers, "cores", lambda: 3)
    assert workers.schedule(translator(), directions)[1] == 3


def test_batches_fit_into_memory(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    row = workers.LOGIT_BYTES * 1000
    directions = [direction("a-b", [9] * 40)]
    sizes = {}
    for name, free in (("much", None), ("little", 20 * row / workers.OF_FREE_MEMORY), ("none", 1)):
        monkeypatch.setattr(workers, "free_on_cpu", lambda free=free: free)
        cut, _ = workers.schedule(translator(max_tokens=1000), directions)
        sizes[name] = max(map(len, cut))
    assert sizes == {"much": 40, "little": 5, "none": 1}  # 20 rows, 2 processes, 2 beams


def test_a_process_that_is_killed():
    """Such as by the system when memory runs out."""

    def killed(sentences):
        os._exit(9)

    cut = [[(0, 0)], [(0, 1)]]
    with pytest.raises(
        ConfigError, match="a process that decodes was killed, most likely since mem"
    ):
        list(workers.translated(SimpleNamespace(translate=killed), [None], cut, 2))


def test_out_of_memory_on_the_gpu():
    def full(sentences):
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(
        ConfigError, match="the GPU's memory ran out on a batch of 1 sentences: low"
    ):
        list(workers.translated(SimpleNamespace(translate=full), [None], [[(0, 0)]], 1))
