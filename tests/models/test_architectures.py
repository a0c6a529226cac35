"""The presets' shapes and parameter counts (method, section 7), on the meta device."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY

from lslora_fairseq.models.architectures import SHAPES
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

TIERS = "high=en,fr,it,de;medium=nl,zh,ja,ko;low=oc,or,sd,wo"
ONE = "low=oc"


class Rows(Dictionary):
    """A dictionary of this many rows."""

    def __init__(self, rows):
        super().__init__()
        self.symbols = [*self.symbols, *(str(i) for i in range(rows - len(self.symbols)))]


def on_meta(arch, rows, **options):
    args = Namespace(arch=arch, **options)
    ARCH_CONFIG_REGISTRY[arch](args)
    dictionary = Rows(rows)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device("meta"):
        return LSLoTransformerModel.build_model(args, task)


def count(model, trained):
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trained)


# from the shapes in method, section 7: parameters in millions as published
@pytest.mark.parametrize(
    "arch, layers, dim, ffn, rows, millions",
    [
        ("lslora_m2m_124_175m", 6, 512, 2048, 256_125, 175.3),
        ("lslora_m2m_124_615m", 12, 1024, 4096, 256_125, 615.0),
        ("lslora_m2m_100_418m", 12, 1024, 4096, 128_112, 483.9),
        ("lslora_m2m_100_1b2", 24, 1024, 8192, 128_112, 1239),
        ("lslora_nllb_200_600m", 12, 1024, 4096, 256_206, 615.1),
        ("lslora_nllb_200_1b3", 24, 1024, 8192, 256_206, 1371),
        ("lslora_nllb_200_3b3", 24, 2048, 8192, 256_206, 3345),
    ],
)
def test_shapes(arch, layers, dim, ffn, rows, millions):
    model = on_meta(arch, rows, lora_tiers=ONE, lora_rank="2")
    for stack in (model.encoder, model.decoder):
        assert len(stack.layers) == layers
        layer = stack.layers[0]
        assert layer.fc1.weight.shape == (ffn, dim) and layer.fc2.weight.shape == (dim, ffn)
        assert layer.self_attn.num_heads == 16 and layer.normalize_before
        assert layer.activation_fn is torch.nn.functional.relu
        assert stack.embed_tokens.weight is model.encoder.embed_tokens.weight
    assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight
    digits = 1 if millions < 1000 else 0
    assert round(count(model, trained=False) / 1e6, digits) == millions
    source = {s.layer for s in model.plan.sites if s.side == "source"}
    assert source == set(range(layers * 3 // 4 + (layers == 6)))


@pytest.mark.parametrize("arch", SHAPES)
@pytest.mark.parametrize("given, attention", [([], 0.1), (["--attention-dropout", "0"], 0)])
def test_dropout_is_that_of_the_public_models(arch, given, attention):
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, ["data", "--arch", arch, *given])
    assert (args.dropout, args.attention_dropout, args.activation_dropout) == (0.1, attention, 0)


def test_dropout_reaches_every_attention():
    model = on_meta("lslora_m2m_124_175m", 256_125, lora_tiers=ONE, lora_rank="2")
    attentions = [m for m in model.modules() if hasattr(m, "q_proj")]
    assert [m.dropout_module.p for m in attentions] == [0.1] * 18


@pytest.mark.parametrize(
    "shape, rank, expected",
    [
        ("square", "2", 638_976),
        ("square", "8", 2_555_904),
        ("full", "2", 933_888),
        ("full", "8", 3_735_552),
    ],
)
def test_adapter_of_one_language(shape, rank, expected):
    model = on_meta(
        "lslora_m2m_124_615m", 256_125, lora_tiers=ONE, lora_rank=rank, lora_shape=shape
    )
    assert count(model, trained=True) == expected
    assert len(model.plan.sites) == 156


@pytest.mark.parametrize(
    "shape, expected, share", [("square", 15_335_424, 2.49), ("full", 22_413_312, 3.64)]
)
def test_twelve_languages(shape, expected, share):
    model = on_meta(
        "lslora_m2m_124_615m",
        256_125,
        lora_tiers=TIERS,
        lora_rank="high=2,medium=2,low=8",
        lora_shape=shape,
    )
    assert count(model, trained=True) == expected
    assert round(100 * expected / count(model, trained=False), 2) == share
    assert {s.layer for s in model.plan.sites if s.side == "source"} == set(range(9))
    table = model.plan.table(count(model, trained=False))
    assert f"{expected:,}" in table.splitlines()[-1]
    if shape == "square":
        shares = [line.split()[-1] for line in table.splitlines() if " all " in line]
        assert shares == ["0.416%", "0.416%", "1.662%", "2.494%"]
