#!/usr/bin/env python3
"""Writes the tables and figures of examples/evidence from what evidence.py left in its folder.

OUT gets results.json, results.md and a figure of the losses and of the scores for each corpus.
Scores are means over directions; those of a tier are means over the directions from and into its
languages, English being counted in none. With several seeds they are means over these, and ± is the
standard deviation. p is that of the paired bootstrap of `lslora compare` against full fine-tuning,
seed by seed. Of seconds an update, the quickest run's are given.
"""

import argparse
import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

import across
import finetune
from evidence import CHOICE, ISOLATION
from systems import SYSTEMS

from lslora_fairseq.errors import one_line_errors
from lslora_fairseq.evaluation import comparison, groups, reports, saved
from lslora_fairseq.evaluation.scoring import CHRF_NAME
from lslora_fairseq.rendering import figures

BASELINE = "full"
METRICS = ("BLEU", CHRF_NAME)


class Corpus:
    """The results of all systems on one fine-tuning corpus.

    Args:
        folder: that of the corpus, with one for each system in it
        tiers: tier -> languages without English
    """

    def __init__(self, folder, tiers):
        self.folder, self.tiers = folder, tiers
        self.choices = {
            name: json.loads((folder / name / CHOICE).read_text())
            for name in ("base", *SYSTEMS)
            if (folder / name / CHOICE).exists()
        }
        self._results = {}

    def seeds(self, system):
        return sorted(path.name for path in (self.folder / system / "test").iterdir())

    def results(self, system, seed):
        """What `lslora evaluate` wrote."""
        key = system, seed
        if key not in self._results:
            self._results[key] = saved.load(str(self.folder / system / "test" / seed / "scores"))
        return self._results[key]

    def groups(self):
        """name -> whether a direction belongs to it; tiers that the corpus has none of are left
        out."""
        first = next(iter(self.choices))
        results = self.results(first, self.seeds(first)[0])
        present = {code for pair in reports.scores(results, "BLEU") for code in groups.sides(pair)}
        found = {
            tier: lambda pair, codes=codes: any(code in codes for code in groups.sides(pair))
            for tier, codes in self.tiers.items()
            if present.intersection(codes)
        }
        found["from English"] = lambda pair: groups.sides(pair)[0] == finetune.PIVOT
        found["into English"] = lambda pair: groups.sides(pair)[1] == finetune.PIVOT
        found["all"] = lambda pair: True
        return found

    def scores(self, system, metric, belongs):
        """Mean over the directions of a group, for each seed."""
        return [
            fmean(
                score
                for pair, score in reports.scores(self.results(system, seed), metric).items()
                if belongs(pair)
            )
            for seed in self.seeds(system)
        ]

    def against_full(self, system):
        """For each seed and group: difference in BLEU to full fine-tuning, and its p."""
        rows = {}
        for seed in self.seeds(system):
            names = [str(self.folder / s / "test" / seed / "scores") for s in (BASELINE, system)]
            found = comparison.resampled(comparison.load(names))
            for name, belongs in self.groups().items():
                pairs = [pair for pair in found.directions if belongs(pair)]
                row = comparison.tested(found, pairs, 0, 1)
                rows.setdefault(name, []).append((row["difference"], row["p"]))
        return rows

    def lengths(self, system):
        """Words of all hypotheses by those of their references, for each seed."""
        found = []
        for seed in self.seeds(system):
            folder = self.folder / system / "test" / seed / "scores"
            texts = {kind: sorted(folder.glob(f"*.{kind}")) for kind in ("hyp", "ref")}
            words = {
                kind: sum(len(path.read_text(encoding="utf-8").split()) for path in paths)
                for kind, paths in texts.items()
            }
            found.append(words["hyp"] / words["ref"])
        return found

    def forgetting(self, system):
        """Mean BLEU and chrF++ on the base model's own held-out text."""
        results = saved.load(str(self.folder / system / "forgetting" / "scores"))
        return [groups.mean(list(reports.scores(results, m).values())) for m in METRICS]


def spread(values, digits=1):
    """Mean and, of several, the standard deviation, as text."""
    more = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{more}"


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def score_rows(corpus, metric):
    """Header and rows of a corpus' scores: systems by groups of directions."""
    found = corpus.groups()
    rows = [
        [system, *(spread(corpus.scores(system, metric, belongs)) for belongs in found.values())]
        for system in corpus.choices
    ]
    return [metric, *found], rows


def difference_rows(corpus):
    """Header and rows: what each system has more than full fine-tuning, and p for each seed."""
    rows = []
    for system in corpus.choices:
        if system in ("base", BASELINE):
            continue
        cells = [
            f"{fmean(d for d, _ in of_seeds):+.1f} ({', '.join(f'{p:.3f}' for _, p in of_seeds)})"
            for of_seeds in corpus.against_full(system).values()
        ]
        rows.append([system, *cells])
    return ["BLEU over full (p of each seed)", *corpus.groups()], rows


def cost_rows(corpus):
    """Header and rows: what was chosen, and what it costs."""
    rows = []
    for system, choice in corpus.choices.items():
        if system == "base":
            continue
        runs = list(choice["runs"].values())
        curves = choice["losses"].values()
        best = [min(curve, key=lambda point: point[1]) for curve in curves]
        own = corpus.forgetting(system)
        rows.append([
            system,
            f"{choice['rate']:g}",
            ", ".join(str(update) for update, _ in best),
            f"{choice['penalty']:g}",
            spread(corpus.lengths(system), 2),
            spread([loss for _, loss in best], 3),
            f"{runs[0]['trained']:,}",
            f"{runs[0]['surviving']:,}" if "surviving" in runs[0] else "",
            f"{min(run['seconds_an_update'] for run in runs):.2f}",
            f"{max(run['peak_mib'] for run in runs):,}",
            f"{own[0]:.1f} / {own[1]:.1f}",
        ])  # fmt: skip
    header = ["system", "learning rate", "best after updates", "length penalty", "length",
              "validation loss", "trained", "surviving", "s an update", "peak MiB",
              "base's own text: BLEU / chrF++"]  # fmt: skip
    return header, rows


def across_rows(corpus, work):
    """Header and rows: directions without English, never trained, directly and by way of English,
    and trained on their own text."""
    names = ["-".join(pair) for pair in across.directions(work)]
    rows = []
    for system in corpus.choices:
        for way in ("direct", "pivot", "trained"):
            folder = corpus.folder / system / "across" / way / "test" / "scores"
            if not folder.exists():
                continue
            results = saved.load(str(folder))
            for metric in METRICS:
                # by way of English, the directions are those of English into the same targets
                found = {groups.sides(p)[1]: s for p, s in reports.scores(results, metric).items()}
                scores = [found[groups.sides(name)[1]] for name in names]
                cells = [f"{score:.1f}" for score in (*scores, fmean(scores))]
                rows.append([system, way, metric, *cells])
    return ["system", "way", "metric", *names, "mean"], rows


def isolation_text(corpus):
    """What became of other directions when a language was added, a line for each system."""
    lines = []
    for path in sorted(corpus.folder.glob(f"*/{ISOLATION}")):
        found = json.loads(path.read_text())
        scores = ", ".join(
            f"{pair} {found['before'][pair]:.1f} → {found['after'][pair]:.1f}"
            for pair in found["after"]
        )
        lines.append(
            f"{path.parent.name}: trained without {found['language']}, then with "
            f"--lora-train-languages {found['language']}: of the "
            f"{len(found['directions_without_it'])} other directions "
            f"{len(found['of_these_the_same_text'])} give the same text; BLEU {scores}"
        )
    return "\n".join(lines)


def curves(corpus, path):
    """Draws the loss on the validation set by epoch, of every system and seed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (system, choice) in enumerate(corpus.choices.items()):
        for seed, losses in choice.get("losses", {}).items():
            label = system if seed == min(choice["losses"]) else None
            axes.plot(*zip(*losses), f"C{number}o-", label=label, alpha=0.8)
    axes.set_xlabel("updates")
    axes.set_ylabel("loss on the validation set")
    axes.legend()
    figures.save(figure, path)


def bars(corpus, path):
    """Draws BLEU of every system by group of directions, with its spread over seeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    found, width = corpus.groups(), 0.85 / len(corpus.choices)
    for number, system in enumerate(corpus.choices):
        scores = [corpus.scores(system, METRICS[0], belongs) for belongs in found.values()]
        axes.bar(
            [place + number * width for place in range(len(found))],
            [fmean(s) for s in scores],
            width,
            yerr=[stdev(s) if len(s) > 1 else 0 for s in scores],
            label=system,
        )
    axes.set_xticks([place + 0.43 - width / 2 for place in range(len(found))], list(found))
    axes.set_ylabel(METRICS[0])
    axes.legend(ncols=4, fontsize="small")
    figures.save(figure, path)


def everything(corpus):
    """All numbers of a corpus, for results.json."""
    return {
        system: {
            **choice,
            "scores": {
                metric: {
                    name: dict(zip(corpus.seeds(system), corpus.scores(system, metric, belongs)))
                    for name, belongs in corpus.groups().items()
                }
                for metric in METRICS
            },
            "against_full": {} if system in ("base", BASELINE) else corpus.against_full(system),
            "forgetting": dict(zip(METRICS, corpus.forgetting(system))),
        }
        for system, choice in corpus.choices.items()
    }


def write(work, base, out):
    """Writes all files; returns the text of results.md."""
    tiers = {}
    for line in (work / "corpus" / "tiers.tsv").read_text(encoding="utf-8").splitlines():
        code, tier = line.split("\t")
        if code != finetune.PIVOT:
            tiers.setdefault(tier, []).append(code)
    packages = ("lslora_fairseq", "torch", "sacrebleu", "numpy")
    made_with = {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "programs": (work / "programs" / "versions.txt").read_text().splitlines(),
    }
    out.mkdir(parents=True, exist_ok=True)
    numbers, texts = {"made_with": made_with, "tiers": tiers, "corpora": {}}, []
    for folder in sorted((work / "results" / base).iterdir()):
        corpus = Corpus(folder, tiers)
        if BASELINE not in corpus.choices:
            continue
        numbers["corpora"][folder.name] = everything(corpus)
        header, rows = across_rows(corpus, work)
        others = [table(header, rows)] if rows else []
        others += filter(None, [isolation_text(corpus)])
        any_results = corpus.results(BASELINE, corpus.seeds(BASELINE)[0])
        texts += [
            f"## {folder.name}",
            *(table(*score_rows(corpus, metric)) for metric in METRICS),
            table(*difference_rows(corpus)),
            table(*cost_rows(corpus)),
            *others,
            "\n".join(f"{m}: {reports.short_signature(any_results, m)}" for m in METRICS),
        ]
        curves(corpus, out / f"losses_{base}_{folder.name}.png")
        bars(corpus, out / f"scores_{base}_{folder.name}.png")
    (out / f"results_{base}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    text = "\n\n".join([f"# On {base}", *texts]) + "\n"
    (out / f"results_{base}.md").write_text(text, encoding="utf-8")
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="the folder that run.sh works in")
    add("--base", default="base", help="folder of the base model in it (default: base)")
    add("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq lets all of it through
    with one_line_errors():
        print(write(args.work, args.base, args.out))


if __name__ == "__main__":
    main()
