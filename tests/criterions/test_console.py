"""The criterion through the console, on real text, beside fairseq's own."""

import re
import shutil

import pytest
import torch
from console import USER_DIR, finetune_args, run, with_option, without

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

OURS = "lslora_label_smoothed_cross_entropy"


def losses(out):
    """Of each epoch, first of its validation, which comes before the line of its training."""
    found = re.findall(
        r"\| (?:train|valid on 'valid' subset) \| (?:epoch \d+ \| )?loss ([\d.]+)", out
    )
    return [float(loss) for loss in found]


def args(corpus, save_dir, *more):
    return with_option(finetune_args(corpus, save_dir, *more), "--criterion", OURS)


@pytest.fixture(scope="module")
def ours(corpus, tmp_path_factory):
    """(checkpoint, stdout) of the training of conftest's *finetuned*, with this criterion."""
    folder = tmp_path_factory.mktemp("ours")
    _, out, _ = run("fairseq-train", *args(corpus, folder, "--report-accuracy"))
    return folder / "checkpoint_last.pt", out


def test_a_run_is_the_one_with_fairseqs_criterion(finetuned, ours):
    checkpoint, out = ours
    assert len(losses(out)) == 6 and "output distribution" not in out
    assert losses(out) == pytest.approx(losses(finetuned[1]), abs=0.002)
    assert len(re.findall(r"\| accuracy [\d.]+ ", out)) == 6
    mine, theirs = (torch.load(path)["model"] for path in (checkpoint, finetuned[0]))
    for key in (k for k in mine if ".lora_" in k):  # Adam follows the sign of the least gradient
        assert (mine[key] - theirs[key]).norm() < 0.02 * theirs[key].norm(), key


def test_its_checkpoint_is_validated(corpus, ours):
    _, out, _ = run(
        "fairseq-validate", corpus.data, "--user-dir", USER_DIR, "--cpu", "--task",
        "translation_multi_lslora", "--path", ours[0], "--valid-subset", "valid", "--max-tokens",
        "600", "--num-workers", "0",
    )  # fmt: skip
    assert losses(out)[-1] == pytest.approx(losses(ours[1])[-2], abs=0.001)


def test_a_run_goes_on_with_the_other_criterion(corpus, finetuned, ours, tmp_path):
    found = []
    for path, name in ((finetuned[0], OURS), (ours[0], "label_smoothed_cross_entropy")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(path, folder)
        more = with_option(args(corpus, folder, "--max-epoch", "4"), "--criterion", name)
        _, out, _ = run("fairseq-train", *without(more, "--finetune-from-model"))
        assert "| train | epoch 004 |" in out and "epoch 003 |" not in out
        found.append(losses(out))
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], abs=0.002)
