"""The steps of the quickstart and of the architecture recipe, with commands that only pretend.

What the commands print is not real here: which commands run, with what, and when again, is.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from console import ROOT

# Stands for every command: writes down its call and leaves the results that are read later.
COMMAND = r"""#!/usr/bin/env bash
name="${0##*/}"
[ "$*" = "-c " ] && exit # environment.sh looks whether this Python works
case "$*" in */cores.py) exec "$REAL_PYTHON" "$@" ;; esac
echo "$name $*" >>"$CALLS"
case "$name $*" in *"$SLOW"*) while [ ! -e "$GO" ]; do sleep 0.02; done ;; esac
case "$name $*" in *"$BROKEN"*) echo "out of luck" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        --save-dir) mkdir -p "$2" && echo weights >"$2/checkpoint_last.pt" ;;
        --lr) echo "x | INFO | epoch 001:     50 / 113 loss=$2, nll_loss=1" ;;
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
    "download corpus pieces binarise_base binarise_finetune train_base finetune_full finetune "
    "decode_base_own decode_base decode_full decode_finetuned report"
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
        for name in ("python", "fairseq-preprocess", "fairseq-train", "lslora"):
            (venv / "bin" / name).write_text(COMMAND)
            (venv / "bin" / name).chmod(0o755)
        wanted = [(ROOT / name).read_text() for name in ("requirements.txt", "setup.py")]
        (venv / ".lslora-installed").write_text("".join(wanted) + f"{self.clone}\n")
        package = self.clone / "lslora_fairseq" / "lora"
        package.mkdir(parents=True)
        (package / "linear.py").write_text("rank = 1\n")
        shutil.copy(ROOT / "lslora_fairseq" / "cores.py", package.parent)
        self.edit("examples/quickstart_steps.sh", "(de fr nl cs cy af)", "(de cs)")  # no more
        self.env = {
            **os.environ,
            "VENV": str(venv),
            "WORK": str(self.work),
            "CALLS": str(self.calls),
            "GO": str(folder / "go"),
            "REAL_PYTHON": sys.executable,
        }

    def start(self, script, *args, sides="source*2,target*1", broken="none", slow="none"):
        """The script's process; it waits at the command *slow*, and *broken* fails."""
        self.calls.write_text("")
        return subprocess.Popen(
            ["bash", str(self.clone / "examples" / script), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.env, "ENCODER_SIDES": sides, "BROKEN": broken, "SLOW": slow},
            cwd=self.work.parent,
            start_new_session=True,
        )

    def run(self, script, *args, **how):
        """(exit status, stdout, stderr, the commands that ran); how: see :meth:`start`."""
        process = self.start(script, *args, **how)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err, self.calls.read_text().splitlines()

    def edit(self, script, old, new):
        """Replaces a text in the copy of a script."""
        path = self.clone / script
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def log(self, step):
        return (self.work / "logs" / f"{step}.log").read_text()

    def command(self, step):
        """The words of the command on top of a step's log."""
        line = self.log(step).splitlines()[0]
        assert line.startswith("$ ")
        return shlex.split(line[2:])


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


def states(out):
    """Step -> whether it was done before."""
    lines = (line.split(": ", 1) for line in out.splitlines() if ": " in line)
    return {name: what == "done before" for name, what in lines if name in QUICKSTART + LEARNING}


def redone(out):
    return [name for name, before in states(out).items() if not before]


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


def test_a_language_is_added_to_the_adapters_of_the_quickstart(recipe):
    status, out, err, _ = recipe.run("add_language.sh")
    assert status == 0, err
    assert "0 of 0 hypotheses of other directions are the same" in out
    words, before = recipe.command("finetune_ca"), recipe.command("extract_before_ca")
    given = dict(zip(words, words[1:]))  # of an option that is there twice, the last
    assert given["--langs"] == "af,cs,cy,de,en,fr,nl,ca" and given["--lang-pairs"] == "en-ca,ca-en"
    assert given["--lora-adapters"] == before[before.index("--out") + 1]
    assert (given["--lora-tiers"], given["--lora-init-from"]) == ("low=ca", "ca=fr")
    assert recipe.command("corpus_ca")[-2:] == ["--like", str(recipe.work / "corpus")]
    _, _, _, calls = recipe.run("add_language.sh")
    assert not calls
    recipe.env.update(NEW="gl", LIKE="de")
    _, _, _, calls = recipe.run("add_language.sh")
    assert not any("train_base" in call for call in calls)
    words = recipe.command("finetune_gl")
    assert words[words.index("--lora-init-from") + 1] == "gl=de"


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
    (recipe.work / "architecture" / "sides" / ".done").unlink()
    _, out, _, _ = recipe.run("architecture_learning.sh", sides="target*3")
    assert redone(out) == LEARNING[1:]
    assert "target*3" in recipe.command("finetune_learned")
    recipe.edit("examples/quickstart.sh", "BASE_UPDATES=1800", "BASE_UPDATES=2000")
    _, out, _, _ = recipe.run("architecture_learning.sh", sides="target*3")
    assert redone(out) == QUICKSTART[5:] + LEARNING


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
    assert redone(out) == LEARNING[2:]


def test_a_setting_that_was_tried_and_changed_back_starts_its_step_over(recipe):
    recipe.run("quickstart.sh")
    recipe.edit("examples/quickstart.sh", "BASE_UPDATES=1800", "BASE_UPDATES=2000")
    status, out, _, _ = recipe.run("quickstart.sh", broken="fairseq-train")
    assert status == 1 and redone(out) == ["train_base"]
    recipe.edit("examples/quickstart.sh", "BASE_UPDATES=2000", "BASE_UPDATES=1800")
    status, out, _, _ = recipe.run("quickstart.sh")
    assert status == 0 and redone(out) == ["train_base"]
    assert (recipe.work / "base" / "checkpoint_last.pt").read_text() == "weights\n"
    assert "1800" in recipe.command("train_base")


def test_a_change_within_a_function_starts_its_steps_over(recipe):
    recipe.run("quickstart.sh")
    for script, old, new, first in (
        ("quickstart_steps.sh", "--lenpen 1.5", "--lenpen 1", "decode_base_own"),
        ("quickstart.sh", "_full.$rate.log", "_full_$rate.log", "finetune_full"),
        ("quickstart.sh", "(0.003 0.001)", "(0.003)", "finetune_full"),
        ("quickstart_steps.sh", "--clip-norm 1.0", "--clip-norm 2.0", "finetune_full"),
        ("steps.sh", "--srcdict ", "--joined-dictionary --srcdict ", "binarise_base"),
        ("steps.sh", "OMP_NUM_THREADS=1 ", "OMP_NUM_THREADS=2 ", "binarise_base"),
    ):
        recipe.edit(f"examples/{script}", old, new)
        _, out, _, _ = recipe.run("quickstart.sh")
        assert redone(out) == QUICKSTART[QUICKSTART.index(first) :], new


def test_a_changed_file_starts_the_steps_over_that_use_it(recipe):
    recipe.run("quickstart.sh")
    for file, first in (
        ("scripts/quickstart_report.py", "report"),
        ("lslora_fairseq/lora/linear.py", "finetune"),  # stock fairseq trains the base
        ("lslora_fairseq/new.py", "finetune"),
        ("scripts/best_checkpoint.py", "finetune_full"),
        ("scripts/pieces.py", "pieces"),
        ("scripts/po_corpus.py", "corpus"),
        ("requirements.txt", "download"),
    ):
        with open(recipe.clone / file, "a") as changed:
            changed.write("# changed\n")
        _, out, _, _ = recipe.run("quickstart.sh")
        assert redone(out) == QUICKSTART[QUICKSTART.index(first) :], file


def test_a_table_alone_starts_no_training_over(recipe):
    recipe.run("architecture_learning.sh")
    with open(recipe.clone / "scripts" / "quickstart_report.py", "a") as changed:
        changed.write("# changed\n")
    _, out, _, _ = recipe.run("architecture_learning.sh")
    assert redone(out) == ["report", "report_learned"]


def test_results_that_are_gone_are_made_again(recipe):
    recipe.run("architecture_learning.sh")
    shutil.rmtree(recipe.work / "decoded")  # as the report says when a file is cut short
    (recipe.work / "logs" / "finetune.log").unlink()  # the budget of the suggestion stands there
    status, out, err, _ = recipe.run("architecture_learning.sh")
    assert status == 0, err
    decodings = [name for name in QUICKSTART + LEARNING if name.startswith("decode")]
    assert redone(out) == ["finetune", *decodings]
    assert recipe.command("suggestion")[-1] == "392704"


def test_full_fine_tunings_run_side_by_side_and_the_best_is_kept(recipe):
    _, out, _, calls = recipe.run("quickstart.sh")
    full = recipe.work / "full"
    words = {}
    for rate in ("0.001", "0.003"):
        assert f"\n    lr {rate}: epoch 001:     50 / 113 loss={rate}\n" in out
        command, *said = recipe.log(f"finetune_full.{rate}").splitlines()
        assert said[0] == f"x | INFO | epoch 001:     50 / 113 loss={rate}, nll_loss=1"
        words[rate] = shlex.split(command)
        assert words[rate][-4:] == ["--lr", rate, "--save-dir", str(full / f"lr_{rate}")]
    assert words["0.001"][:-4] == words["0.003"][:-4]
    adapters = recipe.command("finetune")
    for option in ("--max-epoch", "--max-tokens", "--sampling-temperature", "--clip-norm"):
        assert value(words["0.001"], option) == value(adapters, option)
    (chosen,) = (call for call in calls if "best_checkpoint.py" in call)
    assert chosen.endswith(f" {full}/lr_0.001 {full}/lr_0.003 --out {full}")
    assert value(recipe.command("decode_full"), "--path") == f"{full}/checkpoint_best.pt"


def value(words, option):
    return words[words.index(option) + 1]


def test_models_are_decoded_and_scored_alike(recipe):
    recipe.run("architecture_learning.sh")
    own, base, *others = (
        recipe.command(f"decode_{name}")
        for name in ("base_own", "base", "full", "finetuned", "learned")
    )
    assert own[2] == str(recipe.work / "data" / "base")
    assert value(own, "--path") == value(base, "--path")

    def without_places(words):
        return [word for word in words if not word.startswith(str(recipe.work))]

    assert all(words[2] == str(recipe.work / "data" / "finetune") for words in (base, *others))
    assert all(without_places(words) == without_places(base) for words in (own, *others))


def test_one_of_several_commands_that_fails_tells_why(recipe):
    for broken, step in (("--target-lang cs", "binarise_base"), ("--lr 0.003", "finetune_full")):
        status, out, err, _ = recipe.run("quickstart.sh", broken=broken)
        assert status == 1 and redone(out)[-1] == step
        assert "out of luck" in err


def wait_for(process, recipe, command):
    """Until the process is at the command that it waits at."""
    deadline = time.monotonic() + 60
    while command not in recipe.calls.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_two_runs_in_one_folder(recipe):
    first = recipe.start("quickstart.sh", slow="-m pip download")
    wait_for(first, recipe, "-m pip download")
    said = f"error: another run is at work in {recipe.work}: wait for its end, or stop it"
    for script in ("quickstart.sh", "architecture_learning.sh"):
        status, _, err, calls = recipe.run(script)
        assert (status, err, calls) == (1, f"quickstart: {said}\n", [])
    os.killpg(first.pid, signal.SIGKILL)  # leaves its lock as it is
    first.communicate()
    status, _, err, _ = recipe.run("quickstart.sh")
    assert (status, err) == (0, "")


@pytest.mark.parametrize("script", ["quickstart.sh", "architecture_learning.sh"])
def test_help_and_a_wrong_call(recipe, script):
    status, out, err, calls = recipe.run(script, "--help")
    assert (status, err, calls) == (0, "", []) and f"\n  bash examples/{script}\n" in out
    status, _, err, calls = recipe.run(script, "--epochs")
    name = script.removesuffix(".sh")
    assert (status, calls) == (2, [])
    assert err == f"{name}: error: it takes no arguments, found: --epochs\n"
    assert not recipe.work.exists()
