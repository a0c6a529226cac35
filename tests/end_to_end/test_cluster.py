"""The recipe of examples/cluster in miniature: four processes over gloo, two of them at another
address of the loopback range, as on another machine."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import pytest
import torch
from console import PAIRS, ROOT, SIZES, TIERS, folder_of_commands
from optim.updates import same

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

pytestmark = pytest.mark.skipif(not forkserver.AVAILABLE, reason="loopback has one address here")
HERE = Path(__file__).parent
STOPPED = 75

# Stands for fairseq-train: each process leaves its number where a test finds it, and has the
# address of its machine.
FAIRSEQ_TRAIN = r"""#!/usr/bin/env bash
rank="${RANK:-${SLURM_PROCID:-}}"
[ -n "$rank" ] || exec "$COMMANDS/fairseq-train" "$@"
echo $$ >"$PROCESSES_OF/$rank"
export HOST=127.0.0.$((rank / 2 + 1))
exec "$COMMANDS/fairseq-train-on-host" "$@"
"""
# SLURM's commands, as far as the recipe needs them.
SRUN = r"""#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
pids=() status=0
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait $pid || status=$?; done
exit $status
"""
SCONTROL = r"""#!/usr/bin/env bash
case "$1" in
    show) [ "$3" = 'node[1-2]' ] && echo 127.0.0.1 && echo 127.0.0.2 ;;
    requeue) echo "$2" >>"$PROCESSES_OF/requeued" ;;
esac
"""


class Cluster:
    """Runs the scripts, each with settings of its own, on the test corpus and its base model."""

    def __init__(self, folder, corpus):
        self.folder, self.pids = folder, folder / "processes"
        work, commands = folder / "work", folder / "bin"
        for made in (work / "data", commands, self.pids):
            made.mkdir(parents=True)
        shutil.copytree(corpus.data, work / "data", dirs_exist_ok=True)
        langs = sorted({lang for pair in PAIRS.split(",") for lang in pair.split("-")})
        for pair in (f"{one}-{other}" for one in langs for other in langs if one < other):
            (work / "data" / f"{pair}.done").write_text("of the test corpus\n")
        console = folder_of_commands()
        forkserver.shim(console / "fairseq-train-on-host", HERE / "on_host.py")
        for name, text in (
            ("fairseq-train", FAIRSEQ_TRAIN), ("srun", SRUN), ("scontrol", SCONTROL),
        ):  # fmt: skip
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        path = os.pathsep.join(map(str, (commands, console, Path(sys.executable).parent)))
        (work / "model").mkdir()
        shutil.copy(corpus.base, work / "model" / "model.pt")
        self.env = {
            **os.environ,
            "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
            "COMMANDS": str(console),
            "PROCESSES_OF": str(self.pids),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "WORK": str(work),
            "MODEL_DIR": str(work / "model"),
            "MODEL_LANGUAGES": ",".join(langs),
            "TIERS": TIERS,
            "RANKS": "high=2,low=4",
            "ARCH": "lslora_transformer",
            "ENCODER_SIDES": "source*2,target*1",
            "MAX_EPOCH": "2",
            "PRUNING_BEGIN": "1",
            "PRUNING_DURATION": "1",
            "MAX_TOKENS": "600",
            "UPDATE_FREQ": "4",
            "LR": "3e-4",  # Adam takes steps of that size where gradients are but rounding
            "DROPOUT": "0",  # a process draws the same for all its batches of an update
            "ATTENTION_DROPOUT": "0",
            "EXTRA_TRAIN_ARGS": " ".join(
                [
                    "--cpu",
                    "--distributed-backend",
                    "gloo",
                    "--lang-pairs",
                    PAIRS,
                    "--batch-size",
                    "6",
                    *SIZES,
                ]
            ),
        }

    def start(self, script, name, **settings):
        settings["SAVE_DIR"] = str(self.folder / name)
        return subprocess.Popen(
            ["bash", str(ROOT / "examples" / script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.env, **settings},
        )

    def torchrun(self, name):
        """The script on two machines of two processes."""
        port = str(free_port())
        return [
            self.start(
                "cluster/torchrun.sh", name, NODES="2", NODE_RANK=str(node), PROCESSES="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )
            for node in range(2)
        ]  # fmt: skip

    def slurm(self, name):
        return self.start(
            "cluster/slurm.sh", name, SLURM_SUBMIT_DIR=str(ROOT), SLURM_NTASKS="4",
            SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID=str(free_port()),
        )  # fmt: skip

    def log(self, name):
        path = self.folder / name / "train.log"
        return path.read_text("utf-8") if path.exists() else ""

    def send(self, number, rank, script, name, line, times):
        """Sends a signal to one process once the log of the run has a line so many times."""
        self.wait_for(script, name, line, times)
        os.kill(int((self.pids / str(rank)).read_text()), number)

    def wait_for(self, script, name, line, times):
        while self.log(name).count(line) < times:
            assert script.poll() is None, script.communicate()
            time.sleep(0.02)
        assert are_connected("127.0.0.1", "127.0.0.2")

    def checkpoint(self, name):
        return torch.load(self.folder / name / "checkpoint_last.pt")


def free_port():
    """A port from 20,000 to 29,999, which slurm.sh makes from the last digits of a job's number."""
    while True:
        with socket.socket() as tried:
            port = random.randrange(20000, 30000)
            if tried.connect_ex(("127.0.0.1", port)):
                return port


def are_connected(*addresses):
    """Whether a connection of this system goes from one of two addresses to the other."""
    one, other = (socket.inet_aton(address)[::-1].hex().upper() for address in addresses)
    return re.search(f"{one}:.... {other}:....", Path("/proc/net/tcp").read_text())


def ended(*processes):
    """(exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=200) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]


@pytest.fixture(scope="module")
def cluster(corpus, tmp_path_factory):
    return Cluster(tmp_path_factory.mktemp("a cluster"), corpus)


@pytest.fixture(scope="module")
def whole(cluster):
    """The checkpoint of a run of four processes that nothing disturbs."""
    [(status, out, err)] = ended(cluster.slurm("whole"))
    assert (status, err) == (0, ""), cluster.log("whole")[-3000:]
    assert out == f"4 processes: {cluster.folder}/whole/train.log\n"
    return cluster.checkpoint("whole")


def test_four_processes_on_two_machines_give_what_one_gives(cluster, whole):
    [(status, _, err)] = ended(cluster.start("flores12/finetune.sh", "alone"))
    assert status == 0, err
    alone = cluster.checkpoint("alone")
    updates = [c["optimizer_history"][-1]["num_updates"] for c in (alone, whole)]
    assert updates[0] == updates[1] > 10
    assert alone["model"].keys() == whole["model"].keys()
    removed = 0
    for key, value in alone["model"].items():
        if key.endswith(".pruned"):
            assert torch.equal(value, whole["model"][key]), key
            removed += int(value.sum())
        torch.testing.assert_close(value, whole["model"][key], atol=1e-6, rtol=0, msg=key)
    assert removed > 0


@pytest.mark.slow
def test_a_killed_process_and_a_signal_change_no_bit(cluster, whole):
    """One process is killed, the run goes on and is stopped by a signal to another, and goes on."""
    machines = cluster.torchrun("disturbed")
    cluster.send(signal.SIGKILL, 2, machines[0], "disturbed", "begin training epoch 2", 1)
    for status, _, err in ended(*machines):
        assert status == 1
        assert re.fullmatch(
            r"cluster: error: rank 2 on \S+ was ended by signal 9: see \S+( \S+)*/train.log; "
            "run this again to go on\n",
            err,
        )
    told = r"^lslora: error: rank (\d): another process of this run has ended or cannot be reached"
    assert sorted(re.findall(told, cluster.log("disturbed"), re.M)) == ["0", "1", "3"]
    again = cluster.slurm("disturbed")
    cluster.send(signal.SIGUSR1, 3, again, "disturbed", "begin training epoch 2", 2)
    [(status, out, err)] = ended(again)
    assert status == STOPPED and err == ""
    assert out.endswith("stopped by a signal: run this again to go on\n")
    assert (cluster.pids / "requeued").read_text().count("\n") == 1
    state = cluster.checkpoint("disturbed")
    total = whole["optimizer_history"][-1]["num_updates"]
    assert total / 2 < state["optimizer_history"][-1]["num_updates"] < total
    for status, _, err in ended(*cluster.torchrun("disturbed")):
        assert (status, err) == (0, "")
    state = cluster.checkpoint("disturbed")
    assert same(state["model"], whole["model"])
    assert same(state["last_optimizer_state"], whole["last_optimizer_state"])
    for status, out, err in ended(*cluster.torchrun("disturbed")):
        assert (status, out, err) == (0, f"{cluster.folder}/disturbed is finished\n", "")


@pytest.mark.slow
def test_a_signal_to_one_of_the_scripts_stops_all_processes(cluster, whole):
    machines = cluster.torchrun("asked")
    cluster.wait_for(machines[0], "asked", "begin training epoch 1", 1)
    machines[1].terminate()
    for status, out, err in ended(*machines):
        assert (status, err) == (STOPPED, "")
        assert out.endswith("stopped by a signal: run this again to go on\n")
    assert not (cluster.folder / "asked" / "finished").exists()
    for status, _, err in ended(*cluster.torchrun("asked")):
        assert (status, err) == (0, "")
    assert same(cluster.checkpoint("asked")["model"], whole["model"])


def test_batches_that_processes_cannot_share_evenly_are_refused(cluster):
    three = cluster.start("cluster/torchrun.sh", "three", PROCESSES="3")
    [(status, out, err)] = ended(three)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("cluster: error: UPDATE_FREQ=4 batches make an update, which 3 processes")
