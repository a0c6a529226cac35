"""The language inventory: reading tiers, the stable order, one value for each language."""

import re
from itertools import permutations

import pytest

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.languages import Languages

SPEC = "high=en,de;low=oc,wo"


def test_codes_are_sorted_and_tiers_keep_the_order_of_the_user():
    languages = Languages.parse("low=wo,oc;high=en,de")
    assert languages.codes == ("de", "en", "oc", "wo")
    assert languages.tiers == ("low", "high")
    assert [languages.index(code) for code in languages.codes] == [0, 1, 2, 3]
    assert [languages.tier(code) for code in languages.codes] == ["high", "high", "low", "low"]
    assert len(languages) == 4
    assert "oc" in languages and "fr" not in languages and "low" not in languages


def test_the_order_depends_on_the_codes_alone():
    codes = ("zho_Hans", "en", "zh", "eng_Latn")
    for shuffled in permutations(codes):
        one_tier = Languages.parse(f"all={','.join(shuffled)}")
        two_tiers = Languages.parse(f"b={','.join(shuffled[:2])};a={','.join(shuffled[2:])}")
        assert one_tier.codes == two_tiers.codes == ("en", "eng_Latn", "zh", "zho_Hans")


def test_spaces_empty_parts_and_a_tier_named_twice_are_fine():
    languages = Languages.parse(" high = en , de ;; low=oc,; high=fr ;")
    assert languages.spec == "high=de,en,fr;low=oc"


def test_spec_reads_back_as_the_same_inventory():
    languages = Languages.parse("low=wo,oc;high=en,de")
    assert languages.spec == "low=oc,wo;high=de,en"
    again = Languages.parse(languages.spec)
    assert (again.spec, again.codes, again.tiers) == (
        languages.spec,
        languages.codes,
        languages.tiers,
    )


def test_a_tsv_may_have_a_bom_comments_empty_lines_and_other_line_ends(tmp_path):
    path = tmp_path / "tiers=all.tsv"  # and an equals sign in its name
    text = "\ufeffwo\tlow\r\n# a comment\r\n\r\n  en \t high \r\noc\tlow\r\n#fr\thigh\r\nde\thigh"
    path.write_bytes(text.encode("utf-8"))
    languages = Languages.parse(str(path))
    assert languages.spec == "low=oc,wo;high=de,en"
    assert languages.codes == ("de", "en", "oc", "wo")


@pytest.mark.parametrize(
    "content, message",
    [
        ("de\tmid=2", "the tier 'mid=2' is empty or holds '=', ';' or ','"),
        ("de\thigh;low", "the tier 'high;low' is"),
        ("de,en\thigh", "the language 'de,en' is"),
        ("de\t", "expected code<TAB>tier"),
    ],
)
def test_what_would_read_back_as_something_else_is_refused(tmp_path, content, message):
    """A checkpoint holds the inventory as text; a file is split at tabs alone."""
    path = tmp_path / "tiers.tsv"
    path.write_text(f"fr\tlow\n{content}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        Languages.parse(str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"en\thigh\nde high\n", "line 2: expected code<TAB>tier, found 'de high': write one"),
        (b"# tiers\n\nen\thigh\tx\n", "line 3: expected code<TAB>tier"),
        (b"en\n", "line 1: expected code<TAB>tier"),
        (b"\thigh\n", "line 1: expected code<TAB>tier"),
        (b"en\thigh\nen\tlow\n", "names en twice: keep it in one tier"),
        (b"# nothing\n", "names no language: list each language under a tier"),
        ("dé\thigh\n".encode("latin-1"), "save it as UTF-8 text"),
    ],
)
def test_a_bad_tsv_is_an_error_that_names_the_line(tmp_path, content, message):
    path = tmp_path / "tiers.tsv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--lora-tiers.*{re.escape(message)}"):
        Languages.parse(str(path))


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "en,de",
            "'en,de' is neither a file nor of the form 'high=en,fr;low=oc': correct the path",
        ),
        ("high=en;de", "cannot read 'de': write tier=code,code;tier=code,…"),
        ("high=;low=oc", "cannot read 'high=': write"),
        ("=en", "cannot read '=en': write"),
        ("high=en;low=oc,en", "names en twice: keep it in one tier"),
        ("high=en,en", "names en twice: keep it in one tier"),
        ("high=en,EN", "languages EN and en differ only in case: rename one"),
        ("high=zh;low=zH,Zh", "languages Zh and zH and zh differ only in case: rename one"),
        ("en=de,fr;low=en", "en is both a language and a tier: rename the tier"),
        ("high=,", "names no language"),
        (";=;", "cannot read '=': write"),
    ],
)
def test_a_bad_spec_is_an_error_that_names_the_remedy(spec, message):
    with pytest.raises(ConfigError, match=f"^--lora-tiers:? ?{re.escape(message)}"):
        Languages.parse(spec)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8", (8, 8, 8, 8)),
        (" 8 ", (8, 8, 8, 8)),
        (8, (8, 8, 8, 8)),
        ("high=2,low=8", (2, 2, 8, 8)),
        (" low = 8 , high = 2 ,", (2, 2, 8, 8)),
        ("high=2,low=8,wo=16", (2, 2, 8, 16)),
        ("wo=16,de=1,high=2,low=8", (1, 2, 8, 16)),
        ("de=1,en=2,oc=3,wo=4", (1, 2, 3, 4)),
        ("high=2,oc=3,wo=4", (2, 2, 3, 4)),
    ],
)
def test_a_value_for_all_for_tiers_or_for_languages_which_win(text, expected):
    assert Languages.parse(SPEC).per_language(text, "--lora-rank", int) == expected


@pytest.mark.parametrize(
    "values, text",
    [
        ((2, 2, 2, 2), "2"),
        ((8, 2, 2, 8), None),
        ((1, 2, 3, 4), None),
        ((0.5, 0.5, 0.5, 0.5), "0.5"),
    ],
)
def test_values_are_spelled_as_briefly_as_tiers_allow(values, text):
    languages = Languages.parse(SPEC)
    found = languages.spelled(values)
    assert languages.per_language(found, "--lora-rank", float) == values
    assert text is None or found == text


def test_values_of_a_tier_are_spelled_once():
    assert Languages.parse("high=fr,de;low=wo,oc").spelled([2, 2, 8, 4]) == "high=2,oc=8,wo=4"


def test_inventories_are_joined():
    here = Languages.parse("high=de,en;low=fr")
    found = here.joined(Languages.parse("low=oc,fr;new=wo"))
    assert found.spec == "high=de,en;low=fr,oc;new=wo"
    assert here.joined(Languages.parse("high=en")).spec == here.spec
    message = "fr is in the tier low, and cannot move to high: leave it where it is"
    with pytest.raises(ConfigError, match=message):
        here.joined(Languages.parse("high=fr"))


def test_values_are_converted():
    languages = Languages.parse(SPEC)
    assert languages.per_language("high=0.5,low=4", "--lora-alpha", float) == (0.5, 0.5, 4.0, 4.0)


@pytest.mark.parametrize(
    "text, convert, message",
    [
        (
            "high=2,medium=4",
            int,
            "medium is neither a tier (high, low) nor a language (de, en, oc, ",
        ),
        ("high=2,low=8,ko=4", int, "ko is neither a tier (high, low) nor a language (de, en, oc, "),
        ("high=2,low=8,high=4", int, "gives two values for high: keep one"),
        ("high=2", int, "gives no value for oc, wo: add the language or its tier (low)"),
        ("en=2,oc=1", int, "gives no value for de, wo: add the language or its tier (high, low)"),
        ("", int, "'' is not a whole number: write one whole number for all, or tier=whole"),
        ("2.5", int, "'2.5' is not a whole number"),
        ("high=2,low=", int, "'' is not a whole number"),
        ("high=2,low=x", float, "'x' is not a number: write one number for all, or tier=number,…"),
    ],
)
def test_bad_values_name_the_option_and_the_remedy(text, convert, message):
    with pytest.raises(ConfigError, match=f"^--lora-rank:? {re.escape(message)}"):
        Languages.parse(SPEC).per_language(text, "--lora-rank", convert)
