"""The test of significance is sacrebleu's, digit by digit."""

import numpy as np
import pytest
from folders import sentences, worse
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import bootstrap

REFERENCES = sentences(60, 1)
SYSTEMS = [worse(REFERENCES, share, seed) for seed, share in enumerate((0.3, 0.28, 0.35))]


@pytest.mark.parametrize("seed", ["12345", "7"])
@pytest.mark.parametrize("metric", [BLEU(), CHRF(word_order=2)], ids=["BLEU", "chrF++"])
def test_p_is_that_of_sacrebleu(monkeypatch, metric, seed):
    monkeypatch.setenv("SACREBLEU_SEED", seed)
    named = [(str(number), lines) for number, lines in enumerate(SYSTEMS)]
    _, found = PairedTest(named, {"m": metric}, [REFERENCES], "bs")()
    _, (baseline, *others) = found.popitem()
    scores, draws = bootstrap.resample(metric, SYSTEMS, REFERENCES, bootstrap.seed())
    assert scores.tolist() == [baseline.score, *(result.score for result in others)]
    ps = [bootstrap.p_value((scores[0], draws[0]), (scores[n], draws[n])) for n in (1, 2)]
    assert ps == [result.p_value for result in others]
    assert len(set(ps)) == 2 and all(0.001 < p < 1 for p in ps)


def test_equal_hypotheses_are_not_told_apart():
    scores, draws = bootstrap.resample(BLEU(), [SYSTEMS[0]] * 2, REFERENCES, 1)
    assert bootstrap.p_value((scores[0], draws[0]), (scores[1], draws[1])) == 1.0


def test_directions_of_equal_size_are_drawn_alike():
    metric = BLEU()
    _, first = bootstrap.resample(metric, [SYSTEMS[0]], REFERENCES, 5)
    _, again = bootstrap.resample(metric, [list(SYSTEMS[0])], list(REFERENCES), 5)
    _, other = bootstrap.resample(metric, [SYSTEMS[0]], REFERENCES, 6)
    assert (first == again).all() and not (first == other).all()
    assert first.shape == (1, 1000) and np.isfinite(first).all()


def test_the_seed(monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    assert bootstrap.seed() == 12345
    monkeypatch.setenv("SACREBLEU_SEED", "None")
    assert bootstrap.seed() != bootstrap.seed()
    monkeypatch.setenv("SACREBLEU_SEED", "many")
    with pytest.raises(ConfigError) as caught:
        bootstrap.seed()
    assert str(caught.value) == "SACREBLEU_SEED=many is not a whole number: set one, or none"
