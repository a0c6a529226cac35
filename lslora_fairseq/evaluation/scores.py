"""Scores of the directions in a folder, computed side by side and kept there."""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tqdm import tqdm

from lslora_fairseq.cores import cores
from lslora_fairseq.evaluation import langid, scoring
from lslora_fairseq.evaluation.folder import sha256


class Scores:
    """How directions are scored.

    Args:
        tokenizers: sacrebleu's names, separated by commas
        spm: path of a SentencePiece model, or None
        with_langid: whether off-target hypotheses are counted
        pairs: the directions that will be asked for

    Raises:
        ConfigError: something is unknown or not there, told before the work.
    """

    def __init__(self, tokenizers, spm, with_langid, pairs):
        self.tokenizers, self.spm = [t for t in tokenizers.split(",") if t], spm
        for target in sorted({pair.split("-")[1] for pair in pairs}):
            names = list(scoring.metrics(target, self.tokenizers, spm))
        self.settings = {
            "metrics": names,
            "tokenizers": self.tokenizers,
            "spm": spm and {"path": spm, "sha256": sha256(spm)},
            "langid": langid.version() if with_langid else None,
        }

    def bring_up_to_date(self, folder):
        """Scores what has no such scores yet, and writes it.

        Args:
            folder: a :class:`~lslora_fairseq.evaluation.folder.Folder`
        """
        began, results = time.perf_counter(), folder.results
        new = {name: results.get(name) for name in self.settings} != self.settings
        results.update(self.settings)
        todo = [p for p, facts in results["directions"].items() if new or "scores" not in facts]
        if not todo:
            return
        jobs = [
            (p, folder.lines(p, "hyp"), folder.lines(p, "ref"), self.tokenizers, self.spm,
             self.settings["langid"]) for p in todo
        ]  # fmt: skip
        with ProcessPoolExecutor(min(cores(), len(jobs)), get_context("fork")) as pool:
            done = tqdm(
                pool.map(_score, jobs), "scoring", len(jobs), leave=False, disable=None,
            )  # fmt: skip
            for pair, facts in zip(todo, done):
                results["directions"][pair].pop("off_target", None)
                results["directions"][pair].update(facts)
        results.setdefault("seconds", {})["score"] = time.perf_counter() - began
        folder.save()


def _score(job):
    pair, hypotheses, references, tokenizers, spm, with_langid = job
    target = pair.split("-")[1]
    facts = {"scores": scoring.score_direction(hypotheses, references, target, tokenizers, spm)}
    if with_langid:
        facts["off_target"] = langid.off_target(hypotheses, target)
    return facts
