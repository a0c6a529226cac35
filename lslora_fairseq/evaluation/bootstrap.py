"""Is one system better than another? Paired bootstrap resampling, digit by digit as sacrebleu's.

A test set is drawn anew 1,000 times, with replacement, and all systems are scored on each draw
(Koehn 2004). sacrebleu compares two systems in one direction. Here whole groups of directions are
compared, too: directions with equally many sentences are drawn alike, as a multi-parallel test set
needs, and the macro-average over a group takes the place of the score.

sacrebleu's rule compares absolute differences with their mean, which counts one tail of the two. So
p < 0.05 for 11 % of pairs of equally good systems with normal differences (simulated), not for 5 %.
"""

import os
import secrets

import numpy as np
from sacrebleu.significance import _compute_p_value

from lslora_fairseq.errors import ConfigError

RESAMPLES = 1000
LEVEL = 0.05


def seed():
    """The seed for all directions of a comparison: SACREBLEU_SEED as sacrebleu reads it."""
    text = os.environ.get("SACREBLEU_SEED", "12345")
    if text.lower() == "none":
        return secrets.randbits(32)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"SACREBLEU_SEED={text} is not a whole number: set one, or none"
        ) from None


def resample(metric, systems, references, seed):
    """Scores of systems in one direction, on the test set and on what is drawn from it.

    Args:
        metric: a sacrebleu metric
        systems: list of systems, each a list of hypotheses
        references: list of sentences

    Returns:
        (systems,) scores; (systems, 1000) scores of the same draws
    """
    counts = [metric._extract_corpus_statistics(lines, [references]) for lines in systems]
    scores = np.array([metric._aggregate_and_compute(count).score for count in counts])
    # float32 as sacrebleu: exact for sums below 2 ** 24, in whatever order
    counts = [np.array(count, dtype="float32") for count in counts]
    generator, n = np.random.default_rng(seed), len(references)
    drawn = np.empty((len(systems), RESAMPLES))
    for number in range(RESAMPLES):
        times = np.bincount(generator.choice(n, size=n), minlength=n).astype("float32")
        for system, count in enumerate(counts):
            drawn[system, number] = metric._compute_score_from_stats(times @ count).score
    return scores, drawn


def p_value(baseline, system):
    """How likely a difference as large as that of two systems comes about by chance.

    Args:
        baseline, system: (score, (1000,) scores of the same draws), of a direction or averaged

    Returns:
        sacrebleu's p; but 1 where no draw tells the systems apart, such as for the same hypotheses,
        which sacrebleu takes for surely different (p = 1/1001)
    """
    differences = np.abs(system[1] - baseline[1])
    if not differences.any():
        return 1.0
    return _compute_p_value(differences - differences.mean(), abs(system[0] - baseline[0]))
