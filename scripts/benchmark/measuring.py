"""How anything is measured: in turn, and in a process of its own."""

import gc
import logging
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from lslora_fairseq.errors import ConfigError


def progress(text):
    print(text, file=sys.stderr, flush=True)


def seconds(device):
    """A time stamp, taken once the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(name, runs, repetitions):
    """Measures several things in turn, starting with another one in each repetition.

    Args:
        name: of the measurement, for progress
        runs: label -> function without arguments that runs once and returns its measurement
        repetitions: how often, after a warm-up

    Returns:
        label -> list of measurements
    """
    labels = list(runs)
    found = {label: [] for label in labels}
    for repetition in range(repetitions + 1):
        began = time.perf_counter()
        start = repetition % len(labels)
        for label in labels[start:] + labels[:start]:
            measured = runs[label]()
            if repetition:
                found[label].append(measured)
        number = f"repetition {repetition} of {repetitions}" if repetition else "warm-up"
        progress(f"{name}: {number}, {time.perf_counter() - began:.1f} s")
    return found


def free(device):
    """Gives the memory of models that are no longer referenced back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def in_own_process(function, *args):
    """Calls a function in a fresh process, whose memory holds nothing else.

    Raises:
        ConfigError: the process was killed.
    """
    try:
        with ProcessPoolExecutor(
            1, get_context("spawn"), initializer=logging.disable, initargs=(logging.INFO,)
        ) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise ConfigError(
            "a process of the benchmark was killed, probably for want of memory: free some, or "
            "leave its section out (--sections)"
        ) from None
