"""Adapters that all languages share, through the console: kept in a further stage, and alone."""

import re

import pytest
import torch
from console import adapters_in, finetune_args, generate_args, lslora, run, with_option, without
from test_starts import average, model_of

SHARED = ["--lora-shared-rank", "3", "--lora-shared-alpha", "6", "--lora-embedding-rank", "2"]
SHARED += ["--lr", "0.02"]


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """Folder of a run of three epochs with a checkpoint of each, pruned to a half."""
    save_dir = tmp_path_factory.mktemp("first")
    args = without(finetune_args(corpus, save_dir, *SHARED), "--no-epoch-checkpoints", 0)
    _, out, _ = run(
        "fairseq-train", *args, "--disable-validation", "--pruning-final-sparsity", "0.5",
        "--pruning-begin", "0",
    )  # fmt: skip
    for what in ("all", "embeddings"):
        assert re.search(rf"^for all +4  shared +{what} ", out, re.M)
    return save_dir


def texts_of(corpus, path, folder):
    """What fairseq-generate makes of English in French; lslora evaluate makes the same."""
    decoding = ["--beam", "3", "--max-len-b", "30"]
    args = generate_args(corpus, path, "en", "fr", "--required-batch-size-multiple", "1")
    _, out, _ = run("fairseq-generate", *args, "--remove-bpe", "sentencepiece", *decoding)
    found = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", out, re.M))
    texts = [found[str(number)] for number in range(8)]
    lslora(
        "evaluate", corpus.data, "--path", path, "--cpu", "--out", folder, "--pairs",
        "en-fr,ja-en", "--bleu-tokenizer", "13a", "--max-len-a", "0", *decoding,
    )  # fmt: skip
    assert (folder / "en-fr.hyp").read_text("utf-8").split("\n")[:-1] == texts
    return texts


def test_a_further_stage_trains_the_languages_that_it_names_alone(corpus, first, tmp_path):
    """All others keep every bit and their masks, while this one is pruned on; so do directions
    without it."""
    args = without(without(finetune_args(corpus, tmp_path), "--lora-tiers"), "--lora-rank")
    start = first / "checkpoint_last.pt"
    args = with_option(args, "--finetune-from-model", start)
    args = with_option(args, "--lang-pairs", "en-de,de-en")
    more = ["--lora-train-languages", "de", "--weight-decay", "0.1", "--pruning-scope", "layer"]
    _, out, _ = run("fairseq-train", *args, "--disable-validation", *more)
    for row in ("4  shared +all", "4  shared +embeddings", "3  all +all"):
        assert re.search(rf"^kept +{row} +0 ", out, re.M)
    assert "this run's; only the adapters of de are trained, all others stay; of them, " in out
    before, after = (adapters_in(model_of(f), embeddings=True) for f in (first, tmp_path))
    moved = set()
    for (layer, owner), was in before.items():
        here = after[layer, owner]
        if not all(map(torch.equal, was, here)):
            moved.add((layer.rpartition(".")[2], owner))
            assert here[3].sum() < was[3].sum()
    assert moved == {("source_adapters", "de"), ("target_adapters", "de")}
    assert ("embedding_adapters", "shared") in before
    options = torch.load(tmp_path / "checkpoint_last.pt")["cfg"]["model"]
    assert (options.lora_shared_rank, options.lora_shared_alpha) == (3, 6.0)
    assert options.lora_embedding_rank == 2
    for number, checkpoint in enumerate((start, tmp_path / "checkpoint_last.pt")):
        texts_of(corpus, checkpoint, tmp_path / f"{number}")
    for name in ("en-fr.hyp", "ja-en.hyp"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    told = "rank 3, an adapter of the embeddings of rank 2; only those of de are trained"
    assert told in lslora("doctor", "--checkpoint", start, "--lora-train-languages", "de")[1]
    for (_, owner), (_, _, _, mask) in before.items():
        assert mask.all() == (owner == "shared")


def test_merged_they_give_the_text_of_the_average_unmerged(corpus, first, tmp_path):
    """fairseq-generate merges its direction; evaluate decodes two in one batch. So they do in an
    ensemble with the base, whose embeddings have no adapter."""
    path = tmp_path / "averaged.pt"
    average([first / f"checkpoint{number}.pt" for number in (2, 3)], path)
    alone = texts_of(corpus, path, tmp_path / "out")
    assert len({*alone}) > 4
    assert texts_of(corpus, f"{path}:{corpus.base}", tmp_path / "both") != alone


def test_alone_they_are_trained_without_language_tokens_and_decode(corpus, tmp_path):
    """Languages without a tier among them."""
    args = with_option(finetune_args(corpus, tmp_path, *SHARED), "--lora-rank", "0")
    args = with_option(args, "--lora-tiers", "all=en,de")
    args = without(without(args, "--encoder-langtok"), "--decoder-langtok", 0)
    _, out, _ = run("fairseq-train", *args)
    assert "adapters shared by 2 languages" in out and "| valid on 'valid' subset |" in out
    model = model_of(tmp_path)
    assert {owner for _, owner in adapters_in(model)} == {"shared"}
    assert all(B.any() for _, B, _, _ in adapters_in(model).values())
    path = tmp_path / "checkpoint_last.pt"
    assert texts_of(corpus, path, tmp_path / "out")
