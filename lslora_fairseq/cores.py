#!/usr/bin/env python3
"""How many CPU cores this process may use, by its affinity and its container's quota.

Shell scripts call this file, which prints it and imports nothing of the package.
"""

import math
import os
from pathlib import Path

QUOTA = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")  # version 2 has the first alone


def affinity():
    """Cores that this process may be scheduled on; all cores where the system cannot tell."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def read(path):
    """The text of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def quota(root=Path("/")):
    """CPU time that the control groups of this process grant, in cores; inf without a limit.

    A container may see its own group as the root, or under the path that the host knows it by: all
    groups from that path up to the root are asked, and those that are not there are passed over.
    """
    limits = [math.inf]
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        hierarchy = root / "sys/fs/cgroup" / (controllers and "cpu")  # version 2 names none
        path = hierarchy / group.lstrip("/")
        for folder in (path, *path.parents):
            limit = "".join(read(folder / name) for name in QUOTA).split()
            if len(limit) == 2 and all(map(str.isdecimal, limit)):  # "max" and -1: no limit
                limits.append(int(limit[0]) / int(limit[1]))
            if folder == hierarchy:
                break
    return min(limits)


def cores(root=Path("/")):
    """At least 1; a part of a core counts as one."""
    return max(1, math.ceil(min(affinity(), quota(root))))


if __name__ == "__main__":
    print(cores())
