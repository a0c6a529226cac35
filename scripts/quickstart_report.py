#!/usr/bin/env python3
"""Writes the quickstart's table: BLEU of the base and of the fine-tuned model by resource tier.

BLEU is computed over the corpus' own SentencePiece pieces, over all test sentences from and into
the languages of a tier together; English is a side of every direction and counted in none. The
gain is tested by paired bootstrap. Trainable parameters and sparsity are counted in the checkpoint.
"""

import argparse
import re
from pathlib import Path

from fairseq.checkpoint_utils import load_model_ensemble_and_task
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

import lslora_fairseq  # noqa: F401  registers the model and the task

PIVOT = "en"
# folder of hypotheses -> the corpus whose test set it translates
DECODED = {
    "base_own": "base", "base": "finetune", "finetuned": "finetune", "learned": "finetune",
}  # fmt: skip


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def read_hypotheses(out):
    """The hypotheses that fairseq-generate printed, in the order of the test set."""
    found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", out.read_text(encoding="utf-8"), re.M)
    return [text for _, text in sorted(found, key=lambda item: int(item[0]))]


def read_decoded(folder, text, languages):
    """(hypothesis, reference) pairs, in pieces, of both directions of these languages.

    Raises:
        SystemExit: a file holds another number of hypotheses than the test set has sentences.
    """
    pairs = []
    for language in languages:
        for source, target in ((PIVOT, language), (language, PIVOT)):
            out = folder / f"{source}-{target}.out"
            hypotheses = read_hypotheses(out)
            references = read_lines(text / f"test.{PIVOT}-{language}.{target}")
            if len(hypotheses) != len(references):
                raise SystemExit(
                    f"quickstart: error: {out} holds {len(hypotheses)} hypotheses for "
                    f"{len(references)} sentences: delete {folder} and run again"
                )
            pairs += zip(hypotheses, references)
    return pairs


class Scores:
    """BLEU on the test set over any subset of the languages."""

    def __init__(self, work):
        self.work = work
        self.bleu = BLEU(tokenize="none")  # pieces are tokens already
        self.signature = None

    def _pairs(self, name, languages):
        return read_decoded(
            self.work / "decoded" / name, self.work / "pieces" / DECODED[name], languages
        )

    def score(self, name, languages):
        hypotheses, references = zip(*self._pairs(name, languages))
        return self.bleu.corpus_score(hypotheses, [references]).score

    def compared(self, languages, before="base", after="finetuned"):
        """(sentences, BLEU of one model, of another, p value of the difference)."""
        hypotheses_before, references = zip(*self._pairs(before, languages))
        hypotheses_after, _ = zip(*self._pairs(after, languages))
        systems = [(before, hypotheses_before), (after, hypotheses_after)]
        test = PairedTest(systems, {"BLEU": self.bleu}, [references], test_type="bs")
        signatures, results = test()
        self.signature = signatures["BLEU"]
        first, second = results["BLEU"]
        # of equal hypotheses sacrebleu says that they differ
        p = 1.0 if hypotheses_before == hypotheses_after else second.p_value
        return len(references), first.score, second.score, p


def count_adapters(model, codes):
    """(trainable parameters, entries of B, pruned entries of B) of these languages."""
    trainable = entries = pruned = 0
    for linear in model.adapted_linears():
        for code in codes:
            language = model.languages.index(code)
            _, mask = linear.masks(language)
            trainable += sum(factor.numel() for factor in linear.factors(language))
            entries += mask.numel()
            pruned += int((~mask).sum())
    return trainable, entries, pruned


def groups(inventory):
    """(name, language codes, the codes as a cell) of each tier and of all languages."""
    for tier in inventory.tiers:
        codes = [code for code in inventory.codes if inventory.tier(code) == tier]
        yield tier, codes, " ".join(codes)
    yield "all", list(inventory.codes), str(len(inventory))


def without_pivot(codes):
    return [code for code in codes if code != PIVOT]


def significance(p):
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def table(model, scores):
    """Rows of text, the heading first: one for each tier, and one for all."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    yield ("tier", "languages", "sentences", "base BLEU", "tuned BLEU", "gain", "p",
           "trainable", "of base", "sparsity")  # fmt: skip
    for name, codes, members in groups(model.languages):
        count, base, tuned, p = scores.compared(without_pivot(codes))
        trainable, entries, pruned = count_adapters(model, codes)
        yield (
            name, members, f"{count:,}", f"{base:.1f}", f"{tuned:.1f}", f"{tuned - base:+.1f}",
            significance(p), f"{trainable:,}", f"{trainable / frozen:.2%}",
            f"{pruned / entries:.3f}",
        )  # fmt: skip


def align(rows):
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        names = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:])]
        yield "  ".join(names + numbers)


def load_model(checkpoint):
    return load_model_ensemble_and_task([checkpoint])[0][0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--checkpoint", required=True, help="the fine-tuned model")
    parser.add_argument("--out", type=Path, required=True, help="file to write the table to")
    args = parser.parse_args()
    model = load_model(args.checkpoint)
    scores = Scores(args.work)
    own = scores.score("base_own", without_pivot(model.languages.codes))
    lines = [
        f"BLEU of the base model on held-out messages of its own products: {own:.1f}",
        "",
        *align(table(model, scores)),
        "",
        f"BLEU over SentencePiece pieces, {scores.signature}",
    ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
