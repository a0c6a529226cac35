"""A language that comes later, through the console: onto a checkpoint, and onto adapter files."""

import pytest
import torch
from console import adapters_in, finetune_args, generate_args, lslora, run, with_option, without

FIRST = ["--lora-shared-rank", "3", "--lora-embedding-rank", "2", "--lr", "0.02"]
LATER = [
    "--disable-validation", "--max-update", "6", "--lora-train-languages", "ja", "--lora-tiers",
    "low=ja", "--lr", "0.02", "--pruning-begin", "0", "--pruning-final-sparsity", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """A run without Japanese, pruned, and the folder of its adapter files."""
    folder = tmp_path_factory.mktemp("first")
    args = finetune_args(corpus, folder / "run", *FIRST, "--disable-validation")
    args = with_option(args, "--lora-tiers", "high=en;medium=fr;low=de")
    args = with_option(args, "--lora-rank", "high=2,medium=4,low=4")
    args = with_option(args, "--lang-pairs", "en-de,de-en,en-fr,fr-en")
    run("fairseq-train", *args)
    checkpoint, files = folder / "run" / "checkpoint_last.pt", folder / "adapters"
    lslora("extract", checkpoint, "--out", files)
    return checkpoint, files


def adding(corpus, save_dir, start, *more):
    args = finetune_args(corpus, save_dir)
    args = without(without(without(args, "--lora-tiers"), "--lora-rank"), "--max-epoch")
    args = with_option([*args, *LATER, *more], "--finetune-from-model", start)
    return with_option(args, "--lang-pairs", "en-ja,ja-en")


@pytest.fixture(scope="module")
def later(corpus, first, tmp_path_factory):
    """The checkpoint of a further stage that adds Japanese, and what it printed."""
    folder = tmp_path_factory.mktemp("later")
    _, out, _ = run("fairseq-train", *adding(corpus, folder, first[0]))
    return folder / "checkpoint_last.pt", out


def model_of(checkpoint):
    return torch.load(checkpoint)["model"]


def test_all_others_keep_every_bit(first, later):
    before, after = (adapters_in(model_of(path), embeddings=True) for path in (first[0], later[0]))
    for key, was in before.items():
        assert all(map(torch.equal, was, after[key])), key
    new = {key: parts for key, parts in after.items() if key not in before}
    assert {code for _, code in new} == {"ja"}
    for (layer, _), (A, B, _, mask) in new.items():
        assert A.any() and B.any() and not B[~mask].any(), layer
        assert len(B) == 4  # the rank of its tier
    assert "its own, and ja new; optimizer" in later[1]
    assert "only the adapters of ja are trained" in later[1]


def test_their_files_are_the_same_bytes(first, later, tmp_path):
    lslora("extract", later[0], "--out", tmp_path / "all")
    for path in sorted(first[1].glob("*.safetensors")):
        assert (tmp_path / "all" / path.name).read_bytes() == path.read_bytes(), path.name
    names = {path.name for path in (tmp_path / "all").glob("*.safetensors")}
    assert names - {path.name for path in first[1].iterdir()} == {"ja.safetensors"}


def test_their_directions_give_the_same_text_and_scores(corpus, first, later):
    texts = []
    for path in (first[0], later[0]):
        _, out, _ = run("fairseq-generate", *generate_args(corpus, path, "en", "fr"))
        texts.append([line for line in out.splitlines() if line.startswith("H-")])
    assert len(texts[0]) == 8 and texts[0] == texts[1]


def test_onto_files_is_onto_the_checkpoint(corpus, first, later, tmp_path):
    args = adding(corpus, tmp_path, corpus.base, "--lora-adapters", first[1])
    run("fairseq-train", *args)
    ours, expected = model_of(tmp_path / "checkpoint_last.pt"), model_of(later[0])
    assert ours.keys() == expected.keys()
    for (layer, code), parts in adapters_in(expected).items():
        if code == "ja":
            assert all(map(torch.equal, parts, adapters_in(ours)[layer, code])), layer
    options = torch.load(tmp_path / "checkpoint_last.pt")["cfg"]["model"]
    assert options.lora_tiers == "high=en;medium=fr;low=de,ja"
    assert options.lora_rank == "high=2,medium=4,low=4"


def test_the_same_command_goes_on(corpus, first, tmp_path):
    """A run that adds a language is resumed to the bits of one that was never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("fairseq-train", *adding(corpus, whole, first[0]))
    args = adding(corpus, parts, first[0])
    run("fairseq-train", *with_option(args, "--max-update", "3"))
    _, out, _ = run("fairseq-train", *args)
    assert "Loaded checkpoint" in out
    expected, ours = (model_of(folder / "checkpoint_last.pt") for folder in (whole, parts))
    assert expected.keys() == ours.keys()
    for key, value in expected.items():
        assert torch.equal(value, ours[key]), key


@pytest.mark.parametrize(
    "more, told",
    [
        (["--lora-tiers", "high=ja,fr"], "fr is in the tier medium, and cannot move to high: leav"),
        (["--lora-tiers", "tiny=ja"], "--lora-rank gives no value for ja: add the language or its"),
        (["--lora-rank", "4"], "--lora-rank 4 differs from high=2,medium=4,low=4 of"),
        (["--lora-train-languages", "oc"], "--lora-train-languages names oc, and not languages of"),
        (["--lora-tiers", "low=oc"], "--lora-train-languages names ja, and not languages of --lora"),
    ],
)
def test_what_is_refused(corpus, first, tmp_path, more, told):
    args = adding(corpus, tmp_path / "run", first[0])
    for option, value in zip(more[::2], more[1::2]):
        args = with_option(args, option, value) if option in args else [*args, option, value]
    status, _, err = run("fairseq-train", *args, check=False)
    assert status == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith("lslora: error: ") and told in line, line
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_the_doctor_knows_what_is_new(corpus, first):
    """And compares the rest."""
    args = ["doctor", "--checkpoint", first[0], "--langs", "de,en,fr,ja", "--lora-tiers"]
    status, out, _ = lslora(*args, "low=ja", "--lora-train-languages", "ja")
    assert "only those of ja are trained; those of ja are new" in out and status == 0
    _, out, _ = lslora(*args, "high=de,ja", check=False)
    assert "de is in the tier low, and cannot move to high: leave it where it is" in out
