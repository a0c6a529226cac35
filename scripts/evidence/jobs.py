"""Commands whose results are kept: each has a folder, and is not run again once it is done."""

import hashlib
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from importlib.metadata import version
from pathlib import Path

from lslora_fairseq.errors import ConfigError

DONE, STARTED = ".done.json", ".started.json"


class Jobs:
    """Runs commands, each on a core of its own, and remembers in their folders what they were.

    Args:
        work: the folder of everything
        cores: numbers of the cores that commands may use
    """

    def __init__(self, work, cores):
        self.work = Path(work)
        self._say = threading.Lock()
        self._cores = queue.SimpleQueue()
        for core in cores:
            self._cores.put(core)

    def run(self, folder, command, after=(), begun=None):
        """Runs a command unless it was done with the same words and the same things before it.

        A run that was interrupted finds its folder as it left it; any other begins in an empty one,
        or where a job that has begun the same work left off.

        Args:
            folder: where its results go, within the work folder; ``{out}`` in the command
            command: list of words
            after: folders of the jobs whose results it reads
            begun: the folder of a job that is done, whose results and log it starts with

        Returns:
            the folder

        Raises:
            ConfigError: it failed; the end of its log is in the message.
        """
        out = self.work / folder
        command = [str(word).replace("{out}", str(out)) for word in command]
        made_by = {
            "command": command,
            "package": version("lslora_fairseq"),
            "after": [self._hash(self.work / name) for name in after],
        }
        if _holds(out / DONE, made_by):
            return out
        log = self._log(folder)
        log.parent.mkdir(exist_ok=True)
        if not _holds(out / STARTED, made_by):
            shutil.rmtree(out, ignore_errors=True)
            log.unlink(missing_ok=True)
            if begun is None:
                out.mkdir(parents=True)
            else:
                shutil.copytree(self.work / begun, out)
                shutil.copy(self._log(begun), log)
            (out / STARTED).write_text(json.dumps(made_by))
        core = self._cores.get()
        try:
            self.say(f"{folder} …")
            began = time.time()
            status, usage = _run(command, log, core)
        finally:
            self._cores.put(core)
        if status:
            end = log.read_text(encoding="utf-8").splitlines()[-3:]
            raise ConfigError(f"{folder} failed, see {log}: {' | '.join(end)}")
        facts = {**made_by, "seconds": time.time() - began, "peak_mib": usage.ru_maxrss // 1024}
        (out / DONE).write_text(json.dumps(facts, indent=1))
        self.say(f"{folder}: {facts['seconds']:.0f} s")
        return out

    def log(self, folder):
        """The text of a job's log."""
        return self._log(folder).read_text(encoding="utf-8")

    def _log(self, folder):
        return self.work / "logs" / f"{folder.replace('/', '.')}.log"

    def facts(self, folder):
        """What is known of a job that is done: its command, seconds and peak memory."""
        return json.loads((self.work / folder / DONE).read_text())

    def say(self, text):
        with self._say:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def _hash(self, folder):
        try:
            facts = json.loads((folder / DONE).read_text())
            text = json.dumps([facts[key] for key in ("command", "package", "after")])
        except (OSError, ValueError):  # a step of the shell recipe, which has a folder above
            places = [folder, *folder.parents]
            text = next(p / ".done" for p in places if (p / ".done").exists()).read_text()
        return hashlib.sha256(text.encode()).hexdigest()


def _run(command, log, core):
    """Runs a command on one core; returns its exit status and what it used."""
    with open(log, "a", encoding="utf-8") as file:
        file.write("$ " + " ".join(command) + "\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            # what a log tells is read: fairseq would keep it back at another level
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def _holds(path, made_by):
    """Whether a file tells of the same command and the same things before it."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return all(facts.get(key) == value for key, value in made_by.items())
