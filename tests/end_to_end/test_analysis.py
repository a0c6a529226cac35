"""From a run with --pruning-scope layer to the flags of the next one, with the real commands."""

import json
from collections import Counter

import pytest
import torch
from console import adapters_in, finetune_args, lslora, run, with_option, without

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints


@pytest.fixture(scope="module")
def estimated(corpus, tmp_path_factory):
    """The checkpoint of a run with equal ranks and one threshold for each layer."""
    folder = tmp_path_factory.mktemp("estimated")
    args = with_option(finetune_args(corpus, folder), "--lora-rank", "4")
    run("fairseq-train", *args, "--pruning-scope", "layer", "--disable-validation")
    return folder / "checkpoint_last.pt"


def test_demand_is_what_the_masks_hold(estimated):
    _, out, err = lslora("demand", estimated, "--format", "json")
    report = json.loads(out)
    assert "WARNING" not in err and report["warnings"] == []
    assert (report["scope"], report["final_sparsity"]) == ("layer", 0.9)
    found = Counter()
    for cell in report["cells"]:
        key = f"{cell['stack']}.layers.{cell['layer']}.{cell['side']}_adapters"
        found[key, cell["language"]] += cell["kept"]
    adapters = adapters_in(torch.load(estimated)["model"])
    masks = {key: mask for key, (*_, mask) in adapters.items() if key[1] != "shared"}
    assert found == {key: int(mask.sum()) for key, mask in masks.items()}
    assert len({mask.sum().item() for mask in masks.values()}) > 4  # the languages competed
    for layer in {layer for layer, _ in masks}:
        ours = [mask for (other, _), mask in masks.items() if other == layer]
        left = sum(mask.sum().item() for mask in ours) / sum(mask.numel() for mask in ours)
        assert left == pytest.approx(0.1, abs=1e-3)
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_the_next_run_takes_what_was_suggested(corpus, estimated, tmp_path):
    suggest = ("suggest", estimated, "--budget", "150%")
    words = lslora(*suggest, "--format", "flags")[1].splitlines()
    report = json.loads(lslora(*suggest, "--format", "json")[1])
    # the count of the base is that of the doctor
    _, out, _ = lslora("doctor", "--checkpoint", estimated, "--format", "json")
    (adapters,) = [x for x in json.loads(out)["lines"] if x["check"] == "adapters"]
    assert f" of {report['base_parameters']:,}: 4 languages" in adapters["found"]
    args = without(finetune_args(corpus, tmp_path), "--lora-rank")
    args = with_option(args, "--max-epoch", "1")
    _, out, err = run("fairseq-train", *args, "--disable-validation", *words)
    (total,) = [line for line in (out + err).splitlines() if line.startswith("total ")]
    assert total.split()[-2] == f"{report['used']:,}"
    assert 0 < report["used"] <= report["budget"]
