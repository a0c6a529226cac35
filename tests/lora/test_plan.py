"""Sites, sides, layers and ranks as pure functions."""

import re

import pytest

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.plan import (
    MODULES,
    Site,
    check_ranks,
    default_encoder_sides,
    parse_index_sides,
    parse_layers,
    parse_target_modules,
    plan_sites,
)

DIMS = {"self_attn.q_proj": (16, 16), "fc1": (16, 64), "fc2": (64, 16)}


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, (0, 1, 2, 3, 4, 5)),
        ("0-5", (0, 1, 2, 3, 4, 5)),
        ("3", (3,)),
        (3, (3,)),
        ("5, 0-2,1", (0, 1, 2, 5)),
        ("2-2", (2,)),
    ],
)
def test_layers(text, expected):
    assert parse_layers(text, 6, "--encoder-lora-layers") == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "cannot read '': write for example 0-5,8"),
        ("0-2,", "cannot read ''"),
        ("all", "cannot read 'all'"),
        ("-1", "cannot read '-1'"),
        ("0-", "cannot read '0-'"),
        ("1.5", "cannot read '1.5'"),
        ("6", "6 is not within the model's layers 0-5: name layers of that range, or leave"),
        ("0-6", "0-6 is not within the model's layers 0-5"),
        ("4-2", "4-2 is not within the model's layers 0-5"),
    ],
)
def test_bad_layers(text, message):
    with pytest.raises(ConfigError, match=f"^--encoder-lora-layers: {re.escape(message)}"):
        parse_layers(text, 6, "--encoder-lora-layers")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("source", "ssss"),
        ("target", "tttt"),
        (" target ", "tttt"),
        ("source*3,target*1", "ssst"),
        ("source*3,target", "ssst"),
        ("target, source*2, target", "tsst"),
        ("source*0,target*4", "tttt"),
        ("source,target,source,target", "stst"),
    ],
)
def test_index_sides(text, expected):
    sides = parse_index_sides(text, 4, "--encoder-index-side")
    assert sides == tuple({"s": "source", "t": "target"}[letter] for letter in expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ": cannot read '': write source, target, or source*9,target*3"),
        ("both", ": cannot read 'both'"),
        ("source*", ": cannot read 'source*'"),
        ("source*-1,target*5", ": cannot read 'source*-1'"),
        ("source*2;target*2", ": cannot read 'source*2;target*2'"),
        ("sources", ": cannot read 'sources'"),
        (
            "source*9,target*3",
            "=source*9,target*3 names a side for 12 layers, the model has 4: make the counts add",
        ),
        ("source*1", "=source*1 names a side for 1 layers, the model has 4"),
        ("source,target", "=source,target names a side for 2 layers, the model has 4"),
    ],
)
def test_bad_index_sides(text, message):
    with pytest.raises(ConfigError, match=f"^--encoder-index-side{re.escape(message)}"):
        parse_index_sides(text, 4, "--encoder-index-side")


@pytest.mark.parametrize(
    "layers, expected",
    [
        (1, "source*1"),
        (2, "source*2"),
        (3, "source*2,target*1"),
        (4, "source*3,target*1"),
        (6, "source*5,target*1"),
        (12, "source*9,target*3"),
        (24, "source*18,target*6"),
    ],
)
def test_by_default_the_last_quarter_of_the_encoder_is_indexed_by_the_target(layers, expected):
    assert default_encoder_sides(layers) == expected
    assert len(parse_index_sides(expected, layers, "")) == layers


def test_target_modules_come_in_the_order_of_the_stack():
    option = "--decoder-target-modules"
    assert parse_target_modules(
        "fc2, encoder_attn.out_proj,self_attn.q_proj,fc2,", "decoder", option
    ) == ("self_attn.q_proj", "encoder_attn.out_proj", "fc2")
    for stack in ("encoder", "decoder"):
        assert parse_target_modules(",".join(MODULES[stack]), stack, option) == MODULES[stack]


def test_no_module_at_all_has_to_be_said():
    with pytest.raises(ConfigError, match="unknown module ''; valid: .*, or none$"):
        parse_target_modules("", "encoder", "--encoder-target-modules")


@pytest.mark.parametrize("name", ["q_proj", "self_attn", "fc", "FC1", "encoder_attn.q_proj"])
def test_an_unknown_module_is_answered_with_the_valid_ones(name):
    message = (
        f"--encoder-target-modules: unknown module '{name}'; valid: self_attn.q_proj, "
        "self_attn.k_proj, self_attn.v_proj, self_attn.out_proj, fc1, fc2, or none"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse_target_modules(f"fc1,{name}", "encoder", "--encoder-target-modules")


def test_sites_of_the_full_shape():
    sites = plan_sites(
        "encoder", (1, 2), (("source",), ("source",), ("target",)), DIMS, DIMS, "full"
    )
    assert sites == [
        Site("encoder", 1, "self_attn.q_proj", "source", 16, 16),
        Site("encoder", 1, "fc1", "source", 16, 64),
        Site("encoder", 1, "fc2", "source", 64, 16),
        Site("encoder", 2, "self_attn.q_proj", "target", 16, 16),
        Site("encoder", 2, "fc1", "target", 16, 64),
        Site("encoder", 2, "fc2", "target", 64, 16),
    ]
    assert sites[1].name == "encoder.layers.1.fc1"
    assert [site.entries(3) for site in sites[:3]] == [3 * 32, 3 * 80, 3 * 80]


def test_the_square_shape_sees_the_first_d_of_the_inner_dimension():
    sites = plan_sites("decoder", (0,), (("target",),), DIMS, DIMS, "square")
    assert [(s.in_features, s.out_features) for s in sites] == [(16, 16)] * 3
    assert [s.entries(3) for s in sites] == [96, 96, 96]


SITES = [
    Site("encoder", 0, "fc1", "source", 64, 256),
    Site("decoder", 1, "self_attn.q_proj", "target", 16, 24),
    Site("decoder", 1, "fc1", "target", 24, 16),
]


def test_ranks_from_1_to_the_smallest_side_are_fine():
    check_ranks((1, 16, 7), ("de", "en", "fr"), SITES, "--lora-rank")


@pytest.mark.parametrize("ranks, code", [((4, 0), "en"), ((17, 4), "de"), ((4, -1), "en")])
def test_a_rank_out_of_range_names_language_limit_and_linear(ranks, code):
    rank = next(r for r in ranks if r != 4)
    message = (
        f"--lora-rank: rank {rank} of {code} must lie between 1 and 16, the smaller side of "
        "decoder.layers.1.self_attn.q_proj"
    )
    if 0 in ranks:
        message += "; 0 for every language is plain LoRA, and needs --lora-shared-rank"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_ranks(ranks, ("de", "en"), SITES, "--lora-rank")


def test_no_site_at_all_is_an_error():
    with pytest.raises(ConfigError, match="^no linear is left to adapt: name some in --encoder-t"):
        check_ranks((4,), ("en",), [], "--lora-rank")
