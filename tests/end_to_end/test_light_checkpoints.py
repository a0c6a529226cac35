"""Checkpoints that leave the base model out, with the real commands."""

import json
import shutil

import pytest
import torch
from console import finetune_args, generate_args, lslora, run, with_option, without
from test_starts import average

from lslora_fairseq import checkpoints  # its package lets torch.load read fairseq's checkpoints
from lslora_fairseq.keys import tidy

SAVE = ["--lora-save", "adapters", "--lora-shared-rank", "2", "--lora-embedding-rank", "3"]
SAVE += ["--disable-validation"]


def args_of(corpus, save_dir, *more):
    """A run that saves every epoch."""
    return without(finetune_args(corpus, save_dir, *SAVE, *more), "--no-epoch-checkpoints", 0)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folders of two runs that are the same but for what they save; the light one was stopped
    after its first epoch, and resumed."""
    light, whole = (tmp_path_factory.mktemp(name) for name in ("light", "whole"))
    run("fairseq-train", *with_option(args_of(corpus, light), "--max-epoch", "1"))
    _, out, _ = run("fairseq-train", *args_of(corpus, light))
    assert "Loaded checkpoint" in out
    run("fairseq-train", *with_option(args_of(corpus, whole), "--lora-save", "all"))
    return light, whole


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def last(folder, name="checkpoint_last.pt"):
    return folder / name


def hypotheses(corpus, path, *more):
    _, out, _ = run("fairseq-generate", *generate_args(corpus, path, "en", "de", *more))
    lines = [line for line in out.splitlines() if line.startswith("H-")]
    assert len(lines) == 8
    return lines


def refused(command, args, told):
    status, _, err = run(command, *args, check=False)
    line = err.strip().splitlines()[-1]
    assert status == 1 and line.startswith("lslora: error: ") and told in line, line


def test_a_resumed_light_run_ends_in_the_bits_of_a_whole_one(runs):
    light, whole = runs
    same(checkpoints.read_checkpoint(last(light))[1], torch.load(last(whole))["model"])


def test_the_base_is_not_in_the_file(corpus, runs):
    inside = torch.load(last(runs[0]))["model"]
    assert "encoder.layers.0.fc1.weight" not in inside
    assert len(inside["encoder.embed_tokens.weight"]) == 4  # the language tokens
    sizes = [last(folder).stat().st_size for folder in runs]
    state = torch.load(corpus.base)["model"]
    tidy(state)  # which fairseq 0.12.2 fills with copies
    words = state["encoder.embed_tokens.weight"].numel()
    base = sum(w.numel() for w in state.values()) - 2 * words  # there under three names
    assert sizes[1] - sizes[0] > 0.9 * 4 * base


def test_commands_get_the_base_back(corpus, runs, tmp_path):
    light, whole = map(last, runs)
    assert hypotheses(corpus, light) == hypotheses(corpus, whole)
    for name, path in (("light", light), ("whole", whole)):
        lslora("extract", path, "--out", tmp_path / name)
        lslora(
            "evaluate", corpus.data, "--path", path, "--cpu", "--out", tmp_path / f"{name}.scores",
            "--pairs", "en-fr", "--bleu-tokenizer", "13a", "--max-len-b", "30",
        )  # fmt: skip
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "light" / path.name).read_bytes() == path.read_bytes()
    texts = [(tmp_path / f"{n}.scores" / "en-fr.hyp").read_bytes() for n in ("light", "whole")]
    assert texts[0] == texts[1]
    assert json.loads(lslora("inspect", light, "--format", "json")[1])


def test_an_average_of_light_ones(runs, tmp_path):
    found = []
    for folder in runs:
        paths = [last(folder, f"checkpoint{n}.pt") for n in (2, 3)]
        average(paths, tmp_path / f"{folder.name}.pt")
        found.append(checkpoints.read_checkpoint(tmp_path / f"{folder.name}.pt")[1])
    same(*found)


def test_a_further_stage_names_the_first_base(corpus, runs, tmp_path):
    args = with_option(args_of(corpus, tmp_path), "--finetune-from-model", last(runs[0]))
    run("fairseq-train", *with_option(args, "--max-epoch", "1"))
    assert torch.load(last(tmp_path))["lslora_base"]["path"] == str(corpus.base)


def test_a_base_that_was_moved(corpus, runs, tmp_path):
    """It is looked for beside the checkpoint, and where --lora-base says."""
    state = torch.load(last(runs[0]))
    state["lslora_base"]["path"] = "/gone/base.pt"
    path, expected = tmp_path / "light.pt", hypotheses(corpus, last(runs[0]))
    torch.save(state, path)
    told = f"{path} leaves its base model out, which is not at /gone/base.pt or {tmp_path}/base.pt"
    refused("fairseq-generate", generate_args(corpus, path, "en", "de"), told)
    assert hypotheses(corpus, path, "--lora-base", corpus.base) == expected
    shutil.copy(corpus.base, tmp_path / "base.pt")
    assert hypotheses(corpus, path) == expected
    other = torch.load(corpus.base)
    half = {**other, "model": {key: value.half() for key, value in other["model"].items()}}
    bias = "decoder.layers.1.fc2.bias"
    changed = {**other, "model": {**other["model"], bias: other["model"][bias] + 1}}
    told = f"{path} leaves its base model out, and {tmp_path}/base.pt is another one, or a copy in"
    for wrong in (half, changed):
        torch.save(wrong, tmp_path / "base.pt")
        refused("fairseq-generate", generate_args(corpus, path, "en", "de"), told)
    args = args_of(corpus, tmp_path / "run", "--lora-base", tmp_path / "base.pt")
    told = f"{tmp_path}/base.pt is not the base model of this run, decoder.layers.1.fc2.bias differ"
    refused("fairseq-train", args, told)
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("is_new", [True, False])
def test_what_is_refused(corpus, tmp_path, is_new):
    args = args_of(corpus, tmp_path / "run")
    if is_new:
        told = "leaves the base model out of checkpoints, and no command tells where it is: name it"
        refused("fairseq-train", without(args, "--finetune-from-model"), told)
    else:
        told = "--lora-save base must be all or adapters"
        refused("fairseq-train", with_option(args, "--lora-save", "base"), told)
