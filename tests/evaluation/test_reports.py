"""Scores as text: matrices, means, signatures, in every format."""

import csv
import io
import json

import pytest
import results

from lslora_fairseq.evaluation import reports

TABLE = f"""\
spBLEU, source languages in rows, target languages in columns

source    en    de   wo  mean
en         -  30.0  4.0  17.0
de      36.0     -    -  36.0
wo       8.0     -    -   8.0
mean    22.0  30.0  4.0  19.5

{results.PIECES}

BLEU, source languages in rows, target languages in columns

source    en    de   wo  mean
en         -  15.0  2.0   8.5
de      18.0     -    -  18.0
wo       4.0     -    -   4.0
mean    11.0  15.0  2.0   9.8

{results.BLEU.format("13a")}

off-target: share of hypotheses in another language, by py3langid 0.4.0

source     en    de  wo   mean
en          -  2.0%   ?   2.0%
de       0.0%     -   -   0.0%
wo      10.0%     -   -  10.0%
mean     5.0%  2.0%   ?   4.0%

? unknown to py3langid 0.4.0: wo

means over  directions  spBLEU  BLEU  off-target
high→high            2    33.0  16.5        1.0%
high→low             1     4.0   2.0           ?
low→high             1     8.0   4.0       10.0%
en→x                 2    17.0   8.5        2.0%
x→en                 2    22.0  11.0        5.0%
all                  4    19.5   9.8        4.0%

model        tuned.pt (abababab)
test set     test of data/finetune, 4,000 sentences
references   detokenised test set
detokenised  sentencepiece
decoding     beam 5, lenpen 1.0
near ties    8 of 4,000 sentences"""


def test_the_table():
    assert reports.render(results.make(), "table") == TABLE


def test_means_are_those_of_unrounded_scores():
    """0.04 and 0.04 and 0.06: rounded first, they would make 0.0."""
    scores = {"en-de": (0.04, 0), "de-en": (0.04, 0), "de-wo": (0.07, 0)}
    found = reports.means(results.make(scores))
    assert found["all"]["spBLEU"] == pytest.approx(0.05, rel=1e-12)
    assert found["high→high"] == {"directions": 2, "spBLEU": 0.04, "BLEU": 0.02, "off-target": 0}


def test_a_wide_matrix_is_printed_in_parts():
    codes = [f"l{number:02}" for number in range(30)]
    scores = {f"{s}-{t}": (10.0, 0.0) for s in codes for t in codes if s != t}
    text = reports.render(results.make(scores, {}, off_target=False), "table")
    assert max(map(len, text.splitlines())) <= reports.WIDTH
    headers = [line.split() for line in text.splitlines() if line.startswith("source ")]
    assert len(headers) == 4 and headers[0] + headers[1][1:] == ["source", *codes, "mean"]
    rows = [line.split() for line in text.splitlines() if line.startswith("l07 ")]
    cells = rows[0] + rows[1][1:]
    assert cells == ["l07", *["10.0"] * 7, "-", *["10.0"] * 22, "10.0"]


def test_signatures_that_differ_by_target_language():
    scores = {"en-de": (1.0, 0), "en-zh": (2.0, 0), "de-zh": (3.0, 0), "zh-en": (4.0, 0)}
    found = results.make(scores, {}, off_target=False)
    thirteen, chinese = results.BLEU.format("13a"), results.BLEU.format("zh")
    assert f"\n\n{thirteen} into de, en\n{chinese} into zh\n\n" in reports.render(found, "table")
    assert reports.short_signature(found, "BLEU") == results.BLEU.format("13a,zh")
    assert reports.short_signature(found, "spBLEU") == results.PIECES


def test_without_tiers_and_off_target():
    text = reports.render(results.make(tiers={}, off_target=False), "table")
    assert "off-target" not in text and "high" not in text and "?" not in text
    assert "en→x                 2    17.0   8.5\n" in text


def test_csv_is_tidy():
    rows = list(csv.DictReader(io.StringIO(reports.render(results.make(), "csv"))))
    assert len(rows) == 4 * 3
    assert rows[0] == {
        "source": "en", "target": "de", "source_tier": "high", "target_tier": "high",
        "metric": "spBLEU", "score": "30.04", "signature": results.PIECES,
    }  # fmt: skip
    of_wolof = [row for row in rows if row["target"] == "wo"]
    assert [(row["metric"], row["score"]) for row in of_wolof] == [
        ("spBLEU", "4.04"), ("BLEU", "2.02"), ("off-target", ""),
    ]  # fmt: skip
    assert of_wolof[-1]["signature"] == "py3langid 0.4.0"
    rows = csv.DictReader(io.StringIO(reports.render(results.make(tiers={}), "csv")))
    assert {row["source_tier"] for row in rows} == {""}


def test_json_is_what_was_saved():
    assert json.loads(reports.render(results.make(), "json")) == results.make()


def test_latex_is_escaped():
    scores = {"eng_Latn-deu_Latn": (30.04, 0.02), "deu_Latn-eng_Latn": (36.04, 0.0)}
    tiers = {"eng_Latn": "high & mighty", "deu_Latn": "high & mighty"}
    lines = reports.render(results.make(scores, tiers), "latex").splitlines()
    assert lines[:13] == [
        r"\begin{table}", r"\centering", r"\begin{tabular}{lrrr}", r"\toprule",
        r"source & eng\_Latn & deu\_Latn & mean \\", r"\midrule",
        r"eng\_Latn & - & 30.0 & 30.0 \\", r"deu\_Latn & 36.0 & - & 36.0 \\", r"\midrule",
        r"mean & 36.0 & 30.0 & 33.0 \\", r"\bottomrule", r"\end{tabular}",
        r"\caption{spBLEU (nrefs:1\textbar{}case:mixed\textbar{}eff:no\textbar{}tok:flores200"
        r"\textbar{}smooth:exp\textbar{}version:2.6.0)}",
    ]  # fmt: skip
    assert r"means over & directions & spBLEU & BLEU & off-target \\" in lines
    assert r"high \& mighty$\rightarrow$high \& mighty & 2 & 33.0 & 16.5 & 1.0\% \\" in lines
