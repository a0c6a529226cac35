"""How a run ends early: a signal asks it to save and stop, or another of its processes is gone."""

import functools
import logging
import re
import signal
import threading
from contextlib import contextmanager

import torch

from lslora_fairseq.errors import ConfigError, one_line_errors

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # the exit status of a run that a signal stopped; EX_TEMPFAIL: try again
ASKED = "lslora_asked_to_stop"  # a key of logging outputs


class StopRequest:
    """Whether a signal asks the run to stop.

    It may reach one process or all, in the middle of different updates. Each tells in the logging
    outputs of its batches, which fairseq adds up over all processes at every update anyway, so all
    of them learn of it after the same one.

    Attributes:
        asked: this process was sent a signal
        agreed: some process was, and all know it
    """

    asked = agreed = False

    def listen(self):
        """From here on a signal does not end the process. Outside the main thread, which alone may
        say so, nothing is changed."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True

    def tell(self, logging_output):
        """Adds what this process knows to the logging output of a batch."""
        logging_output[ASKED] = int(self.asked)

    def hear(self, logging_outputs):
        """Reads what all processes know from the logging outputs of an update."""
        self.agreed = self.agreed or any(bool(log.get(ASKED, 0)) for log in logging_outputs)


def end_early():
    """Lets fairseq's trainer stop where a task has a :class:`StopRequest` that is agreed on, and
    tell in one line that another process is gone."""
    from fairseq.trainer import Trainer

    if getattr(Trainer.train_step, "ending_early", False):
        return
    load_checkpoint, get_train_iterator = Trainer.load_checkpoint, Trainer.get_train_iterator
    train_step = Trainer.train_step

    @functools.wraps(load_checkpoint)
    def listening(self, *args, **kwargs):
        stop, options = _request(self), self.cfg.checkpoint
        if stop is not None and not (options.no_save or options.no_last_checkpoints):
            stop.listen()
        return load_checkpoint(self, *args, **kwargs)

    @functools.wraps(get_train_iterator)
    def remembering(self, *args, **kwargs):
        self.lslora_iterator = get_train_iterator(self, *args, **kwargs)
        return self.lslora_iterator

    @functools.wraps(train_step)
    def stopping(self, *args, **kwargs):
        output = train_step(self, *args, **kwargs)
        stop = _request(self)
        if stop is not None and stop.agreed:
            _save_and_stop(self)
        return output

    Trainer.get_train_iterator = remembering
    Trainer.load_checkpoint = _telling_of_the_others(listening)
    Trainer.train_step = _telling_of_the_others(stopping)
    Trainer.valid_step = _telling_of_the_others(Trainer.valid_step)
    Trainer.train_step.ending_early = True


def _request(trainer):
    """The :class:`StopRequest` of the task, or None of another task."""
    stop = getattr(trainer.task, "stop", None)
    return stop if isinstance(stop, StopRequest) else None


def _save_and_stop(trainer):
    """Saves what fairseq saves in the middle of an epoch, and ends all processes.

    After the last update of an epoch fairseq first validates and saves in its own way, since a
    resumed run would not validate that epoch any more; the next update, if there is one, is the
    last.
    """
    from fairseq import checkpoint_utils

    iterator = trainer.lslora_iterator
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, None)
    if iterator.end_of_epoch():
        return
    if trainer.data_parallel_world_size > 1:  # a process that ends first may end the others
        torch.distributed.barrier(trainer.data_parallel_process_group)
    logger.info(
        "stopped by a signal after %d updates, which checkpoint_last.pt holds: the same command "
        "goes on from there (exit status %d)",
        trainer.get_num_updates(),
        STOPPED,
    )
    raise SystemExit(STOPPED)


def _telling_of_the_others(method):
    @functools.wraps(method)
    def telling(self, *args, **kwargs):
        with one_line_errors(), _others_gone():
            return method(self, *args, **kwargs)

    return telling


@contextmanager
def _others_gone():
    """Turns what torch raises when processes cannot reach each other into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in text:
            raise
        reason = re.sub(r"^\[\S+\] ", "", text.splitlines()[0]).partition(". ")[0]
        raise ConfigError(
            f"rank {torch.distributed.get_rank()}: another process of this run has ended or cannot "
            f"be reached ({reason}): look for what became of it; the same commands go on from the "
            "last checkpoint"
        ) from error
