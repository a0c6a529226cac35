"""The command line itself: help, mistakes, and a fairseq that cannot be imported."""

import json
import runpy
import shutil
import sys

import handmade
import pytest
from console import ROOT, lslora, run

from lslora_fairseq.cli import COMMANDS


def test_help_lists_the_commands():
    _, out, _ = lslora("--help")
    for name, (_, summary) in COMMANDS.items():
        assert name in out and summary.split(",")[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    _, out, _ = lslora(command, "--help")
    assert f"examples:\n  lslora {command}" in out


@pytest.mark.parametrize(
    "args, told",
    [
        ([], "the following arguments are required: command"),
        (["diagnose"], "invalid choice: 'diagnose' (choose from"),
        (["doctor", "--colour"], "unrecognized arguments: --colour"),
        (["doctor", "--max-tokens", "0"], "argument --max-tokens: 0 is not positive"),
        (["doctor", "--amp", "--fp16"], "not allowed with argument --amp"),
    ],
)
def test_a_mistake_on_the_command_line(args, told):
    status, out, err = lslora(*args, check=False)
    assert status == 2 and not out
    assert told in err.splitlines()[-1]


def broken(folder, *packages):
    """A folder to be first on the path, in which these packages cannot be imported."""
    for package in packages:
        (folder / f"{package}.py").write_text(
            "raise ValueError('mutable default for field common')"
        )
    return [str(folder)]


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help_does_not_wait_for_torch_and_fairseq(tmp_path, command):
    _, out, err = lslora(*command, "--help", first_on_path=broken(tmp_path, "torch", "fairseq"))
    assert out.startswith("usage: lslora") and not err


def test_analyses_do_not_wait_for_fairseq(tmp_path):
    """They read the checkpoint's options by themselves, with the safe loader."""
    path = handmade.save(tmp_path, handmade.make(lambda *_: 1))
    args = ("demand", path, "--format", "csv")
    status, out, err = lslora(*args, first_on_path=broken(tmp_path, "fairseq"))
    assert status == 0 and out.startswith("language,tier,") and not err


def test_evaluate_does_not_wait_for_scikit_learn(tmp_path):
    """fairseq imports it and scipy, for what is not used here."""
    status, out, err = lslora(
        "evaluate", tmp_path / "gone", "--path", "x", "--out", tmp_path / "out",
        first_on_path=broken(tmp_path, "sklearn", "scipy"), check=False,
    )  # fmt: skip
    assert status == 1 and not out
    assert err.splitlines()[-1].startswith(f"lslora: error: {tmp_path / 'gone'}: No such file")


def test_no_line_of_fairseqs_own_import():
    """It logs that tensorboardX is not installed, whatever is asked for."""
    _, out, err = lslora("doctor")
    assert out.startswith("ok       Python") and not err


def test_importing_the_package_before_fairseq_registers():
    code = (
        "import lslora_fairseq; from fairseq import models, optim, tasks; "
        "print('lslora_transformer' in models.MODEL_REGISTRY, 'pruned_adam' in "
        "optim.OPTIMIZER_REGISTRY, 'translation_multi_lslora' in tasks.TASK_REGISTRY)"
    )
    _, out, _ = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT), fresh=True)
    assert out == "True True True\n"


def test_the_command_as_a_module_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lslora", "--help"])
    monkeypatch.delitem(sys.modules, "lslora_fairseq.cli")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lslora_fairseq.cli", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: lslora")


def test_a_fairseq_that_cannot_be_imported_is_told(tmp_path):
    """What else was asked for is passed over."""
    status, out, err = lslora(
        "doctor", "--lora-tiers", "high=de", "--format", "json",
        check=False, first_on_path=broken(tmp_path, "fairseq"),
    )  # fmt: skip
    assert status == 1 and "Traceback" not in err
    report = json.loads(out)
    (error,) = [line for line in report["lines"] if line["status"] == "error"]
    assert error["check"] == "fairseq"
    assert "cannot be imported (ValueError: mutable default for field common)" in error["found"]
    assert "pip install" in error["remedy"]
    assert report["not_checked"] == {"everything else": "a fairseq that can be imported"}
    assert [line["check"] for line in report["lines"]][2:] == [
        "torch",
        "numpy",
        "omegaconf",
        "sacrebleu",
    ]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = handmade.save(tmp_path, handmade.make(lambda *_: 1, pruning_final_sparsity=0.5))
    command = f"'{sys.executable}' -m lslora demand '{path}' --format json"
    piped = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    _, out, err = run(shutil.which("bash"), "-c", piped, PYTHONPATH=str(ROOT))
    assert out == "0\n" and "Error" not in err
