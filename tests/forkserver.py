"""A process that has imported torch and fairseq and forks itself for each console command.

Importing them takes five of the six seconds of a small command. A forked child is a process of its
own with arguments, environment, folder, files, exit status and signals like any other; it runs the
installed console script itself, and only there imports fairseq_cli and the plugin. What it does
not show is what happens before that: imports, variables that act on them or on the interpreter
(PYTHONHASHSEED, OMP_NUM_THREADS), and the order of sets of strings, which all children share.

console.py is its user. This module imports little, so that :func:`shims` start fast.
"""

import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from importlib import import_module
from pathlib import Path

AVAILABLE = sys.platform == "linux"  # elsewhere a fork does not survive what torch has loaded
_lock = threading.Lock()
_server = None  # (folder, Popen, socket's path) of this process


def address():
    """The socket of this process's server, which is started by the first call."""
    global _server
    with _lock:
        if _server is None:
            folder = tempfile.TemporaryDirectory(prefix="forkserver-")
            path, log = Path(folder.name, "socket"), Path(folder.name, "log")
            with open(log, "w") as errors:
                # it ends with this process, when there is nothing more to read from its stdin
                process = subprocess.Popen(
                    [sys.executable, __file__, str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            assert process.stdout.readline() == b"ready\n", log.read_text()
            _server = folder, process, str(path)
        return _server[2]


class Process:
    """A command in a child of the server at *path*.

    Args:
        argv: ``[script, ...]`` or ``["-m", module, ...]``
        env: the whole environment
        files: three file descriptors, for stdin, stdout and stderr
    """

    def __init__(self, path, argv, env, files):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        socket.send_fds(self.socket, [b"."], files)
        self.socket.sendall(json.dumps([argv, env, os.getcwd()]).encode() + b"\n")
        self.replies = self.socket.makefile()
        self.pid = int(self.replies.readline())

    def wait(self, timeout=None):
        """The exit status, that of a signal negative; raises TimeoutError after *timeout* s."""
        self.socket.settimeout(timeout)
        with self.socket:
            try:
                return int(self.replies.readline())
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                raise


def shims(folder, names):
    """Makes console scripts in *folder* that have the server run the real ones."""
    for name in names:
        script = Path(sys.executable).parent / name
        path = Path(folder, name)
        path.write_text(
            f"#!{sys.executable} -IS\n"
            f"import os, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from forkserver import Process\n"
            f"argv = [{str(script)!r}, *sys.argv[1:]]\n"
            f"status = Process({address()!r}, argv, dict(os.environ), [0, 1, 2]).wait()\n"
            "sys.exit(status if status >= 0 else 128 - status)  # as a shell has it\n"
        )
        path.chmod(0o755)


def _import():
    """Imports what console commands import, as if nothing had been run yet."""
    for name in ("generate", "interactive", "preprocess", "train", "validate"):
        import_module(f"fairseq_cli.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fairseq_cli"]:
        del sys.modules[name]  # they set logging up, each in its way
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    assert "lslora_fairseq" not in sys.modules
    gc.collect()
    gc.freeze()  # or every child visits, and thereby copies, all of this when it ends
    assert threading.active_count() == 1


def _serve(listener):
    """Forks for each request; returns in the child, or without one when the tests are over."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:  # waits for the command, which is its child
            break
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request
    connection.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(argv, env, folder):
    """Runs a command as ``python ARGV`` does."""
    # or all children would draw the same; torch starts from a constant anyway
    sys.modules["numpy"].random.seed()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for option in filter(None, env.get("PYTHONWARNINGS", "").split(",")):
        warnings._setoption(option)
    if env.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    paths = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if argv[0] == "-m":
        sys.path[:0] = [folder, *paths]
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [os.path.dirname(argv[0]), *paths]
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        _import()
        print("ready", flush=True)
        command = _serve(listener)
    if command:
        _run(*command)
