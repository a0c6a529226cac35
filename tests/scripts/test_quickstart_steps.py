"""The steps of the quickstart and of the architecture recipe, with commands that only pretend.

What the commands print is not real here: which commands run, with what, and when again, is.
"""

import os
import shlex
import shutil
import subprocess

import pytest
from console import ROOT

# Stands for every command: writes down its call and leaves the results that are read later.
COMMAND = r"""#!/usr/bin/env bash
name="${0##*/}"
[ "$*" = "-c " ] && exit # environment.sh looks whether this Python works
echo "$name $*" >>"$CALLS"
case "$name $*" in *"$BROKEN"*) echo "out of luck"; exit 1 ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        --save-dir) echo weights >"$2/checkpoint_last.pt" ;;
        --out) case "$2" in *.txt) echo "a table" >"$2" ;; esac ;;
        --format) format="$2" ;;
        sides | demand | suggest) action="$1" ;;
    esac
    shift
done
case "$name $action $format" in
    "fairseq-train  "*) echo "total   7  all     all   392,704   14.030%" ;;
    "lslora sides flags") printf '%s\n' --encoder-index-side "$ENCODER_SIDES" ;;
    "lslora suggest flags")
        printf '%s\n' --lora-rank high=3,low=5 --encoder-target-modules fc1,fc2 ;;
    lslora*) echo "$action as ${format:-table}" ;;
esac
"""
QUICKSTART = (
    "download corpus pieces binarise_base binarise_finetune train_base finetune decode_base_own "
    "decode_base decode_finetuned report"
).split()
LEARNING = (
    "weight_learning sides estimation demand suggestion finetune_learned decode_learned "
    "report_learned"
).split()


class Recipe:
    """Runs the scripts of a copy with pretended commands, in folders whose names have a space."""

    def __init__(self, folder):
        self.clone, self.work, self.calls = folder / "a clone", folder / "my work", folder / "calls"
        venv = folder / "venv"
        for name in ("examples", "scripts"):
            shutil.copytree(ROOT / name, self.clone / name)
        for name in ("requirements.txt", "setup.py"):
            shutil.copy(ROOT / name, self.clone)
        (venv / "bin").mkdir(parents=True)
        for name in ("python", "fairseq-preprocess", "fairseq-train", "fairseq-generate", "lslora"):
            (venv / "bin" / name).write_text(COMMAND)
            (venv / "bin" / name).chmod(0o755)
        wanted = [(ROOT / name).read_text() for name in ("requirements.txt", "setup.py")]
        (venv / ".lslora-installed").write_text("".join(wanted) + f"{self.clone}\n")
        self.env = {**os.environ, "VENV": str(venv), "WORK": str(self.work)}

    def run(self, script, *args, sides="source*2,target*1", broken="no command"):
        """(exit status, stdout, stderr, the commands that ran)"""
        self.calls.write_text("")
        done = subprocess.run(
            ["bash", str(self.clone / "examples" / script), *args],
            capture_output=True,
            text=True,
            env={**self.env, "CALLS": str(self.calls), "ENCODER_SIDES": sides, "BROKEN": broken},
            cwd=self.work.parent,
            timeout=300,
        )
        calls = self.calls.read_text().splitlines()
        return done.returncode, done.stdout, done.stderr, calls

    def command(self, step):
        """The words of the command on top of a step's log."""
        line = (self.work / "logs" / f"{step}.log").read_text().splitlines()[0]
        assert line.startswith("$ ")
        return shlex.split(line[2:])


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


def states(out):
    """Step -> whether it was done before."""
    lines = (line.split(": ", 1) for line in out.splitlines() if ": " in line)
    return {name: what == "done before" for name, what in lines if name in QUICKSTART + LEARNING}


def test_what_is_found_reaches_the_next_training(recipe):
    status, out, err, _ = recipe.run("architecture_learning.sh")
    assert status == 0, err
    assert states(out) == dict.fromkeys(QUICKSTART + LEARNING, False)
    assert "\nsides as table\n" in out and "\ndemand as table\n" in out
    assert "\nsuggest as table\n" in out and out.count("\na table\n") == 2
    found = recipe.work / "architecture"
    assert (found / "demand" / "demand.csv").read_text() == "demand as csv\n"
    assert (found / "demand" / "demand.json").read_text() == "demand as json\n"
    hand_set = recipe.command("finetune")
    place = hand_set.index("--lora-rank")

    def trained_with(folder, *adapters, **pruning):
        words = hand_set[:place] + list(adapters) + hand_set[place + 2 :]
        words[words.index("--save-dir") + 1] = str(recipe.work / folder)
        for option, value in pruning.items():
            words[words.index(f"--pruning-{option}") + 1] = value
        return words

    sides = ("--encoder-index-side", "source*2,target*1")
    assert recipe.command("weight_learning") == trained_with(
        "weight_learning", "--lora-rank", "8", "--lora-weight-learning", **{"final-sparsity": "0"}
    )
    assert recipe.command("estimation") == trained_with(
        "estimation", "--lora-rank", "8", *sides, scope="layer"
    )
    assert recipe.command("suggestion")[-1] == "392704"  # what the hand-set run trains
    suggested = ("--lora-rank", "high=3,low=5", "--encoder-target-modules", "fc1,fc2")
    assert recipe.command("finetune_learned") == trained_with("learned", *suggested, *sides)


def test_what_is_done_is_not_done_again(recipe):
    recipe.run("quickstart.sh")
    status, out, _, calls = recipe.run("quickstart.sh")
    assert status == 0 and states(out) == dict.fromkeys(QUICKSTART, True) and not calls
    _, out, _, _ = recipe.run("architecture_learning.sh")
    assert states(out) == {**dict.fromkeys(QUICKSTART, True), **dict.fromkeys(LEARNING, False)}
    status, out, _, calls = recipe.run("architecture_learning.sh")
    assert states(out) == dict.fromkeys(QUICKSTART + LEARNING, True) and not calls
    assert status == 0 and "\nsuggest as table\n" in out


def test_a_change_is_followed_by_the_later_steps_only(recipe):
    recipe.run("architecture_learning.sh")
    (recipe.work / "logs" / ".sides.done").unlink()
    _, out, _, _ = recipe.run("architecture_learning.sh", sides="target*3")
    done = states(out)
    assert [name for name, before in done.items() if not before] == LEARNING[1:]
    assert "target*3" in recipe.command("finetune_learned")
    script = recipe.clone / "examples" / "quickstart.sh"
    script.write_text(script.read_text().replace("BASE_UPDATES=1800", "BASE_UPDATES=2000"))
    _, out, _, _ = recipe.run("architecture_learning.sh", sides="target*3")
    redone = [name for name, before in states(out).items() if not before]
    assert redone == QUICKSTART[5:] + LEARNING


def test_a_step_that_failed_is_told_and_done_again(recipe):
    broken = "--pruning-scope layer"
    status, out, err, _ = recipe.run("architecture_learning.sh", broken=broken)
    assert status == 1 and list(states(out))[-1] == "estimation"
    log = recipe.work / "logs" / "estimation.log"
    assert err.splitlines() == [
        log.read_text().splitlines()[0],
        "out of luck",
        f"architecture_learning: error: estimation failed, see {log}; run this again to go on",
    ]
    status, out, _, _ = recipe.run("architecture_learning.sh")
    assert status == 0
    assert [name for name, before in states(out).items() if not before] == LEARNING[2:]


@pytest.mark.parametrize("script", ["quickstart.sh", "architecture_learning.sh"])
def test_help_and_a_wrong_call(recipe, script):
    status, out, err, calls = recipe.run(script, "--help")
    assert (status, err, calls) == (0, "", []) and f"\n  bash examples/{script}\n" in out
    status, _, err, calls = recipe.run(script, "--epochs")
    name = script.removesuffix(".sh")
    assert (status, calls) == (2, [])
    assert err == f"{name}: error: it takes no arguments, found: --epochs\n"
    assert not recipe.work.exists()
