"""Adapters leave a checkpoint as files and come back onto the base, with the real commands."""

import json

import pytest
import torch
from console import (
    USER_DIR,
    adapters_in,
    assert_alike,
    finetune_args,
    generate_args,
    lslora,
    run,
    with_option,
    without,
)

from lslora_fairseq import cli  # its package lets torch.load read fairseq's checkpoints
from lslora_fairseq.errors import UserError

# an update that changes nothing, so that what was loaded can be read off what is saved
STILL = ["--lr", "0", "--max-update", "1", "--disable-validation", "--pruning-begin", "5"]
ON_BASE = "adapters of de, en, fr, ja, shared loaded from {}/de.safetensors and 4 more onto {}"


@pytest.fixture(scope="module")
def files(finetuned, tmp_path_factory):
    """The folder of the files of the fine-tuned model."""
    folder = tmp_path_factory.mktemp("files") / "adapters"
    _, out, _ = lslora("extract", finetuned[0], "--out", folder, "--licence", "MIT")
    assert out.splitlines()[-1].startswith("5 files, ")
    return folder


@pytest.fixture(scope="module")
def assembled(corpus, files, tmp_path_factory):
    path = tmp_path_factory.mktemp("assembled") / "assembled.pt"
    lslora("assemble", "--base", corpus.base, "--adapters", files, "--out", path)
    return path


@pytest.fixture(scope="module")
def expected(corpus, finetuned):
    """Hypotheses of the fine-tuned model, with their scores."""
    return hypotheses(*generate_args(corpus, finetuned[0], "en", "de"))


def hypotheses(*args):
    _, out, _ = run("fairseq-generate", *args)
    lines = [line for line in out.splitlines() if line.startswith("H-")]
    assert len(lines) == 8
    return lines


def model_of(save_dir):
    return torch.load(save_dir / "checkpoint_last.pt")["model"]


def bare(corpus, save_dir, *more):
    """A command that leaves out the languages and their ranks."""
    args = finetune_args(corpus, save_dir, *more)
    return without(without(args, "--lora-tiers"), "--lora-rank")


def refused(command, args, told):
    """The command ends with this one line; those of lslora that load no fairseq are run here."""
    if command in ("extract", "inspect", "assemble"):
        with pytest.raises(UserError) as ended:
            cli.main([command, *map(str, args)])
        line = str(ended.value)
    else:
        status, _, err = (lslora if command == "evaluate" else run)(command, *args, check=False)
        assert status == 1
        line = err.strip().splitlines()[-1]
    assert line.startswith("lslora: error: ") and line.isprintable() and told in line, line


def test_the_base_model_with_files_translates_as_what_they_came_from(
    corpus, files, assembled, expected
):
    base = generate_args(corpus, corpus.base, "en", "de", "--lora-adapters", files)
    _, out, err = run("fairseq-generate", *base)
    assert [line for line in out.splitlines() if line.startswith("H-")] == expected
    assert ON_BASE.format(files, corpus.base) in out + err
    assert hypotheses(*generate_args(corpus, assembled, "en", "de")) == expected
    assert hypotheses(*generate_args(corpus, corpus.base, "en", "de")) != expected


def test_interactive(corpus, finetuned, files):
    ours, whole = (
        run(
            "fairseq-interactive", corpus.data, "--user-dir", USER_DIR, "--cpu", "--task",
            "translation_multi_lslora", "-s", "en", "-t", "fr", "--path", path, *more,
            stdin="▁Not ▁a ▁valid ▁choice .\n",
        )[1]
        for path, more in ((corpus.base, ["--lora-adapters", files]), (finetuned[0], []))
    )  # fmt: skip
    (line,) = [line for line in ours.splitlines() if line.startswith("H-0\t")]
    assert line in whole.splitlines()


def test_evaluate(corpus, finetuned, files, tmp_path):
    with_files = ["--path", corpus.base, "--lora-adapters", files]
    ours = [corpus.data, "--cpu", "--max-len-b", "30", "--pairs", "en-de"]
    for name, model in (("files", with_files), ("whole", ["--path", finetuned[0]])):
        lslora("evaluate", *ours, *model, "--out", tmp_path / name)
    texts = [(tmp_path / name / "en-de.hyp").read_bytes() for name in ("files", "whole")]
    assert texts[0] == texts[1]
    results = json.loads((tmp_path / "files" / "scores.json").read_text())
    assert results["tiers"] == {"de": "high", "en": "high", "fr": "low", "ja": "low"}
    paths = [model["path"] for model in results["models"]]
    assert paths == [str(corpus.base), *map(str, sorted(files.glob("*.safetensors")))]
    told = f"{tmp_path / 'files'} was made with models"
    refused("evaluate", [*ours, "--path", corpus.base, "--out", tmp_path / "files"], told)
    scores = ["--scores", tmp_path / "files", "--langs", "fr"]
    lslora("extract", finetuned[0], "--out", tmp_path / "card", *scores)
    card = (tmp_path / "card" / "README.md").read_text("utf-8")
    assert "## Scores\n\n```text\nBLEU" in card and "- license" not in card
    assert sorted(p.name for p in (tmp_path / "card").glob("*.safetensors")) == [
        "fr.safetensors",
        "shared.safetensors",
    ]


def test_training_from_files_is_training_from_the_checkpoint(corpus, finetuned, files, tmp_path):
    """A second stage goes on pruning as it would have; what it saves needs no file any more."""
    more = ["--max-update", "4", "--disable-validation", "--pruning-final-sparsity", "0.95",
            "--pruning-begin", "0", "--pruning-duration", "1"]  # fmt: skip
    start = with_option(
        bare(corpus, tmp_path / "whole", *more), "--finetune-from-model", finetuned[0]
    )
    run("fairseq-train", *start)
    args = bare(corpus, tmp_path / "files", *more, "--lora-adapters", files)
    _, out, _ = run("fairseq-train", *args)
    assert ON_BASE.format(files, corpus.base) in out
    assert f"adapters continue from {files}/de.safetensors and 4 more: languages" in out
    whole, ours = model_of(tmp_path / "whole"), model_of(tmp_path / "files")
    for key, (A, B, _, mask) in adapters_in(whole, embeddings=True).items():
        A_files, B_files, _, mask_files = adapters_in(ours, embeddings=True)[key]
        assert torch.equal(B, B_files) and torch.equal(mask, mask_files), key
        assert torch.equal(A[A_files != 0], A_files[A_files != 0]) and A_files.any()
    assert (mask_files.logical_not()).any() or key[1] == "shared"
    saved = torch.load(tmp_path / "files" / "checkpoint_last.pt")["cfg"]
    assert saved["task"].lora_adapters is None and saved["model"].lora_adapters is None
    # it goes on without the files
    args = with_option(args, "--lora-adapters", tmp_path / "none")
    _, out, _ = run("fairseq-train", *with_option(args, "--max-update", "5"))
    assert "num_updates: 5" in out or "Loaded checkpoint" in out


def test_an_assembled_checkpoint_is_trained_further(corpus, assembled, tmp_path):
    args = with_option(bare(corpus, tmp_path, *STILL), "--finetune-from-model", assembled)
    run("fairseq-train", *args)
    before, after = torch.load(assembled)["model"], model_of(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_a_language_that_is_new_to_the_base(corpus, tmp_path):
    """Its file holds the row of its token, which the base lacks."""
    args = finetune_args(
        corpus,
        tmp_path / "run",
        "--max-update",
        "3",
        "--disable-validation",
        langs="oc,de,en,fr,ja",
    )
    args = with_option(args, "--lora-tiers", "high=en,de;low=fr,ja,oc")
    run("fairseq-train", *args)
    trained, folder = tmp_path / "run" / "checkpoint_last.pt", tmp_path / "files"
    lslora("extract", trained, "--out", folder)
    whole = hypotheses(*generate_args(corpus, trained, "en", "de"))
    more = ("--lora-adapters", folder)
    assert_alike(hypotheses(*generate_args(corpus, corpus.base, "en", "de", *more)), whole)
    lslora("assemble", "--base", corpus.base, "--adapters", folder, "--out", tmp_path / "x.pt")
    rows = torch.load(tmp_path / "x.pt")["model"]["encoder.embed_tokens.weight"]
    own = model_of(tmp_path / "run")["encoder.embed_tokens.weight"]
    assert torch.equal(rows[-5:], own[[-4, -3, -2, -1, -5]])  # new ones come last


def test_inspect(finetuned, files):
    tables = [lslora("inspect", path)[1] for path in (files, finetuned[0])]
    assert tables[0] == tables[1]
    assert "de.safetensors" in tables[0] and "90.0%" in tables[0]
    (about,) = json.loads(lslora("inspect", files / "fr.safetensors", "--format", "json")[1])
    assert (about["language"], about["tier"], about["token"]) == ("fr", "low", "__fr__")
    assert about["modules"][0] == {
        "name": "encoder.layers.0.self_attn.q_proj", "side": "source", "in_features": 32,
        "out_features": 32, "rank": 4, "alpha": 4,
    }  # fmt: skip
    assert about["bytes"] == (files / "fr.safetensors").stat().st_size


def test_what_is_refused(corpus, finetuned, files, assembled, tmp_path):
    checkpoint, base = finetuned[0], ["--base", corpus.base, "--adapters"]
    blocked = tmp_path / "file"
    blocked.touch()
    new, out = ["--out", tmp_path / "x"], ["--out", tmp_path / "x.pt"]
    alone = files / "fr.safetensors"
    for command, args, told in (
        ("extract", [checkpoint, "--out", files], f"--out {files} is there already: name a folder"),
        ("extract", [checkpoint, *new, "--langs", "xx"], "--langs names xx, and not languages"),
        ("extract", [corpus.base, *new], "has no adapters: name a checkpoint"),
        ("extract", [checkpoint, "--out", blocked / "x"], f"cannot write --out {blocked / 'x'} ("),
        ("assemble", ["--base", checkpoint, "--adapters", files, *out], "adapters of its own"),
        ("assemble", ["--base", tmp_path / "no", "--adapters", files, *out], "no: no such file"),
        ("assemble", [*base, alone, *out], "needs shared.safetensors, what the languages of"),
        ("assemble", [*base, files, "--out", blocked / "x"], f"cannot write --out {blocked}/x ("),
        ("inspect", [tmp_path / "no"], f"{tmp_path}/no: no such file"),
    ):
        refused(command, args, told)
    assert sorted(tmp_path.iterdir()) == [blocked]
    with_files = ["--lora-adapters", files]
    args = generate_args(corpus, checkpoint, "en", "de", *with_files)
    refused("fairseq-generate", args, "has adapters of its own, and those of")
    args = finetune_args(corpus, tmp_path / "run", *with_files)
    told = "--lora-rank 8 differs from high=2,low=4 of"
    refused("fairseq-train", with_option(args, "--lora-rank", "8"), told)
    args = bare(corpus, tmp_path / "run", *with_files)
    told = "--lora-adapters needs the base model that the files were trained on"
    refused("fairseq-train", without(args, "--finetune-from-model"), told)
    args = with_option(args, "--finetune-from-model", assembled)
    refused("fairseq-train", args, "has adapters of its own, and those of")


def test_a_damaged_file(corpus, files, tmp_path):
    content = bytearray((files / "fr.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "fr.safetensors").write_bytes(content)
    args = generate_args(corpus, corpus.base, "en", "de", "--lora-adapters", tmp_path)
    refused("fairseq-generate", args, "fr.safetensors is refused: it is damaged")
