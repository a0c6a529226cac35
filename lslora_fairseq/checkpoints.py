"""Reading what a checkpoint was trained with, and keeping checkpoint files whole."""

import argparse
import functools
import logging
import os
import pickle
import re
import textwrap
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from omegaconf import OmegaConf

from lslora_fairseq import light
from lslora_fairseq.errors import ConfigError, one_line_errors

# what torch.load raises for a file that is cut short, damaged or no checkpoint at all
UNREADABLE = (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError)


def allow_fairseq_checkpoints():
    """Lets ``torch.load`` read fairseq checkpoints with its safe loader (torch ≥ 2.6).

    They hold an ``argparse.Namespace`` beside tensors and plain values.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace])


def receive_checkpoints_from_own_processes():
    """Lets the processes of a run hand each other a checkpoint again (torch ≥ 2.6).

    fairseq reads it on the first process and sends the others pickled objects beyond what the
    safe loader accepts; they come from a process of the same run.
    """
    from fairseq.distributed import utils as distributed_utils

    send = distributed_utils._broadcast_object_slow
    if getattr(send, "trusting", False):
        return
    switch = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

    def trusting(*args, **kwargs):
        before = os.environ.get(switch)
        os.environ[switch] = "1"
        try:
            return send(*args, **kwargs)
        finally:
            del os.environ[switch]
            if before is not None:
                os.environ[switch] = before

    trusting.trusting = True
    distributed_utils._broadcast_object_slow = trusting


def copy_checkpoints_atomically():
    """Makes fairseq's copy of a checkpoint appear under its name only once it is complete.

    fairseq writes ``checkpoint3.pt`` and copies it over ``checkpoint_last.pt``: a run killed
    during that copy could not be resumed.
    """
    from fairseq.file_io import PathManager

    copy = PathManager.copy
    if getattr(copy, "atomic", False):
        return

    def atomic_copy(src_path, dst_path, overwrite=False):
        if not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        done = copy(src_path, dst_path + ".tmp", overwrite=True)
        if done:  # where shutil raises, iopath answers False
            os.replace(dst_path + ".tmp", dst_path)
        return done

    atomic_copy.atomic = True
    PathManager.copy = staticmethod(atomic_copy)


def report_unwritable_save_dir():
    """A save directory that cannot be written, or a full disk, is told in one line."""
    from fairseq import checkpoint_utils

    for name in ("verify_checkpoint_directory", "save_checkpoint"):
        function = getattr(checkpoint_utils, name)
        if not getattr(function, "reporting", False):
            setattr(checkpoint_utils, name, _reporting(function))


def _reporting(write):
    @functools.wraps(write)
    def reporting(cfg, *args, **kwargs):
        with one_line_errors(), _without_logged_tracebacks():
            try:
                return write(cfg, *args, **kwargs)
            except (OSError, RuntimeError) as error:
                cause = error  # torch may fail once more while it closes the file
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                if cause is None:
                    raise
                raise ConfigError(
                    f"cannot write to --save-dir {getattr(cfg, 'save_dir', cfg)} "
                    f"({cause.strerror or cause}): free some space or name another folder; the "
                    "checkpoints already there are kept"
                ) from error

    reporting.reporting = True
    return reporting


@contextmanager
def _without_logged_tracebacks():
    """fairseq logs the traceback of a failed write before it raises the error that we report."""
    logger = logging.getLogger("fairseq.checkpoint_utils")

    def short(record):
        wanted = os.environ.get("LSLORA_TRACEBACK")
        return wanted or not record.getMessage().startswith("Traceback")

    logger.addFilter(short)
    try:
        yield
    finally:
        logger.removeFilter(short)


def load_checkpoint(path):
    """All that a checkpoint holds, with the base model if it :mod:`leaves that out <.light>`; its
    tensors are memory-mapped where the file allows it.

    Raises:
        ConfigError: the file cannot be read as a fairseq checkpoint, or its base model is gone.
    """
    return light.completed(read_file(path), path)


def read_file(path):
    """As :func:`load_checkpoint`, without what the file leaves out."""
    try:
        try:
            # torch 2.2 maps no file that is named by a Path
            state = torch.load(str(path), map_location="cpu", mmap=True)
        except RuntimeError:  # a file of torch's old format cannot be mapped
            state = torch.load(path, map_location="cpu")
    except UNREADABLE as error:
        raise ConfigError(_unreadable(path, error)) from None
    if not isinstance(state, dict) or "model" not in state:
        raise ConfigError(
            f"{path} is not a fairseq checkpoint, it holds no model: name a file that "
            "fairseq-train wrote"
        )
    return state


def read_checkpoint(path):
    """What a checkpoint was trained with, and its weights, as :func:`load_checkpoint` gives them.

    Returns:
        dict of option name -> value, task and model alike; the model's state dict
    """
    state = load_checkpoint(path)
    return options_of(state), state["model"]


def options_of(state):
    """The options in a checkpoint's content, by name, task and model alike."""
    options = dict(vars(state["args"])) if state.get("args") else {}
    for group in ("task", "model"):
        section = (state.get("cfg") or {}).get(group)
        if isinstance(section, argparse.Namespace):
            section = vars(section)
        elif OmegaConf.is_config(section):
            section = OmegaConf.to_container(section)
        options.update(section or {})
    return options


def write_checkpoint(path, content):
    """Writes a checkpoint, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        torch.save(content, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            os.remove(f"{path}.tmp")
        raise ConfigError(
            f"cannot write --out {path} ({getattr(error, 'strerror', None) or error}): free some "
            "space or name another file"
        ) from None


def read_args(path):
    """The options of :func:`read_checkpoint` alone."""
    return options_of(read_file(path))


def _unreadable(path, error):
    unsafe = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
    if unsafe:
        return (
            f"{path} holds {unsafe[1]}, which torch's safe loader refuses: if you trust the file, "
            "set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
        )
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    reason = textwrap.shorten(reason, 100, placeholder=" …")
    return (
        f"cannot read the checkpoint {path} ({reason}): it is damaged, cut short or no "
        "checkpoint; copy it again, or name another one"
    )


def chosen_checkpoint(args):
    """What ``fairseq-train`` with these *args* will load, found by fairseq's own rule.

    Returns:
        path of the file (which need not exist), and whether training starts afresh from it, with
        a new optimizer; otherwise it goes on
    """
    from fairseq import checkpoint_utils

    asked = _Asked(getattr(args, "checkpoint_suffix", None) or "")
    logger = logging.getLogger(checkpoint_utils.__name__)
    logger.addFilter(_nothing)
    try:
        checkpoint_utils.load_checkpoint(args, asked)
    except _Answer as answer:
        return answer.args
    finally:
        logger.removeFilter(_nothing)


def _nothing(record):
    return False


class _Answer(Exception):
    pass


class _Asked:
    """Stands for a trainer; answers with what it is told to load instead of loading it."""

    def __init__(self, suffix):
        self.checkpoint_suffix = suffix

    def load_checkpoint(self, path, reset_optimizer, *_, **__):
        raise _Answer(path, reset_optimizer)


being_loaded = ContextVar("lslora_being_loaded", default=None)  # path, or None


def tell_what_is_loaded():
    """While fairseq's trainer loads a checkpoint, :data:`being_loaded` tells which; a task that
    asks for it learns that training starts afresh from one."""
    from fairseq.trainer import Trainer

    load = Trainer.load_checkpoint
    if getattr(load, "telling", False):
        return

    @functools.wraps(load)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        found = os.path.isfile(filename)
        token = being_loaded.set(filename if found else None)
        try:
            extra_state = load(self, filename, reset_optimizer, *args, **kwargs)
        finally:
            being_loaded.reset(token)
        if found and reset_optimizer and hasattr(self.task, "starts_afresh"):
            self.task.starts_afresh(self.model, filename)
        return extra_state

    load_checkpoint.telling = True
    Trainer.load_checkpoint = load_checkpoint
