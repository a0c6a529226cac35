"""Weight learning through the real console commands."""

import json
import re

import pytest
import torch
from console import finetune_args, generate_args, lslora, run

from lslora_fairseq.keys import is_adapter_key


@pytest.fixture(scope="module")
def learned(corpus, tmp_path_factory):
    """(checkpoint, stdout of the training)."""
    save_dir = tmp_path_factory.mktemp("learned")
    args = finetune_args(corpus, save_dir, "--lora-weight-learning")
    _, out, _ = run("fairseq-train", *args)
    return save_dir / "checkpoint_last.pt", out


def logits(path):
    return {k: v for k, v in torch.load(path)["model"].items() if k.endswith("side_weights.logits")}


def test_weights_are_learned_saved_and_logged(learned):
    path, out = learned
    found = logits(path)
    assert [*found] == [
        f"{stack}.layers.{layer}.side_weights.logits"
        for stack, layers in (("encoder", 3), ("decoder", 2))
        for layer in range(layers)
    ]
    assert all(w.shape == (1, 2) and w.all() for w in found.values())
    for key, w in found.items():
        stack, _, layer = key.split(".")[:3]
        logged = re.findall(rf"\bp_source/{stack}\.{layer} ([\d.]+)", out)
        assert float(logged[-1]) == pytest.approx(w.softmax(-1)[0, 0].item(), abs=0.005)


def test_sides_reads_them(learned):
    _, out, _ = lslora("sides", learned[0], "--format", "json")
    rows = json.loads(out)["layers"]
    for row, w in zip(rows, logits(learned[0]).values(), strict=True):
        assert row["p_source"] == pytest.approx(w.softmax(-1)[0, 0].item(), abs=1e-6)
        assert row["side"] == ("source" if w[0, 0] > w[0, 1] else "target")


def test_decoding_needs_no_option_of_the_adapters(corpus, learned):
    _, out, _ = run("fairseq-generate", *generate_args(corpus, learned[0], "en", "fr"))
    assert len(re.findall(r"^H-\d+\t", out, re.M)) == 8


def test_the_doctor_takes_weight_learning_from_the_checkpoint(learned):
    trained = [v for k, v in torch.load(learned[0])["model"].items() if is_adapter_key(k)]
    entries = sum(v.numel() for v in trained if v.is_floating_point())
    _, out, _ = lslora("doctor", "--checkpoint", learned[0], "--format", "json")
    (line,) = [line for line in json.loads(out)["lines"] if line["check"] == "adapters"]
    assert line["found"].startswith(f"{entries:,} trainable parameters, ")
    assert ": 4 languages, 31 linears, shared adapters of rank 16, " in line["found"]  # 3·5 + 2·8


def test_sides_found_are_accepted_by_the_next_run(corpus, learned, tmp_path):
    _, out, _ = lslora("sides", learned[0], "--format", "flags")
    run(
        "fairseq-train", *finetune_args(corpus, tmp_path, *out.split("\n")[:-1], "--max-epoch", "1")
    )
    assert not logits(tmp_path / "checkpoint_last.pt")
