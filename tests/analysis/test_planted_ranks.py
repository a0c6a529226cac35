"""``lslora demand`` and ``lslora suggest`` find what was planted, from ten different starts."""

import json

import planted
import pytest
import torch
import toy

from lslora_fairseq.cli import main

MODULES = {
    "encoder": ["self_attn.v_proj", "fc1"],
    "decoder": ["encoder_attn.v_proj", "fc1"],
}
SIZES = dict(encoder_layers=1, decoder_layers=1, encoder_embed_dim=32, encoder_ffn_embed_dim=128)
UPDATES = 200


def trained(seed, path):
    """Trains the student of the test below and saves it.

    Returns:
        the languages' codes by planted rank
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(toy.CODES), generator=generator).tolist()
    codes = [toy.CODES[i] for i in order]
    ranks = ",".join(f"{code}={rank}" for code, rank in zip(codes, (1, 2, 4, 8)))
    modules = {f"{stack}_target_modules": ",".join(names) for stack, names in MODULES.items()}
    teacher = toy.build(seed, lora_rank=ranks, **modules, **SIZES)
    planted.plant(teacher, 2.0, generator)
    options = dict(lora_rank="8", **SIZES)
    student = toy.build(seed, **options)
    optimizer = planted.pruned_adam(
        student, 0.02, adam_betas="(0.9, 0.98)", pruning_scope="layer", pruning_unit="update",
        pruning_final_sparsity=0.9, pruning_begin=UPDATES * 2 // 15,
        pruning_duration=UPDATES * 10 // 15,
    )  # fmt: skip
    planted.learn(student, teacher, optimizer, UPDATES, generator)
    planted.save(student, options, optimizer, path)
    return codes


def strictly_rising(values):
    return values == sorted(set(values))


@pytest.mark.parametrize("seed", planted.SEEDS)
def test_demand_and_suggestion_are_those_planted(seed, tmp_path, capsys):
    """A teacher's languages differ from the base by 1, 2, 4 and 8 rank-one changes in two modules
    of either stack, and the student, at rank 8 everywhere, shows both in what survives.

    One encoder layer (indexed by the source) and one decoder layer (by the target), d 32, inner
    dimension 128. Each rank-one change has Frobenius norm 2; the base's self_attn.v_proj has about
    5.7. 200 updates of 64 sentences of at most 5 tokens, Adam at lr 0.02 falling to 0. The schedule
    is the authors' in shape: 2/15 of the run before pruning, 10/15 of it rising to 0.9. No noise.
    The seed sets the base, which language has which rank, the changes, the sentences and the
    student's start.
    """
    checkpoint = str(tmp_path / "checkpoint.pt")
    codes = trained(seed, checkpoint)

    assert main(["demand", checkpoint, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shares = {row["language"]: row["all"] for row in found["languages"]}
    assert strictly_rising([shares[code] for code in codes])
    for stack, names in MODULES.items():
        modules = {m["module"]: m["all"] for m in found["modules"] if m["stack"] == stack}
        planted_shares = [modules.pop(name) for name in names]
        assert min(planted_shares) > max(modules.values())

    # rank 8 for all languages in the planted modules
    budget = 4 * 8 * sum([32 + 32, 32 + 128, 32 + 32, 32 + 128])
    args = ["suggest", checkpoint, "--budget", str(budget), "--per", "language"]
    assert main([*args, "--format", "flags"]) == 0
    words = capsys.readouterr().out.split()
    flags = dict(zip(words[::2], words[1::2]))
    ranks = dict(pair.split("=") for pair in flags.pop("--lora-rank").split(","))
    assert strictly_rising([int(ranks[code]) for code in codes])
    for stack, names in MODULES.items():
        assert flags[f"--{stack}-target-modules"] == ",".join(names)
