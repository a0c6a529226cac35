#!/usr/bin/env python3
"""Trains a SentencePiece model on a corpus' base/train.* and writes the whole corpus as pieces.

OUT gets spm.model, dict.txt (the pieces as a fairseq dictionary) and, for every file of the corpus,
one of the same path with the pieces separated by spaces.
"""

import argparse
import shutil
import sys
from io import BytesIO
from pathlib import Path

import sentencepiece

SPECIALS = 3  # <unk> <s> </s>, which fairseq adds to a dictionary itself


def train(corpus, out, vocab_size):
    """Trains OUT/spm.model on the base's training text alone and writes OUT/dict.txt."""
    out.mkdir(parents=True, exist_ok=True)
    text = (line for path in sorted(corpus.glob("base/train.*")) for line in _lines(path))
    model = BytesIO()  # no path goes into the file, which is the same wherever it is made
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=model,
        vocab_size=vocab_size,
        character_coverage=1.0,
        num_threads=2,
        minloglevel=1,
    )
    (out / "spm.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = map(pieces.id_to_piece, range(SPECIALS, len(pieces)))
    (out / "dict.txt").write_text("".join(f"{name} 1\n" for name in names), encoding="utf-8")


def take(folder, out):
    """Copies what :func:`train` wrote to another folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("spm.model", "dict.txt"):
        shutil.copy(folder / name, out)


def encode(corpus, out):
    """Writes every file of the corpus as pieces under OUT; prints their numbers to stderr."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "spm.model"))
    for folder in sorted(path.name for path in corpus.iterdir() if path.is_dir()):
        (out / folder).mkdir(exist_ok=True)
        count = 0
        for path in sorted((corpus / folder).iterdir()):
            encoded = pieces.encode(_lines(path), out_type=str)
            text = "".join(" ".join(line) + "\n" for line in encoded)
            (out / folder / path.name).write_text(text, encoding="utf-8")
            count += sum(map(len, encoded)) * path.name.startswith("train.")
        print(f"{folder}: {count:,} pieces of training text on all sides", file=sys.stderr)


def _lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder that po_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=6000, help="pieces (default: 6000)")
    parser.add_argument("--like", type=Path, metavar="FOLDER",
        help="take model and dictionary from there, and train none")  # fmt: skip
    args = parser.parse_args()
    if args.like:
        take(args.like, args.out)
    else:
        train(args.corpus, args.out, args.vocab_size)
    encode(args.corpus, args.out)


if __name__ == "__main__":
    main()
