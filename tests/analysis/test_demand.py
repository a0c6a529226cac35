"""``lslora demand`` on masks that are counted by hand."""

import csv
import io
import json
from fractions import Fraction

import handmade
import pytest
from console import lslora

from lslora_fairseq.analysis import demand, survivors, trained
from lslora_fairseq.errors import ConfigError

NEED = {"de": 1, "en": 2, "oc": 4}
# entries of B of one language at rank 2: 8 in a projection and fc2, 16 in fc1
LAYER = {"encoder": 48, "decoder": 72}


def keep(site, code):
    """Of each site 1, 2 or 4 entries survive; of fc1 three times as many."""
    return NEED[code] * (3 if site.module == "fc1" else 1)


def measured(folder, kept=keep, **options):
    content = handmade.make(kept, **options)
    return survivors.measure(trained.read(handmade.save(folder, content)))


def exactly(**shares):
    return {name: pytest.approx(float(share), rel=1e-12) for name, share in shares.items()}


def test_shares_by_language_and_tier(tmp_path):
    rows = demand.by_language(measured(tmp_path))
    of = {(row["tier"], row["language"]): row for row in rows}
    assert list(of) == [
        ("high", None), ("high", "de"), ("high", "en"), ("low", None), ("low", "oc"),
    ]  # fmt: skip
    for code, tier in (("de", "high"), ("en", "high"), ("oc", "low")):
        n = NEED[code]
        shares = exactly(
            encoder=Fraction(7 * n, 48),
            decoder=Fraction(10 * n, 72),
            all=Fraction(3 * 7 * n + 2 * 10 * n, 3 * 48 + 2 * 72),
        )
        assert of[tier, code] == {"language": code, "tier": tier, **shares}
    # a tier is the mean of its languages
    assert of["high", None]["encoder"] == pytest.approx(1.5 * 7 / 48)
    assert of["low", None]["decoder"] == pytest.approx(4 * 10 / 72)


def test_shares_by_layer_and_module(tmp_path):
    found = measured(tmp_path, lambda site, code: keep(site, code) * (site.layer < 2))
    layers = demand.by_layer(found)
    assert [(row["stack"], row["layer"]) for row in layers] == [
        ("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 0), ("decoder", 1),
    ]  # fmt: skip
    assert layers[1]["tiers"] == exactly(high=1.5 * 7 / 48, low=4 * 7 / 48)
    assert layers[1]["all"] == pytest.approx(7 / 3 * 7 / 48)
    assert layers[2] == {"stack": "encoder", "layer": 2, "tiers": {"high": 0, "low": 0}, "all": 0}
    modules = {(row["stack"], row["module"]): row for row in demand.by_module(found)}
    assert len(modules) == 5 + 8
    assert modules["encoder", "fc1"]["tiers"] == exactly(high=2 / 3 * 4.5 / 16, low=2 / 3 * 12 / 16)
    assert modules["decoder", "encoder_attn.k_proj"]["tiers"] == exactly(high=1.5 / 8, low=4 / 8)


def test_cells_and_the_share_removed(tmp_path):
    found = measured(tmp_path)
    cells = demand.cells(found)
    assert len(cells) == 3 * (3 * 5 + 2 * 8)
    assert ("en", "high", "encoder", 0, "fc1", "source", 16, 6, 6 / 16) in cells
    assert ("oc", "low", "encoder", 2, "fc2", "target", 8, 4, 4 / 8) in cells
    assert ("de", "high", "decoder", 1, "encoder_attn.q_proj", "target", 8, 1, 1 / 8) in cells
    assert found.sparsity == pytest.approx(1 - 7 * (3 * 7 + 2 * 10) / (3 * (3 * 48 + 2 * 72)))


def test_ranks_that_differ_are_told_and_counted_each_by_its_own(tmp_path):
    found = measured(tmp_path, lora_rank="high=1,oc=2", pruning_final_sparsity=0.1)
    assert float(found.shares(found.sites(stack="encoder", layer=0))[0]) == 7 / 24
    assert float(found.shares(found.sites(stack="encoder", layer=0))[2]) == 28 / 48
    assert found.warnings() == [
        "ranks differ: the shares of languages cannot be compared, since each is one of another "
        "size; train with the same --lora-rank for all"
    ]


def test_scope_language_is_told(tmp_path):
    found = measured(tmp_path, pruning_scope="language", pruning_final_sparsity=0.1)
    assert found.warnings() == [
        "--pruning-scope language leaves the same share of every language: only layers and "
        "modules can be compared; train with --pruning-scope layer"
    ]


def test_a_schedule_that_is_not_at_its_end_is_told(tmp_path):
    found = measured(tmp_path, pruning_final_sparsity=0.9)
    assert found.warnings() == [
        "pruning has removed 66.8% and was to remove 90.0% in the end: take the run's last "
        "checkpoint"
    ]
    assert measured(tmp_path, pruning_final_sparsity=0.67).warnings() == []


def test_a_language_of_which_nothing_is_left_is_told(tmp_path):
    """In layers 0 and 1 of the encoder the source indexes, in all others the target."""

    def kept(site, code):
        return 0 if code == "en" and site.side == "source" else keep(site, code)

    found = measured(tmp_path, kept, pruning_final_sparsity=0.1)
    assert found.untrained == {"source": ["en"]}
    assert found.warnings() == [
        "nothing is left of en where the source language indexes, as of a language that is never "
        "the source: that does not show that it needs nothing, and the others keep the more for "
        "it; train with directions from and into each, or leave it out of --lora-tiers"
    ]


def test_a_language_that_was_never_updated_took_no_part(tmp_path):
    """Its B is zero and nothing of it pruned: en as a source, which indexes two layers."""

    def kept(site, code):
        return 99 if code == "en" and site.side == "source" else keep(site, code)

    content = handmade.make(kept, pruning_final_sparsity=0.66)
    for key, weight in content["model"].items():
        if key.endswith("source_adapters.lora_en"):
            weight.zero_()
    found = survivors.measure(trained.read(handmade.save(tmp_path, content)))
    assert found.untouched == found.untrained == {"source": ["en"]}
    layers = [found.shares(found.sites(stack="encoder", layer=n)).tolist() for n in range(3)]
    assert [shares[1] for shares in layers] == [0, 0, 14 / 48]
    entries = 3 * (3 * 48 + 2 * 72) - 2 * 48
    assert found.sparsity == pytest.approx(1 - (7 * (3 * 5 + 2) + 2 * 10 * 7) / entries)
    assert found.warnings() == [
        "never updated where the source language indexes: en, as of a language that is never the "
        "source: it took no part in pruning there, and the 0 shown does not mean that it needs "
        "nothing; train with directions from and into each, or leave it out of --lora-tiers"
    ]


def test_both_sides_of_weight_learning_are_counted(tmp_path):
    found = measured(tmp_path, lora_weight_learning=True)
    assert len(demand.cells(found)) == 2 * 3 * (3 * 5 + 2 * 8)
    assert float(found.shares(found.sites(stack="encoder"))[1]) == 14 / 48


def test_a_stack_without_adapters_has_no_share(tmp_path):
    found = measured(tmp_path, decoder_target_modules="none")
    path = tmp_path / "checkpoint_last.pt"
    report = json.loads(lslora("demand", path, "--format", "json")[1])
    assert report["languages"][1]["decoder"] is None
    assert report["languages"][1]["encoder"] == 7 / 48
    assert demand.FORMATS["table"](found).splitlines()[5].split() == ["de", "14.6%", "-", "14.6%"]


def kept_and_shared(site, code):
    """Of each shared site 5 entries survive, as after another version's pruning."""
    return 5 if code == "shared" else keep(site, code)


@pytest.mark.parametrize("shared", [{"lora_shared_rank": 1}, {"lora_embedding_rank": 1}])
def test_what_all_languages_share_changes_nothing(tmp_path, shared):
    plain = measured(tmp_path, pruning_final_sparsity=0.1)
    found = measured(tmp_path, kept_and_shared, pruning_final_sparsity=0.1, **shared)
    assert found.warnings() == plain.warnings() == []
    for text in demand.FORMATS.values():
        assert text(found) == text(plain)


def test_shared_adapters_alone_tell_nothing_of_a_language(tmp_path):
    content = handmade.make(kept_and_shared, lora_rank="0", lora_shared_rank=1)
    path = handmade.save(tmp_path, content)
    for command in (["demand", path], ["suggest", path, "--budget", "1M"]):
        status, out, err = lslora(*command, check=False)
        assert (status, out) == (1, "") and "Traceback" not in err
        assert err.splitlines()[-1] == (
            f"lslora: error: {path} has shared adapters alone (--lora-rank 0), which tell nothing "
            "of a language: train with the same --lora-rank for all languages"
        )


def test_the_formats_hold_the_same(tmp_path):
    path = handmade.save(tmp_path, handmade.make(keep, pruning_final_sparsity=0.1))
    _, table, _ = lslora("demand", path)
    report = json.loads(lslora("demand", path, "--format", "json")[1])
    rows = list(csv.DictReader(io.StringIO(lslora("demand", path, "--format", "csv")[1])))
    assert rows == [{k: str(v) for k, v in cell.items()} for cell in report["cells"]]
    assert report["ranks"] == {"de": 2, "en": 2, "oc": 2}
    assert report["tiers"] == {"high": ["de", "en"], "low": ["oc"]}
    assert (report["scope"], report["final_sparsity"], report["warnings"]) == ("layer", 0.1, [])
    lines = table.splitlines()
    assert lines[:10] == [
        "demand: share of a language's entries of B that survive pruning",
        "3 languages, rank 2, 66.8% of all entries removed, scope layer",
        "",
        "language  encoder  decoder    all",
        "high        21.9%    20.8%  21.4%",
        "  de        14.6%    13.9%  14.2%",
        "  en        29.2%    27.8%  28.5%",
        "low         58.3%    55.6%  56.9%",
        "  oc        58.3%    55.6%  56.9%",
        "",
    ]
    assert "encoder 0  21.9%  58.3%  34.0%" in lines
    assert "encoder fc1                  28.1%  75.0%  43.8%" in lines
    assert "decoder encoder_attn.v_proj  18.8%  50.0%  29.2%" in lines


def test_warnings_go_to_stderr(tmp_path):
    path = handmade.save(tmp_path, handmade.make(keep, pruning_scope="language"))
    status, out, err = lslora("demand", path, "--format", "csv")
    assert "WARNING: --pruning-scope language leaves the same share" in err
    assert "WARNING" not in out


@pytest.mark.parametrize(
    "kept, found", [(None, "is not pruned"), (lambda *_: 0, "has lost every entry of B")]
)
def test_without_pruning_the_remedy_is_told(tmp_path, kept, found):
    with pytest.raises(ConfigError) as caught:
        measured(tmp_path, kept)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoint_last.pt {found}, and demand is what pruning leaves: train with "
        "the same --lora-rank for all, --optimizer pruned_adam, --pruning-scope layer and "
        "--pruning-final-sparsity 0.9, until the schedule ends"
    )


def test_an_unpruned_checkpoint_on_the_command_line(tmp_path):
    path = handmade.save(tmp_path, handmade.make())
    status, out, err = lslora("demand", path, check=False)
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"lslora: error: {path} is not pruned, and demand is")
