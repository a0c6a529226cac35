"""Batches decoded side by side: on a CPU by as many processes as there are cores.

The processes are copies of the one that loaded the models, and share its weights.
"""

import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import torch

from lslora_fairseq.cores import cores
from lslora_fairseq.doctor.memory import free_on_cpu
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation.decoding import batches

MAX_TOKENS = 12000  # of a batch, where --batch-size alone limits it
BATCHES = 4  # for each process: directions are taken together until there are so many
LEAST_TOKENS = 1000  # of a batch, however few there are for each process
LOGIT_BYTES = 12  # that beam search takes for one word of one hypothesis and model, measured
OF_FREE_MEMORY = 0.6
_work = None  # in a worker: the translator, and the directions that batches number


def schedule(translator, directions):
    """How directions are decoded: in which batches, and by how many processes.

    Directions are taken together until there is work for a while, so that results appear one
    after the other.

    Args:
        translator: a :class:`~lslora_fairseq.evaluation.decoding.Translator`
        directions: list of its directions

    Returns:
        list of batches of (place in *directions*, number of the sentence); number of processes
    """
    options = translator.cfg.dataset
    max_tokens, max_sentences, workers = options.max_tokens or MAX_TOKENS, options.batch_size, 1
    if translator.device.type == "cpu":
        workers = cores()
        tokens = sum(int(direction.widths.sum()) for direction in directions)
        max_tokens = min(max_tokens, max(tokens // (BATCHES * workers), LEAST_TOKENS))
        sentences = _fitting(translator, workers)
        max_sentences = min(max_sentences or sentences, sentences)
    cut, first = [], 0
    while first < len(directions):
        last, tokens = first, 0
        while last < len(directions) and tokens < BATCHES * workers * max_tokens:
            tokens += int(directions[last].widths.sum())
            last += 1
        for batch in batches(directions[first:last], max_tokens, max_sentences):
            cut.append([(place + first, number) for place, number in batch])
        first = last
    return cut, workers


def _fitting(translator, workers):
    """How many sentences of a batch fit into memory beside those of the other processes."""
    free = free_on_cpu()
    if free is None:
        return sys.maxsize
    row = LOGIT_BYTES * len(translator.models) * len(translator.task.target_dictionary)
    return max(1, int(OF_FREE_MEMORY * free / workers / row) // translator.beams.beam)


def translated(translator, directions, cut, workers):
    """Decodes batches, in whatever order they are done.

    Args:
        translator: a :class:`~lslora_fairseq.evaluation.decoding.Translator`
        directions: list of its directions
        cut: batches, lists of (place in *directions*, number of the sentence)
        workers: processes; 1 is this one

    Yields:
        a batch, and what ``translate`` returns of it

    Raises:
        ConfigError: memory ran out.
    """
    global _work
    _work = translator, directions
    if workers == 1:
        for batch in cut:
            yield batch, _translate(batch)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start)
    try:
        pending = {pool.submit(_translate, batch): batch for batch in cut}
        for done in as_completed(pending):
            yield pending.pop(done), done.result()
    except BrokenProcessPool:
        raise ConfigError(
            "a process that decodes was killed, most likely since memory ran out: lower "
            "--max-tokens, and run this again to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells it to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A worker would wait for ever for a main process that was killed."""
    wait([parent_process().sentinel])
    os._exit(1)


def _translate(batch):
    translator, directions = _work
    try:
        return translator.translate([(directions[place], number) for place, number in batch])
    except torch.cuda.OutOfMemoryError:
        raise ConfigError(
            f"the GPU's memory ran out on a batch of {len(batch)} sentences: lower --max-tokens, "
            "and run this again to go on"
        ) from None
