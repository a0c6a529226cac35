"""A frozen base in bf16 through the console (--lora-base-dtype)."""

import json
import re
import shutil

import pytest
import torch
from console import (
    LANGS,
    USER_DIR,
    adapters_in,
    finetune_args,
    generate_args,
    lslora,
    run,
    with_option,
)
from optim.updates import same

from lslora_fairseq import checkpoints  # its package lets torch.load read fairseq's checkpoints
from lslora_fairseq.keys import EMBEDDINGS, FUSED_COPIES

KINDS = ["--lora-shared-rank", "2", "--lora-embedding-rank", "3", "--lora-train-tokens", "fr,ja"]
HALF = ["--lora-base-dtype", "bf16"]


def args_of(corpus, save_dir, *more):
    """Two epochs with every kind of adapter, pruned at the second; ja has no sentence."""
    args = finetune_args(corpus, save_dir, "--dropout", "0.1", "--weight-decay", "0.01", *KINDS)
    for option, value in (
        ("--criterion", "lslora_label_smoothed_cross_entropy"),
        ("--lang-pairs", "en-de,de-en,en-fr,fr-en"),
        ("--pruning-duration", "1"),
        ("--max-epoch", "2"),
    ):
        args = with_option(args, option, value)
    return [*args, *more]


def losses(out):
    return [
        [float(loss) for loss in re.findall(rf"\| {part} \| (?:epoch \d+ \| )?loss ([\d.]+)", out)]
        for part in (r"train", r"valid on 'valid' subset")
    ]


def last(folder):
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folders of runs and what they printed: in fp32; in bf16; in bf16, stopped after an epoch and
    resumed, with a light checkpoint at the end."""
    names = ("fp32", "whole", "parts")
    fp32, whole, parts = (tmp_path_factory.mktemp(name) for name in names)
    told = [run("fairseq-train", *args_of(corpus, fp32))[1]]
    told.append(run("fairseq-train", *args_of(corpus, whole, *HALF))[1])
    args = args_of(corpus, parts, *HALF)
    run("fairseq-train", *with_option(args, "--max-epoch", "1"))
    shutil.copy(last(parts), parts / "first.pt")
    run("fairseq-train", *args, "--lora-save", "adapters")
    return (fp32, whole, parts), told


def test_losses_are_those_of_fp32(runs):
    for expected, found in zip(*map(losses, runs[1])):
        assert len(found) == 2 and found == pytest.approx(expected, abs=0.02)
    assert losses(runs[1][0]) != losses(runs[1][1])


def same_states(one, other):
    for read in (lambda path: checkpoints.read_checkpoint(path)[1], optimizer_in):
        assert same(dict(read(one)), dict(read(other)))


def optimizer_in(path):
    return torch.load(path)["last_optimizer_state"]


def test_a_resumed_run_ends_in_the_same_bits(runs):
    same_states(*map(last, runs[0][1:]))


@pytest.mark.slow
def test_a_light_checkpoint_is_resumed_to_the_same_bits(corpus, runs, tmp_path):
    for folder in runs[0][1:]:
        (tmp_path / folder.name).mkdir()
        shutil.copy(last(folder), tmp_path / folder.name)
        args = args_of(corpus, tmp_path / folder.name, *HALF)
        _, out, _ = run("fairseq-train", *with_option(args, "--max-epoch", "3"))
        assert "| epoch 003 |" in out and "| epoch 002 |" not in out
    same_states(*(last(tmp_path / folder.name) for folder in runs[0][1:]))


def test_checkpoints_hold_the_base_as_it_was(corpus, runs):
    base, (_, whole, parts) = torch.load(corpus.base)["model"], runs[0]
    words = len(base[EMBEDDINGS[0]]) - len(LANGS.split(","))
    row_of = words + LANGS.split(",").index("fr")
    for path in (last(whole), parts / "first.pt", last(parts)):
        found = checkpoints.read_checkpoint(path)[1]
        for key, weight in base.items():
            if key.rpartition(".")[2] in ("_float_tensor", *FUSED_COPIES):
                continue  # of fairseq 0.12.2, without meaning here
            assert found[key].dtype == weight.dtype, key
            if key in EMBEDDINGS:
                moved = (found[key] != weight).any(1).nonzero().flatten().tolist()
                assert moved == [row_of], key  # a row that is trained; ja has no sentence
            else:
                assert torch.equal(found[key], weight), key
        row = found[EMBEDDINGS[0]][row_of]
        assert not torch.equal(row, row.bfloat16().float())
    sizes = [last(folder).stat().st_size for folder in runs[0]]
    assert sizes[2] < 0.8 * sizes[0] and sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_pruned_entries_are_zero_and_an_absent_language_does_not_move(runs):
    before, after = (
        adapters_in(torch.load(path)["model"])
        for path in (runs[0][2] / "first.pt", last(runs[0][1]))
    )
    removed, entries = 0, 0
    for (layer, owner), (A, B, _, mask) in after.items():
        assert A.dtype == torch.float and not B[~mask].any()
        if owner == "ja":
            assert all(map(torch.equal, before[layer, owner], after[layer, owner]))
            assert mask.all()
        else:
            assert not torch.equal(before[layer, owner][0], A)
        if owner in ("de", "en", "fr"):
            removed, entries = removed + int((~mask).sum()), entries + mask.numel()
    assert removed / entries == pytest.approx(0.9, abs=0.001)


def test_checkpoints_are_decoded_in_fp32_unless_asked(corpus, runs):
    """A light one of a run in bf16. In bf16 the score of a hypothesis has other last digits, and
    beam search may find another one."""

    def scores(*more):
        args = generate_args(corpus, last(runs[0][2]), "en", "de", *more)
        lines = run("fairseq-generate", *args)[1].splitlines()
        return [float(line.split("\t")[1]) for line in lines if line.startswith("H-")]

    usual, half = scores(), scores(*HALF)
    assert len(half) == 8
    near = [one == pytest.approx(other, abs=0.05) for one, other in zip(half, usual)]
    assert sum(near) > 4 and half != usual


@pytest.mark.slow
def test_results_tell_the_dtype_of_the_base(corpus, runs, tmp_path):
    made = {}
    for name, more in (("fp32", []), ("bf16", HALF)):
        lslora(
            "evaluate", corpus.data, "--path", last(runs[0][1]), "--cpu", "--out", tmp_path / name,
            "--pairs", "en-fr", "--bleu-tokenizer", "13a", "--max-len-b", "30", *more,
        )  # fmt: skip
        results = json.loads((tmp_path / name / "scores.json").read_text())
        made[name] = results["decoding"]
    assert made["bf16"] == {**made["fp32"], "lora_base_dtype": "bfloat16"}
    assert "lora_base_dtype" not in made["fp32"]


def test_validation_in_fp32_agrees_with_that_of_training(corpus, runs):
    _, out, _ = run(
        "fairseq-validate", corpus.data, "--user-dir", USER_DIR, "--cpu", "--task",
        "translation_multi_lslora", "--path", last(runs[0][1]), "--valid-subset", "valid",
        "--max-tokens", "600", "--num-workers", "0",
    )  # fmt: skip
    assert losses(out)[1] == pytest.approx(losses(runs[1][1])[1][-1:], abs=0.02)


@pytest.mark.slow
def test_a_stage_of_one_language_keeps_the_others(corpus, runs, tmp_path):
    """In bf16, from a light checkpoint of a run in bf16."""
    start = last(runs[0][2])
    args = args_of(corpus, tmp_path, *HALF, "--lora-train-languages", "fr", "--disable-validation")
    args = with_option(args, "--lora-train-tokens", "fr")
    args = with_option(with_option(args, "--finetune-from-model", start), "--max-epoch", "1")
    run("fairseq-train", *with_option(args, "--lang-pairs", "en-fr,fr-en"))
    before, after = checkpoints.read_checkpoint(start)[1], torch.load(last(tmp_path))["model"]
    moved = {key for key, weight in after.items() if not torch.equal(weight, before[key])}
    names = {key.rpartition(".")[2] for key in moved - {*EMBEDDINGS}}
    assert {"lora_fr"} <= names <= {"lora_fr", "pruned"}
    words = len(before[EMBEDDINGS[0]]) - len(LANGS.split(","))
    rows = (before[EMBEDDINGS[0]] != after[EMBEDDINGS[0]]).any(1).nonzero().flatten().tolist()
    assert rows == [words + LANGS.split(",").index("fr")]
