"""How many cores a process may use, with the files in which a container's limits stand."""

import os
import subprocess
import sys

import pytest
from console import ROOT

from lslora_fairseq import cores


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


CGROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, float("inf")),
        # version 2: seen as the root of its own namespace, and by the host's path
        ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "max 100000\n"}, float("inf")),
        ({"proc/self/cgroup": "0::/a b/c\n", f"{CGROUP}/a b/cpu.max": "300000 100000\n",
          f"{CGROUP}/a b/c/cpu.max": "max 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", f"{CGROUP}/a/cpu.max": "300000 100000\n",
          f"{CGROUP}/a/b/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/docker/gone\n", f"{CGROUP}/cpu.max": "50000 100000\n"}, 0.5),
        # version 1, where other controllers have groups of their own
        ({"proc/self/cgroup": "5:memory:/m\n2:cpu,cpuacct:/docker/x\n",
          f"{CGROUP}/cpu/docker/x/cpu.cfs_quota_us": "400000\n",
          f"{CGROUP}/cpu/docker/x/cpu.cfs_period_us": "100000\n",
          f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1\n",
          f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"proc/self/cgroup": "2:cpu:/\n", f"{CGROUP}/cpu/cpu.cfs_quota_us": "250000\n",
          f"{CGROUP}/cpu/cpu.cfs_period_us": "50000\n"}, 5),
        ({"proc/self/cgroup": "4:cpuset:/s\n", f"{CGROUP}/cpu/cpu.cfs_quota_us": "100000\n",
          f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    ],
)  # fmt: skip
def test_quota(tmp_path, files, expected):
    write(tmp_path, files)
    assert cores.quota(tmp_path) == expected


@pytest.mark.parametrize(
    "quota, expected", [("max", 8), ("150000", 2), ("1000", 1), ("9900000", 8)]
)
def test_the_least_of_affinity_and_quota(tmp_path, monkeypatch, quota, expected):
    write(tmp_path, {"proc/self/cgroup": "0::/", f"{CGROUP}/cpu.max": f"{quota} 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.cores(tmp_path) == expected


def test_where_affinity_is_not_known(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores.cores(tmp_path) == 6


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_bound_to_one_core():
    core = min(os.sched_getaffinity(0))
    said = subprocess.run(
        [sys.executable, ROOT / "lslora_fairseq" / "cores.py"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    ).stdout
    assert said == "1\n"
