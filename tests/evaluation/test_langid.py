"""The share of hypotheses in another language, by the library itself."""

import sys
from importlib.metadata import version

import pytest

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import langid

GERMAN = "Der Ausschuss hat gestern beschlossen, die Regeln für alle Mitglieder zu ändern."
FRENCH = "Le comité a décidé hier de changer les règles pour tous les membres du groupe."
CHINESE = "委员会昨天决定修改所有成员的规则，并将在下个月公布新的规定。"


def test_the_share_of_other_languages():
    lines = [GERMAN, FRENCH, GERMAN, GERMAN]
    assert langid.off_target(lines, "de") == 0.25
    assert langid.off_target(lines, "fra_Latn") == 0.75
    assert langid.off_target([CHINESE], "zho_simpl") == 0
    assert langid.off_target(["上海是一个大城市。"], "zh") == 0  # Wu, says the library


def test_an_empty_hypothesis_is_off_target():
    assert langid.off_target([GERMAN, "", " "], "de") == pytest.approx(2 / 3)


def test_where_there_is_no_share():
    assert langid.off_target([GERMAN], "wo") is None
    assert langid.off_target([], "de") is None


@pytest.mark.parametrize(
    "name, codes",
    [
        ("de", "de deu deu_Latn de_DE de-AT DE"),
        ("zh", "zh zh_CN zho zho_Hans zho_simpl cmn"),
        pytest.param(
            "yue",
            "yue yue_Hant",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="py3langid 0.2 lacks it"),
        ),
        ("ja", "ja ja_XX jpn_Jpan"),
        ("no", "no nb nob_Latn"),
        ("nn", "nn nno_Latn"),
        ("tl", "tl tgl_Latn fil"),
        ("ar", "ar arb_Arab ar_AR"),
        ("fa", "fa pes_Arab prs_Arab"),  # one language of several that are taken for one
        ("ms", "ms zsm_Latn"),
        ("or", "or ory_Orya"),
        ("he", "he iw heb_Hebr"),
        (None, "wo wol_Latn sd snd_Arab min_Latn l1 xx nothing_like_it toolongforacode"),
    ],
)
def test_codes(name, codes):
    assert {code: langid.known(code) for code in codes.split()} == dict.fromkeys(
        codes.split(), name
    )


def test_the_version():
    assert langid.version() == f"py3langid {version('py3langid')}"


@pytest.mark.parametrize("library", ["py3langid", "langcodes"])
def test_without_the_library_the_remedy_is_told(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    for call in (langid.version, lambda: langid.off_target([GERMAN], "de")):
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == (
            f"off-target hypotheses are counted with py3langid and langcodes ({library} is not "
            "installed): pip install 'py3langid>=0.2.2' 'langcodes>=3.3'"
        )
