"""``lslora suggest``: the rule, by hand."""

import contextlib
import csv
import io
import json
import shlex
from argparse import Namespace

import handmade
import pytest
import torch
import toy
from console import lslora
from test_demand import NEED, keep, measured

from lslora_fairseq.analysis import suggest
from lslora_fairseq.cli import build_parser
from lslora_fairseq.config import LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError

SQUARE = {
    "lora_rank": "4",
    "lora_shape": "square",
    "encoder_lora_layers": "1,3",
    "encoder_index_side": "source*2,target*2",
}
SHARED = {"lora_shared_rank": int, "lora_shared_alpha": float, "lora_embedding_rank": int}


def as_options(flags):
    return {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}


def pruned_model(folder, **options):
    """The path of a checkpoint of a toy model of which pruning left about half, at random."""
    model = toy.set_adapters(toy.build(**options))
    state = model.state_dict()
    for key in [key for key in state if key.endswith("_adapters.pruned")]:
        state[key] = (torch.rand(state[key].shape) > 0.5).to(torch.uint8)
    saved = Namespace(**{**toy.OPTIONS, **options, "pruning_scope": "layer"})
    return handmade.save(folder, {"model": state, "args": saved})


def suggested(path, *more):
    args = build_parser("suggest").parse_args(["suggest", path, *more, "--format", "json"])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert args.run(args) == 0
    return json.loads(output.getvalue())


@pytest.mark.parametrize("per", ["tier", "language"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        SQUARE,
        {"decoder_target_modules": "fc1", "decoder_index_side": "source,target"},
        {"lora_shared_rank": 3, "lora_shared_alpha": 6.0},
        {"lora_embedding_rank": 3},
    ],
)
def test_a_run_with_the_flags_trains_the_parameters_that_were_promised(tmp_path, options, per):
    report = suggested(pruned_model(tmp_path, **options), "--budget", "12000", "--per", per)
    flags = as_options(report["flags"])
    tiers = flags.pop("lora_tiers")
    assert tiers == toy.OPTIONS["lora_tiers"]
    shared = {name: kind(flags.pop(name)) for name, kind in SHARED.items() if name in flags}
    # 0 is said, too: new adapters would have others
    none = {"lora_shared_rank": 0, "lora_embedding_rank": 0}
    assert shared == {**none, **{name: options[name] for name in options if name in SHARED}}
    model = toy.build(**flags, **shared)
    assert sum(p.numel() for p in toy.adapters(model)) == report["used"] <= 12_000
    sides = {(site.stack, site.layer, site.side) for site in model.plan.sites}
    assert sides == {(s.stack, s.layer, s.side) for s in toy.build(**options).plan.sites}


def test_alpha_is_not_among_the_flags_and_that_is_said(tmp_path, caplog):
    report = suggested(pruned_model(tmp_path, lora_rank="4"), "--budget", "9000")
    assert not caplog.records
    path = pruned_model(tmp_path, lora_rank="4", lora_alpha="32")
    assert suggested(path, "--budget", "9000") == report
    assert caplog.messages == [
        f"{path} was trained with --lora-alpha 32, which is not among the flags: it belongs to "
        "training, like the learning rate, and scales adapters by alpha / rank, so that another "
        "rank may want another alpha"
    ]


# rank 1 of one language: (4 + 4) in a projection, (4 + 8) in fc1 and fc2
ENCODER, DECODER = 3 * (3 * 8 + 2 * 12), 2 * (6 * 8 + 2 * 12)
# 20 x 4 embeddings once, and 128 in each encoder layer, 192 in each decoder layer
BASE = 20 * 4 + 3 * 128 + 2 * 192


@pytest.mark.parametrize(
    "budget, ranks",
    [
        (30, [1, 1, 1]),
        (39, [1, 1, 1]),
        (40, [1, 1, 2]),  # .1/3 .2/3 .4/3
        (50, [1, 1, 3]),  # .1/3 .2/3 .4/5
        (60, [1, 2, 3]),  # .1/3 .2/3 .4/7
        (100, [1, 3, 6]),
        (170, [2, 5, 10]),
    ],
)
def test_ranks_in_proportion_to_demand(budget, ranks):
    assert suggest.apportion([0.1, 0.2, 0.4], [10, 10, 10], budget, 99) == ranks


def test_what_does_not_fit_ends_it():
    """The next one would be the second, which costs too much: the first gets nothing either."""
    assert suggest.apportion([0.1, 0.9], [10, 100], 209, 99) == [1, 1]
    assert suggest.apportion([0.1, 0.9], [10, 100], 210, 99) == [1, 2]


def test_among_equals_the_first_one():
    assert suggest.apportion([0.3, 0.3, 0.3], [1, 1, 1], 5, 99) == [2, 2, 1]


def test_no_rank_beyond_the_matrix_and_none_without_demand():
    assert suggest.apportion([0.9, 0.1, 0.0], [1, 1, 1], 1000, 4) == [4, 4, 1]


def test_ranks_are_in_the_order_of_demand():
    demands = [0.31, 0.02, 0.29, 0.11, 0.12, 0.0]
    for budget in range(60, 400, 7):
        ranks = suggest.apportion(demands, [10] * 6, budget, 99)
        assert sum(ranks) == budget // 10
        pairs = sorted(zip(demands, ranks))
        assert [rank for _, rank in pairs] == sorted(ranks)


def test_a_module_is_kept_from_half_the_share_of_its_stack_on(tmp_path):
    """A third of the encoder's 8 entries, of 16 in fc1, survives; decoder: 3/9 of 72 = 1/3."""

    def kept(site, _):
        few = {"self_attn.k_proj": 1, "self_attn.q_proj": 2, "fc1": 7 if site.layer else 6}
        return few.get(site.module, 3) if site.stack == "encoder" else 2 * (site.module == "fc1")

    found = {(m.stack, m.module): m for m in suggest.judge_modules(measured(tmp_path, kept))}
    encoder = (1 + 2 + 3 + 3) * 3 + 6 + 7 + 7
    assert found["encoder", "fc1"].average == pytest.approx(encoder / (3 * 48))
    assert found["encoder", "self_attn.k_proj"].share == 1 / 8
    assert [name for name, module in found.items() if not module.kept] == [
        ("encoder", "self_attn.k_proj"),
        *(("decoder", m) for m in handmade.MODULES["decoder"] if m != "fc1" and "out" not in m),
    ]


def test_exactly_half_is_kept(tmp_path):
    """Of 48 entries 12 survive, a quarter; of k_proj 1 in 8."""

    def kept(site, _):
        return {"self_attn.k_proj": 1, "fc1": 4, "fc2": 3}.get(site.module, 2)

    module = suggest.judge_modules(measured(tmp_path, kept, decoder_target_modules="none"))[1]
    assert (module.module, module.share, module.average) == ("self_attn.k_proj", 1 / 8, 1 / 4)
    assert module.kept


def test_a_stack_that_is_not_adapted_or_all_pruned_gets_none(tmp_path):
    for options in ({"decoder_target_modules": "none"}, {"pruning_scope": "language"}):
        found = measured(
            tmp_path, lambda s, code: keep(s, code) * (s.stack == "encoder"), **options
        )
        modules, groups = suggest.suggest(found, 10_000, "tier")
        flags = suggest.Suggestion(modules, groups, 10_000, BASE, {}).flags
        assert flags["--decoder-target-modules"] == "none"
        assert flags["--encoder-target-modules"].startswith("self_attn.q_proj,")


def test_tiers_share_a_rank_and_their_languages_pay(tmp_path):
    """Demands high 21.4 %, low 56.9 %; a step of high costs two languages."""
    cost = ENCODER + DECODER
    modules, groups = suggest.suggest(measured(tmp_path), 8 * cost, "tier")
    assert all(module.kept for module in modules)
    high, low = groups
    assert (high.name, high.languages, high.rank, high.parameters) == ("high", 2, 2, 4 * cost)
    assert (low.name, low.languages, low.rank, low.parameters) == ("low", 1, 4, 4 * cost)
    assert high.demand == pytest.approx(1.5 * 41 / 288)
    assert low.demand == pytest.approx(4 * 41 / 288)


def test_each_language_its_own_rank(tmp_path):
    _, groups = suggest.suggest(measured(tmp_path), 7 * (ENCODER + DECODER), "language")
    assert [(g.name, g.languages, g.rank) for g in groups] == [
        ("de", 1, 1),
        ("en", 1, 2),
        ("oc", 1, 4),
    ]


def test_shared_adapters_are_paid_first(tmp_path):
    def kept(site, code):
        return 2 if code == "shared" else 0 if "encoder_attn" in site.module else keep(site, code)

    options = {"lora_shared_rank": 2, "lora_embedding_rank": 3, "pruning_final_sparsity": 0.1}
    path = handmade.save(tmp_path, handmade.make(kept, **options))
    cost = ENCODER + DECODER - 2 * 24  # without cross-attention, which is dropped
    words = 3 * (4 + 20)
    least = str((3 + 2) * cost + words)
    report = json.loads(lslora("suggest", path, "--budget", least, "--format", "json")[1])
    assert [group["rank"] for group in report["groups"]] == [1, 1]
    assert (report["shared"], report["embeddings"]) == (2 * cost, words)
    assert str(report["used"]) == least
    assert report["flags"]["--lora-shared-rank"] == "2"
    assert report["flags"]["--lora-embedding-rank"] == "3"
    assert "--lora-shared-alpha" not in report["flags"]
    table = lslora("suggest", path, "--budget", least)[1].splitlines()
    (row,) = [line.split() for line in table if line.startswith("(shared)")]
    assert row == ["(shared)", "all", "-", "2", f"{2 * cost:,}"]
    (row,) = [line.split() for line in table if line.startswith("(embeddings)")]
    assert row == ["(embeddings)", "all", "-", "3", str(words)]
    told = f"beside the shared adapters' {2 * cost + words:,}: give at"
    with pytest.raises(ConfigError, match=told):
        suggest.suggest(measured(tmp_path, kept, **options), int(least) - 1, "tier")


def test_dropped_modules_cost_nothing_and_take_no_part_in_demand(tmp_path):
    def kept(site, code):
        return 0 if "encoder_attn" in site.module else keep(site, code)

    found = measured(tmp_path, kept)
    modules, groups = suggest.suggest(found, 100_000, "tier")
    assert {m.module for m in modules if not m.kept} == {f"encoder_attn.{p}_proj" for p in "qkv"}
    for group in groups:
        assert group.parameters == group.rank * group.languages * (ENCODER + DECODER - 2 * 24)
    # the matrix of a projection is 4 x 4
    assert [group.rank for group in groups] == [4, 4]
    assert groups[1].demand == pytest.approx(4 * (3 * 7 + 2 * 7) / (3 * 48 + 2 * 48))


def test_a_budget_too_small_for_rank_1_names_the_smallest(tmp_path):
    least = 3 * (ENCODER + DECODER)
    path = handmade.save(tmp_path, handmade.make(keep))
    status, out, err = lslora("suggest", path, "--budget", least - 1, check=False)
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"lslora: error: --budget: {least - 1} parameters are too few for rank 1 everywhere: give "
        f"at least {least}, or adapt fewer languages or layers"
    )
    _, groups = suggest.suggest(measured(tmp_path), least, "tier")
    assert [group.rank for group in groups] == [1, 1]


@pytest.mark.parametrize(
    "text, budget",
    [
        ("393000", 393_000),
        ("393,000", 393_000),
        ("1.5M", 1_500_000),
        ("20k", 20_000),
        ("2%", 55_980),
        (".5%", 13_995),
    ],
)
def test_budgets(text, budget):
    assert suggest.parse_budget(text)(2_799_040) == budget


@pytest.mark.parametrize("text", ["", "2x", "-3", "1e6", "%", "1.5.2M", "2 %"])
def test_a_budget_that_cannot_be_read(text):
    with pytest.raises(ConfigError) as caught:
        suggest.parse_budget(text)
    assert str(caught.value) == (
        f"--budget: cannot read {text!r}: write a number of parameters such as 393000 or 1.5M, or "
        "a share of the base model such as 2%"
    )


def test_after_weight_learning_the_sides_come_first(tmp_path):
    path = handmade.save(tmp_path, handmade.make(keep, lora_weight_learning=True))
    status, out, err = lslora("suggest", path, "--budget", "1M", check=False)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"lslora: error: {path} was trained with --lora-weight-learning, with adapters for both "
        "sides: take the sides from 'lslora sides', and train with them and --pruning-scope layer"
    )


def test_the_formats_hold_the_same_and_the_flags_are_options(tmp_path):
    def kept(site, code):
        return 0 if "encoder_attn" in site.module else keep(site, code)

    path = handmade.save(tmp_path, handmade.make(kept, pruning_scope="language"))
    args = ("suggest", path, "--budget", "250%", "--per", "language")
    _, table, err = lslora(*args)
    report = json.loads(lslora(*args, "--format", "json")[1])
    rows = list(csv.DictReader(io.StringIO(lslora(*args, "--format", "csv")[1])))
    words = lslora(*args, "--format", "flags")[1].splitlines()
    assert "WARNING: --pruning-scope language" in err and "WARNING" not in table
    assert words == shlex.split(table.splitlines()[-1])
    assert dict(zip(words[::2], words[1::2])) == report["flags"]
    flags = {name: value for name, value in report["flags"].items() if name != "--lora-rank"}
    groups = [{k: str(v) for k, v in group.items()} for group in report["groups"]]
    assert rows == [{**group, **flags} for group in groups]
    assert (report["base_parameters"], report["budget"]) == (BASE, 5 * BASE // 2)
    lines = table.splitlines()
    assert "decoder encoder_attn.q_proj      0.0%  dropped, below half of 22.7%" in lines
    assert "decoder fc1                     43.8%  kept, at least half of 22.7%" in lines
    used = report["used"]
    assert used == sum(int(row["parameters"]) for row in rows) <= report["budget"]
    assert f"{used:,} of 2,120 parameters, {used / BASE:.2%} of the base model's 848" in lines
    options = as_options(report["flags"])
    assert [options.pop(name) for name in ("lora_shared_rank", "lora_embedding_rank")] == ["0"] * 2
    config = LSLoConfig.from_namespace(Namespace(**options))
    sizes = {"fc1": (4, 8), "fc2": (8, 4)}
    dims = {module: sizes.get(module, (4, 4)) for module in handmade.MODULES["decoder"]}
    plan = resolve(config, handmade.LAYERS, dict.fromkeys(handmade.LAYERS, dims))
    assert plan.ranks == tuple(int(row["rank"]) for row in rows)
    assert [row["name"] for row in rows] == list(NEED)
    assert sum(s.entries(rank) for s in plan.sites for rank in plan.ranks) == used
