"""How a run ends early: what a signal does, and what is told of other processes."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from lslora_fairseq import stopping
from lslora_fairseq.errors import UserError


@pytest.fixture
def trainer(monkeypatch):
    """Stands for fairseq's; ``saved`` counts its checkpoints."""
    iterator = SimpleNamespace(end_of_epoch=lambda: made.is_end)
    made = SimpleNamespace(
        lslora_iterator=iterator, is_end=False, saved=0, data_parallel_world_size=1,
        cfg=SimpleNamespace(checkpoint=SimpleNamespace()), get_num_updates=lambda: 7,
    )  # fmt: skip

    def save(options, of, itr, loss):
        assert (of, itr, loss) == (made, iterator, None)
        made.saved += 1

    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", save)
    return made


def test_a_run_is_saved_and_stopped_in_the_middle_of_an_epoch(trainer):
    with pytest.raises(SystemExit) as stopped:
        stopping._save_and_stop(trainer)
    assert stopped.value.code == 75 and trainer.saved == 1


def test_at_the_end_of_an_epoch_it_is_saved_and_validated_first(trainer):
    trainer.is_end = True
    stopping._save_and_stop(trainer)
    assert trainer.saved == 1


def test_all_processes_know_what_one_was_told():
    stop, other = stopping.StopRequest(), stopping.StopRequest()
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        stop.listen()
        for number in stopping.SIGNALS:
            stop.asked = False
            os.kill(os.getpid(), number)
            assert stop.asked and not stop.agreed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    outputs = [{}, {}]
    for request, output in zip((stop, other), outputs):
        request.tell(output)
    added = [{key: torch.tensor(sum(o[key] for o in outputs)) for key in outputs[0]}]
    for request in (stop, other):
        for told in ([{"loss": 1}], added, [{}]):  # the second one tells, and is not forgotten
            request.hear(told)
        assert request.agreed
    other = stopping.StopRequest()
    other.hear([{stopping.ASKED: torch.tensor(0.0)}])
    assert not other.agreed


@pytest.mark.parametrize(
    "error, told",
    [
        (RuntimeError("[/gloo/tcp/pair.cc:5] Connection closed by peer [::1]:4. And more"), True),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp, ncclRemoteError\nmore"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("/gloo/"), False),
    ],
)
def test_an_error_of_the_connection_is_told_in_one_line(monkeypatch, error, told):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)

    def fails(self):
        raise error

    with pytest.raises(UserError if told else type(error)) as raised:
        stopping._telling_of_the_others(fails)(None)
    said = str(raised.value)
    if told:
        assert "\n" not in said and said.startswith("lslora: error: rank 3: another process of")
        assert (
            "(Connection closed by peer [::1]:4)" in said or "(NCCL error in: x.cpp, nccl" in said
        )


def test_the_trainer_is_wrapped_once():
    wrapped = Trainer.train_step
    stopping.end_early()
    assert Trainer.train_step is wrapped and wrapped.ending_early
