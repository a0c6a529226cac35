"""The command line itself: help, mistakes, and a fairseq that cannot be imported."""

import json

import pytest
from console import lslora

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
        (["doctor", "--colour"], "unknown arguments: --colour"),
        (["doctor", "--max-tokens", "0"], "argument --max-tokens: 0 is not positive"),
        (["doctor", "--amp", "--fp16"], "not allowed with argument --amp"),
    ],
)
def test_a_mistake_on_the_command_line(args, told):
    status, out, err = lslora(*args, check=False)
    assert status == 2 and not out
    assert told in err.splitlines()[-1]


def test_a_fairseq_that_cannot_be_imported_is_told(tmp_path):
    """What else was asked for is passed over; the options of the adapters are not known then."""
    broken = tmp_path / "fairseq"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ValueError('mutable default for field common')")
    status, out, err = lslora(
        "doctor", "--lora-tiers", "high=de", "--format", "json",
        check=False, first_on_path=[str(tmp_path)],
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
