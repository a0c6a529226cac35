"""Systems compared with a baseline, from the folders that ``lslora evaluate`` wrote."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import CHRF

from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.evaluation import bootstrap, groups, reports, saved, scoring
from lslora_fairseq.evaluation.bootstrap import LEVEL

EXAMPLES = 5  # of sentences that got better, and as many that got worse


def load(folders):
    """The results of all folders, the first being the baseline's.

    Returns:
        folder -> results

    Raises:
        ConfigError: a folder cannot be read, or is not comparable with the baseline: other test
            sets, directions or tokenizers, or a file that has changed since it was scored.
    """
    twice = [folder for folder in dict.fromkeys(folders) if folders.count(folder) > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: name each folder once")
    loaded = {folder: saved.load(folder) for folder in folders}
    baseline, *others = folders
    for other in others:
        _check_comparable(baseline, loaded[baseline], other, loaded[other])
    for folder, results in loaded.items():
        for pair, direction in results["directions"].items():
            for kind in ("ref", "hyp"):
                saved.read_lines(folder, pair, kind, direction["sha256"])
    return loaded


def _check_comparable(a, of_a, b, of_b):
    """Raises ConfigError, naming both folders, unless both were scored on the same text alike."""
    both = f"{a} and {b}"
    remedy = "compare results of the same test set, evaluated with the same options"
    for key, what in (("subset", "subsets"), ("tokenizers", "tokenizers"), ("metrics", "metrics")):
        if of_a[key] != of_b[key]:
            found = f"{_text(of_a[key])} and {_text(of_b[key])}"
            raise ConfigError(f"{both} have different {what}, {found}: {remedy}")
    if (of_a["spm"] or {}).get("sha256") != (of_b["spm"] or {}).get("sha256"):
        raise ConfigError(f"{both} were scored with different SentencePiece models: {remedy}")
    only = [
        f"{pair} is only in {folder}"
        for folder, own, other in ((a, of_a, of_b), (b, of_b, of_a))
        for pair in own["directions"]
        if pair not in other["directions"]
    ]
    if only:
        raise ConfigError(f"{both} have different directions ({listed(only)}): {remedy}")
    for pair, direction in of_a["directions"].items():
        other = of_b["directions"][pair]
        if direction["sentences"] != other["sentences"]:
            found = f"{direction['sentences']:,} and {other['sentences']:,}"
            raise ConfigError(f"{both} have {found} sentences in {pair}: {remedy}")
        if direction["sha256"]["ref"] != other["sha256"]["ref"]:
            raise ConfigError(f"{both} have different references in {pair}: {remedy}")


def _text(value):
    return value if isinstance(value, str) else "+".join(value)


class Resampled(NamedTuple):
    """All systems, scored on the same draws.

    Attributes:
        metric: its name
        seed: of the draws
        directions: pair -> (systems,) scores, (systems, 1000) draws, and the signature
    """

    metric: str
    seed: int
    directions: dict


def compare(loaded, metric=None):
    """Tests every system against the baseline, in each direction and group of directions.

    Args:
        loaded: what :func:`load` returned
        metric: name of a metric; None is the main one

    Returns:
        dict with ``baseline``, ``metric``, ``signatures`` (signature -> target languages),
        ``resamples``, ``seed``, ``level`` and ``systems``: for each ``system``, ``directions`` and
        ``groups``, each with what :func:`tested` returns and a ``verdict`` (better, worse or
        undecided); the number of directions of each verdict

    Raises:
        ConfigError: the results have no such metric, or it cannot be computed here.
    """
    baseline, results = next(iter(loaded.items()))
    found = resampled(loaded, metric)
    return {
        "baseline": baseline,
        "metric": found.metric,
        "signatures": reports.by_signature(
            {pair: signature for pair, (_, _, signature) in found.directions.items()}
        ),
        "resamples": bootstrap.RESAMPLES,
        "seed": found.seed,
        "level": LEVEL,
        "systems": [
            _system(name, number, found, results["tiers"])
            for number, name in enumerate(loaded)
            if number
        ],
    }


def resampled(loaded, metric=None):
    """Scores all systems on the test set of each direction, and on draws from it.

    Args and errors are those of :func:`compare`.

    Returns:
        a :class:`Resampled`, for :func:`tested`
    """
    baseline, results = next(iter(loaded.items()))
    names = results["metrics"]
    metric = metric or names[0]
    if metric not in names:
        raise ConfigError(f"--metric {metric}: {baseline} has no such scores: {', '.join(names)}")
    _check_spm(baseline, results["spm"], metric)
    spm = results["spm"] and results["spm"]["path"]
    options = {"tokenizers": results["tokenizers"], "spm": spm}
    for target in {groups.sides(pair)[1] for pair in results["directions"]}:
        scoring.metric(metric, target, **options)  # told before the work; processes inherit it
    seed = bootstrap.seed()
    work = partial(_resample, metric, options, seed)
    return Resampled(metric, seed, _resample_all(loaded, work))


def tested(found, pairs, baseline, system):
    """Tests a system against another by the means of their scores over directions.

    Args:
        found: a :class:`Resampled`
        pairs: the directions
        baseline, system: places of the two among the folders

    Returns:
        dict with ``baseline`` and ``score``, the means, ``difference`` and ``p``
    """
    scores = np.mean([found.directions[pair][0] for pair in pairs], axis=0)
    draws = np.mean([found.directions[pair][1] for pair in pairs], axis=0)
    p = bootstrap.p_value((scores[baseline], draws[baseline]), (scores[system], draws[system]))
    return {
        "baseline": float(scores[baseline]),
        "score": float(scores[system]),
        "difference": float(scores[system] - scores[baseline]),
        "p": float(p),
    }


def _check_spm(folder, spm, metric):
    """Raises ConfigError if the SentencePiece model of the scores is not there any more."""
    if not spm or not metric.startswith("spBLEU"):
        return
    try:
        with open(spm["path"], "rb") as file:
            same = sha256(file.read()).hexdigest() == spm["sha256"]
    except OSError:
        same = None
    if not same:
        raise ConfigError(
            f"{folder} was scored with the SentencePiece model {spm['path']}, which "
            f"{'is gone' if same is None else 'has changed'}: put it back, or compare with "
            f"--metric {scoring.CHRF_NAME}"
        )


def _resample_all(loaded, work):
    """pair -> what *work* returns, done in as many processes as there are CPUs."""
    pairs = list(next(iter(loaded.values()))["directions"])
    checksums = [
        {folder: results["directions"][pair]["sha256"] for folder, results in loaded.items()}
        for pair in pairs
    ]
    processes = min(len(pairs), _cpus())
    if processes == 1:
        return dict(zip(pairs, _counted(map(work, pairs, checksums), len(pairs))))
    with ProcessPoolExecutor(processes) as pool:
        return dict(zip(pairs, _counted(pool.map(work, pairs, checksums), len(pairs))))


def _cpus():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _counted(results, total):
    """Passes results on; tells a terminal how many there are."""
    for number, result in enumerate(results, 1):
        if sys.stderr.isatty():
            end = "\n" if number == total else ""
            print(f"\rcompared {number} of {total} directions", end=end, file=sys.stderr)
        yield result


def _resample(name, options, seed, pair, checksums):
    """(systems,) scores, (systems, 1000) draws, and the signature, of one direction."""
    metric = scoring.metric(name, groups.sides(pair)[1], **options)
    folders = list(checksums)
    references = saved.read_lines(folders[0], pair, "ref", checksums[folders[0]])
    systems = [saved.read_lines(folder, pair, "hyp", checksums[folder]) for folder in folders]
    scores, draws = bootstrap.resample(metric, systems, references, seed)
    signature = metric.get_signature()
    signature.update("bs", bootstrap.RESAMPLES)
    signature.update("seed", seed)
    return scores, draws, str(signature)


def _system(name, number, found, tiers):
    """The comparison of one system with the first."""
    directions = {pair: _decided(tested(found, [pair], 0, number)) for pair in found.directions}
    verdicts = [row["verdict"] for row in directions.values()]
    return {
        "system": name,
        "directions": directions,
        "groups": {
            label: {"directions": len(pairs), **_decided(tested(found, pairs, 0, number))}
            for label, pairs in groups.groups(found.directions, tiers).items()
        },
        **{verdict: verdicts.count(verdict) for verdict in ("better", "worse", "undecided")},
    }


def _decided(row):
    verdict = "better" if row["difference"] > 0 else "worse"
    return {**row, "verdict": verdict if row["p"] < LEVEL and row["difference"] else "undecided"}


def examples(loaded, pair):
    """The sentences of one direction that changed most, by chrF++ of the sentence.

    Returns:
        for each system a list of dicts with ``system``, ``sentence`` (from 1), ``difference``,
        ``source``, ``reference``, ``baseline`` and ``hypothesis``: up to five that got better, the
        most improved first, then up to five that got worse

    Raises:
        ConfigError: the results have no such direction, or the source text is gone.
    """
    (baseline, results), *others = loaded.items()
    if pair not in results["directions"]:
        raise ConfigError(
            f"--examples {pair}: {baseline} has no such direction: {listed(results['directions'])}"
        )
    chrf = CHRF(word_order=2)
    sources, references, before = (
        saved.read_lines(baseline, pair, kind, results["directions"][pair]["sha256"])
        for kind in ("src", "ref", "hyp")
    )
    found = []
    for folder, own in others:
        after = saved.read_lines(folder, pair, "hyp", own["directions"][pair]["sha256"])
        changed = [
            {
                "system": folder,
                "sentence": number,
                "difference": _chrf(chrf, b, reference) - _chrf(chrf, a, reference),
                "source": source,
                "reference": reference,
                "baseline": a,
                "hypothesis": b,
            }
            for number, (source, reference, a, b) in enumerate(
                zip(sources, references, before, after), 1
            )
            if a != b
        ]
        changed.sort(key=lambda row: -row["difference"])
        found += [row for row in changed[:EXAMPLES] if row["difference"] > 0]
        found += [row for row in changed[: -EXAMPLES - 1 : -1] if row["difference"] < 0]
    return found


def _chrf(chrf, hypothesis, reference):
    return chrf.sentence_score(hypothesis, [reference]).score
