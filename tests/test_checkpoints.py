"""Reading a checkpoint's options, and what happens to files when something goes wrong."""

import argparse
import errno
import logging
import re
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

import lslora_fairseq  # noqa: F401  puts the functions below into fairseq
from lslora_fairseq.checkpoints import (
    chosen_checkpoint,
    copy_checkpoints_atomically,
    read_args,
    receive_checkpoints_from_own_processes,
    report_unwritable_save_dir,
    tell_what_is_loaded,
)
from lslora_fairseq.errors import ConfigError, UserError


def saved(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return str(path)


def test_options_of_a_legacy_checkpoint(tmp_path):
    content = {"model": {}, "args": Namespace(langs=["de", "en"], arch="transformer")}
    path = saved(tmp_path / "old.pt", content)
    assert read_args(path) == {"langs": ["de", "en"], "arch": "transformer"}


@pytest.mark.parametrize("kind", [Namespace, dict])
def test_options_of_a_checkpoint_with_a_config(tmp_path, kind):
    sections = {
        "task": kind(langs=["de"], seed=1),
        "model": kind(arch="lslora_transformer", seed=2),
        "optimizer": kind(lr=[0.1]),
    }
    path = saved(tmp_path / "new.pt", {"model": {}, "args": None, "cfg": sections})
    assert read_args(path) == {"langs": ["de"], "arch": "lslora_transformer", "seed": 2}


def test_options_in_an_omegaconf_config(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    cfg = OmegaConf.create({"task": {"langs": ["de", "en"]}, "model": None})
    path = saved(tmp_path / "new.pt", {"model": {}, "cfg": cfg})
    assert read_args(path) == {"langs": ["de", "en"]}


def test_a_checkpoint_may_tell_nothing(tmp_path):
    assert read_args(saved(tmp_path / "bare.pt", {"model": {}})) == {}


def test_the_format_of_old_torch_is_read_too(tmp_path):
    content = {"model": {"w": torch.ones(3)}, "args": Namespace(arch="transformer")}
    path = saved(tmp_path / "old.pt", content, _use_new_zipfile_serialization=False)
    assert read_args(path) == {"arch": "transformer"}


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-10],
        lambda whole: b"",
        lambda whole: b"not a checkpoint\n",
        lambda whole: bytes(len(whole)),
    ],
    ids=["half", "almost whole", "empty", "text", "zeros"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_cannot_be_read_is_told_with_cause_and_remedy(tmp_path, change, zipped):
    path = tmp_path / "checkpoint.pt"
    content = {"model": {"w": torch.ones(1000)}, "args": Namespace(arch="transformer")}
    saved(path, content, _use_new_zipfile_serialization=zipped)
    path.write_bytes(change(path.read_bytes()))
    message = f"^cannot read the checkpoint {re.escape(str(path))} \\(\\w*[A-Z].*\\): it is damaged"
    with pytest.raises(ConfigError, match=message) as caught:
        read_args(str(path))
    assert str(caught.value).endswith(
        "cut short or no checkpoint; copy it again, or name another one"
    )
    assert len(str(caught.value)) < len(str(path)) + 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"weights": {}}, [1, 2], torch.ones(2)])
def test_a_file_without_a_model_is_no_checkpoint(tmp_path, content):
    path = saved(tmp_path / "other.pt", content)
    message = f"^{re.escape(path)} is not a fairseq checkpoint, it holds no model: name a file that"
    with pytest.raises(ConfigError, match=message):
        read_args(path)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="torch ≥ 2.6 loads safely"
)
def test_an_object_that_the_safe_loader_refuses_is_named_with_the_way_out(tmp_path, monkeypatch):
    content = {"model": {}, "extra": argparse.ArgumentParser}
    path = saved(tmp_path / "odd.pt", content)
    message = f"^{re.escape(path)} holds argparse.ArgumentParser, which torch's safe loader refuses"
    with pytest.raises(ConfigError, match=message + ".*set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1$"):
        read_args(path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert read_args(path) == {}


@pytest.mark.parametrize(
    "words, found, chosen",
    [
        ("", "", ("run/checkpoint_last.pt", False)),
        ("--finetune-from-model base.pt", "base.pt", ("base.pt", True)),
        (
            "--finetune-from-model base.pt",
            "run/checkpoint_last.pt",
            ("run/checkpoint_last.pt", False),
        ),
        ("--finetune-from-model base.pt --checkpoint-suffix _x", "base.pt", ("base.pt", True)),
        (
            "--finetune-from-model base.pt --checkpoint-suffix _x",
            "run/checkpoint_last_x.pt",
            ("run/checkpoint_last_x.pt", False),
        ),
        ("--continue-once a.pt --finetune-from-model base.pt", "a.pt", ("a.pt", False)),
        ("--continue-once a.pt", "run/checkpoint_last.pt", ("run/checkpoint_last.pt", False)),
        ("--restore-file a.pt", "a.pt run/checkpoint_last.pt", ("a.pt", False)),
        ("--restore-file a.pt --reset-optimizer", "a.pt", ("a.pt", True)),
        ("--restore-file a.pt --checkpoint-suffix _x", "a.pt", ("a_x.pt", False)),
    ],
)
def test_the_checkpoint_that_fairseq_chooses(tmp_path, monkeypatch, caplog, words, found, chosen):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in found.split():
        (tmp_path / name).touch()
    parser = options.get_training_parser()
    args = parser.parse_known_args(["data", "--save-dir", "run", *words.split()])[0]
    with caplog.at_level("INFO"):
        assert chosen_checkpoint(args) == chosen
    assert not caplog.records  # nothing is loaded yet


def test_installing_twice_wraps_once():
    def functions():
        return (
            distributed_utils._broadcast_object_slow,
            PathManager.copy,
            checkpoint_utils.verify_checkpoint_directory,
            checkpoint_utils.save_checkpoint,
            Trainer.load_checkpoint,
        )

    before = functions()
    receive_checkpoints_from_own_processes()
    copy_checkpoints_atomically()
    report_unwritable_save_dir()
    tell_what_is_loaded()
    assert functions() == before


def test_a_copy_that_fails_leaves_the_old_file(tmp_path):
    old = tmp_path / "checkpoint_last.pt"
    old.write_bytes(b"old")
    copied = False
    try:
        copied = PathManager.copy(str(tmp_path / "missing.pt"), str(old), overwrite=True)
    except OSError:
        pass  # another version of iopath raises
    assert not copied
    assert old.read_bytes() == b"old"


def test_a_save_dir_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "run")
    message = (
        f"^lslora: error: cannot write to --save-dir {re.escape(folder)} \\(Not a directory\\)"
    )
    with pytest.raises(UserError, match=message + ": free some space or name another folder; "):
        checkpoint_utils.verify_checkpoint_directory(folder)


def failing_save(monkeypatch, raised):
    """fairseq's save_checkpoint, wrapped as ours, with a write that fails."""

    def save_checkpoint(cfg):
        try:
            raise raised
        finally:
            logger = logging.getLogger(checkpoint_utils.__name__)
            logger.error("Traceback (most recent call last): …")
            logger.error("kept")

    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", save_checkpoint)
    report_unwritable_save_dir()
    return checkpoint_utils.save_checkpoint


def test_a_full_disk_is_one_line_without_the_traceback_that_fairseq_logs(monkeypatch, caplog):
    error = OSError(errno.ENOSPC, "No space left on device")
    save = failing_save(monkeypatch, error)
    message = (
        "lslora: error: cannot write to --save-dir runs (No space left on device): free some "
        "space or name another folder; the checkpoints already there are kept"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        save(Namespace(save_dir="runs"))
    assert [record.getMessage() for record in caplog.records] == ["kept"]
    monkeypatch.setenv("LSLORA_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="No space left on device"):
        save(Namespace(save_dir="runs"))
    assert len(caplog.records) == 3


def test_torch_failing_once_more_while_it_closes_the_file_is_still_a_full_disk(monkeypatch):
    error = RuntimeError("unexpected pos 64 vs 0")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="No space left on device"):
        failing_save(monkeypatch, error)(Namespace(save_dir="runs"))


def test_another_failure_of_saving_is_not_taken_for_a_full_disk(monkeypatch):
    with pytest.raises(RuntimeError, match="^CUDA error$"):
        failing_save(monkeypatch, RuntimeError("CUDA error"))(Namespace(save_dir="runs"))
