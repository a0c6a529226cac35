"""A run that is killed, or stopped by a signal, and started again ends in the same bits as one that
was never disturbed."""

import os
import signal
from pathlib import Path

import pytest
import torch
from console import adapters_in, finetune_args, run, start, with_option
from fairseq.file_io import PathManager
from optim.updates import same

SCHEDULES = {
    "epoch": [],
    "update": ["--pruning-unit", "update", "--pruning-begin", "2", "--pruning-duration", "15"],
    "weight learning, and shared": [
        "--lora-weight-learning", "--lora-shared-rank", "2", "--lora-embedding-rank", "2",
    ],
}  # fmt: skip


def start_and_end(args, line, log, number=signal.SIGKILL, status=-signal.SIGKILL):
    """Starts fairseq-train and sends it a signal, of which it ends, when its output has reached
    *line*; returns what it printed from there on."""
    reading, writing = os.pipe()
    with open(reading) as out, open(log, "w") as errors:
        with open(os.devnull) as nothing, open(writing, "w") as written:
            process = start(
                "fairseq-train", *args, files=(nothing, written, errors), PYTHONUNBUFFERED="1"
            )
        for text in out:
            if line in text:
                break
        else:
            pytest.fail(f"the run ended before {line!r}; see {log}")
        os.kill(process.pid, number)
        rest = out.read()
    assert process.wait() == status
    return rest


@pytest.mark.parametrize(
    "unit",
    [pytest.param(name, marks=pytest.mark.slow if name != "epoch" else ()) for name in SCHEDULES],
)
def test_killed_run_ends_in_the_same_bits(corpus, tmp_path, unit):
    def args(name):
        # a checkpoint every 2 updates, the last one copied over checkpoint_last.pt each time
        return finetune_args(
            corpus, tmp_path / name, "--save-interval-updates", "2", "--keep-interval-updates",
            "1", "--dropout", "0.1", "--weight-decay", "0.01", "--clip-norm", "1.0",
            "--update-freq", "2", "--max-tokens", "200", *SCHEDULES[unit],
        )  # fmt: skip

    run("fairseq-train", *args("whole"))
    moments = [
        "begin training epoch 1",  # before the first checkpoint
        "Preparing to save checkpoint for epoch 2 @ 10 updates",  # in the middle of the schedule
        "Saving checkpoint to",  # while a file is written
    ]
    for line in moments:
        start_and_end(args("killed"), line, tmp_path / "log")
    line = "begin training epoch 3"
    said = start_and_end(args("killed"), line, tmp_path / "log", signal.SIGTERM, 75)
    assert "stopped by a signal after" in said
    run("fairseq-train", *args("killed"), fresh=unit == "epoch")  # one with another order of hashes
    whole, killed = (
        torch.load(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "killed")
    )
    assert same(whole["model"], killed["model"])
    assert same(whole["last_optimizer_state"], killed["last_optimizer_state"])
    updates = [s["optimizer_history"][-1]["num_updates"] for s in (whole, killed)]
    assert updates[0] == updates[1] > 10
    found = adapters_in(whole["model"]).items()
    masks = [mask for (_, owner), (_, _, _, mask) in found if owner != "shared"]
    assert 0.89 < 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks) < 0.91


def test_resume_needs_no_adapter_options(corpus, tmp_path):
    """Tiers, ranks and sides come from the checkpoint; a TSV of tiers may be gone by then."""
    tiers = tmp_path / "tiers.tsv"
    tiers.write_text("en\thigh\nde\thigh\nfr\tlow\nja\tlow\n")
    args = with_option(finetune_args(corpus, tmp_path / "run"), "--lora-tiers", tiers)
    run("fairseq-train", *with_option(args, "--max-epoch", "1"), "--encoder-index-side", "target")
    tiers.unlink()
    shorter = list(args)
    for option in ("--lora-tiers", "--lora-rank"):
        place = shorter.index(option)
        del shorter[place : place + 2]
    run("fairseq-train", *with_option(shorter, "--max-epoch", "2"))
    state = torch.load(tmp_path / "run" / "checkpoint_last.pt")
    options = vars(state["cfg"]["model"])
    assert options["lora_tiers"] == "high=de,en;low=fr,ja"
    assert options["lora_rank"] == "high=2,low=4"
    assert options["encoder_index_side"] == "target"
    assert state["extra_state"]["train_iterator"]["epoch"] == 3  # the next one


def test_a_copy_that_is_cut_short_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import shutil

    old, new = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint3.pt"
    old.write_bytes(b"old")
    new.write_bytes(b"new" * 1000)

    def cut_short(src, dst):
        Path(dst).write_bytes(b"ne")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", cut_short)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_bytes() == b"old"
    PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_bytes() == new.read_bytes()
