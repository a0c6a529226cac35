"""A forked command is, for what it can tell, the process that starting Python anew makes."""

import os
import signal
import sys

import forkserver
import pytest
from console import folder_of_commands, run, start

pytestmark = pytest.mark.skipif(not forkserver.AVAILABLE, reason="commands are not forked here")
TELL = """
import atexit, json, logging, os, sys, warnings
atexit.register(print, "the end")
print(json.dumps([sys.argv, sys.path[:2], os.getcwd(), dict(os.environ), __name__, __file__]))
print(sys.modules["__main__"].__dict__ is globals(), sys.stdin.read(), sys.stdout.isatty())
logging.warning("logged")
warnings.warn("warned")
print([name for name in sys.modules if name.startswith(("fairseq_cli", "lslora_fairseq"))])
"""
ENDS = {
    "sys.exit()": 0,
    "sys.exit(3)": 3,
    "sys.exit('a message')": 1,
    "os.kill(os.getpid(), 9)": -9,
    "": 0,
}


@pytest.mark.parametrize("end", ENDS)
def test_it_is_told_and_tells_the_same(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(f"{TELL}\nsys.stdout.flush()\n{end}\n")
    for arguments in ([script, "a b", ""], ["-m", "script", "--option"]):
        for env in ({}, {"PYTHONWARNINGS": "ignore", "PYTHONPATH": "/none", "LSLORA_X": "é\n"}):
            found = [
                run(sys.executable, *arguments, check=False, stdin="Grüße\n", fresh=fresh, **env)
                for fresh in (False, True)
            ]
            assert found[0] == found[1]
            status, out, err = found[0]
            assert status == ENDS[end] and ("the end" in out) == (status >= 0)
            assert ("warned" in err) == (not env) and "logged" in err and "Grüße" in out


@pytest.mark.parametrize(
    "statement, expected, told",
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 2)", -2, "KeyboardInterrupt"),
    ],
)
def test_an_exception_is_told(tmp_path, statement, expected, told):
    script = tmp_path / "script.py"
    script.write_text(f"print('out')\n{statement}\n")
    for fresh in (False, True):
        status, out, err = run(sys.executable, script, check=False, fresh=fresh)
        assert (status, out) == (expected, "out\n")
        assert err.startswith("Traceback (most recent call last):\n")
        assert err.splitlines()[-1].strip() == told


def test_each_draws_other_random_numbers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import random, numpy\nprint(random.random())\nprint(numpy.random.rand())\n")
    drawn = "".join(run(sys.executable, script)[1] for _ in range(2)).split()
    assert len(set(drawn)) == 4


def test_what_would_come_too_late_is_refused():
    with pytest.raises(AssertionError, match="PYTHONHASHSEED'} needs fresh=True"):
        run("fairseq-train", PYTHONHASHSEED="1")


def test_scripts_run_it_by_name(tmp_path):
    (tmp_path / "told.py").write_text("import os, sys\nprint(os.getppid(), input(), sys.argv[1:])")
    env = {"PATH": f"{folder_of_commands()}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    script = "fairseq-train --nothing; echo $?; echo hi | python -m told 'a b' | tail -1; echo $$"
    _, out, err = run("/bin/bash", "-c", f"{script}; python -c 'print(7)'", **env)
    status, told, shell, seven = out.splitlines()
    parent, said = told.split(" ", 1)
    assert (status, said, seven) == ("1", "hi ['a b']", "7") and parent != shell
    assert "fairseq/options.py" in err and err.endswith("\nRuntimeError\n")


def test_it_ends_with_its_asker(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('on', flush=True)\ntime.sleep(60)\nprint('off')\n")
    path = f"{folder_of_commands()}:{os.environ['PATH']}"
    reading, writing = os.pipe()
    with open(os.devnull) as nothing, open(reading) as read, open(writing, "w") as written:
        process = start(
            "/bin/bash", "-c", "exec python -m script", files=(nothing, written, written),
            PATH=path, PYTHONPATH=str(tmp_path),
        )  # fmt: skip
        written.close()
        assert read.readline() == "on\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        assert read.read() == ""  # which ends when its last writer has
