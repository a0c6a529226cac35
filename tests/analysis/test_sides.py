"""``lslora sides`` on hand-made weights."""

import csv
import io
import json
import shlex
from argparse import Namespace

import handmade
import pytest
import torch
from console import lslora

from lslora_fairseq.analysis import sides, trained
from lslora_fairseq.config import LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError

LOGITS = {
    ("encoder", 0): (1.0, 0.0),
    ("encoder", 1): (0.15, 0.0),
    ("encoder", 2): (0.0, 0.05),
    ("decoder", 0): (0.0, 0.0),
    ("decoder", 1): (-1.0, 2.0),
}


def learned(folder, logits=LOGITS, **options):
    content = handmade.make(logits=logits, lora_weight_learning=True, **options)
    return sides.learned_sides(trained.read(handmade.save(folder, content)))


def brief(layers):
    return [(x.stack, x.layer, x.side, x.choice) for x in layers]


def test_the_larger_weight_wins_and_the_margin_says_how_clearly(tmp_path):
    layers = learned(tmp_path)
    assert brief(layers) == [
        ("encoder", 0, "source", "clear"),
        ("encoder", 1, "source", "slight"),
        ("encoder", 2, "target", "open"),
        ("decoder", 0, "target", "open"),
        ("decoder", 1, "target", "clear"),
    ]
    e = 2.718281828459045
    assert layers[0].p_source == pytest.approx(e / (e + 1), rel=1e-9)
    assert layers[0].p_target == pytest.approx(1 / (e + 1), rel=1e-9)
    assert layers[0].margin == pytest.approx((e - 1) / (e + 1), rel=1e-9)
    assert sides.side_flags(layers) == {
        "--encoder-index-side": "source*2,target*1",
        "--decoder-index-side": "target*2",
    }


def test_shared_adapters_change_nothing(tmp_path):
    assert learned(tmp_path, lora_shared_rank=1) == learned(tmp_path)


def test_a_tie_goes_to_the_default_of_the_stack(tmp_path):
    layers = learned(tmp_path, logits={("encoder", 1): (2.0, 2.0)})
    assert {(x.stack, x.side, x.margin) for x in layers} == {
        ("encoder", "source", 0.0),
        ("decoder", "target", 0.0),
    }


@pytest.mark.parametrize(
    "adapted, flag",
    [
        ("0,2", "source*2,target*1"),  # layer 1 as layer 0
        ("1-2", "source*2,target*1"),  # layer 0 as the one above
        ("2", "target*3"),
    ],
)
def test_a_layer_without_adapters_takes_the_side_of_its_neighbour(tmp_path, adapted, flag):
    layers = learned(tmp_path, encoder_lora_layers=adapted)
    assert sides.side_flags(layers)["--encoder-index-side"] == flag
    without = [x for x in layers if x.choice == "none"]
    assert len(without) == 5 - 2 - len(trained_layers(adapted))
    assert all(x.p_source is x.p_target is x.margin is None for x in without)


def trained_layers(text):
    return {"0,2": (0, 2), "1-2": (1, 2), "2": (2,)}[text]


def test_of_the_layers_below_the_nearest_one_counts(tmp_path):
    logits = {("encoder", 0): (1.0, 0.0), ("encoder", 1): (0.0, 1.0)}
    layers = learned(tmp_path, logits, encoder_lora_layers="0-1")
    assert sides.side_flags(layers)["--encoder-index-side"] == "source*1,target*2"


def test_a_stack_without_adapters_gets_no_flag(tmp_path):
    layers = learned(tmp_path, decoder_target_modules="none")
    assert sides.side_flags(layers) == {"--encoder-index-side": "source*2,target*1"}


def test_the_flags_are_those_of_the_next_run(tmp_path):
    """Each format gives the same flags, which the options' own reader takes."""
    path = handmade.save(
        tmp_path,
        handmade.make(logits=LOGITS, lora_weight_learning=True, encoder_lora_layers="1-2"),
    )
    _, table, _ = lslora("sides", path)
    _, flags, _ = lslora("sides", path, "--format", "flags")
    expected = ["--encoder-index-side", "source*2,target*1", "--decoder-index-side", "target*2"]
    assert flags.splitlines() == shlex.split(table.splitlines()[-1]) == expected
    assert table.splitlines()[:4] == [
        "layer      p_source  p_target  side    margin  choice",
        "encoder 0         -         -  source       -  no adapters",
        "encoder 1     0.537     0.463  source   0.075  slight",
        "encoder 2     0.488     0.512  target   0.025  open",
    ]
    names = [word.removeprefix("--").replace("-", "_") for word in expected[::2]]
    config = LSLoConfig.from_namespace(
        Namespace(lora_tiers="high=de", lora_rank="1", **dict(zip(names, expected[1::2])))
    )
    dims = dict.fromkeys(("encoder", "decoder"), dict.fromkeys(handmade.MODULES["decoder"], (4, 4)))
    plan = resolve(config, handmade.LAYERS, dims)
    assert {(s.stack, s.layer): s.side for s in plan.sites} == {
        ("encoder", 0): "source",
        ("encoder", 1): "source",
        ("encoder", 2): "target",
        ("decoder", 0): "target",
        ("decoder", 1): "target",
    }


def test_json_and_csv_hold_the_same(tmp_path):
    content = handmade.make(logits=LOGITS, lora_weight_learning=True, encoder_lora_layers="1-2")
    path = handmade.save(tmp_path, content)
    report = json.loads(lslora("sides", path, "--format", "json")[1])
    rows = list(csv.DictReader(io.StringIO(lslora("sides", path, "--format", "csv")[1])))
    assert report["flags"]["--decoder-index-side"] == "target*2"
    assert len(rows) == len(report["layers"]) == 5
    for row, layer in zip(rows, report["layers"]):
        assert row == {k: "" if v is None else str(v) for k, v in layer.items()}


@pytest.mark.parametrize("options", [{}, {"lora_rank": "0", "lora_shared_rank": 1}])
def test_without_weight_learning_the_remedy_is_told(tmp_path, options):
    path = handmade.save(tmp_path, handmade.make(**options))
    status, out, err = lslora("sides", path, check=False)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"lslora: error: {path} was not trained with --lora-weight-learning: train with it (and "
        "without --encoder-index-side and --decoder-index-side), then name that checkpoint"
    )
    assert "Traceback" not in err


def test_weights_of_a_run_that_diverged(tmp_path):
    with pytest.raises(
        ConfigError, match=r"encoder layer 1 are \[\[nan, 0.0\]\]: the run diverged"
    ):
        learned(tmp_path, logits={("encoder", 1): (float("nan"), 0.0)})


def test_a_softmax_far_from_even_is_no_overflow(tmp_path):
    layers = learned(tmp_path, logits={("encoder", 0): (-1000.0, 1000.0)})
    assert (layers[0].side, layers[0].p_target, layers[0].margin) == ("target", 1.0, 1.0)


def test_weights_saved_in_half_precision(tmp_path):
    content = handmade.make(logits=LOGITS, lora_weight_learning=True)
    for key, weight in content["model"].items():
        if weight.is_floating_point():
            content["model"][key] = weight.half()
    path = handmade.save(tmp_path, content)
    assert sides.learned_sides(trained.read(path))[0].p_source == pytest.approx(
        torch.tensor([1.0, 0.0]).softmax(0)[0].item()
    )
