#!/usr/bin/env python3
"""Writes the table of the architecture recipe: a learned architecture beside a hand-set one.

Scores of the base model and of both fine-tuned ones are read from the folders of `lslora evaluate`
and averaged as in the quickstart's tables. The gain is that of the learned architecture over the
hand-set one, tested by the paired bootstrap of `lslora compare`. Below stand the options that the
architectures were trained with.
"""

import argparse
from pathlib import Path

from quickstart_report import Scores, align, count_adapters, load_model, tiers

from lslora_fairseq.checkpoints import read_args
from lslora_fairseq.errors import one_line_errors

OPTIONS = (
    "lora_rank",
    "encoder_index_side",
    "decoder_index_side",
    "encoder_target_modules",
    "decoder_target_modules",
)


def table(hand_set, learned, scores):
    """Rows of text, the heading first: one for each tier, and one for all."""
    yield ("tier", "languages", "sentences", "base", "hand-set", "learned", "gain", "p",
           "trainable hand-set", "trainable learned")  # fmt: skip
    for name, codes, members in tiers(hand_set.languages):
        yield (
            name, members, f"{scores.sentences(codes):,}",
            *(f"{scores.mean(model, codes):.1f}" for model in scores.names),
            *scores.compared(codes, "finetuned", "learned"),
            *(f"{count_adapters(model, codes)[0]:,}" for model in (hand_set, learned)),
        )  # fmt: skip


def options(hand_set, learned):
    """Lines: each option of the architecture and its value in either; dicts of option -> value."""
    for name in OPTIONS:
        yield f"--{name.replace('_', '-')}"
        yield f"    hand-set  {hand_set[name]}"
        yield f"    learned   {learned[name]}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="the recipe's folder")
    parser.add_argument("--hand-set", required=True, help="checkpoint of the quickstart")
    parser.add_argument("--learned", required=True, help="checkpoint of the learned architecture")
    parser.add_argument("--out", type=Path, required=True, help="file to write the table to")
    args = parser.parse_args()
    paths = (args.hand_set, args.learned)
    with one_line_errors():
        scores = Scores(args.work / "decoded", ["base", "finetuned", "learned"])
        lines = [
            f"{scores.metric}, means over directions",
            align(table(*map(load_model, paths), scores)),
            "",
            scores.signatures[0],
            "",
            *options(*map(read_args, paths)),
        ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
