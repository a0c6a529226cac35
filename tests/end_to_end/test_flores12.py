"""The recipe of examples/flores12 in miniature: its own scripts on archives like the real ones."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from console import PAIRS, ROOT, SIZES, folder_of_commands

from lslora_fairseq.checkpoints import read_args
from lslora_fairseq.languages import Languages

SCRIPTS = ("download.sh", "prepare.sh", "finetune.sh", "evaluate.sh")
RECIPE = ROOT / "examples" / "flores12"
FLORES_CODES = {"en": "eng", "de": "deu", "ja": "jpn"}


def script(name, settings, source=os.devnull, **more):
    """Runs a script of the recipe, after a file of settings; (exit status, stdout, stderr)."""
    folders = folder_of_commands(), Path(sys.executable).parent, os.environ["PATH"]
    path = os.pathsep.join(map(str, folders))
    python = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", 'source "$1" && bash "$2"', "script", str(source), str(RECIPE / name)],
        capture_output=True,
        text=True,
        env={**os.environ, **python, **settings, **more},
        cwd=Path(settings["WORK"]).parent,  # anywhere but in the clone
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def error(result):
    """The one line of an error that ended a script."""
    status, _, stderr = result
    lines = stderr.splitlines()
    assert status == 1 and len(lines) == 1 and lines[0].startswith("flores12: error: "), stderr
    return lines[0]


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory):
    """Environment of the scripts; the archives stand ready under BASE_URL."""
    folder = tmp_path_factory.mktemp("flores 12")
    model, flores = folder / "flores101_mm100_615M", folder / "flores101_dataset"
    for made in (model, flores / "dev", flores / "devtest"):
        made.mkdir(parents=True)
    shutil.copy(corpus.base, model / "model.pt")
    shutil.copy(corpus.spm, model / "sentencepiece.bpe.model")
    shutil.copy(corpus.dictionary, model / "dict.txt")
    (model / "language_pairs.txt").write_text(PAIRS)
    for lang, code in FLORES_CODES.items():
        lines = corpus.text[lang]
        for split, part in (("dev", lines[16:] + lines[:8]), ("devtest", lines[8:16])):
            (flores / split / f"{code}.{split}").write_text("\n".join(part) + "\n", "utf-8")
    for source, target in ((model, "pretrained_models"), (flores, "dataset")):
        (folder / target).mkdir()
        with tarfile.open(folder / target / f"{source.name}.tar.gz", "w:gz") as archive:
            archive.add(source, source.name)
    return {
        "BASE_URL": folder.as_uri(),
        "WORK": str(folder / "work"),
        "TIERS": "high=en,de;low=ja",
        "RANKS": "high=2,low=4",
        "VALID_LINES": "8",
        "ARCH": "lslora_transformer",
        "ENCODER_SIDES": "source*2,target*1",
        "MAX_EPOCH": "3",
        "PRUNING_BEGIN": "1",
        "PRUNING_DURATION": "2",
        "MAX_TOKENS": "600",
        "UPDATE_FREQ": "1",
        "BEAM": "2",
        "BLEU_TOKENIZER": "char",
        "EQUAL_RANK": "3",
        "BUDGET": "15872",  # what RANKS have
        "JOBS": "1",
        "EXTRA_TRAIN_ARGS": " ".join(["--cpu", "--num-workers", "0", *SIZES]),
        "EXTRA_GENERATE_ARGS": "--cpu --num-workers 0 --max-len-b 30",
    }


@pytest.fixture(scope="module")
def printed(settings):
    """What each script printed in its first run."""
    out = {}
    for name in SCRIPTS:
        status, out[name], stderr = script(name, settings)
        assert status == 0, f"{name} failed:\n{out[name][-3000:]}\n{stderr[-3000:]}"
    return out


def test_every_direction_is_scored_on_the_raw_text(settings, printed):
    work = Path(settings["WORK"])
    scored = json.loads((work / "results" / "scores.json").read_text("utf-8"))
    langs = list(FLORES_CODES)
    assert {*scored["directions"]} == {f"{s}-{t}" for s in langs for t in langs if s != t}
    assert scored["tiers"] == {"en": "high", "de": "high", "ja": "low"}
    for direction, facts in scored["directions"].items():
        for kind, language in zip(("src", "ref"), direction.split("-")):
            raw = work / "flores101_dataset" / "devtest" / f"{FLORES_CODES[language]}.devtest"
            text = (work / "results" / f"{direction}.{kind}").read_text("utf-8")
            assert text == raw.read_text("utf-8")
        assert "|tok:char|" in facts["scores"]["BLEU"]["signature"]
    assert any(facts["scores"]["BLEU"]["score"] for facts in scored["directions"].values())
    assert re.search(r"^high→low +2 +\d", printed["evaluate.sh"], re.M)


def test_a_second_run_does_nothing(settings, printed):
    work = Path(settings["WORK"])

    def files():
        return {p: p.stat().st_mtime_ns for p in work.rglob("*") if "results" not in p.parts}

    before = files()
    again = {name: script(name, settings) for name in SCRIPTS}
    assert files() == before
    assert [status for status, _, _ in again.values()] == [0] * 4, again
    model, flores = again["download.sh"][1].splitlines()
    assert model.endswith("615M is complete") and flores.endswith("dataset is complete")
    assert again["prepare.sh"][1].endswith("data is complete\n")
    assert again["finetune.sh"][1].endswith("finetuned is finished\n")
    assert again["evaluate.sh"][1] == printed["evaluate.sh"]
    assert again["evaluate.sh"][2] == "6 of 6 directions were decoded before\n"


def test_the_base_model_is_evaluated_too(settings, printed):
    base = str(Path(settings["WORK"], "flores101_mm100_615M", "model.pt"))
    status, _, stderr = script("evaluate.sh", settings, CHECKPOINT=base)
    assert status == 1 and "name another --out" in stderr
    results = str(Path(settings["WORK"], "results_base"))
    status, out, stderr = script("evaluate.sh", settings, CHECKPOINT=base, RESULTS=results)
    assert status == 0, stderr
    assert out.splitlines()[0] == printed["evaluate.sh"].splitlines()[0]


@pytest.mark.parametrize(
    "name, missing, remedy",
    [
        ("prepare.sh", "dict.txt", "download.sh"),
        ("finetune.sh", "model.pt", "download.sh"),
        ("evaluate.sh", "checkpoint_last.pt", "finetune.sh"),
    ],
)
def test_a_missing_step_is_named(settings, tmp_path, name, missing, remedy):
    said = error(script(name, settings, WORK=str(tmp_path)))
    assert f"/{missing} is missing or empty: run examples/flores12/{remedy}" in said


def test_texts_must_have_as_many_lines(settings, printed, tmp_path):
    work = Path(settings["WORK"])
    shutil.copytree(work / "flores101_dataset", tmp_path / "flores101_dataset")
    with open(tmp_path / "flores101_dataset" / "devtest" / "jpn.devtest", "a") as file:
        file.write("one line more\n")
    model = str(work / "flores101_mm100_615M")
    said = error(script("prepare.sh", settings, WORK=str(tmp_path), MODEL_DIR=model))
    assert "ja has" in said and "9 test lines" in said and "translations of each other" in said
    assert not list((tmp_path / "data").glob("*.done"))


def test_an_unknown_language_is_named(settings, tmp_path):
    said = error(script("download.sh", settings, WORK=str(tmp_path), TIERS="high=en,tlh"))
    assert "'tlh' of TIERS" in said and "FLORES_CODES=tlh=code" in said


def exported(settings_file):
    """What a file of settings exports."""
    says = 'source "$1" && env -0'
    bash = ["bash", "-c", says, "settings", str(settings_file)]
    done = subprocess.run(bash, capture_output=True, text=True, env={}, check=True)
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


@pytest.fixture(scope="module")
def learned(settings, printed):
    """(folder of what learn_architecture.sh found, its stdout)"""
    status, out, stderr = script("learn_architecture.sh", settings)
    assert status == 0, f"{out[-3000:]}\n{stderr[-3000:]}"
    return Path(settings["WORK"], "architecture"), out


def test_the_architecture_is_learned(settings, learned):
    folder, out = learned
    mixed = read_args(folder / "weight_learning" / "checkpoint_last.pt")
    competing = read_args(folder / "estimation" / "checkpoint_last.pt")
    assert mixed["lora_weight_learning"] and not competing["lora_weight_learning"]
    assert mixed["lora_rank"] == competing["lora_rank"] == "3"
    assert mixed["dropout"] == mixed["attention_dropout"] == 0.1
    found = exported(folder / "settings.sh")
    for stack in ("encoder", "decoder"):
        assert competing[f"{stack}_index_side"] == found[f"{stack.upper()}_SIDES"]
    sides, suggested = (
        dict(zip(words[::2], words[1::2]))
        for name in ("sides", "suggestion")
        for words in [(folder / f"{name}.flags").read_text().split()]
    )
    settings_of = {
        "--encoder-index-side": "ENCODER_SIDES",
        "--decoder-index-side": "DECODER_SIDES",
        "--lora-rank": "RANKS",
        "--encoder-target-modules": "ENCODER_MODULES",
        "--decoder-target-modules": "DECODER_MODULES",
    }
    assert {flag: found[name] for flag, name in settings_of.items()}.items() <= suggested.items()
    assert sides.items() <= suggested.items() and len(sides) == 2
    for name in ("sides.txt", "demand.txt", "suggestion.txt", "settings.sh"):
        assert (folder / name).read_text() in out
    assert json.loads((folder / "demand.json").read_text("utf-8"))
    assert (folder / "demand.png").read_bytes().startswith(b"\x89PNG")


def test_the_learned_architecture_is_fine_tuned_and_scored(settings, learned):
    folder, _ = learned
    for name in ("finetune.sh", "evaluate.sh"):
        status, out, stderr = script(name, settings, folder / "settings.sh")
        assert status == 0, f"{name} failed:\n{out[-3000:]}\n{stderr[-3000:]}"
    assert out.startswith("BLEU, source languages in rows")
    found = exported(folder / "settings.sh")
    save_dir = Path(settings["WORK"], "finetuned_learned")
    assert found["SAVE_DIR"] == str(save_dir) and (save_dir / "checkpoint_last.pt").exists()
    tuned = read_args(save_dir / "checkpoint_last.pt")
    for option, name in (
        ("lora_rank", "RANKS"),
        ("encoder_index_side", "ENCODER_SIDES"),
        ("decoder_index_side", "DECODER_SIDES"),
        ("encoder_target_modules", "ENCODER_MODULES"),
        ("decoder_target_modules", "DECODER_MODULES"),
    ):
        assert tuned[option] == found[name]
    log = (save_dir / "train.log").read_text("utf-8")
    trained = re.search(r"^total .* all +([\d,]+) ", log, re.M)[1].replace(",", "")
    assert 0 < int(trained) <= int(settings["BUDGET"])


def test_a_learned_architecture_is_not_learned_again(settings, learned):
    folder, _ = learned
    trained = sorted(folder.glob("*/*"))
    before = [path.stat().st_mtime_ns for path in trained]
    found = (folder / "settings.sh").read_text()
    status, out, _ = script("learn_architecture.sh", settings)
    assert status == 0 and out.count(" is finished\n") == 2
    assert [path.stat().st_mtime_ns for path in trained] == before
    assert (folder / "settings.sh").read_text() == found


def test_the_thirty_languages_hold_the_twelve_and_are_known():
    settings = exported(ROOT / "examples" / "flores30" / "settings.sh")
    twelve, thirty = (
        Languages.parse(tiers)
        for tiers in (re.search(r"TIERS:-(.*)}", (RECIPE / "config.sh").read_text())[1],
                      settings["TIERS"])
    )  # fmt: skip
    assert (len(twelve), len(thirty)) == (12, 30)
    assert [sum(thirty.tier(c) == t for c in thirty.codes) for t in thirty.tiers] == [10] * 3
    assert all(thirty.tier(code) == twelve.tier(code) for code in twelve.codes)
    codes = "source config.sh && for l in $LANGUAGES; do flores_code $l || exit; done"
    done = subprocess.run(
        ["bash", "-c", codes], capture_output=True, text=True, cwd=RECIPE,
        env={**os.environ, **settings},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 30
