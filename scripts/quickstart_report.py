#!/usr/bin/env python3
"""Writes the quickstart's tables: the base model, fully fine-tuned and with adapters, by tier.

Scores are read from the folders of `lslora evaluate`. Those of a tier are means over the directions
from and into its languages; English is a side of every direction and counted in none. Differences
are tested by the paired bootstrap of `lslora compare`. Trainable parameters and sparsity are
counted in the checkpoint of the adapters.
"""

import argparse
from pathlib import Path

from fairseq.checkpoint_utils import load_model_ensemble_and_task

import lslora_fairseq  # noqa: F401  registers the model and the task
from lslora_fairseq.errors import one_line_errors
from lslora_fairseq.evaluation import comparison, groups, reports, saved
from lslora_fairseq.evaluation.scoring import CHRF_NAME
from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.lora.plan import SHARED
from lslora_fairseq.rendering.tables import aligned

PIVOT = "en"
ALIGNMENT = "<<" + ">" * 8


class Scores:
    """Scores of several models on the same test set, over any subset of its languages.

    Args:
        decoded: the folder with one of `lslora evaluate` for each model
        names: the models' folders in it

    Raises:
        ConfigError: a folder cannot be read, or they are not of the same test set.
    """

    def __init__(self, decoded, names):
        self.names = names
        loaded = comparison.load([str(decoded / name) for name in names])
        self._results = dict(zip(names, loaded.values()))
        self._resampled = comparison.resampled(loaded)
        self.metric = self._resampled.metric

    @property
    def signatures(self):
        """The signature of the main metric, and of chrF++."""
        _, _, tested = next(iter(self._resampled.directions.values()))
        return tested, reports.short_signature(self._results[self.names[0]], CHRF_NAME)

    def _pairs(self, languages):
        return [
            pair
            for pair in self._resampled.directions
            if any(code in languages and code != PIVOT for code in groups.sides(pair))
        ]

    def sentences(self, languages):
        directions = self._results[self.names[0]]["directions"]
        return sum(directions[pair]["sentences"] for pair in self._pairs(languages))

    def mean(self, name, languages, metric=None):
        """Mean of a model's scores over the directions of these languages."""
        scores = reports.scores(self._results[name], metric or self.metric)
        return groups.mean([scores[pair] for pair in self._pairs(languages)])

    def compared(self, languages, before, after):
        """(difference, p) of two models, as cells."""
        places = self.names.index(before), self.names.index(after)
        row = comparison.tested(self._resampled, self._pairs(languages), *places)
        return f"{row['difference']:+.1f}", significance(row["p"])


def significance(p):
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def count_adapters(model, codes):
    """(parameters, entries of B that can be pruned, those that are) of the adapters of these
    languages; the parameters of what all languages share count where these are all."""
    parameters = entries = pruned = 0
    languages = [model.languages.index(code) for code in codes]
    are_all = len(codes) == len(model.languages)
    for linear in model.adapted_linears():
        for side in linear.adapters:
            if side == SHARED:
                parameters += are_all * sum(factor.numel() for factor in linear.factors(0, side))
                continue
            for language in languages:
                _, mask = linear.masks(language, side)
                parameters += sum(factor.numel() for factor in linear.factors(language, side))
                entries += mask.numel()
                pruned += int((~mask).sum())
    if model.plan.embedding_site and are_all:
        parameters += model.embedding_adapters.mask.numel()
    return parameters, entries, pruned


def tiers(inventory):
    """(name, language codes, the codes as a cell) of each tier and of all languages."""
    for tier in inventory.tiers:
        codes = [code for code in inventory.codes if inventory.tier(code) == tier]
        yield tier, codes, " ".join(codes)
    yield "all", list(inventory.codes), str(len(inventory))


def count_frozen(model):
    """Parameters of the base model."""
    return sum(p.numel() for name, p in model.named_parameters() if not is_adapter_key(name))


def score_table(inventory, scores):
    """Rows of text, the heading first: one for each tier, and one for all."""
    yield ("tier", "languages", "sentences", "base", "full", "adapters", "over base", "p",
           "over full", "p")  # fmt: skip
    for name, codes, members in tiers(inventory):
        yield (
            name, members, f"{scores.sentences(codes):,}",
            *(f"{scores.mean(model, codes):.1f}" for model in scores.names),
            *scores.compared(codes, "base", "finetuned"),
            *scores.compared(codes, "full", "finetuned"),
        )  # fmt: skip


def adapter_table(model, scores):
    """Rows of text, the heading first: one for each tier, and one for all."""
    frozen = count_frozen(model)
    yield "tier", "languages", "base", "full", "adapters", "trainable", "of base", "sparsity"
    for name, codes, members in tiers(model.languages):
        trainable, entries, pruned = count_adapters(model, codes)
        yield (
            name, members,
            *(f"{scores.mean(model, codes, CHRF_NAME):.1f}" for model in scores.names),
            f"{trainable:,}", f"{trainable / frozen:.2%}", f"{pruned / entries:.3f}",
        )  # fmt: skip


def align(rows):
    header, *rows = rows
    return aligned(ALIGNMENT[: len(header)], header, rows)


def load_model(checkpoint):
    return load_model_ensemble_and_task([checkpoint])[0][0]


def report(work, checkpoint, choice):
    """The text of the report."""
    model = load_model(checkpoint)
    scores = Scores(work / "decoded", ["base", "full", "finetuned"])
    own = saved.load(str(work / "decoded" / "base_own"))
    own = groups.mean(list(reports.scores(own, scores.metric).values()))
    signature, of_chrf = scores.signatures
    return "\n".join([
        f"{scores.metric} of the base model on held-out messages of its own products: {own:.1f}",
        "",
        f"{scores.metric}, means over directions",
        align(score_table(model.languages, scores)),
        "",
        f"{CHRF_NAME}, means over directions, and the adapters",
        align(adapter_table(model, scores)),
        "",
        f"full: all {count_frozen(model):,} parameters of the base model fine-tuned",
        choice.read_text(encoding="utf-8").rstrip("\n"),
        f"{scores.metric} {signature}",
        f"{CHRF_NAME} {of_chrf}",
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--checkpoint", required=True, help="the model with adapters")
    parser.add_argument("--choice", type=Path, required=True, help="what best_checkpoint.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="file to write the tables to")
    args = parser.parse_args()
    with one_line_errors():
        text = report(args.work, args.checkpoint, args.choice)
    args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
