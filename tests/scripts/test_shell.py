"""The shell scripts: what bash 3.2, which macOS has, does not know; the making of .venv."""

import os
import re
import shutil
import subprocess

import pytest
from console import ROOT

SCRIPTS = sorted(path for name in ("examples", "scripts") for path in (ROOT / name).rglob("*.sh"))
# of a later bash, or not on macOS
LATER = re.compile(
    "|".join((
        r"\b(mapfile|readarray|coproc|getconf|nproc|tac|readlink|stat)\b",
        r"\bflock -",
        r"\b(declare|local|typeset) -\w*[An]",
        r"\bwait -n",
        r"\[\[? -v ",
        r"\$\{[^}]*(\^|,,|@[A-Za-z]\})",
        r"\|&|&>>|;;&|;&",
        r"\{[a-z]+\}[<>]",
        r"\[-\d+\]",
        r"\bsed -\w*[uzi]",
        r"\bsort -\w*[zV]",
        r"\bgrep -\w*P",
    ))
)  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_an_old_bash_does_not_know(path):
    code = re.sub(r"(^|\s)#.*", "", path.read_text(), flags=re.M)
    assert not [line for line in code.splitlines() if LATER.search(line)]


def test_the_guard_knows_what_it_looks_for():
    later = (
        "mapfile -t A <f", "declare -A a", "echo ${x^^}", "echo ${x@Q}", "a |& b", "wait -n",
        "local -n r=$1", "sed -u s/a/b/", "exec {fd}>f", "echo ${a[-1]}", "flock -n 9",
    )  # fmt: skip
    assert all(map(LATER.search, later))
    known = ("declare -f x", "echo ${x##*/}", 'echo "${@: -2}"', "sed -n 2p", "local x", "a || b")
    assert not any(map(LATER.search, known))


# Stands for the Python that makes .venv and for the one in it; the first pip waits for a file.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    "-m venv "*)
        mkdir -p "${!#}/bin"
        cp "$0" "${!#}/bin/python" ;;
    "-m pip "*)
        echo "$*" >>"$CALLS"
        while [ ! -e "$GO" ]; do sleep 0.02; done
        [ -z "$BROKEN" ] || exit 1 ;;
esac
"""


class Clone:
    def __init__(self, folder):
        self.root, self.calls, self.go = folder / "a clone", folder / "calls", folder / "go"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("requirements.txt", "requirements-hf.txt", "setup.py"):
            shutil.copy(ROOT / name, self.root)
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.calls.write_text("")
        self.env = {
            **os.environ,
            "ROOT": str(self.root),
            "PYTHON": str(python),
            "CALLS": str(self.calls),
            "GO": str(self.go),
        }
        for name in ("VENV", "HF"):
            self.env.pop(name, None)

    def start(self, broken=""):
        return subprocess.Popen(
            ["bash", "-c", 'source "$ROOT/scripts/environment.sh" && command -v python'],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.env, "BROKEN": broken},
        )

    def installed(self, *args):
        """(exit status, number of pip's runs so far)"""
        process = self.start(*args)
        process.communicate(timeout=60)
        return process.returncode, len(self.calls.read_text().splitlines())


def test_one_process_installs_and_the_other_waits(tmp_path):
    clone = Clone(tmp_path)
    both = [clone.start() for _ in range(2)]
    said = [
        next(line for line in process.stderr if line.startswith(("installing", "waiting")))
        for process in both
    ]
    clone.go.touch()
    out = [process.communicate(timeout=60)[0] for process in both]
    venv = clone.root / ".venv"
    assert out == [f"{venv}/bin/python\n"] * 2
    assert sorted(line.split()[0] for line in said) == ["installing", "waiting"]
    assert len(clone.calls.read_text().splitlines()) == 3


def test_an_installation_that_failed_is_done_again_when_the_versions_are_changed_back(tmp_path):
    clone = Clone(tmp_path)
    clone.go.touch()
    assert clone.installed() == (0, 3)
    assert clone.installed() == (0, 3)
    requirements = clone.root / "requirements.txt"
    wanted = requirements.read_text()
    requirements.write_text(wanted + "numpy<1\n")
    assert clone.installed("broken") == (1, 4)
    requirements.write_text(wanted)
    assert clone.installed() == (0, 7)


def test_an_environment_with_transformers_has_no_torchaudio(tmp_path):
    """It is made anew where only one of the files of versions changes."""
    clone = Clone(tmp_path)
    clone.go.touch()
    clone.env["HF"] = "1"
    assert clone.installed() == (0, 4)
    tools, versions, audio, ours = clone.calls.read_text().splitlines()
    assert versions.endswith("requirements-hf.txt") and "/requirements.txt" in versions
    assert audio == "-m pip uninstall -y torchaudio"
    assert clone.installed() == (0, 4)
    with open(clone.root / "requirements-hf.txt", "a") as file:
        file.write("peft<1\n")
    assert clone.installed() == (0, 8)
