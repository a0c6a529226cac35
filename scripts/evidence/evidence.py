#!/usr/bin/env python3
"""Fine-tunes, decodes and scores the systems of examples/evidence.

Systems run side by side, one on each core. Of each, the learning rate is chosen on the validation
set after half of the epochs, then its epoch and the length penalty, all with the first seed; then
the test set is decoded once. What is done is not done again. WORK is the folder in which run.sh has
prepared the corpora and the base.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import finetune
from jobs import Jobs
from systems import EPOCHS, ESTIMATION, SYSTEMS, WEIGHT_LEARNING

from lslora_fairseq.cores import cores
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import groups, reports, saved

LENGTH_PENALTIES = (1.0, 1.5, 2.0)
DECODING = "--cpu --beam 4 --max-len-a 1.5 --max-len-b 8"
CHOICE = "choice.json"


class Evidence:
    """The trainings and decodings on top of one base model.

    Args:
        work: the folder of everything
        base: folder of the base model in it
        seeds: numbers; with the first one everything is chosen
    """

    def __init__(self, work, base, seeds):
        self.work, self.base, self.seeds = Path(work), base, seeds
        self.jobs = Jobs(work, sorted(os.sched_getaffinity(0))[: cores()])

    def place(self, corpus, name):
        """The folder of a system, within the work folder."""
        return f"results/{self.base}/{corpus}/{name}"

    def all_of(self, corpus, name):
        """Trains, decodes and scores a system, and writes down what was chosen."""
        system, place, first = SYSTEMS[name], self.place(corpus, name), self.seeds[0]
        if system.is_learned:
            system = replace(system, options=system.options + self.learned(corpus, place))
        half = EPOCHS[corpus] // 2
        tried = {
            rate: self.train(f"{place}/tried", corpus, system, rate, first, half)
            for rate in system.rates
        }
        rate = min(tried, key=lambda rate: min(tried[rate]))
        losses = {seed: self.train(place, corpus, system, rate, seed) for seed in self.seeds}
        best = {seed: f"{self.run(place, rate, seed)}/{finetune.BEST}" for seed in self.seeds}
        penalty, valid = self.length_penalty(place, corpus, best[first])
        for seed, checkpoint in best.items():
            self.decode(f"{place}/test/{seed}", corpus, "test", checkpoint, penalty)
        self.decode(f"{place}/forgetting", "base", "test", best[first], penalty)
        self.write(place, {
            "options": system.options,
            "tried": tried,
            "rate": rate,
            "losses": losses,
            "penalty": penalty,
            "valid_bleu": valid,
            "runs": {seed: self.facts(self.run(place, rate, seed)) for seed in self.seeds},
        })  # fmt: skip

    def base_alone(self, corpus):
        """Decodes and scores the base model as it is."""
        place, checkpoint = self.place(corpus, "base"), f"{self.base}/{finetune.LAST}"
        penalty, valid = self.length_penalty(place, corpus, checkpoint)
        self.decode(f"{place}/test/{self.seeds[0]}", corpus, "test", checkpoint, penalty)
        self.decode(f"{place}/forgetting", "base", "test", checkpoint, penalty)
        self.write(place, {"penalty": penalty, "valid_bleu": valid})

    def run(self, place, rate, seed):
        return f"{place}/lr_{rate:g}.seed_{seed}"

    def train(self, place, corpus, system, rate, seed, epochs=None):
        """Trains once.

        Returns:
            the losses on the validation set after each epoch
        """
        folder, base = self.run(place, rate, seed), self.work / self.base / finetune.LAST
        command = finetune.command(self.work, corpus, base, system, EPOCHS[corpus], rate, seed)
        self.jobs.run(folder, command, after=[f"data/{corpus}", self.base])
        return finetune.curve(self.jobs.log(folder))

    def facts(self, run):
        of_job = self.jobs.facts(run)
        peak = {"peak_mib": of_job["peak_mib"]}
        return {**finetune.facts(self.jobs.log(run)), **peak}

    def length_penalty(self, place, corpus, checkpoint):
        """The length penalty with the highest mean BLEU on the validation set, and all scores."""
        scores = {
            x: self.decode(f"{place}/valid/{x:g}", corpus, "valid", checkpoint, x)
            for x in LENGTH_PENALTIES
        }
        return max(scores, key=scores.get), scores

    def decode(self, folder, corpus, subset, checkpoint, penalty):
        """Decodes all directions of a corpus.

        Args:
            checkpoint: its path within the work folder

        Returns:
            mean BLEU of the directions
        """
        command = [
            "lslora", "evaluate", self.work / "data" / corpus, "--path", self.work / checkpoint,
            "--out", "{out}/scores", "--gen-subset", subset, *DECODING.split(),
            "--lenpen", penalty, "--tiers", self.work / "corpus" / "tiers.tsv",
        ]  # fmt: skip
        run = str(Path(checkpoint).parent)
        out = self.jobs.run(folder, command, after=[f"data/{corpus}", run])
        results = saved.load(str(out / "scores"))
        return groups.mean(list(reports.scores(results, "BLEU").values()))

    def learned(self, corpus, place):
        """Index sides, ranks and modules as this package's commands find them.

        Returns:
            the words of the options
        """
        words, first = (), self.seeds[0]
        for name, system, ask in (
            ("weights", WEIGHT_LEARNING, ["sides"]),
            ("estimate", ESTIMATION, ["suggest", "--budget", "25%"]),
        ):
            (rate,) = system.rates
            system = replace(system, options=system.options + words)
            self.train(f"{place}/{name}", corpus, system, rate, first)
            run = self.run(f"{place}/{name}", rate, first)
            command = ["lslora", ask[0], self.work / run / finetune.LAST, *ask[1:]]
            told = subprocess.run([*command, "--format", "flags"], capture_output=True, text=True)
            if told.returncode:
                raise ConfigError(told.stderr)
            words += tuple(told.stdout.splitlines())
        return words

    def write(self, place, content):
        (self.work / place / CHOICE).write_text(json.dumps(content, indent=1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="the folder that run.sh has prepared")
    add("--base", default="base", help="folder of the base model in it (default: base)")
    add("--corpora", nargs="+", default=["few", "more"], metavar="NAME", help="(default: few more)")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="NAME",
        help=f"(default: {' '.join(SYSTEMS)})")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    args = parser.parse_args()
    evidence = Evidence(args.work, args.base, args.seeds)
    with ThreadPoolExecutor(cores()) as pool:
        doing = []
        for corpus in args.corpora:
            doing.append(pool.submit(evidence.base_alone, corpus))
            doing += [pool.submit(evidence.all_of, corpus, name) for name in args.systems]
        try:
            for each in doing:
                each.result()
        except ConfigError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"evidence.py: error: {error}")


if __name__ == "__main__":
    main()
