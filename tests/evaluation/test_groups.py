"""Which directions are averaged together, and in which order languages stand."""

import pytest

from lslora_fairseq.evaluation import groups

TIERS = {"de": "high", "wo": "low", "en": "high", "nl": "medium"}


def test_pairs_of_tiers_come_in_the_order_of_tiers():
    pairs = ["wo-de", "de-wo", "de-en", "nl-de", "wo-en"]
    assert list(groups.groups(pairs, TIERS).items()) == [
        ("high→high", ["de-en"]),
        ("high→low", ["de-wo"]),
        ("low→high", ["wo-de", "wo-en"]),
        ("medium→high", ["nl-de"]),
        ("x→en", ["de-en", "wo-en"]),
        ("other", ["wo-de", "de-wo", "nl-de"]),
        ("all", pairs),
    ]


def test_english_is_a_code_not_a_beginning():
    pairs = ["eng_Latn-deu_Latn", "deu_Latn-enm_Latn", "deu_Latn-eng_Latn"]
    assert groups.groups(pairs, {}) == {
        "en→x": ["eng_Latn-deu_Latn"],
        "x→en": ["deu_Latn-eng_Latn"],
        "other": ["deu_Latn-enm_Latn"],
        "all": pairs,
    }
    assert groups.groups(["en_XX-de_DE"], {}) == {"en→x": ["en_XX-de_DE"], "all": ["en_XX-de_DE"]}


def test_without_english_nothing_is_other():
    assert groups.groups(["de-wo", "wo-de"], {}) == {"all": ["de-wo", "wo-de"]}


def test_a_language_without_tier_is_in_no_pair_of_tiers():
    found = groups.groups(["de-wo", "de-xx", "xx-wo"], TIERS)
    assert found == {"high→low": ["de-wo"], "all": ["de-wo", "de-xx", "xx-wo"]}


def test_rows_and_columns_are_in_one_order():
    sources, targets = groups.axes(["en-de", "en-wo", "wo-xx", "nl-en", "xx-en"], TIERS)
    assert list(sources.items()) == [
        ("high", ["en"]), ("low", ["wo"]), ("medium", ["nl"]), (None, ["xx"]),
    ]  # fmt: skip
    assert list(targets.items()) == [("high", ["en", "de"]), ("low", ["wo"]), (None, ["xx"])]


def test_the_mean_of_what_is_there():
    assert groups.mean([1.0, None, 2.0]) == 1.5
    assert groups.mean([None]) is None
    assert groups.mean([0.1] * 3) == pytest.approx(0.1, rel=1e-15)
