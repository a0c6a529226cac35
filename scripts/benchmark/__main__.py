"""python scripts/benchmark: starts the command with the memory allocator that it wants."""

import logging
import os
import platform
import sys
from pathlib import Path

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"


def restart_with_allocator():
    """glibc reads the setting of its allocator when a process starts."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    restart_with_allocator()
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # where the package lies
    from benchmark.command import main

    logging.disable(logging.INFO)  # fairseq and the models would tell of every adapter
    main()
