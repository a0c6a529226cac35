"""Makes what stands beside it, once: adapter files of version 1 of the format, with their base.

    cd tests/data/adapters_v1 && PYTHONPATH=../..:../../.. python make.py

It trains a small base model and adapters on the translations that the packages wtforms and humanize
ship. The files stay as they are; tests/adapters/test_version1.py reads them with every later
version of this package, and compares what they translate with translations.txt.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import conftest
import sentencepiece
import torch
from console import USER_DIR, lslora, run

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

LANGS = ["de", "en", "fr"]
PAIRS = "en-de,de-en,en-fr,fr-en"
SIZES = (
    "--encoder-layers 2 --decoder-layers 1 --encoder-embed-dim 24 --decoder-embed-dim 24 "
    "--encoder-ffn-embed-dim 48 --decoder-ffn-embed-dim 48 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --share-all-embeddings --encoder-normalize-before "
    "--decoder-normalize-before --dropout 0"
).split()
TRAIN = (
    "--encoder-langtok src --decoder-langtok --criterion label_smoothed_cross_entropy "
    "--max-tokens 500 --num-workers 0 --no-epoch-checkpoints --no-save-optimizer-state "
    "--disable-validation --log-format simple --seed 3 --cpu"
).split()
HERE = Path(__file__).resolve().parent


def text():
    """English messages of at most 30 characters, their translations by language, and a
    SentencePiece model's pieces of all of them, in the current folder."""
    messages = {lang: conftest._messages(lang) for lang in LANGS if lang != "en"}
    shared = set.intersection(*(set(m) for m in messages.values()))
    english = sorted(line for line in shared if len(line) <= 30)
    lines = {"en": english, **{lang: [m[e] for e in english] for lang, m in messages.items()}}
    for lang, found in lines.items():
        Path(f"all.{lang}").write_text("\n".join(found) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=[f"all.{lang}" for lang in lines], model_prefix="spm", vocab_size=160,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_file="spm.model")
    pieces = [spm.id_to_piece(i) for i in range(3, spm.get_piece_size())]
    Path("dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    for lang, found in lines.items():
        encoded = "".join(" ".join(spm.encode(line, out_type=str)) + "\n" for line in found)
        Path(f"train.{lang}").write_text(encoded, encoding="utf-8")


def train(*more):
    """A run on this text; it and all paths in its checkpoints are relative to the folder."""
    run("fairseq-train", "data", *TRAIN, *SIZES, "--langs", ",".join(LANGS), *more)


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make()
        os.chdir(HERE)


def make():
    text()
    for lang in LANGS:
        if lang != "en":
            run(
                "fairseq-preprocess", "-s", "en", "-t", lang, "--trainpref", "train", "--destdir",
                "data", "--srcdict", "dict.txt", "--tgtdict", "dict.txt",
            )  # fmt: skip
    train(
        "--task", "translation_multi_simple_epoch", "--lang-pairs", PAIRS, "--arch", "transformer",
        "--optimizer", "adam", "--lr", "0.005", "--max-epoch", "40", "--save-dir", "base",
    )  # fmt: skip
    state = torch.load("base/checkpoint_last.pt")
    torch.save({**state, "last_optimizer_state": None}, "base.pt")
    tune = (
        "--user-dir", USER_DIR, "--task", "translation_multi_lslora", "--arch",
        "lslora_transformer", "--optimizer", "pruned_adam", "--lr", "0.01",
    )  # fmt: skip
    train(
        *tune, "--lang-pairs", PAIRS, "--finetune-from-model", "base.pt", "--lora-tiers",
        "high=en,de;low=fr", "--lora-rank", "high=2,low=3", "--lora-alpha", "high=2,low=6",
        "--lora-shared-rank", "2", "--lora-embedding-rank", "2", "--pruning-begin", "10",
        "--pruning-duration", "40", "--max-epoch", "80", "--save-dir", "run",
    )  # fmt: skip
    last = "run/checkpoint_last.pt"
    # so little is pruned that a mask would take more than it saves
    train(
        *tune, "--lang-pairs", "en-fr,fr-en", "--finetune-from-model", last,
        "--lora-train-languages", "fr", "--pruning-masks", "reset", "--pruning-final-sparsity",
        "0.02", "--pruning-begin", "0", "--pruning-duration", "1", "--max-epoch", "4", "--save-dir",
        "light",
    )  # fmt: skip
    lslora("extract", last, "--out", "adapters", "--licence", "MIT")
    light = "light/checkpoint_last.pt"
    lslora("extract", light, "--out", "bf16", "--langs", "fr", "--dtype", "bf16")
    for name in ("adapters", "bf16"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copy("base.pt", HERE)
    shutil.copytree("adapters", HERE / "adapters")
    (HERE / "bf16").mkdir()
    shutil.copy("bf16/fr.safetensors", HERE / "bf16")
    shutil.copy("dict.txt", HERE)
    for lang in LANGS:
        lines = Path(f"train.{lang}").read_text("utf-8").splitlines()[1::3]
        (HERE / f"{lang}.txt").write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")
    sys.path.insert(0, str(HERE.parents[1] / "adapters"))
    from test_version1 import FILES, translated

    found = [line for pair in FILES for line in translated(*pair)]
    (HERE / "translations.txt").write_text("\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
