#!/usr/bin/env python3
"""Fine-tunes, decodes and scores the systems of examples/evidence.

All systems take part at once, a training or decoding on each core. Of each, the learning rate is
chosen by the loss on the validation set of few after an epoch (or taken from what was chosen on
another base), then for each corpus its checkpoint by that loss and its length penalty by BLEU on
the validation set, all with the first seed; then the test set is decoded once. On the base whose
rates are tried, directions that were never trained and a language that is added later are looked
at, too. What is done is not done again. WORK is the folder in which run.sh has prepared the corpora
and the base.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import across
import finetune
from jobs import Jobs
from systems import (
    ACROSS,
    ADDED,
    BEST,
    ESTIMATION,
    LENGTH,
    SYSTEMS,
    TRIED_FOR,
    TRIED_ON,
    WEIGHT_LEARNING,
)

from lslora_fairseq.analysis import trained
from lslora_fairseq.cores import cores
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import groups, reports, saved

LENGTH_PENALTIES = (1.0, 1.5, 2.0)
DECODING = "--cpu --beam 4 --max-len-a 1.5 --max-len-b 8"
CHOICE, ISOLATION = "choice.json", "isolation.json"


class Evidence:
    """The trainings and decodings on top of one base model.

    Args:
        work: the folder of everything
        base: folder of the base model in it
        seeds: numbers; with the first one everything is chosen
        rates_of: another base, whose learning rates are taken
    """

    def __init__(self, work, base, seeds, rates_of=None):
        self.work, self.base, self.seeds, self.rates_of = Path(work), base, seeds, rates_of
        self.jobs = Jobs(work, sorted(os.sched_getaffinity(0))[: cores()])
        self._own_text = threading.Lock()

    def place(self, corpus, name):
        """The folder of a system, within the work folder."""
        return f"results/{self.base}/{corpus}/{name}"

    def all_of(self, name, corpora):
        """Trains, decodes and scores a system on some corpora, and writes down what was chosen."""
        system = SYSTEMS[name]
        if system.is_learned:
            system = replace(system, options=system.options + self.learned(name))
        rate, tried = self.learning_rate(name, system)
        for corpus in corpora:
            self.on_corpus(corpus, name, system, rate, {"tried": tried})

    def learning_rate(self, name, system):
        """The best learning rate, and the curve of each one that was tried."""
        if self.rates_of:
            chosen = self.work / "results" / self.rates_of / TRIED_ON / name / CHOICE
            return json.loads(chosen.read_text())["rate"], {}
        place, first = f"{self.place(TRIED_ON, name)}/tried", self.seeds[0]
        tried = {
            rate: self.train(place, TRIED_ON, system, rate, first, TRIED_FOR)
            for rate in system.rates
        }
        return min(tried, key=lambda rate: finetune.lowest(tried[rate])), tried

    def on_corpus(self, corpus, name, system, rate, known):
        place, first = self.place(corpus, name), self.seeds[0]
        begun = {}  # an epoch of the best rate is done already
        if corpus == TRIED_ON and known["tried"]:
            begun[first] = self.run(f"{place}/tried", rate, first)
        losses = {
            seed: self.train(place, corpus, system, rate, seed, begun=begun.get(seed))
            for seed in self.seeds
        }
        runs = {seed: self.run(place, rate, seed) for seed in self.seeds}
        best = {seed: f"{run}/{finetune.BEST}" for seed, run in runs.items()}
        penalty, valid = self.length_penalty(place, corpus, best[first])
        for seed, checkpoint in best.items():
            self.decode(f"{place}/test/{seed}", f"data/{corpus}", "test", checkpoint, penalty)
        self.decode(f"{place}/forgetting", "data/base", "test", best[first], penalty)
        facts = {seed: self.facts(run, system) for seed, run in runs.items()}
        self.write(f"{place}/{CHOICE}", {
            **known,
            "options": system.options,
            "rate": rate,
            "losses": losses,
            "penalty": penalty,
            "valid_bleu": valid,
            "runs": facts,
        })  # fmt: skip
        if self.rates_of:
            return
        if corpus == across.CORPUS and name in ACROSS:
            self.across(place, best[first], penalty)
            self.trained_across(place, system, rate, penalty)
        if corpus == TRIED_ON and name == BEST:
            self.isolation(corpus, name, system, rate, penalty)

    def base_alone(self, corpora):
        """Decodes and scores the base model as it is."""
        checkpoint = f"{self.base}/{finetune.LAST}"
        for corpus in corpora:
            place = self.place(corpus, "base")
            penalty, valid = self.length_penalty(place, corpus, checkpoint)
            test = f"{place}/test/{self.seeds[0]}"
            self.decode(test, f"data/{corpus}", "test", checkpoint, penalty)
            self.decode(f"{place}/forgetting", "data/base", "test", checkpoint, penalty)
            self.write(f"{place}/{CHOICE}", {"penalty": penalty, "valid_bleu": valid})

    def run(self, place, rate, seed):
        return f"{place}/lr_{rate:g}.seed_{seed}"

    def train(
        self, place, corpus, system, rate, seed, length=None, start=None, pairs=None, begun=None
    ):
        """Trains once.

        Args:
            length: options that say how long (default: as long as the corpus is trained on)
            start: a checkpoint within the work folder (default: the base)
            pairs: directions (default: all that the corpus has)
            begun: folder of a shorter run of the same, which this one continues

        Returns:
            the losses on the validation set, as :func:`finetune.curve` has them
        """
        folder, start = self.run(place, rate, seed), start or f"{self.base}/{finetune.LAST}"
        pairs, length = pairs or finetune.pairs(self.work, corpus), length or LENGTH[corpus]
        command = finetune.command(
            self.work, corpus, self.work / start, system, pairs, length, rate, seed
        )
        after = [f"data/{corpus}", str(Path(start).parent)]
        self.jobs.run(folder, command, after, begun)
        return finetune.curve(self.jobs.log(folder))

    def facts(self, run, system):
        found = {**finetune.facts(self.jobs.log(run)), "peak_mib": self.jobs.facts(run)["peak_mib"]}
        if not system.is_stock:
            weights = trained.read(str(self.work / run / finetune.BEST)).weights
            pruned = (w.sum().item() for key, w in weights.items() if key.endswith(".pruned"))
            found["surviving"] = found["trained"] - int(sum(pruned))
        return found

    def length_penalty(self, place, corpus, checkpoint):
        """The length penalty with the highest mean BLEU on the validation set, and all scores."""
        scores = {
            x: self.decode(f"{place}/valid/{x:g}", f"data/{corpus}", "valid", checkpoint, x)
            for x in LENGTH_PENALTIES
        }
        return max(scores, key=scores.get), scores

    def decode(self, folder, data, subset, checkpoint, penalty, after=()):
        """Decodes all directions of a binarised corpus.

        Args:
            folder: where to, within the work folder as are *data* and *checkpoint*
            after: jobs that made the data, where it is not the recipe's own

        Returns:
            mean BLEU of the directions
        """
        command = [
            "lslora", "evaluate", self.work / data, "--path", self.work / checkpoint,
            "--out", "{out}/scores", "--gen-subset", subset, *DECODING.split(),
            "--lenpen", penalty, "--tiers", self.work / "corpus" / "tiers.tsv",
        ]  # fmt: skip
        run = str(Path(checkpoint).parent)
        out = self.jobs.run(folder, command, after=[*(after or [data]), run])
        results = saved.load(str(out / "scores"))
        return groups.mean(list(reports.scores(results, "BLEU").values()))

    def across(self, place, checkpoint, penalty):
        """Decodes directions that were never trained, directly and by way of English."""
        jobs, work, into_english = self.jobs, self.work, f"{place}/test/{self.seeds[0]}"
        for way, hypotheses, after in (
            ("direct", None, []),
            ("pivot", work / into_english / "scores", [into_english]),
        ):
            folder = f"{place}/across/{way}"
            across.binarise(jobs, work, folder, hypotheses, after)
            made = [f"{folder}/jobs/{path.name}" for path in (work / folder / "jobs").iterdir()]
            self.decode(f"{folder}/test", f"{folder}/data", "test", checkpoint, penalty, made)

    def trained_across(self, place, system, rate, penalty):
        """Trains a system on text of these directions alone, and decodes them."""
        jobs, data, first = self.jobs, f"data/{across.OWN}", self.seeds[0]
        with self._own_text:  # systems share it
            across.binarise(jobs, self.work, data, subsets=("train", "valid", "test"))
        pairs = ["-".join(pair) for pair in across.directions(self.work)]
        folder, corpus = f"{place}/across/trained", f"{across.OWN}/data"
        self.train(folder, corpus, system, rate, first, LENGTH[across.CORPUS], pairs=pairs)
        checkpoint = f"{self.run(folder, rate, first)}/{finetune.BEST}"
        self.decode(f"{folder}/test", f"data/{corpus}", "test", checkpoint, penalty)

    def isolation(self, corpus, name, system, rate, penalty):
        """Trains a system without one language, then that language alone; what has become of the
        directions without it?"""
        place, first = f"{self.place(corpus, name)}/isolation", self.seeds[0]
        pairs = finetune.pairs(self.work, corpus)
        with_it = [pair for pair in pairs if ADDED in groups.sides(pair)]
        others = [pair for pair in pairs if pair not in with_it]
        later = replace(system, options=(*system.options, "--lora-train-languages", ADDED))
        before, after = (self.run(f"{place}/{stage}", rate, first) for stage in ("first", "later"))
        self.train(f"{place}/first", corpus, system, rate, first, pairs=others)
        start = f"{before}/{finetune.BEST}"
        self.train(f"{place}/later", corpus, later, rate, first, start=start, pairs=with_it)
        folders = {}
        for stage, run in (("before", before), ("after", after)):
            folder, checkpoint = f"{place}/{stage}", f"{run}/{finetune.BEST}"
            self.decode(folder, f"data/{corpus}", "test", checkpoint, penalty)
            folders[stage] = self.work / folder / "scores"
        scores = {
            stage: reports.scores(saved.load(str(folder)), "BLEU")
            for stage, folder in folders.items()
        }
        same = [
            pair
            for pair in others
            if len({(folder / f"{pair}.hyp").read_bytes() for folder in folders.values()}) == 1
        ]
        self.write(f"{self.place(corpus, name)}/{ISOLATION}", {
            "language": ADDED,
            "directions_without_it": others,
            "of_these_the_same_text": same,
            **{stage: {pair: found[pair] for pair in with_it} for stage, found in scores.items()},
        })  # fmt: skip

    def learned(self, name):
        """Index sides, ranks and modules as this package's commands find them on few.

        Returns:
            the words of the options
        """
        words, first, place = (), self.seeds[0], self.place(TRIED_ON, name)
        for step, system, ask in (
            ("weights", WEIGHT_LEARNING, ["sides"]),
            ("estimate", ESTIMATION, ["suggest", "--budget", "25%"]),
        ):
            (rate,) = system.rates
            system = replace(system, options=system.options + words)
            self.train(f"{place}/{step}", TRIED_ON, system, rate, first)
            run = self.run(f"{place}/{step}", rate, first)
            command = ["lslora", ask[0], self.work / run / finetune.LAST, *ask[1:]]
            told = subprocess.run([*command, "--format", "flags"], capture_output=True, text=True)
            if told.returncode:
                raise ConfigError(told.stderr)
            words += tuple(told.stdout.splitlines())
        return words

    def write(self, name, content):
        (self.work / name).write_text(json.dumps(content, indent=1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="the folder that run.sh has prepared")
    add("--base", default="base", help="folder of the base model in it (default: base)")
    add("--rates-of", metavar="BASE",
        help="take the learning rates that were chosen on this base")  # fmt: skip
    add("--corpora", nargs="+", default=["few", "more"], choices=list(LENGTH), metavar="NAME",
        help=f"of {', '.join(LENGTH)} (default: few more)")  # fmt: skip
    add("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="NAME",
        help=f"(default: {' '.join(SYSTEMS)})")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    args = parser.parse_args()
    evidence = Evidence(args.work, args.base, args.seeds, args.rates_of)
    # all at once, each job waiting for a core: none is idle while another system is still at work
    with ThreadPoolExecutor(len(args.systems) + 1) as pool:
        doing = [pool.submit(evidence.all_of, name, args.corpora) for name in args.systems]
        doing.append(pool.submit(evidence.base_alone, args.corpora))
        try:
            for each in doing:
                each.result()
        except ConfigError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"evidence.py: error: {error}")


if __name__ == "__main__":
    main()
