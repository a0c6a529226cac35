"""A language that comes later, through the console: onto a checkpoint, and onto adapter files."""

import shlex

import pytest
import torch
from console import (
    adapters_in,
    assert_alike,
    finetune_args,
    generate_args,
    lslora,
    run,
    with_option,
    without,
)

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

FIRST = ["--lora-shared-rank", "3", "--lora-embedding-rank", "2"]
LATER = [
    "--disable-validation", "--max-update", "6", "--lora-train-languages", "ja", "--lora-tiers",
    "low=ja", "--pruning-begin", "0", "--pruning-final-sparsity", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """A run without Japanese, pruned, and the folder of its adapter files."""
    folder = tmp_path_factory.mktemp("first")
    args = finetune_args(corpus, folder / "run", *FIRST, "--disable-validation")
    args = with_option(args, "--lr", "0.02")
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
    args = with_option(args, "--lr", "0.02")
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
    texts = [
        hypotheses("fairseq-generate", *generate_args(corpus, path, "en", "fr"))
        for path in (first[0], later[0])
    ]
    assert texts[0] == texts[1]


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
        (
            ["--lora-tiers", "low=oc"],
            "--lora-train-languages names ja, and not languages of --lora",
        ),
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


@pytest.fixture(scope="module")
def occitan(corpus, tmp_path_factory):
    """A data folder in which the Japanese text stands for Occitan, of which the base knows
    nothing."""
    folder = tmp_path_factory.mktemp("data")
    for path in corpus.data.iterdir():
        (folder / path.name).symlink_to(path)
        if "ja" in path.name:
            (folder / path.name.replace("ja", "oc")).symlink_to(path)
    return folder


def unknown(corpus, occitan, save_dir, start, *more):
    """The further stage that adds Occitan, which starts as French."""
    args = adding(corpus, save_dir, start, "--lora-init-from", "oc=fr", *more)
    for option, value in (
        ("--lora-tiers", "low=oc"),
        ("--lora-train-languages", "oc"),
        ("--lang-pairs", "en-oc,oc-en"),
        ("--langs", "de,en,fr,ja,oc"),
    ):
        args = with_option(args, option, value)
    return [occitan, *args[1:]]


WORDS = "encoder.embed_tokens.weight"
STILL = ["--lr", "0", "--max-update", "1"]


def test_an_unknown_language_starts_as_the_one_it_is_told(corpus, occitan, first, tmp_path):
    """Adapters and the row of its token; the embeddings' adapter adds nothing to the row."""
    args = unknown(corpus, occitan, tmp_path, first[0])
    for option, value in zip(STILL[::2], STILL[1::2]):
        args = with_option(args, option, value)
    args = with_option(args, "--pruning-final-sparsity", "0")
    _, out, _ = run("fairseq-train", *args)
    assert "new to the base model, with a row that is trained: __oc__" in out
    before, after = model_of(first[0]), model_of(tmp_path / "checkpoint_last.pt")
    found = adapters_in(after, embeddings=True)
    for (layer, code), (A, B, mask_A, mask_B) in found.items():
        if code == "oc":
            assert torch.equal(A, found[layer, "fr"][0]) and torch.equal(B, found[layer, "fr"][1])
            assert mask_A.all() and mask_B.all()
    A, B = found["embedding_adapters", "shared"][:2]
    assert torch.equal(after[WORDS][:-1], before[WORDS])
    fr = len(before[WORDS]) - 2
    torch.testing.assert_close(after[WORDS][-1], before[WORDS][fr] + A.t() @ B[:, fr])
    assert not B[:, -1].any() and B[:, fr].any()


def test_an_unknown_language_is_trained_with_its_token(corpus, occitan, first, tmp_path):
    """From files and from the checkpoint alike; resumed, taken out, loaded and merged, it is the
    same."""
    folders = [tmp_path / name for name in ("files", "whole")]
    more = ("--lora-adapters", first[1])
    # (a file has zeros where a row of A can have no effect: not what a start is compared with)
    args, other = (
        without(unknown(corpus, occitan, *start), "--lora-init-from")
        for start in ((folders[0], corpus.base, *more), (folders[1], first[0]))
    )
    run("fairseq-train", *with_option(args, "--max-update", "3"))
    run("fairseq-train", *args)
    run("fairseq-train", *other)
    ours, whole = (model_of(folder / "checkpoint_last.pt") for folder in folders)
    assert torch.equal(ours[WORDS], whole[WORDS])
    for key, parts in adapters_in(whole).items():
        if key[1] == "oc":
            assert all(map(torch.equal, parts, adapters_in(ours)[key])), key
    before = model_of(first[0])[WORDS]
    assert torch.equal(ours[WORDS][:-1], before)
    checkpoint, files = folders[0] / "checkpoint_last.pt", tmp_path / "adapters"
    lslora("extract", checkpoint, "--langs", "oc", "--out", files)
    together = f"{first[1]},{files / 'oc.safetensors'}"
    for pair in ("en-oc", "oc-en", "en-fr"):
        sources = [(checkpoint, ()), (corpus.base, ("--lora-adapters", together))]
        if "oc" not in pair:  # other directions see nothing of the new token, to the last digit
            sources.append((first[0], ()))
        texts = []
        for path, more in sources:
            args = [occitan, *generate_args(corpus, path, *pair.split("-"), *more)[1:]]
            texts.append(hypotheses("fairseq-generate", *args))
        assert all(text == texts[0] for text in texts)
        _, line, _ = lslora("merge", checkpoint, "--pair", pair, "--out", tmp_path / f"{pair}.pt")
        command, _, *words = shlex.split(line)
        assert ("oc" in words[words.index("--langs") + 1].split(",")) == ("oc" in pair)
        words += ["--cpu", "--gen-subset", "test", "--beam", "3", "--num-workers", "0"]
        assert_alike(hypotheses(command, occitan, *words, "--max-len-b", "30"), texts[0])


def hypotheses(command, *args):
    _, out, _ = run(command, *args)
    lines = [line for line in out.splitlines() if line.startswith("H-")]
    assert len(lines) == 8
    return lines


@pytest.mark.parametrize(
    "value, told",
    [
        (
            "fr=oc",
            "--lora-init-from fr=oc: fr has adapters where this run starts from: name a lang",
        ),
        ("oc=oc", "--lora-init-from oc=oc: oc has no adapters where this run starts from: name"),
        ("oc", "--lora-init-from: cannot read 'oc': write wo=fr,sd=ur"),
        ("oc=wo", "--lora-init-from names wo, and not languages of --lora-tiers"),
        ("oc=en", "--lora-init-from oc=en: en has rank 2 and oc 4: give both the same"),
    ],
)
def test_starts_that_are_refused(corpus, occitan, first, tmp_path, value, told):
    args = unknown(corpus, occitan, tmp_path / "run", first[0])
    status, _, err = run(
        "fairseq-train", *with_option(args, "--lora-init-from", value), check=False
    )
    assert status == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith("lslora: error: ") and told in line, line
