"""The section about the memory of training steps."""

import gc
import os
import sys
from ctypes import CDLL
from pathlib import Path

import torch

from benchmark.contenders import CONTENDERS, FROZEN, FULL, LOOP, OURS
from benchmark.measuring import in_own_process, progress
from benchmark.report import Result, Spread, Table
from benchmark.shapes import LANGUAGES
from benchmark.steps import precision_note
from lslora_fairseq.errors import ConfigError

MEGABYTE = 2**20


def memory_status(name):
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("the system does not tell a process's memory: leave out --sections memory")


def current_memory(device):
    """Bytes in use; the peak is counted anew from here on."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        raise ConfigError("peak memory is read from Linux's /proc: leave out --sections memory")
    trim = getattr(CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: give back what building the model has left behind
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_status("VmRSS")


def peak_memory(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory_status("VmHWM")


def step_memory(setting, label, languages, threads):
    """Memory of training; to be run in a process of its own.

    Returns:
        bytes once model and batch are built, and the peak above that of three training steps with
        their optimizer
    """
    torch.set_num_threads(threads)
    contender = CONTENDERS[label](setting, languages)
    batch = setting.batch(languages)
    built = current_memory(setting.device)
    contender.start_optimizer()
    for _ in range(3):
        contender.forward_backward(batch)
        contender.update()
    return built, peak_memory(setting.device) - built


def memory_of(function, *args):
    """Calls one of the functions that measure memory in a process of its own.

    glibc's allocator gives back there what is free: keeping it for reuse, it would count it, too.
    """
    before = os.environ.get("GLIBC_TUNABLES")
    os.environ["GLIBC_TUNABLES"] = f"glibc.malloc.mmap_threshold={MEGABYTE}"
    try:
        return in_own_process(function, *args)
    finally:
        del os.environ["GLIBC_TUNABLES"]
        if before is not None:
            os.environ["GLIBC_TUNABLES"] = before


def memory(options):
    """Peak memory of training steps above the weights, each kind in a process of its own."""
    counts = options.languages
    loop = min((n for n in counts if n >= LANGUAGES), default=max(counts))
    chosen = [(FROZEN, 1), (FULL, 1)]
    chosen += [(OURS, n) for n in counts] + [(LOOP, loop)]
    raw = {}
    for label, languages in chosen:
        name = label
        if label in (OURS, LOOP):
            name = f"{label}, {languages} language{'s' if languages > 1 else ''}"
        raw[name] = memory_of(step_memory, options.setting, label, languages, options.threads)
        progress(f"memory: {name}, {raw[name][1] / MEGABYTE:,.0f} MiB above model and batch")
    full = raw[FULL][1]
    rows = {
        name: [Spread.of([value]) for value in (built / MEGABYTE, above / MEGABYTE, above / full)]
        for name, (built, above) in raw.items()
    }
    columns = ["model and batch, MiB", "peak above, MiB", f"peak above ÷ {FULL}"]
    title = "Peak memory of training steps, above what model and batch take"
    notes = precision_note(options.setting)
    return Result([Table(title, columns, rows)], {"bytes": raw}, notes)
