"""Batches decoded side by side: on a CPU by as many processes as there are cores.

The processes are copies of the one that loaded the models, and share its weights.
"""

import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from lslora_fairseq.cores import cores
from lslora_fairseq.doctor.memory import free_on_cpu
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation.decoding import batches

CPU_TOKENS = 4000
WINDOW = 30  # batches for each process that directions are taken together for
LOGIT_BYTES = 20  # of one word of one hypothesis in a step of beam search, measured
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
    max_tokens, max_sentences, workers = options.max_tokens, options.batch_size, 1
    if translator.device.type == "cpu":
        max_tokens = min(max_tokens or CPU_TOKENS, CPU_TOKENS)
        longest = max(int(direction.widths.max()) for direction in directions)
        rows = max(1, max_tokens // longest) * translator.beams.beam
        workers = in_parallel(rows, len(translator.task.target_dictionary))
    cut, first = [], 0
    enough = WINDOW * workers * (max_tokens or CPU_TOKENS)
    while first < len(directions):
        last, tokens = first, 0
        while last < len(directions) and (tokens < enough or last == first):
            tokens += int(directions[last].lengths.sum())
            last += 1
        for batch in batches(directions[first:last], max_tokens, max_sentences):
            cut.append([(place + first, number) for place, number in batch])
        first = last
    return cut, workers


def in_parallel(rows, words):
    """How many processes decode on a CPU: one a core, as far as memory allows.

    Args:
        rows: hypotheses of a batch: sentences · beams
        words: size of the dictionary
    """
    free = free_on_cpu()
    if free is None:
        return cores()
    return max(1, min(cores(), free // (LOGIT_BYTES * rows * words)))


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
    threads = max(1, cores() // workers)
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start, (threads,))
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


def _start(threads):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells them to stop
    torch.set_num_threads(threads)


def _translate(batch):
    translator, directions = _work
    try:
        return translator.translate([(directions[place], number) for place, number in batch])
    except torch.cuda.OutOfMemoryError:
        raise ConfigError(
            f"the GPU's memory ran out on a batch of {len(batch)} sentences: lower --max-tokens, "
            "and run this again to go on"
        ) from None
