"""BLEU tables: python score.py FOLDER TIERS TOKENIZER LANG REFERENCE [LANG REFERENCE …]

FOLDER holds one SOURCE-TARGET.hyp of plain text for each direction; TIERS is written as for
--lora-tiers. Prints the score of every direction, the means by resource tier of source and
target, and sacrebleu's signature; the scores also go to FOLDER/scores.tsv.
"""

import sys
from pathlib import Path

from sacrebleu.metrics import BLEU


def main(folder, tiers, tokenizer, *references):
    folder = Path(folder)
    tier_of = {}
    for group in filter(str.strip, tiers.split(";")):
        tier, _, langs = group.partition("=")
        tier_of.update({lang.strip(): tier.strip() for lang in langs.split(",")})
    if tokenizer not in BLEU.TOKENIZERS:
        fail(
            f"sacrebleu has no tokenizer {tokenizer}: choose one of "
            f"{', '.join(BLEU.TOKENIZERS)} with BLEU_TOKENIZER"
        )
    try:
        bleu = BLEU(tokenize=tokenizer)
    except OSError as error:
        fail(
            f"sacrebleu cannot download its tokenizer {tokenizer} ({error}): "
            "run once with a network, or choose another one with BLEU_TOKENIZER"
        )
    lines = {lang: read(path) for lang, path in zip(references[::2], references[1::2])}
    scores = {}
    for source in lines:
        for target in lines:
            if source != target:
                hypotheses = read(folder / f"{source}-{target}.hyp")
                if len(hypotheses) != len(lines[target]):
                    fail(
                        f"{source}-{target}.hyp in {folder} has {len(hypotheses)} lines, the "
                        f"reference {len(lines[target])}: delete it and run evaluate.sh again"
                    )
                scores[source, target] = bleu.corpus_score(hypotheses, [lines[target]]).score
    (folder / "scores.tsv").write_text(
        "".join(f"{s}-{t}\t{score:.2f}\n" for (s, t), score in scores.items()), encoding="utf-8"
    )
    print(f"BLEU of each direction ({tokenizer} tokenizer), source languages in rows")
    show(lines, {pair: [score] for pair, score in scores.items()})
    print("\nmeans by resource tier")
    by_tier = {}
    for (source, target), score in scores.items():
        by_tier.setdefault((tier_of[source], tier_of[target]), []).append(score)
    show(dict.fromkeys(tier_of.values()), by_tier)
    print(f"\nmean of {len(scores)} directions: {mean(scores.values()):.2f}")
    print(bleu.get_signature())


def show(names, scores):
    """Prints a matrix of means; *scores*: (row, column) -> values."""
    names = list(names)
    width = max(7, *(len(name) + 2 for name in names))
    print(" " * width + "".join(f"{name:>{width}}" for name in [*names, "mean"]))
    for row in names:
        values = [scores.get((row, column), []) for column in names]
        show_row(row, values, width)
    columns = [sum((scores.get((row, column), []) for row in names), []) for column in names]
    show_row("mean", columns, width)


def show_row(name, values, width):
    cells = [f"{mean(v):.2f}" if v else "-" for v in [*values, sum(values, [])]]
    print(f"{name:<{width}}" + "".join(f"{cell:>{width}}" for cell in cells))


def mean(values):
    return sum(values) / len(values)


def fail(message):
    sys.exit(f"flores12: error: {message}")


def read(path):
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\r\n") for line in lines]


if __name__ == "__main__":
    main(*sys.argv[1:])
