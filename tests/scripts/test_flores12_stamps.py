"""What the scripts of examples/flores12 take for done, with commands that only pretend."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from console import ROOT

# Stands for the commands of fairseq and for Python: a checkpoint is the text of the settings that
# first trained it.
COMMAND = r"""#!/usr/bin/env bash
name="${0##*/}"
case "$name $*" in
    "python "*encode.py*) exit ;;
    "python "*"-m lslora evaluate"*) printf '%s\n' "$@" >>"$CALLS"; exit ;;
    "python "*"-m lslora sides"*)
        case "$*" in *flags) printf '%s\n' --encoder-index-side s --decoder-index-side t ;; esac
        exit ;;
    "python "*"-m lslora "*)
        case "$*" in *flags) printf '%s\n' --lora-rank 3 --encoder-index-side s ;; esac
        exit ;;
    "python "*) exec "$REAL_PYTHON" "$@" ;;
esac
echo "$name $*" >>"$CALLS"
case "$name $*" in *"$SLOW"*) while [ ! -e "$GO" ]; do sleep 0.02; done ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        --lr) lr="$2" ;;
        --seed) seed="$2" ;;
        --max-epoch) epochs="$2" ;;
        --save-dir) made="$2/checkpoint_last.pt" ;;
        --destdir) mkdir -p "$2"; touch "$2/train.bin" "$2/train.idx" "$2/dict.x.txt" ;;
    esac
    shift
done
case "$name" in
    fairseq-train)
        [ -e "$made" ] || echo "lr $lr seed $seed" >"$made"
        [ -z "$BROKEN" ] || exit 1
        echo "$epochs epochs" >>"$made" ;;
esac
"""


class Flores:
    """Runs the scripts on English and French files of a line each."""

    def __init__(self, folder):
        self.work, self.calls, self.clone = folder / "work", folder / "calls", folder / "a clone"
        self.model, self.text = folder / "model", folder / "flores"
        commands = folder / "bin"
        for made in (commands, self.model, self.text / "dev", self.text / "devtest"):
            made.mkdir(parents=True)
        for name in ("examples", "scripts"):
            shutil.copytree(ROOT / name, self.clone / name)
        (self.clone / "lslora_fairseq").mkdir()
        shutil.copy(ROOT / "lslora_fairseq" / "cores.py", self.clone / "lslora_fairseq")
        for name in ("python", "fairseq-train", "fairseq-preprocess"):
            (commands / name).write_text(COMMAND)
            (commands / name).chmod(0o755)
        for name in ("model.pt", "dict.txt", "sentencepiece.bpe.model"):
            (self.model / name).write_text(f"{name}\n")
        (self.model / "language_pairs.txt").write_text("en-fr,fr-en\n")
        for split in ("dev", "devtest"):
            for code in ("eng", "fra"):
                (self.text / split / f"{code}.{split}").write_text(f"{code} {split}\n")
        self.env = {
            **os.environ,
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "GO": str(folder / "go"),
            "WORK": str(self.work),
            "MODEL_DIR": str(self.model),
            "FLORES_DIR": str(self.text),
            "TIERS": "high=en;low=fr",
            "BROKEN": "",
            "SLOW": "none",
        }

    def start(self, script, **settings):
        self.calls.write_text("")
        return subprocess.Popen(
            ["bash", str(self.clone / "examples" / "flores12" / script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.env, **settings},
            start_new_session=True,
        )

    def run(self, script, **settings):
        """(stdout, the commands that ran)"""
        process = self.start(script, **settings)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out, self.calls.read_text().splitlines()

    def refused(self, script, **settings):
        """The one line of an error that ended the script before it ran a command."""
        process = self.start(script, **settings)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1 and err.count("\n") == 1 and not self.calls.read_text(), err
        return err.removeprefix("flores12: error: ").removesuffix("\n")


@pytest.fixture
def flores(tmp_path):
    flores = Flores(tmp_path)
    flores.run("prepare.sh")
    return flores


OTHER = "name another SAVE_DIR, or delete this one"


def test_a_run_of_other_settings_is_never_taken_for_this_one(flores):
    folder = flores.work / "finetuned"
    for how in ({"BROKEN": "yes"}, {}):  # unfinished, finished
        process = flores.start("finetune.sh", LR="0.1", **how)
        _, err = process.communicate()
        assert process.returncode == (1 if how else 0), err
        for name, option, own, other in (
            ("LR", "--lr", "0.1", "0.2"),
            ("SEED", "--seed", "2", "3"),
            ("EXTRA_TRAIN_ARGS", "--max-update", None, "5"),
        ):
            said = flores.refused(
                "finetune.sh",
                **{"LR": "0.1", name: other if own else f"{option} {other}"},
            )
            was = f"{option} {own}" if own else "less"
            assert said == f"{folder} was made with {was} and not with {option} {other}: {OTHER}"
        for path in (flores.model / "model.pt", flores.work / "data" / "en-fr.done"):
            was = path.read_text()
            path.write_text("another\n")
            assert "of checksum" in flores.refused("finetune.sh", LR="0.1")
            path.write_text(was)
    out, calls = flores.run("finetune.sh", LR="0.1")
    assert out == f"{folder} is finished\n" and not calls
    out, calls = flores.run("finetune.sh", LR="0.2", SAVE_DIR=str(flores.work / "other"))
    assert (flores.work / "other" / "checkpoint_last.pt").read_text().startswith("lr 0.2 ")


def test_more_epochs_go_on_and_fewer_are_refused(flores):
    folder = flores.work / "finetuned"
    flores.run("finetune.sh", MAX_EPOCH="5")
    _, calls = flores.run("finetune.sh", MAX_EPOCH="7")
    assert len(calls) == 1
    assert (folder / "checkpoint_last.pt").read_text().splitlines()[1:] == ["5 epochs", "7 epochs"]
    out, calls = flores.run("finetune.sh", MAX_EPOCH="7")
    assert out == f"{folder} is finished\n" and not calls
    said = flores.refused("finetune.sh", MAX_EPOCH="5")
    assert said == f"{folder} was made with MAX_EPOCH=7, which can only be raised: {OTHER}"


def test_a_run_may_be_moved_but_not_taken_over(flores):
    flores.run("finetune.sh")
    moved = flores.work / "moved"
    (flores.work / "finetuned").rename(moved)
    shutil.copytree(flores.model, flores.work / "copy of the model")
    out, calls = flores.run(
        "finetune.sh", SAVE_DIR=str(moved), MODEL_DIR=str(flores.work / "copy of the model")
    )
    assert out == f"{moved} is finished\n" and not calls
    (moved / "settings").unlink()
    said = flores.refused("finetune.sh", SAVE_DIR=str(moved))
    assert said == f"{moved} holds checkpoints that this script has not made: {OTHER}"


def test_all_directions_are_evaluated(flores):
    flores.run("finetune.sh")
    _, words = flores.run("evaluate.sh", BEAM="2", EXTRA_GENERATE_ARGS="--lenpen 2")
    assert words[:4] == ["-m", "lslora", "evaluate", str(flores.work / "data")]
    given = dict(zip(words[4:], words[5:]))
    results = flores.work / "results"
    wanted = {
        "--path": str(flores.work / "finetuned" / "checkpoint_last.pt"),
        "--out": str(results),
        "--langs": "en,fr",
        "--pairs": "en-fr,fr-en",
        "--tiers": "high=en;low=fr",
        "--references": f"{results}/references/{{lang}}.devtest",
        "--bleu-tokenizer": "flores101",
        "--beam": "2",
        "--max-tokens": "4000",
        "--lenpen": "2",
    }
    assert given.items() >= wanted.items()
    assert "--fp16" in words
    for language, code in (("en", "eng"), ("fr", "fra")):
        assert (results / "references" / f"{language}.devtest").read_text() == f"{code} devtest\n"
    _, words = flores.run("evaluate.sh", EXTRA_GENERATE_ARGS="--cpu")
    assert "--cpu" in words and "--fp16" not in words


def test_data_of_another_model_or_text(flores):
    data = flores.work / "data"
    out, calls = flores.run("prepare.sh")
    assert out == f"{data} is complete\n" and not calls
    remedy = "delete it, or choose another WORK"
    said = flores.refused("prepare.sh", VALID_LINES="3")
    assert said == f"{data} was made with VALID_LINES=47 and not with VALID_LINES=3: {remedy}"
    for path, name in (
        (flores.model / "sentencepiece.bpe.model", "sentencepiece.bpe.model"),
        (flores.model / "dict.txt", "dict.txt"),
        (flores.text / "dev" / "fra.dev", "fr.dev"),
        (flores.text / "devtest" / "eng.devtest", "en.devtest"),
    ):
        was = path.read_text()
        path.write_text("another\n")
        said = flores.refused("prepare.sh")
        assert said.startswith(f"{data} was made with {name} of checksum ")
        path.write_text(was)
    flores.run("finetune.sh")
    (flores.text / "devtest" / "eng.devtest").write_text("another\n")
    assert f"{data} was not prepared from {flores.text}" in flores.refused("evaluate.sh")


@pytest.mark.parametrize(
    "script, command, folder",
    [
        ("prepare.sh", "fairseq-preprocess", "data"),
        ("finetune.sh", "fairseq-train", "finetuned"),
        ("learn_architecture.sh", "fairseq-train", "architecture"),
    ],
)
def test_two_runs_in_one_folder(flores, script, command, folder):
    if script == "prepare.sh":
        shutil.rmtree(flores.work / "data")
    first = flores.start(script, SLOW=command)
    deadline = time.monotonic() + 60
    while command not in flores.calls.read_text():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    said = flores.refused(script)
    where = flores.work / folder
    assert said == f"another run is at work in {where}: wait for its end, or stop it"
    os.killpg(first.pid, signal.SIGKILL)  # leaves its lock as it is
    first.communicate()
    flores.run(script)


def test_an_architecture_learned_with_other_settings(flores):
    flores.run("learn_architecture.sh")
    learned = flores.work / "architecture"
    found = (learned / "settings.sh").read_text()
    assert "export ENCODER_SIDES=s\n" in found and "export RANKS=3\n" in found
    said = flores.refused("learn_architecture.sh", SEED="3")
    folder = learned / "weight_learning"
    assert said == f"{folder} was made with --seed 2 and not with --seed 3: {OTHER}"
    assert (learned / "settings.sh").read_text() == found
