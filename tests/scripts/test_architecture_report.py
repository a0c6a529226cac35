"""The table of the architecture recipe, from folders of `lslora evaluate` and two models."""

import architecture_report
import pytest
from quickstart_report import Scores
from test_quickstart_report import by_name, right, write_decoded, wrong_half, wrong_other_half
from toy import build


@pytest.fixture
def scores(tmp_path):
    write_decoded(
        tmp_path / "decoded",
        base=dict(de=wrong_half, fr=right, ja=right),
        finetuned=dict(de=wrong_half, fr=wrong_half, ja=wrong_half),
        learned=dict(de=right, fr=wrong_half, ja=wrong_other_half),
    )
    return Scores(tmp_path / "decoded", ["base", "finetuned", "learned"])


def test_table(scores):
    hand_set = build()  # high de (rank 1) en (2), low fr (3) ja (5)
    learned = build(lora_rank="high=4,low=2", encoder_target_modules="fc1,fc2")
    rows = by_name(architecture_report.table(hand_set, learned, scores))
    found = {name: {k: cell for k, (cell,) in row.items()} for name, row in rows.items()}
    assert list(found) == ["high", "low", "all"]
    high, low = found["high"], found["low"]
    assert (high["languages"], high["sentences"], low["sentences"]) == ("de en", "80", "160")
    assert high["base"] == high["hand-set"] != high["learned"] == "100.0"
    assert float(high["gain"]) == pytest.approx(100 - float(high["hand-set"]))
    assert high["p"] == "< 0.001"
    assert low["base"] == "100.0" and abs(float(low["gain"])) < 1
    assert float(low["p"]) > 0.05
    # d = 16, ffn = 32: an attention projection has 32 entries per rank, fc1 and fc2 48 each;
    # 4 encoder layers, 2 decoder layers with twice the attention
    encoder, decoder = 4 * (3 * 32 + 2 * 48), 2 * (6 * 32 + 2 * 48)
    assert high["trainable hand-set"] == f"{3 * (encoder + decoder):,}"
    assert low["trainable learned"] == f"{4 * (4 * 2 * 48 + decoder):,}"
    assert found["all"]["trainable hand-set"] == f"{11 * (encoder + decoder):,}"


def test_options_stand_one_over_the_other():
    hand_set = {name: f"hand {name}" for name in architecture_report.OPTIONS}
    learned = {name: f"learned {name}" for name in architecture_report.OPTIONS}
    lines = list(architecture_report.options(hand_set, learned))
    assert lines[:6] == [
        "--lora-rank",
        "    hand-set  hand lora_rank",
        "    learned   learned lora_rank",
        "--encoder-index-side",
        "    hand-set  hand encoder_index_side",
        "    learned   learned encoder_index_side",
    ]
    assert len(lines) == 15
