"""What a run starts from is known from the checkpoint that fairseq loads, on every way in."""

import re
import shutil

import pytest
import torch
from console import (
    USER_DIR,
    adapters_in,
    finetune_args,
    generate_args,
    run,
    with_option,
    without,
)

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

OTHER = "ja,fr,en,de"
# an update that changes nothing, so that what was loaded can be read off what is saved
STILL = ["--lr", "0", "--max-update", "1", "--disable-validation"]


def model_of(save_dir, name="checkpoint_last.pt"):
    return torch.load(save_dir / name)["model"]


def train(args, **kwargs):
    return run("fairseq-train", *args, **kwargs)[1]


def refused(args, message):
    """The command ends with this one line."""
    status, _, err = run("fairseq-train", *args, check=False)
    assert status == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"lslora: error: {message}"), line


def same_weights(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def epochs(args, number):
    return with_option([*args, "--disable-validation"], "--max-epoch", str(number))


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """Folder of a run of three epochs with a checkpoint of each; adapters scaled, half pruned."""
    save_dir = tmp_path_factory.mktemp("first")
    args = without(finetune_args(corpus, save_dir), "--no-epoch-checkpoints", 0)
    args += ["--lora-alpha", "32", "--pruning-final-sparsity", "0.5", "--pruning-begin", "0"]
    train(epochs(args, 3))
    return save_dir


def bare(corpus, save_dir, *more, start=()):
    """A command that leaves out every option of the adapters."""
    args = without(finetune_args(corpus, save_dir, *more), "--finetune-from-model")
    return [*without(without(args, "--lora-tiers"), "--lora-rank"), *start]


def test_the_order_of_languages_is_matched_on_every_way_in(corpus, tmp_path):
    """--langs in another order than the base's: rows follow their tokens, once."""
    langs = {"langs": OTHER}
    plain = finetune_args(corpus, tmp_path / "plain", **langs)
    train(epochs(plain, 1))
    train(epochs(plain, 2))
    suffix = [*finetune_args(corpus, tmp_path / "suffix", **langs), "--checkpoint-suffix", "_x"]
    train(epochs(suffix, 1))
    train(epochs(suffix, 2))
    same_weights(
        model_of(tmp_path / "plain"), model_of(tmp_path / "suffix", "checkpoint_last_x.pt")
    )
    restored = with_option(
        without(finetune_args(corpus, tmp_path / "restored", **langs), "--finetune-from-model"),
        "--max-epoch",
        "1",
    )
    resets = [f"--reset-{what}" for what in ("optimizer", "lr-scheduler", "meters", "dataloader")]
    train([*restored, "--restore-file", corpus.base, *resets, *STILL])
    rows = model_of(tmp_path / "restored")["encoder.embed_tokens.weight"]
    assert torch.equal(rows, model_of(tmp_path / "plain")["encoder.embed_tokens.weight"])
    base = torch.load(corpus.base)["model"]["encoder.embed_tokens.weight"]
    assert torch.equal(rows[:-4], base[:-4]) and torch.equal(rows[-4:].flip(0), base[-4:])


def test_a_run_that_continues_another_once(corpus, first, tmp_path):
    """It needs none of the adapters' options, and is the run that would have gone on."""
    on = shutil.copytree(first, tmp_path / "on")
    more = ["--pruning-final-sparsity", "0.5", "--pruning-begin", "0"]
    train(epochs(bare(corpus, on, *more), 4))
    last = first / "checkpoint_last.pt"
    for name, start in (
        ("once", ["--continue-once", last]),
        ("beside", ["--continue-once", last, "--finetune-from-model", corpus.base]),
    ):
        out = train(epochs(bare(corpus, tmp_path / name, *more, start=start), 4))
        assert "random weights" not in out
        same_weights(model_of(on), model_of(tmp_path / name))
    swapped = with_option(
        bare(corpus, tmp_path / "x", start=["--continue-once", last]), "--langs", OTHER
    )
    refused(swapped, f"{last} was trained with --langs de,en,fr,ja, this run has {OTHER}: the or")
    gone = bare(corpus, tmp_path / "x", start=["--continue-once", tmp_path / "gone.pt"])
    refused(gone, f"--continue-once {tmp_path}/gone.pt: no such file, and nothing to train from")


def test_a_checkpoint_outlives_the_one_it_was_started_from(corpus, first, tmp_path):
    start = shutil.copy(first / "checkpoint_last.pt", tmp_path / "start.pt")
    more = ["--pruning-final-sparsity", "0.5", "--pruning-begin", "0"]
    train(epochs(bare(corpus, tmp_path / "run", *more, start=["--restore-file", start]), 4))
    (tmp_path / "start.pt").unlink()
    path = tmp_path / "run" / "checkpoint_last.pt"
    _, out, _ = run(
        "fairseq-validate", corpus.data, "--user-dir", USER_DIR, "--cpu", "--task",
        "translation_multi_lslora", "--path", path, "--valid-subset", "valid", "--max-tokens",
        "600", "--num-workers", "0",
    )  # fmt: skip
    assert re.search(r"valid on 'valid' subset \| loss [\d.]+", out)
    run("fairseq-generate", *generate_args(corpus, path, "en", "de"))


def average(paths, out):
    """As fairseq's scripts/average_checkpoints.py: all of the first, with the mean of the models;
    whole numbers are divided with their remainder dropped."""
    states = [torch.load(path) for path in paths]
    mean = {key: value.clone() for key, value in states[0]["model"].items()}
    for state in states[1:]:
        for key, value in state["model"].items():
            mean[key] += value
    for key, value in mean.items():
        if value.is_floating_point():
            value.div_(len(paths))
        else:
            mean[key] //= len(paths)
    torch.save({**states[0], "model": mean}, out)
    return mean


def test_an_average_decodes_resumes_and_keeps_what_is_pruned_in_all(corpus, first, tmp_path):
    paths = [first / f"checkpoint{n}.pt" for n in (2, 3)]
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint_last.pt"
    mean = average(paths, path)
    pruned = [adapters_in(torch.load(p)["model"]) for p in paths]
    gone = 0
    for key, (_, B, _, mask) in adapters_in(mean).items():
        both = ~pruned[0][key][3] & ~pruned[1][key][3]
        assert torch.equal(~mask, both) and not B[both].any()
        gone += int(both.sum())
    assert gone
    run("fairseq-generate", *generate_args(corpus, path, "en", "de"))
    more = ["--pruning-final-sparsity", "0.5", "--pruning-begin", "0", "--lr", "0"]
    train(epochs(bare(corpus, tmp_path / "run", *more), 4))
    resumed = adapters_in(model_of(tmp_path / "run"))
    for key, (A, B, _, mask) in adapters_in(mean).items():
        assert torch.equal(resumed[key][0], A)
        kept = resumed[key][3]
        assert torch.equal(resumed[key][1], B * kept)
        assert not (kept & ~mask).any()


def test_a_further_stage_takes_the_adapters_as_they_are(corpus, first, tmp_path):
    """Scaling and masks included; what contradicts them is refused, what may change is said."""
    start = first / "checkpoint_last.pt"
    before = model_of(first)
    args = bare(corpus, tmp_path / "second", "--finetune-from-model", start, *STILL)
    args = with_option(args, "--pruning-begin", "5")
    out = train([*args, "--lora-dropout", "0.1"])
    same_weights(before, model_of(tmp_path / "second"))
    saved = torch.load(tmp_path / "second" / "checkpoint_last.pt")
    options = saved["cfg"]["model"] if saved.get("cfg") else saved["args"]
    assert options.lora_alpha == "32" and options.lora_dropout == 0.1
    found = adapters_in(before).items()
    masks = [mask for (_, owner), (*_, mask) in found if owner != "shared"]
    pruned, entries = sum(int((~m).sum()) for m in masks), sum(2 * m.numel() for m in masks)
    told = f"{pruned:,} of {entries:,} entries are pruned and stay so (--pruning-masks reset frees"
    assert pruned and f"adapters continue from {start}: " in out and told in out
    reset = with_option(args, "--save-dir", tmp_path / "reset")
    out = train([*reset, "--pruning-masks", "reset"])
    assert f"; 0 of {entries:,} entries are pruned" in out
    freed = model_of(tmp_path / "reset")
    for key, value in before.items():
        expected = torch.zeros_like(value) if key.endswith(".pruned") else value
        assert torch.equal(freed[key], expected), key
    refused(
        [*with_option(args, "--save-dir", tmp_path / "x"), "--lora-alpha", "8"],
        f"--lora-alpha 8 differs from 32 of {start}, which this run starts from: leave the option",
    )
    # the same in other words
    train([*with_option(args, "--save-dir", tmp_path / "y"), "--lora-alpha", "high=32,low=32.0"])
    same_weights(before, model_of(tmp_path / "y"))


def test_a_stage_with_languages_in_another_order_matches_their_tokens(corpus, first, tmp_path):
    start = ["--finetune-from-model", first / "checkpoint_last.pt", *STILL]
    args = with_option(bare(corpus, tmp_path, *start), "--langs", OTHER)
    train(with_option(args, "--pruning-begin", "5"))
    before, after = (
        m["encoder.embed_tokens.weight"] for m in (model_of(first), model_of(tmp_path))
    )
    assert torch.equal(after[:-4], before[:-4]) and torch.equal(after[-4:].flip(0), before[-4:])
