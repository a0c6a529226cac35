"""Scores against sacrebleu called directly, and what keeps a tokenizer from being there."""

import http.client
import io
import pickle
import urllib.error
import urllib.request
from hashlib import sha256

import pytest
import sentencepiece
from folders import sentences, worse
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_ko_mecab, tokenizer_spm

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import scoring

REFERENCES = sentences(30, 1)
HYPOTHESES = worse(REFERENCES, 0.3, 2)
FILE_OF = {"flores101": "sacrebleu_tokenizer_spm.model", "flores200": "flores200sacrebleuspm"}


@pytest.fixture(autouse=True)
def no_cache():
    scoring._bleu.cache_clear()
    scoring._piece_bleu.cache_clear()


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece model of 40 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200, 3)), model_writer=model, vocab_size=40,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "own.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder for the models that sacrebleu downloads, and no network."""
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def unreachable(url):
    raise urllib.error.URLError("Name or service not known")


def told(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        scoring.metrics(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(*args, **kwargs):
    return list(scoring.metrics(*args, **kwargs))


def signature(metric):
    return str(metric.get_signature())


@pytest.mark.parametrize(
    "tokenizer, target, direct",
    [("auto", "de", "13a"), ("auto", "zho_Hans", "zh"), ("char", "de", "char")],
)
def test_scores_and_signatures_are_sacrebleus(tokenizer, target, direct):
    found = scoring.score(HYPOTHESES, REFERENCES, scoring.metrics(target, [tokenizer]))
    bleu, chrf = BLEU(tokenize=direct), CHRF(word_order=2)
    assert found == {
        "BLEU": {
            "score": bleu.corpus_score(HYPOTHESES, [REFERENCES]).score,
            "signature": signature(bleu),
        },
        "chrF++": {
            "score": chrf.corpus_score(HYPOTHESES, [REFERENCES]).score,
            "signature": signature(chrf),
        },
    }
    assert f"|tok:{direct}|" in found["BLEU"]["signature"]
    assert 20 < found["BLEU"]["score"] < 60


def test_a_direction_in_a_process_of_its_own():
    work = pickle.loads(pickle.dumps(scoring.score_direction))
    found = pickle.loads(pickle.dumps(work(HYPOTHESES, REFERENCES, "de", ["auto"])))
    assert found == scoring.score(HYPOTHESES, REFERENCES, scoring.metrics("de", ["13a"]))


@pytest.mark.parametrize(
    "tokenizer, codes",
    [
        ("zh", "zh zh_CN zho zho_Hans zho_simpl cmn_Hant yue_Hant zh-TW ZH"),
        ("ja-mecab", "ja ja_XX jpn jpn_Jpan"),
        ("ko-mecab", "ko ko_KR kor_Hang"),
        ("13a", "de deu_Latn jav_Latn kok zha zul"),
    ],
)
def test_auto_goes_by_the_language(tokenizer, codes):
    assert {code: scoring.for_language("auto", code) for code in codes.split()} == dict.fromkeys(
        codes.split(), tokenizer
    )
    assert scoring.for_language("intl", codes.split()[0]) == "intl"


def test_own_pieces(spm):
    """As if the text had been cut into pieces before; the signature names the model."""
    model = sentencepiece.SentencePieceProcessor(str(spm))
    cut = [[" ".join(model.encode(x, out_type=str)) for x in y] for y in (HYPOTHESES, REFERENCES)]
    direct = BLEU(tokenize="none").corpus_score(cut[0], [cut[1]]).score
    found = scoring.score_direction(HYPOTHESES, REFERENCES, "de", ["13a"], str(spm))
    assert list(found) == ["spBLEU", "BLEU", "chrF++"]
    assert found["spBLEU"]["score"] == direct != found["BLEU"]["score"]
    assert f"|tok:spm-{sha256(spm.read_bytes()).hexdigest()[:8]}|" in found["spBLEU"]["signature"]


def test_names_and_their_order(spm, models):
    for file in FILE_OF.values():
        (models / file).write_bytes(spm.read_bytes())
    assert names("de", ["13a"]) == ["BLEU", "chrF++"]
    assert names("de", ["flores200"]) == ["spBLEU", "chrF++"]
    assert names("de", ["13a", "flores200"]) == ["BLEU", "spBLEU", "chrF++"]
    assert names("de", ["flores200", "auto", "intl", "auto"]) == [
        "spBLEU", "BLEU (auto)", "BLEU (intl)", "chrF++",
    ]  # fmt: skip
    assert names("de", ["flores200", "flores101"], str(spm)) == [
        "spBLEU (own)", "spBLEU (flores200)", "spBLEU (flores101)", "chrF++",
    ]  # fmt: skip


def test_published_pieces(spm, models):
    """A file in its place is used without network; sacrebleu's signature has its name."""
    (models / FILE_OF["flores101"]).write_bytes(spm.read_bytes())
    found = scoring.score_direction(HYPOTHESES, REFERENCES, "de", ["flores101"], str(spm))
    assert found["spBLEU (flores101)"]["score"] == found["spBLEU (own)"]["score"]
    assert "|tok:flores101|" in found["spBLEU (flores101)"]["signature"]


def test_one_metric_does_not_wait_for_the_others():
    made = scoring.metric("chrF++", "ja", ["flores200", "auto"], "gone.model")
    assert isinstance(made, CHRF) and made.word_order == 2
    made = scoring.metric("BLEU", "de", ["auto"], "gone.model")
    assert made.tokenizer_signature == "13a"


def test_an_unknown_tokenizer():
    assert told("de", ["13b"]) == (
        "--bleu-tokenizer: sacrebleu has no tokenizer 13b: choose one of auto, none, zh, 13a, intl,"
        " char, ja-mecab, ko-mecab, flores101, flores200, spBLEU-1K"
    )


@pytest.mark.parametrize(
    "target, module, name", [("ja", tokenizer_ja_mecab, "ja"), ("kor", tokenizer_ko_mecab, "ko")]
)
def test_a_tokenizer_without_its_package(monkeypatch, target, module, name):
    monkeypatch.setattr(module, "MeCab", None)
    assert told(target, ["auto"]) == (
        f"--bleu-tokenizer: {name}-mecab needs packages that are not installed: pip install "
        f"'sacrebleu[{name}]', or choose another tokenizer, such as flores200"
    )


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\x0a\x0a"])
def test_a_file_that_is_no_sentencepiece_model(tmp_path, content):
    path = tmp_path / "some.model"
    path.write_bytes(content)
    assert told("de", [], str(path)) == (
        f"--spm {path} is not a SentencePiece model: name the .model file that spm_train wrote or "
        "that comes with the base model"
    )


def test_a_file_that_is_not_there():
    assert told("de", [], "gone.model") == (
        "--spm gone.model cannot be read (No such file or directory): name a SentencePiece model"
    )


@pytest.mark.parametrize("tokenizer, base", [("flores101", "M2M-124"), ("flores200", "NLLB-200")])
def test_no_network(models, tokenizer, base):
    url = tokenizer_spm.SPM_MODELS[tokenizer]["url"]
    assert told("de", [tokenizer]) == (
        f"--bleu-tokenizer: sacrebleu cannot download its SentencePiece model of {tokenizer} (Name "
        f"or service not known): put the file of {url} at {models / FILE_OF[tokenizer]}, or score "
        f"with a SentencePiece model that you have: --spm FILE (the one that comes with {base} is "
        "probably the same file)"
    )
    assert not (models / FILE_OF[tokenizer]).exists()


class CutShort(io.BytesIO):
    def read(self):
        raise http.client.IncompleteRead(b"abc", 1000)


@pytest.mark.parametrize("answer", [CutShort, lambda: io.BytesIO(b"<html>log in first</html>")])
def test_a_download_that_fails_leaves_no_file_behind(models, monkeypatch, spm, answer):
    path = models / FILE_OF["flores200"]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url: answer())
    assert "cannot download its SentencePiece model of flores200" in told("de", ["flores200"])
    assert not path.exists()
    path.write_bytes(b"")  # nor is one in the way that an earlier attempt left
    monkeypatch.setattr(urllib.request, "urlopen", lambda url: io.BytesIO(spm.read_bytes()))
    assert names("de", ["flores200"]) == ["spBLEU", "chrF++"]


def test_a_damaged_file_in_its_place_is_named_and_left(models):
    path = models / FILE_OF["flores200"]
    path.write_bytes(b"no model")
    assert told("de", ["flores200"]) == (
        f"{path} is not the SentencePiece model of flores200: delete it, so that it is downloaded "
        "again"
    )
    assert path.exists()
