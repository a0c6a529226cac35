"""A process that has imported torch and fairseq and forks itself for each console command.

Importing them takes five of the six seconds of a small command. A forked child is a process of its
own with arguments, environment, folder, files, exit status and signals like any other; it runs the
installed console script itself, and only there imports fairseq_cli and the plugin. What it does
not show is what happens before and after: imports, variables that act on them or on the interpreter
(PYTHONHASHSEED, OMP_NUM_THREADS), a shell's limits (ulimit), another order of sets of strings,
since all children have the same, and how the interpreter takes its modules apart.

console.py is its user. This module imports little, so that :func:`shims` start fast.
"""

import atexit
import gc
import json
import os
import runpy
import select
import shutil
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
COMMANDS = ("generate", "interactive", "preprocess", "train", "validate")  # of fairseq_cli
_lock = threading.Lock()
_server = None  # (folder, Popen) of this process
_status = None  # with which a child ends


def folder():
    """The folder with the ``socket`` of this process's server, which the first call starts."""
    global _server
    with _lock:
        if _server is None:
            made = Path(tempfile.mkdtemp(prefix="forkserver-"))
            log = made / "log"
            with open(log, "w") as errors:
                # it ends, and removes the folder, with this process: when its stdin does
                process = subprocess.Popen(
                    [sys.executable, __file__, str(made / "socket")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            assert process.stdout.readline() == b"ready\n", log.read_text()
            _server = made, process
        return _server[0]


class Process:
    """A command in a child of a server, which is killed if its asker ends first.

    Args:
        server: its folder
        argv: ``[script, ...]`` or ``["-m", module, ...]``
        env: the whole environment
        files: three file descriptors, for stdin, stdout and stderr
    """

    def __init__(self, server, argv, env, files):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"{server}/socket")
        socket.send_fds(self.socket, [b"."], files)
        self.socket.sendall(json.dumps([argv, env, os.getcwd()]).encode() + b"\n")
        self.replies = self.socket.makefile()
        self.pid = int(self.replies.readline())

    def wait(self, timeout=None):
        """The exit status, that of a signal negative; raises TimeoutError after *timeout* s."""
        self.socket.settimeout(timeout)
        with self.socket:
            return int(self.replies.readline())


def shims():
    """Makes a folder for PATH: console scripts, and ``python -m``, run by the server."""
    made = folder() / "bin"
    made.mkdir(exist_ok=True)
    for name in ("python", "lslora", *(f"fairseq-{command}" for command in COMMANDS)):
        shim(made / name, Path(sys.executable).parent / name)
    return made


def shim(path, script):
    """Makes a command that is a Python *script* run by the server."""
    path.write_text(
        f"#!{sys.executable} -IS\n"
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import forkserver\nforkserver.stand_in({str(script)!r}, {str(folder())!r})\n"
    )
    path.chmod(0o755)


def stand_in(script, server):
    """What a shim does."""
    argv = [script, *sys.argv[1:]]
    if Path(script).name == "python":
        if argv[1:2] != ["-m"]:
            os.execv(script, argv)
        argv = argv[1:]
    process = Process(server, argv, dict(os.environ), [0, 1, 2])
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    status = process.wait()
    sys.exit(status if status >= 0 else 128 - status)  # as a shell has it


def _import():
    """Imports what console commands import, as if nothing had been run yet."""
    import logging  # registers with atexit, as others do; _end is there before them

    for name in COMMANDS:
        import_module(f"fairseq_cli.{name}")
    import_module("torch._dynamo")  # every optimizer imports it when it is made
    for name in [name for name in sys.modules if name.partition(".")[0] == "fairseq_cli"]:
        del sys.modules[name]  # they set logging up, each in its way
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    assert "lslora_fairseq" not in sys.modules
    gc.collect()
    gc.freeze()  # or a child's collections visit, and thereby copy, all of this
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
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % pid)
    ready, _, _ = select.select([connection, os.pidfd_open(pid)], [], [])
    if connection in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(argv, env, folder):
    """Runs a command as ``python ARGV`` does."""
    global _status
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
    sys.path[:0] = [folder if argv[0] == "-m" else os.path.dirname(argv[0]), *paths]
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        _status = 0
    except SystemExit as end:
        _status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception:
        _status = 1
        raise


def _end():
    """Ends a child when all else is done: freeing what it shares would copy it page by page."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        atexit.register(_end)
        _import()
        print("ready", flush=True)
        command = _serve(listener)
    if command:
        _run(*command)
    else:
        shutil.rmtree(os.path.dirname(sys.argv[1]))
