"""The options: defaults, validation against a model, the table, the pruning schedule."""

import re
from argparse import ArgumentParser, Namespace

import pytest

from lslora_fairseq.config import LORA_FIELDS, LSLoConfig, PruningConfig, resolve
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.plan import MODULES
from lslora_fairseq.pruning.schedule import Schedule

D, FFN = 16, 64
TIERS = "high=en,de;low=fr"


def dims():
    shapes = {"fc1": (D, FFN), "fc2": (FFN, D)}
    stacks = {s: {m: shapes.get(m, (D, D)) for m in MODULES[s]} for s in ("encoder", "decoder")}
    return {**stacks, "embeddings": (D, 100)}


def resolved(encoder=4, decoder=2, **options):
    """(config, plan) of a model with so many layers."""
    config = LSLoConfig(**{"lora_tiers": TIERS, **options})
    return config, resolve(config, {"encoder": encoder, "decoder": decoder}, dims())


def test_fields_and_defaults():
    config = LSLoConfig()
    assert {name: getattr(config, name) for name in LORA_FIELDS} == {
        "lora_tiers": None,
        "lora_rank": "4",
        "lora_alpha": None,
        "lora_shared_rank": 0,
        "lora_shared_alpha": None,
        "lora_embedding_rank": 0,
        "lora_train_languages": None,
        "lora_train_tokens": None,
        "lora_init_from": None,
        "lora_dropout": 0.0,
        "encoder_target_modules": "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,fc1,fc2",
        "decoder_target_modules": "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,"
        "encoder_attn.q_proj,encoder_attn.k_proj,encoder_attn.v_proj,fc1,fc2",
        "encoder_lora_layers": None,
        "decoder_lora_layers": None,
        "encoder_index_side": None,
        "decoder_index_side": None,
        "lora_weight_learning": False,
        "lora_shape": "full",
    }


def test_defaults_of_a_12_layer_model_are_the_authors_9_and_3():
    config, plan = resolved(encoder=12, decoder=12)
    assert config.encoder_index_side == "source*9,target*3"
    assert config.decoder_index_side == "target"
    assert len(plan.sites) == 12 * 5 + 12 * 8
    assert plan.ranks == plan.alphas == (4, 4, 4)
    assert plan.dropout == 0.0
    assert {s.side for s in plan.sites if s.stack == "encoder" and s.layer < 9} == {"source"}
    assert {s.side for s in plan.sites if s.stack == "decoder" or s.layer >= 9} == {"target"}


def test_the_config_is_left_in_a_form_that_needs_no_file(tmp_path):
    path = tmp_path / "tiers.tsv"
    path.write_text("\ufeff# code\ttier\nfr\tlow\nen\thigh\nde\thigh\n", encoding="utf-8")
    config, plan = resolved(lora_tiers=str(path), lora_rank="high=2,low=4,de=1")
    assert config.lora_tiers == "low=fr;high=de,en"
    assert config.lora_rank == "high=2,low=4,de=1"
    assert config.encoder_index_side == "source*3,target*1"
    path.unlink()
    assert resolve(config, {"encoder": 4, "decoder": 2}, dims()).ranks == plan.ranks == (1, 2, 4)


def test_alphas_follow_tiers_and_languages():
    _, plan = resolved(lora_rank="high=2,low=4", lora_alpha="high=1,low=0.5,en=3")
    assert plan.languages.codes == ("de", "en", "fr")
    assert plan.ranks == (2, 2, 4)
    assert plan.alphas == (1.0, 3.0, 0.5)


def test_sites_follow_layers_modules_sides_and_shape():
    _, plan = resolved(
        encoder_lora_layers="1,3",
        encoder_target_modules="fc2",
        encoder_index_side="source*2,target*2",
        decoder_target_modules="none",
        lora_shape="square",
        lora_dropout=0.1,
    )
    assert [(s.name, s.side, s.in_features, s.out_features) for s in plan.sites] == [
        ("encoder.layers.1.fc2", "source", D, D),
        ("encoder.layers.3.fc2", "target", D, D),
    ]
    assert plan.dropout == 0.1
    assert plan.needs("source") and plan.needs("target")


def test_only_the_sides_of_adapted_layers_are_needed():
    _, plan = resolved(encoder_lora_layers="0-2", decoder_target_modules="none")
    assert plan.needs("source") and not plan.needs("target")
    _, plan = resolved(encoder_target_modules="none")
    assert plan.needs("target") and not plan.needs("source")
    _, plan = resolved(encoder_index_side="source", decoder_index_side="source")
    assert plan.needs("source") and not plan.needs("target")


def test_weight_learning_has_an_adapter_of_either_side_at_every_site():
    config, plan = resolved(lora_weight_learning=True)
    assert config.encoder_index_side is config.decoder_index_side is None
    sites = [(site.name, site.side) for site in plan.sites]
    _, given = resolved()
    assert sites == [(site.name, side) for site in given.sites for side in ("source", "target")]
    assert plan.weight_learning and not given.weight_learning


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_tiers": None}, "--lora-tiers is missing: list the languages by tier, such as"),
        ({"lora_tiers": ""}, "--lora-tiers is missing"),
        ({"lora_shape": "round"}, "--lora-shape round must be full or square"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1.0 must lie in [0, 1)"),
        ({"lora_dropout": -0.1}, "--lora-dropout -0.1 must lie in [0, 1)"),
        ({"lora_dropout": float("nan")}, "--lora-dropout nan must lie in [0, 1)"),
        ({"lora_rank": "high=2,low=4,ko=8"}, "--lora-rank: ko is neither a tier"),
        ({"lora_rank": "high=2"}, "--lora-rank gives no value for fr"),
        (
            {"lora_rank": "0"},
            "--lora-rank: rank 0 of de must lie between 1 and 16, the smaller side of "
            "encoder.layers.0.self_attn.q_proj; 0 for every language is plain LoRA, and needs "
            "--lora-shared-rank",
        ),
        (
            {"lora_rank": "high=2,low=0", "lora_shared_rank": 4},
            "--lora-rank: rank 0 of fr must lie between 1 and 16, the smaller side of "
            "encoder.layers.0.self_attn.q_proj; 0 for every language is plain LoRA",
        ),
        (
            {"lora_shared_rank": -1},
            "--lora-shared-rank: rank -1 of all languages must lie between 1 and 16, the smaller",
        ),
        ({"lora_shared_rank": 17}, "--lora-shared-rank: rank 17 of all languages must lie between"),
        (
            {"lora_shared_rank": 2, "lora_shared_alpha": 0.0},
            "--lora-shared-alpha: 0.0 of all languages must be positive; without the option",
        ),
        (
            {"lora_shared_alpha": 2.0},
            "--lora-shared-alpha scales the shared adapters, and there are none: add "
            "--lora-shared-rank, or leave it out",
        ),
        (
            {"lora_train_languages": "oc,en,wo"},
            "--lora-train-languages names oc, wo, and not languages of --lora-tiers: choose",
        ),
        (
            {"lora_train_languages": " ,"},
            "--lora-train-languages names ' ,', and not languages of --lora-tiers: choose",
        ),
        (
            {"lora_rank": "0", "lora_shared_rank": 2, "lora_weight_learning": True},
            "--lora-weight-learning weighs adapters of languages, and with --lora-rank 0 there are "
            "none: leave it out, or give --lora-rank",
        ),
        (
            {"lora_rank": "0", "lora_shared_rank": 2, "lora_train_languages": "en"},
            "--lora-train-languages names adapters of languages to train, and with --lora-rank 0",
        ),
        (
            {"lora_rank": "0", "lora_shared_rank": 2, "lora_alpha": "4"},
            "--lora-alpha scales adapters of languages, and with --lora-rank 0 there are none: "
            "leave it out, or give --lora-shared-alpha, or give --lora-rank",
        ),
        (
            {"lora_rank": "0", "lora_embedding_rank": 2, "lora_weight_learning": True},
            "--lora-weight-learning weighs adapters of languages, and with --lora-rank 0 there",
        ),
        (
            {"lora_embedding_rank": 17},
            "--lora-embedding-rank: rank 17 of the embeddings must lie between 1 and 16, the "
            "smaller side of decoder.output_projection",
        ),
        ({"lora_embedding_rank": -1}, "--lora-embedding-rank: rank -1 of the embeddings must lie"),
        ({"lora_rank": "high=2,low=17"}, "--lora-rank: rank 17 of fr must lie between 1 and 16"),
        ({"lora_alpha": "0"}, "--lora-alpha: 0.0 of de must be positive; without the option"),
        ({"lora_alpha": "high=1,low=-2"}, "--lora-alpha: -2.0 of fr must be positive"),
        ({"lora_alpha": "inf"}, "--lora-alpha: inf of de must be positive"),
        ({"lora_alpha": "nan"}, "--lora-alpha: nan of de must be positive"),
        ({"lora_alpha": "medium=1"}, "--lora-alpha: medium is neither a tier"),
        (
            {"encoder_index_side": "source*9,target*3"},
            "--encoder-index-side=source*9,target*3 names a side for 12 layers, the model has 4",
        ),
        (
            {"lora_weight_learning": True, "decoder_index_side": "target"},
            "--decoder-index-side target and --lora-weight-learning exclude each other: leave out "
            "--decoder-index-side to learn",
        ),
        (
            {"decoder_index_side": "target*3"},
            "--decoder-index-side=target*3 names a side for 3 layers, the model has 2",
        ),
        ({"encoder_lora_layers": "4"}, "--encoder-lora-layers: 4 is not within the model's"),
        ({"decoder_lora_layers": "0-2"}, "--decoder-lora-layers: 0-2 is not within the model's"),
        (
            {"encoder_target_modules": "encoder_attn.q_proj"},
            "--encoder-target-modules: unknown module 'encoder_attn.q_proj'; valid: self_attn.q_",
        ),
        ({"decoder_target_modules": "fc3"}, "--decoder-target-modules: unknown module 'fc3'; va"),
        (
            {"encoder_target_modules": "none", "decoder_target_modules": "none"},
            "no linear is left to adapt",
        ),
    ],
)
def test_a_bad_option_is_named_with_its_remedy(options, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        resolved(**options)


def test_the_square_shape_allows_ranks_up_to_d():
    _, plan = resolved(lora_rank="16", lora_shape="square", encoder_target_modules="fc1")
    assert plan.ranks == (16, 16, 16)


def test_the_table_counts_by_tier_side_and_module():
    _, plan = resolved(
        lora_rank="high=2,low=4",
        encoder_target_modules="fc1",
        decoder_target_modules="self_attn.q_proj,fc1",
    )
    # 3 encoder layers of the source: 3 * 2 languages * rank 2 * (16 + 64) = 960
    lines = plan.table(10_000).splitlines()
    assert [line.split() for line in lines] == [
        ["tier", "languages", "side", "module", "trainable", "of", "base"],
        ["high", "source", "fc1", "960", "9.600%"],
        ["high", "target", "fc1", "960", "9.600%"],
        ["high", "target", "self_attn.q_proj", "256", "2.560%"],
        ["high", "2", "all", "all", "2,176", "21.760%"],
        ["low", "source", "fc1", "960", "9.600%"],
        ["low", "target", "fc1", "960", "9.600%"],
        ["low", "target", "self_attn.q_proj", "256", "2.560%"],
        ["low", "1", "all", "all", "2,176", "21.760%"],
        ["total", "3", "all", "all", "4,352", "43.520%"],
    ]


def test_shared_adapters_sit_where_those_of_languages_do():
    _, plan = resolved(lora_shared_rank=4, lora_shape="square", encoder_lora_layers="1,3")
    assert (plan.shared_rank, plan.shared_alpha, plan.trained) == (4, 4, None)
    assert [(s.name, s.in_features, s.out_features) for s in plan.shared_sites] == [
        (s.name, s.in_features, s.out_features) for s in plan.sites
    ]
    assert {site.side for site in plan.shared_sites} == {"shared"}
    assert {site.side for site in plan.sites} == {"source", "target"}
    assert plan.needs("source") and plan.needs("target")


def test_rank_0_for_all_leaves_the_shared_adapters_alone():
    for rank in ("0", "high=0,low=0"):
        _, plan = resolved(lora_rank=rank, lora_shared_rank=4, lora_shared_alpha=8.0)
        assert plan.sites == () and len(plan.shared_sites) == 4 * 5 + 2 * 8
        assert (plan.shared_rank, plan.shared_alpha) == (4, 8.0)
        assert not plan.needs("source") and not plan.needs("target")


def test_rank_0_for_all_leaves_the_embeddings_adapter_alone():
    _, plan = resolved(lora_rank="0", lora_embedding_rank=4)
    assert plan.all_sites == () and plan.embedding_rank == 4
    site = plan.embedding_site
    assert (site.name, site.entries(4)) == ("decoder.output_projection", 4 * (16 + 100))
    assert resolved()[1].embedding_site is None


SHARED_ROWS = [
    ["for", "all", "shared", "fc1", "960", "9.600%"],
    ["for", "all", "3", "shared", "all", "960", "9.600%"],
]
EMBEDDINGS_ROW = ["for", "all", "3", "shared", "embeddings", "232", "2.320%"]


@pytest.mark.parametrize(
    "options, shared, total",
    [
        ({}, SHARED_ROWS, "2,880"),
        ({"lora_rank": "0"}, SHARED_ROWS, "960"),
        (
            {"lora_train_languages": "de,en,fr"},
            [["kept", "3", "shared", "all", "0", "0.000%"]],
            "1,920",
        ),
        (
            {"lora_train_languages": "fr"},
            [
                ["kept", "3", "shared", "all", "0", "0.000%"],
                ["kept", "2", "all", "all", "0", "0.000%"],
            ],
            "640",
        ),
        ({"lora_embedding_rank": 2}, [*SHARED_ROWS, EMBEDDINGS_ROW], "3,112"),
        ({"lora_rank": "0", "lora_embedding_rank": 2}, [*SHARED_ROWS, EMBEDDINGS_ROW], "1,192"),
        (
            {"lora_embedding_rank": 2, "lora_train_languages": "fr,en,de"},
            [["kept", "3", "shared", what, "0", "0.000%"] for what in ("all", "embeddings")],
            "1,920",
        ),
    ],
)
def test_the_table_counts_shared_adapters_once(options, shared, total):
    _, plan = resolved(
        **{"lora_rank": "2", "lora_shared_rank": 3, **options},
        encoder_target_modules="fc1",
        decoder_target_modules="none",
    )
    lines = [line.split() for line in plan.table(10_000).splitlines()]
    share = f"{int(total.replace(',', '')) / 10_000:.3%}"
    assert lines[-1 - len(shared) :] == [*shared, ["total", "3", "all", "all", total, share]]
    tiers = {plan.languages.tier(code) for code in plan.trained or plan.languages.codes}
    assert {line[0] for line in lines} & {"high", "low"} == (tiers if plan.sites else set())


def pruning(**options):
    names = ("final_sparsity", "begin", "duration", "unit", "scope", "target")
    return PruningConfig(**{f"pruning_{n}": options[n] for n in names if n in options})


def test_the_default_schedule():
    assert pruning().validated() == Schedule(0.9, 2, 10, "epoch")
    assert (PruningConfig().pruning_scope, PruningConfig().pruning_target) == ("language", "B")


def test_a_schedule_of_ones_own():
    config = pruning(
        final_sparsity=0.5, begin=0, duration=1, unit="update", scope="layer", target="AB"
    )
    assert config.validated() == Schedule(0.5, 0, 1, "update")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"final_sparsity": 1.0}, "--pruning-final-sparsity 1.0 must lie in [0, 1): 0 prunes"),
        ({"final_sparsity": -0.1}, "--pruning-final-sparsity -0.1 must lie in [0, 1)"),
        ({"final_sparsity": float("nan")}, "--pruning-final-sparsity nan must lie in [0, 1)"),
        ({"begin": -1}, "--pruning-begin -1 must not be negative"),
        ({"duration": 0}, "--pruning-duration 0 must be at least 1"),
        ({"unit": "batch"}, "--pruning-unit batch must be epoch or update"),
        ({"scope": "model"}, "--pruning-scope model must be language or layer"),
        ({"target": "A"}, "--pruning-target A must be B or AB"),
    ],
)
def test_a_bad_schedule_names_its_option(options, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        pruning(**options).validated()


@pytest.mark.parametrize(
    "options, max_epoch, max_update, ends",
    [
        ({}, 12, 0, None),  # epoch 12 is pruned to the end and trained
        ({}, 11, 0, ("epoch 12", 11)),
        ({}, 0, 0, None),  # no limit
        ({}, 0, 5, None),  # no limit in epochs
        ({}, 15, 5, None),
        ({"final_sparsity": 0.0}, 1, 0, None),
        ({"unit": "update", "begin": 10, "duration": 90}, 0, 101, None),
        ({"unit": "update", "begin": 10, "duration": 90}, 0, 100, ("update 100", 99)),
        ({"unit": "update", "begin": 10, "duration": 90}, 3, 0, None),
    ],
)
def test_a_schedule_that_ends_after_the_run_is_warned_about(options, max_epoch, max_update, ends):
    warning = pruning(**options).warning(max_epoch, max_update)
    if ends is None:
        assert warning is None
    else:
        assert warning == (
            f"the pruning schedule ends at {ends[0]}, after the run's last ({ends[1]}): "
            "--pruning-final-sparsity 0.9 is not reached; lower --pruning-begin or "
            "--pruning-duration, or train longer"
        )


def test_every_field_is_an_option_of_its_type():
    parser = ArgumentParser()
    PruningConfig.add_options(parser)
    LSLoConfig.add_options(parser, defaults=False)
    words = "--pruning-begin 3 --pruning-final-sparsity .5 --lora-rank 2 --lora-weight-learning"
    args = parser.parse_args([*words.split(), "--lora-dropout", "0.1", "--encoder-lora-layers=1"])
    assert (args.pruning_begin, args.pruning_final_sparsity, args.pruning_duration) == (3, 0.5, 10)
    assert (args.lora_rank, args.lora_dropout, args.encoder_lora_layers) == ("2", 0.1, "1")
    assert args.lora_weight_learning is True
    assert args.lora_shape is args.lora_tiers is None  # not given
    assert set(LORA_FIELDS) < set(vars(args))


def test_configs_are_read_from_a_namespace_of_all_options():
    args = Namespace(lora_tiers=TIERS, lora_rank="2", pruning_begin=7, lr=[0.1])
    assert LSLoConfig.from_namespace(args).lora_rank == "2"
    assert PruningConfig.from_namespace(args).validated() == Schedule(0.9, 7, 10)
