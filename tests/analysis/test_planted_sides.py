"""``lslora sides`` finds the planted side of every layer, from ten different starts."""

import json
from itertools import groupby

import planted
import pytest
import torch
import toy

from lslora_fairseq.cli import main

SIZES = dict(encoder_layers=2, decoder_layers=2, encoder_embed_dim=32, encoder_ffn_embed_dim=64)


@pytest.mark.parametrize("seed", planted.SEEDS)
def test_sides_are_those_planted(seed, tmp_path, capsys):
    """A teacher's layers differ from the base by a change for each source, or for each target
    language, and the student, which has adapters of both in every layer, learns which.

    Two encoder and two decoder layers, d 32, inner dimension 64; the side of every layer is drawn
    at random. In all linears that have adapters by default, a language has four rank-one changes
    of Frobenius norm 1, and the student's rank is 4. 400 updates of 64 sentences of at most 5
    tokens, Adam at lr 0.02 falling to 0; no pruning, no noise. The seed sets the base, the sides,
    the changes, the sentences and the student's start.

    It takes a student that has learned the change well: with half the sentences and three quarters
    of the updates, the upper encoder layer is taken for the wrong side in one seed of ten, since
    the decoder can make up for what a target-indexed encoder layer does.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = {
        f"{stack}_index_side": [
            ("source", "target")[side]
            for side in torch.randint(2, (SIZES[f"{stack}_layers"],), generator=generator)
        ]
        for stack in ("encoder", "decoder")
    }
    given = {option: ",".join(f"{side}*1" for side in found) for option, found in sides.items()}
    teacher = toy.build(seed, lora_rank="4", **given, **SIZES)
    planted.plant(teacher, 1.0, generator)
    options = dict(lora_rank="4", lora_weight_learning=True, **SIZES)
    student = toy.build(seed, **options)
    optimizer = planted.pruned_adam(
        student, 0.02, adam_betas="(0.9, 0.98)", pruning_final_sparsity=0.0
    )
    planted.learn(student, teacher, optimizer, 400, generator)
    checkpoint = str(tmp_path / "checkpoint.pt")
    planted.save(student, options, optimizer, checkpoint)

    assert main(["sides", checkpoint, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    for stack, layers in groupby(found, key=lambda layer: layer["stack"]):
        assert [layer["side"] for layer in layers] == sides[f"{stack}_index_side"]
