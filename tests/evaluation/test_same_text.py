"""``lslora evaluate`` gives the text of one ``fairseq-generate`` for each direction."""

import json
import re

import pytest
from console import PAIRS, finetune_args, generate_args, lslora, run, train_args

DECODING = ["--beam", "3", "--max-len-a", "1.3", "--max-len-b", "4", "--max-tokens", "150"]
COMPARED = ("en-fr", "ja-en", "en-de")
# what is trained -> options beside those of console.finetune_args
MODELS = {
    "a side for each layer": ["--encoder-index-side", "source*2,target*1"],
    "decoder layers of both sides": ["--decoder-index-side", "source*1,target*1"],
    "learned weights": ["--lora-weight-learning"],
    "ranks of each language, much pruned, and adapters shared by all": [
        "--lora-rank", "en=1,de=3,fr=7,ja=2", "--pruning-final-sparsity", "0.9",
        "--lora-shared-rank", "3", "--lora-shared-alpha", "6", "--lora-embedding-rank", "4",
    ],
    "tokens in the places of bos and eos": ["--lang-tok-replacing-bos-eos"],
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request, corpus, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("model")
    run("fairseq-train", *finetune_args(corpus, save_dir, *MODELS[request.param], "--lr", "0.02"))
    return save_dir / "checkpoint_last.pt"


def evaluated(corpus, path, out, *more):
    """Runs the command; returns pair -> (score, text) of each sentence, best first, and pair ->
    how many were decided by near ties."""
    _, said, _ = lslora(
        "evaluate", corpus.data, "--path", path, "--cpu", "--out", out, "--format", "json",
        "--gen-subset", "train", "--nbest", "2", "--bleu-tokenizer", "13a", *DECODING, *more,
    )  # fmt: skip
    results = json.loads(said)
    assert {*results["directions"]} == {*PAIRS.split(",")}
    found = {}
    for pair in results["directions"]:
        rows = [row.split("\t") for row in (out / f"{pair}.nbest.tsv").read_text().splitlines()]
        sentences = found[pair] = [[] for _ in range(results["directions"][pair]["sentences"])]
        for number, score, text in rows:
            sentences[int(number) - 1].append((float(score), text))
        best = (out / f"{pair}.hyp").read_text("utf-8").split("\n")[:-1]
        assert best == [hypotheses[0][1] for hypotheses in sentences]
    return found, {pair: facts["near_ties"] for pair, facts in results["directions"].items()}


def generated(corpus, path, pair, *more):
    """What one fairseq-generate prints, as :func:`evaluated`."""
    args = generate_args(corpus, path, *pair.split("-"), "--required-batch-size-multiple", "1")
    args = [*args, "--gen-subset", "train", "--nbest", "2", "--remove-bpe", "sentencepiece"]
    _, out, _ = run("fairseq-generate", *args, *DECODING, *more)
    found = {}
    for number, score, text in re.findall(r"^D-(\d+)\t(\S+)\t(.*)$", out, re.M):
        found.setdefault(int(number), []).append((float(score), text))
    return [found[number] for number in range(len(found))]


def check(corpus, ours, path, *more):
    """Hypotheses are the same, but for near ties within 1e-4, which are counted.

    Returns:
        the texts of the directions compared
    """
    ours, ties = ours
    texts = {}
    for pair in COMPARED:
        theirs = generated(corpus, path, pair, *more)
        assert len(ours[pair]) == len(theirs) > 20
        different = sum(here[0][1] != there[0][1] for here, there in zip(ours[pair], theirs))
        assert different <= ties[pair] < 0.1 * len(theirs)
        close = sum(abs(here[0][0] - there[0][0]) < 1e-4 for here, there in zip(ours[pair], theirs))
        assert close >= len(theirs) - ties[pair]
        texts[pair] = [hypotheses[0][1] for hypotheses in ours[pair]]
    assert len({text for lines in texts.values() for text in lines}) > 20
    return texts


def test_models_with_adapters(corpus, model, tmp_path):
    check(corpus, evaluated(corpus, model, tmp_path / "out"), model)


def test_a_stock_model(corpus, tmp_path):
    check(corpus, evaluated(corpus, corpus.base, tmp_path / "out"), corpus.base)


@pytest.mark.slow
def test_an_ensemble_of_a_model_and_its_base(corpus, finetuned, tmp_path):
    path = f"{finetuned[0]}:{corpus.base}"
    together = check(corpus, evaluated(corpus, path, tmp_path / "out"), path)
    alone, _ = evaluated(corpus, finetuned[0], tmp_path / "alone")
    assert any([h[0][1] for h in alone[pair]] != texts for pair, texts in together.items())


def test_a_stock_model_whose_tokens_replace_eos(corpus, tmp_path):
    args = train_args(
        corpus, tmp_path, "--arch", "transformer", "--optimizer", "adam", "--max-epoch", "4",
        "--finetune-from-model", corpus.base, "--lang-tok-replacing-bos-eos",
        "--disable-validation",
        task="translation_multi_simple_epoch",
    )  # fmt: skip
    run("fairseq-train", *args)
    path = tmp_path / "checkpoint_last.pt"
    check(corpus, evaluated(corpus, path, tmp_path / "out"), path)


def test_the_first_tokens_of_the_reference(corpus, finetuned, tmp_path):
    more = ("--prefix-size", "3", "--max-len-a", "0", "--max-len-b", "12", "--lenpen", "0.6")
    ours = evaluated(corpus, finetuned[0], tmp_path / "out", *more)
    check(corpus, ours, finetuned[0], *more)
    for pair, sentences in ours[0].items():
        references = (tmp_path / "out" / f"{pair}.ref").read_text("utf-8").split("\n")
        begins = [h[0][1][:1] == r[:1] for h, r in zip(sentences, references)]
        assert sum(begins) > 0.95 * len(begins)
