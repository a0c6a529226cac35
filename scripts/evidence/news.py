#!/usr/bin/env python3
"""Writes news text as pieces for examples/evidence: every line of {train,valid,test}.CODE in NEWS
is the same sentence in each language, as in NTREX. Languages without such files are left out."""

import argparse
import sys
from pathlib import Path

import sentencepiece

SPLITS = ("train", "valid", "test")
PIVOT = "en"


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def build(news, model, out, languages):
    """Writes OUT/SPLIT.en-CODE.{en,CODE}; returns the codes of the languages that NEWS has.

    Raises:
        FileNotFoundError: there is no English, or none of the languages.
        ValueError: two files of a split have different numbers of lines.
    """
    found = [la for la in languages if all((news / f"{name}.{la}").exists() for name in SPLITS)]
    if not found:
        raise FileNotFoundError(
            f"{news} has none of {', '.join(languages)}: no train.CODE and so on"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        text = {la: lines(news / f"{name}.{la}") for la in (PIVOT, *found)}
        if len({len(of_language) for of_language in text.values()}) > 1:
            raise ValueError(f"{news}/{name}.*: the files have different numbers of lines")
        pieces = {
            la: "".join(" ".join(line) + "\n" for line in model.encode(of_language, out_type=str))
            for la, of_language in text.items()
        }
        for la in found:
            for code in (PIVOT, la):
                (out / f"{name}.{PIVOT}-{la}.{code}").write_text(pieces[code], encoding="utf-8")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--news", type=Path, required=True, help="folder with the text")
    add("--spm", type=Path, required=True, help="SentencePiece model of the base")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--languages", nargs="+", required=True, metavar="CODE", help="beside English")
    args = parser.parse_args()
    model = sentencepiece.SentencePieceProcessor(model_file=str(args.spm))
    try:
        print(*build(args.news, model, args.out, args.languages))
    except (OSError, ValueError) as error:
        sys.exit(f"news.py: error: {error}")


if __name__ == "__main__":
    main()
