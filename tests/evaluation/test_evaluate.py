"""``lslora evaluate`` through the console: its files, going on, scoring anew, what it refuses."""

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import time
from tempfile import TemporaryFile
from unicodedata import normalize

import pytest
import torch
from console import LANGS, PAIRS, ROOT, finetune_args, lslora, run, start, train_args
from sacrebleu.metrics import BLEU, CHRF

from lslora_fairseq.evaluation import saved

LANGUAGES = LANGS.split(",")
ALL = sorted(PAIRS.split(","))
QUICK = ["--beam", "2", "--max-len-b", "20", "--bleu-tokenizer", "13a", "--cpu"]


def words(corpus, checkpoint, out, *more):
    return ["evaluate", corpus.data, "--path", checkpoint, "--out", out, *QUICK, *more]


@pytest.fixture(scope="module")
def evaluated(corpus, finetuned, tmp_path_factory):
    """(folder, table) of the fine-tuned model on the test set; not to be changed."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    _, table, err = lslora(*words(corpus, finetuned[0], out))
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"decoded {pair}" for pair in sorted(ALL, key=lambda p: err.index(f"decoded {p}:"))
    ]
    assert "6 of 6 directions, 48 of 48 sentences, 00:00 left" in err.splitlines()[-1]
    return out, table


@pytest.fixture
def out(evaluated, tmp_path):
    """A copy of the results that a test may change."""
    return shutil.copytree(evaluated[0], tmp_path / "out")


def results(folder):
    return saved.load(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(args, told):
    status, said, err = lslora(*args, check=False)
    assert status == 1 and not said
    *progress, line = err.splitlines()
    assert all("decoded " in line for line in progress)
    assert line.startswith("lslora: error: ")
    assert told in line
    return line


def test_texts(corpus, evaluated):
    folder, _ = evaluated
    for pair in ALL:
        source, target = pair.split("-")
        for suffix, language in (("src", source), ("ref", target)):
            lines = (folder / f"{pair}.{suffix}").read_text("utf-8").split("\n")
            # SentencePiece has normalised it
            expected = [normalize("NFKC", line) for line in corpus.text[language][8:16]]
            assert lines == [*(" ".join(line.split()) for line in expected), ""]
        assert (folder / f"{pair}.hyp").read_text("utf-8").count("\n") == 8
    assert not [name for name in contents(folder) if name.endswith(".tmp")]


def test_scores_are_sacrebleus(evaluated, finetuned, corpus):
    folder, table = evaluated
    found = results(folder)
    assert sorted(found["directions"]) == ALL
    for pair, facts in found["directions"].items():
        hypotheses, references = (
            (folder / f"{pair}.{suffix}").read_text("utf-8").split("\n")[:-1]
            for suffix in ("hyp", "ref")
        )
        for name, metric in (("BLEU", BLEU()), ("chrF++", CHRF(word_order=2))):
            score = metric.corpus_score(hypotheses, [references]).score
            assert facts["scores"][name] == {
                "score": score, "signature": str(metric.get_signature())
            }  # fmt: skip
        assert facts["sentences"] == 8 and facts["seconds"] > 0 and facts["near_ties"] >= 0
        for suffix, checksum in facts["sha256"].items():
            content = (folder / f"{pair}.{suffix}").read_bytes()
            assert hashlib.sha256(content).hexdigest() == checksum
    checksum = hashlib.sha256(finetuned[0].read_bytes()).hexdigest()
    assert found["models"] == [{"path": str(finetuned[0]), "sha256": checksum}]
    assert found["decoding"] == {"beam": 2, "lenpen": 1.0, "max_len_a": 0.0, "max_len_b": 20}
    assert found["text"] == "--remove-bpe sentencepiece"
    assert found["tiers"] == {"de": "high", "en": "high", "fr": "low", "ja": "low"}
    mean = sum(d["scores"]["chrF++"]["score"] for d in found["directions"].values()) / 6
    assert f"{mean:.1f}" in next(line for line in table.splitlines() if line.startswith("all "))
    assert "high→low" in table and "en→x" in table and "detokenised test set" in table


def test_a_second_run_decodes_nothing(corpus, finetuned, out):
    before = contents(out)
    _, table, err = lslora(*words(corpus, finetuned[0], out))
    assert err == "6 of 6 directions were decoded before\n"
    assert contents(out) == before
    assert table == lslora(*words(corpus, finetuned[0], out))[1]


def test_it_goes_on_after_it_was_killed(corpus, finetuned, evaluated, tmp_path):
    folder = tmp_path / "out"
    args = words(corpus, finetuned[0], folder)
    with TemporaryFile() as nothing, TemporaryFile("w+") as err:
        files = (nothing, nothing, err)
        environment = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        process = start("python", "-m", "lslora", *args, files=files, fresh=True, **environment)
        while not (folder / "scores.json").exists():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    (folder / "en-ja.hyp").unlink(missing_ok=True)
    decoded = [p for p in json.loads((folder / "scores.json").read_text())["directions"]]
    before = sum((folder / f"{pair}.hyp").exists() for pair in decoded)
    time.sleep(1)  # its workers have noticed
    _, _, err = lslora(*args)
    assert (f"{before} of 6 directions were decoded before" in err) == (before > 0)
    assert err.count("decoded ") - (before > 0) == 6 - before
    for pair in ALL:
        for suffix in ("src", "ref", "hyp"):
            name = f"{pair}.{suffix}"
            assert (folder / name).read_bytes() == (evaluated[0] / name).read_bytes()


def test_hypotheses_that_were_changed_are_decoded_again(corpus, finetuned, evaluated, out):
    (out / "en-fr.hyp").write_text("rien\n" * 8)
    _, _, err = lslora(*words(corpus, finetuned[0], out))
    assert err.startswith("5 of 6 directions were decoded before\ndecoded en-fr: 1 of 1 ")
    assert (out / "en-fr.hyp").read_bytes() == (evaluated[0] / "en-fr.hyp").read_bytes()
    assert results(out)["directions"]["en-fr"]["scores"]


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ("en-fr,fr-en", ["en-fr", "fr-en"]),
        ("*-en", ["de-en", "fr-en", "ja-en"]),
        ("en-[df]*", ["en-de", "en-fr"]),
    ],
)
def test_some_directions(corpus, finetuned, evaluated, tmp_path, pairs, expected):
    args = words(corpus, finetuned[0], tmp_path / "out", "--format", "json")
    _, out, _ = lslora(*args, "--pairs", pairs)
    assert sorted(json.loads(out)["directions"]) == expected
    for pair in expected:
        name = f"{pair}.hyp"
        assert (tmp_path / "out" / name).read_bytes() == (evaluated[0] / name).read_bytes()


def test_directions_of_a_file_join_those_that_are_there(corpus, finetuned, tmp_path):
    listed = tmp_path / "pairs"
    listed.write_text("en-ja\nfr-en\n")
    args = words(corpus, finetuned[0], tmp_path / "out", "--format", "csv")
    lslora(*args, "--pairs", "en-ja")
    _, out, err = lslora(*args, "--pairs", listed)
    assert err.startswith("1 of 2 directions were decoded before\ndecoded fr-en: ")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r["source"], r["target"], r["metric"]) for r in rows if r["metric"] == "BLEU"] == [
        ("en", "ja", "BLEU"), ("fr", "en", "BLEU"),
    ]  # fmt: skip
    assert {(r["source_tier"], r["target_tier"]) for r in rows} == {
        ("high", "low"),
        ("low", "high"),
    }


def test_raw_references(corpus, finetuned, out, tmp_path):
    for language in LANGUAGES:
        lines = [f"{line} !" for line in corpus.text[language][8:16]]
        (tmp_path / f"raw.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    template = tmp_path / "raw.{lang}"
    before = results(out)
    _, table, err = lslora(*words(corpus, finetuned[0], out, "--references", template))
    assert err == "6 of 6 directions were decoded before\n" and str(template) in table
    after = results(out)
    for pair, facts in after["directions"].items():
        raw = (tmp_path / f"raw.{pair[3:]}").read_bytes()
        assert (out / f"{pair}.ref").read_bytes() == raw
        assert (out / f"{pair}.src").read_bytes() == (tmp_path / f"raw.{pair[:2]}").read_bytes()
        assert facts["scores"] != before["directions"][pair]["scores"]
    # and back
    lslora(*words(corpus, finetuned[0], out))
    assert {p: f["scores"] for p, f in results(out)["directions"].items()} == {
        p: f["scores"] for p, f in before["directions"].items()
    }


def test_other_metrics_are_computed_without_decoding(corpus, finetuned, out):
    args = words(corpus, finetuned[0], out, "--spm", corpus.spm, "--langid")
    args[args.index("13a")] = "char,intl"
    _, table, err = lslora(*args)
    assert err == "6 of 6 directions were decoded before\n"
    found = results(out)
    assert found["metrics"] == ["spBLEU", "BLEU (char)", "BLEU (intl)", "chrF++"]
    assert found["langid"].startswith("py3langid ")
    for facts in found["directions"].values():
        assert list(facts["scores"]) == found["metrics"] and 0 <= facts["off_target"] <= 1
    assert "tok:spm-" in table and "tok:char" in table and "py3langid" in table


def test_tokenizers_of_each_language(corpus, finetuned, out):
    args = words(corpus, finetuned[0], out)
    place = args.index("--bleu-tokenizer")
    _, table, err = lslora(*args[:place], *args[place + 2 :])
    assert err == "6 of 6 directions were decoded before\n"
    for pair, facts in results(out)["directions"].items():
        tokenizer = "|tok:ja-mecab-" if pair.endswith("-ja") else "|tok:13a|"
        assert tokenizer in facts["scores"]["BLEU"]["signature"]
    assert "|tok:ja-mecab-" in table and "|tok:13a|" in table


def test_a_heat_map_and_latex(corpus, finetuned, out, tmp_path):
    args = words(corpus, finetuned[0], out, "--plot", tmp_path / "map.png", "--format", "latex")
    _, said, _ = lslora(*args)
    assert "\\begin{tabular}" in said
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_compared(corpus, evaluated, tmp_path):
    lslora(*words(corpus, corpus.base, tmp_path / "base"))
    _, said, _ = lslora("compare", tmp_path / "base", evaluated[0], "--format", "json")
    (system,) = json.loads(said)["systems"]
    base, tuned = (results(folder)["directions"] for folder in (tmp_path / "base", evaluated[0]))
    for pair, facts in system["directions"].items():
        gain = tuned[pair]["scores"]["BLEU"]["score"] - base[pair]["scores"]["BLEU"]["score"]
        assert facts["difference"] == pytest.approx(gain, abs=1e-9)


def test_a_stock_model_that_does_not_tell_its_languages(corpus, tmp_path):
    state = torch.load(corpus.base)
    for name in ("langs", "lang_pairs", "encoder_langtok", "decoder_langtok", "langtoks"):
        setattr(state["cfg"]["task"], name, None)
    torch.save(state, tmp_path / "bare.pt")
    langs = ("--langs", ",".join(LANGUAGES), "--encoder-langtok", "src", "--decoder-langtok")
    lslora(*words(corpus, corpus.base, tmp_path / "told"))
    lslora(*words(corpus, tmp_path / "bare.pt", tmp_path / "bare", *langs, "--lang-pairs", PAIRS))
    for pair in ALL:
        told, bare = ((tmp_path / f / f"{pair}.hyp").read_bytes() for f in ("told", "bare"))
        assert told == bare


def test_sentences_that_are_too_long(corpus, finetuned, tmp_path):
    more = ("--max-source-positions", "8", "--pairs", "en-fr")
    args = words(corpus, finetuned[0], tmp_path / "out", *more)
    line = refused(args, "en-fr: sentence ")
    assert "tokens, more than the model takes (8, " in line
    assert "--skip-invalid-size-inputs-valid-test, which leaves its line empty" in line
    _, table, _ = lslora(*args, "--skip-invalid-size-inputs-valid-test")
    facts = results(tmp_path / "out")["directions"]["en-fr"]
    lines = (tmp_path / "out" / "en-fr.hyp").read_text("utf-8").split("\n")[:-1]
    assert len(lines) == 8 and lines.count("") >= facts["too_long"] > 0
    assert f"\ntoo long     {facts['too_long']} sentences" in table


@pytest.mark.parametrize(
    "more, told",
    [
        (["--beam", "3"], "was made with decoding beam=2, this run has decoding beam=3: name"),
        (["--gen-subset", "valid"], 'was made with subset "test", this run has subset "valid"'),
        (["--remove-bpe", "@@ "], 'made with text "--remove-bpe sentencepiece", this run has text'),
    ],
)
def test_other_settings_are_not_mixed(corpus, finetuned, out, more, told):
    before = contents(out)
    refused(words(corpus, finetuned[0], out, *more), told)
    assert contents(out) == before


def test_another_checkpoint_and_other_data_are_not_mixed(corpus, finetuned, out, tmp_path):
    before = contents(out)
    line = refused(words(corpus, corpus.base, out), f"{out} was made with models ")
    assert str(finetuned[0]) in line and str(corpus.base) in line
    data = shutil.copytree(corpus.data, tmp_path / "data")
    for kind in ("bin", "idx"):
        for language in ("en", "fr"):
            shutil.copy(
                data / f"valid.en-fr.{language}.{kind}", data / f"test.en-fr.{language}.{kind}"
            )
    args = words(corpus, finetuned[0], out)
    args[1] = data
    refused(args, f"{out} has en-fr of other data (checksum ")
    assert contents(out) == before
    # the same files elsewhere are the same
    copy = shutil.copy(finetuned[0], tmp_path / "copy.pt")
    _, _, err = lslora(*words(corpus, copy, out))
    assert err == "6 of 6 directions were decoded before\n"


def test_what_stands_in_the_way(corpus, finetuned, out, tmp_path):
    args = words(corpus, finetuned[0], out)
    (out / "scores.json").write_text("{")
    refused(args, f"{out / 'scores.json'} is damaged (")
    (out / "scores.json").unlink()
    refused(args, f"{out} has de-en.hyp, ")
    (tmp_path / "file").write_text("")
    refused(
        words(corpus, finetuned[0], tmp_path / "file"), f"cannot write to --out {tmp_path}/file"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_keeps_the_directions_that_are_done(corpus, finetuned, out):
    before = contents(out)
    (out / "en-fr.hyp").unlink()
    (out / "en-fr.hyp.tmp").symlink_to("/dev/full")
    line = refused(words(corpus, finetuned[0], out), f"cannot write to --out {out} (No space left")
    assert line.endswith("the directions already there are kept")
    (out / "en-fr.hyp.tmp").unlink()
    after = contents(out)
    assert {n: c for n, c in after.items() if n != "scores.json"} == {
        n: c for n, c in before.items() if n not in ("scores.json", "en-fr.hyp")
    }
    lslora(*words(corpus, finetuned[0], out))
    assert contents(out)["en-fr.hyp"] == before["en-fr.hyp"]


def test_two_runs_in_one_folder(corpus, finetuned, out):
    import fcntl

    with open(out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(words(corpus, finetuned[0], out), f"another run is at work in {out}")


REFUSED = {
    "no such direction": (["--pairs", "en-ko"], "no direction of the data fits 'en-ko': there are"),
    "no data of the subset": (["--gen-subset", "test9"], "has no test9 data of two languages"),
    "an unknown tokenizer": (["--bleu-tokenizer", "12a"], "sacrebleu has no tokenizer 12a"),
    "a direction of fairseq": (["-s", "en"], "--source-lang has no place in lslora evaluate"),
    "sampling": (["--sampling"], "--sampling has no place in lslora evaluate: use fairseq-gen"),
    "an unknown option": (["--bean", "3"], "unrecognized arguments: --bean 3"),
    "no such checkpoint": (["--path", "gone.pt"], "--path gone.pt: no such file"),
    "another task": (["--task", "translation"], "--task translation: leave it out"),
    "references without languages": (["--references", "x"], "--references x lacks {lang}"),
    "references that are not there": (["--references", "x.{lang}"], "no such file: x.de, x.en"),
    "tiers": (["--tiers", "high"], "--tiers: 'high' is neither a file nor"),
    "a picture": (["--plot", "x.bmp"], "--plot x.bmp must end in one of .png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(corpus, finetuned, tmp_path, case):
    more, told = REFUSED[case]
    refused(words(corpus, finetuned[0], tmp_path / "out", *more), told)
    assert not [n for n in contents(tmp_path / "out")] if (tmp_path / "out").exists() else True


def test_references_of_another_length(corpus, finetuned, tmp_path):
    for language in LANGUAGES:
        lines = corpus.text[language][8 : 15 if language == "fr" else 16]
        (tmp_path / f"raw.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    template = tmp_path / "raw.{lang}"
    refused(
        words(corpus, finetuned[0], tmp_path / "out", "--references", template),
        f"{tmp_path}/raw.fr has 7 lines, the data 8 sentences of",
    )
    assert not contents(tmp_path / "out")


def test_no_such_data(corpus, finetuned, tmp_path):
    args = words(corpus, finetuned[0], tmp_path / "out")
    args[1] = tmp_path / "gone"
    refused(args, f"{tmp_path}/gone: No such file or directory: name the folder that fairseq")


@pytest.fixture(scope="module")
def of_fewer_languages(corpus, tmp_path_factory):
    """A checkpoint with adapters for all languages but Japanese."""
    save_dir = tmp_path_factory.mktemp("fewer")
    args = finetune_args(corpus, save_dir, "--lora-tiers", "high=en,de;low=fr", "--max-epoch", "1")
    args[args.index("--lang-pairs") + 1] = "en-de,de-en,en-fr,fr-en"
    run("fairseq-train", *args)
    return save_dir / "checkpoint_last.pt"


def test_a_language_without_adapter(corpus, of_fewer_languages, tmp_path):
    refused(
        words(corpus, of_fewer_languages, tmp_path / "out"),
        "no adapter for ja of the data: add it to --lora-tiers (adapters: de, en, fr)",
    )
    lslora(*words(corpus, of_fewer_languages, tmp_path / "out", "--pairs", "*-fr,fr-*"))


def test_a_checkpoint_of_other_languages(corpus, finetuned, of_fewer_languages, tmp_path):
    path = f"{finetuned[0]}:{of_fewer_languages}"
    refused(
        words(corpus, path, tmp_path / "out"),
        "the models of the ensemble have adapters for different languages: ",
    )


def test_an_ensemble_of_models_of_other_token_orders(corpus, finetuned, tmp_path):
    args = train_args(
        corpus, tmp_path, "--arch", "transformer", "--optimizer", "adam", "--max-update", "1",
        "--disable-validation", task="translation_multi_simple_epoch", langs="fr,en,de,ja",
    )  # fmt: skip
    run("fairseq-train", *args)
    path = f"{finetuned[0]}:{tmp_path / 'checkpoint_last.pt'}"
    refused(words(corpus, path, tmp_path / "out"), "the order numbers the language tokens")


def test_a_language_with_a_dictionary_of_its_own(corpus, finetuned, tmp_path):
    data = shutil.copytree(corpus.data, tmp_path / "data")
    lines = (data / "dict.fr.txt").read_text("utf-8").splitlines()
    (data / "dict.fr.txt").write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    args = words(corpus, finetuned[0], tmp_path / "out")
    args[1] = data
    refused(args, f"{data}/dict.fr.txt differs from {data}/dict.de.txt: the languages of a")
