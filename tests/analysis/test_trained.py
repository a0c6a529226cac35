"""Reading a checkpoint with adapters: what it holds, and what is refused."""

from pathlib import Path

import handmade
import pytest
import torch
import toy

from lslora_fairseq.analysis import trained
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.plan import SIDES


def saved(folder, **changes):
    """The path of a hand-made checkpoint; keys of *changes* replace weights, None removes one."""
    content = handmade.make()
    for key, weight in changes.items():
        if weight is None:
            del content["model"][key]
        else:
            content["model"][key] = weight
    return handmade.save(folder, content)


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        trained.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_plan_is_that_of_the_options(tmp_path):
    found = trained.read(saved(tmp_path))
    assert found.layers == handmade.LAYERS
    assert found.plan.languages.codes == ("de", "en", "oc")
    assert found.plan.ranks == (2, 2, 2)
    first = found.adapters()["encoder.layers.0.source_adapters"]
    assert [(s.module, s.in_features, s.out_features) for s in first] == [
        ("self_attn.q_proj", 4, 4),
        ("self_attn.k_proj", 4, 4),
        ("self_attn.v_proj", 4, 4),
        ("fc1", 4, 8),
        ("fc2", 8, 4),
    ]
    assert list(found.adapters()) == [
        "encoder.layers.0.source_adapters",
        "encoder.layers.1.source_adapters",
        "encoder.layers.2.target_adapters",
        "decoder.layers.0.target_adapters",
        "decoder.layers.1.target_adapters",
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_parameters_of_the_base_are_those_of_the_model(tmp_path, shared):
    """The embeddings count once where the model shares them, copies or not."""
    model = toy.build(share_all_embeddings=shared)
    state = {key: weight.clone() for key, weight in model.state_dict().items()}
    content = {"model": state, "args": handmade.Namespace(**toy.OPTIONS)}
    found = trained.read(handmade.save(tmp_path, content))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found.base_parameters() == frozen
    assert found.plan.sites == model.plan.sites


def test_a_mask_says_what_is_removed_or_in_older_checkpoints_what_is_kept(tmp_path):
    content = handmade.make(lambda *_: 3)
    newer = trained.read(handmade.save(tmp_path, content)).kept(LAYER)
    mask = content["model"].pop(f"{LAYER}.pruned") == 0
    assert 0 < mask.sum() < mask.numel()
    content["model"][f"{LAYER}.mask"] = mask
    older = trained.read(handmade.save(tmp_path, content)).kept(LAYER)
    assert torch.equal(older, mask) and torch.equal(newer, mask)


def test_what_a_checkpoint_says_of_itself_is_no_parameter(tmp_path):
    plain, record = saved(tmp_path), {"lslora_record": torch.arange(500)}
    expected = trained.read(plain).base_parameters()
    assert trained.read(saved(tmp_path, **record)).base_parameters() == expected == 848


def test_shared_adapters_are_checked_and_kept_apart(tmp_path):
    content = handmade.make(lora_shared_rank=3)
    found = trained.read(handmade.save(tmp_path, content))
    keys = ["encoder.layers.0.shared_adapters", "decoder.layers.1.shared_adapters"]
    assert not {*keys} & {*found.adapters()}
    assert found.kept(keys[0]).shape == (3, 48)
    assert found.base_parameters() == 848
    del content["model"][f"{keys[1]}.lora_shared"]
    told = f"{keys[1]}.lora_shared: missing instead of (3, 72)"
    assert told in refusal(handmade.save(tmp_path, content))


def test_the_embeddings_adapter_is_checked_and_kept_apart(tmp_path):
    """Also where layers learn the weights of their sides: it is in no layer."""
    content = handmade.make(lora_embedding_rank=2, lora_weight_learning=True)
    found = trained.read(handmade.save(tmp_path, content))
    assert "embedding_adapters" not in found.adapters()
    assert found.kept("embedding_adapters").shape == (2, 4 + 20)
    assert found.base_parameters() == 848
    key = "embedding_adapters.lora_shared"
    for wrong, told in ((None, "missing"), (torch.ones(3, 24), "(3, 24)")):
        changed = {k: w for k, w in {**content["model"], key: wrong}.items() if w is not None}
        file = handmade.save(tmp_path, {**content, "model": changed})
        assert f"{key}: {told} instead of (2, 24)" in refusal(file)
    content["model"]["decoder.output_projection.weight"] = torch.ones(20, 4)
    told = "weights: --lora-embedding-rank adapts embeddings that are one matrix"
    assert told in refusal(handmade.save(tmp_path, content))


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.pt"
    assert refusal(path) == f"{path}: no such file: name a checkpoint that fairseq-train wrote"
    assert refusal(tmp_path).startswith(f"{tmp_path}: no such file")


def test_a_base_model(tmp_path):
    content = handmade.make()
    content["args"] = handmade.Namespace(arch="transformer")
    path = handmade.save(tmp_path, content)
    told = f"{path} has no adapters: name a checkpoint that was trained with --arch lslora_…"
    assert refusal(path) == told
    content = handmade.make()
    content["model"] = {k: w for k, w in content["model"].items() if "_adapters." not in k}
    assert refusal(handmade.save(tmp_path, content)) == told


def test_another_kind_of_model(tmp_path):
    key = "decoder.layers.0.encoder_attn.k_proj.weight"
    path = saved(tmp_path, **{key: None})
    assert refusal(path) == f"{path} holds no {key}: name a checkpoint of fairseq's transformer"


def test_a_damaged_file(tmp_path):
    path = saved(tmp_path)
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    assert refusal(path).startswith(f"cannot read the checkpoint {path} (")


def test_options_that_do_not_fit_the_weights(tmp_path):
    content = handmade.make()
    content["args"].encoder_index_side = "source*2"
    path = handmade.save(tmp_path, content)
    assert refusal(path) == (
        f"{path} holds options that do not fit its weights: --encoder-index-side=source*2 names "
        "a side for 2 layers, the model has 3: make the counts add up"
    )


LAYER = "encoder.layers.0.source_adapters"


@pytest.mark.parametrize(
    "key, weight, told",
    [
        (f"{LAYER}.lora_de", torch.ones(3, 48), f"{LAYER}.lora_de: (3, 48) instead of (2, 48)"),
        (f"{LAYER}.pruned", None, f"{LAYER}.pruned: missing instead of (6, 48)"),
        (f"{LAYER}.lora_fr", torch.ones(2, 48), f"{LAYER}.lora_fr: (2, 48) instead of none"),
        (
            "decoder.layers.1.side_weights.logits",
            torch.zeros(1, 2),
            "decoder.layers.1.side_weights.logits: (1, 2) instead of none",
        ),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, key, weight, told):
    path = saved(tmp_path, **{key: weight})
    assert refusal(path) == (
        f"{path} holds adapters that do not fit its own options ({told}): name the file that "
        "fairseq-train wrote, unchanged"
    )


def test_both_sides_of_weight_learning(tmp_path):
    content = handmade.make(lora_weight_learning=True)
    path = handmade.save(tmp_path, content)
    keys = list(trained.read(path).adapters())
    assert keys[:2] == [f"encoder.layers.0.{side}_adapters" for side in SIDES]
    del content["model"]["decoder.layers.0.side_weights.logits"]
    assert "side_weights.logits: missing instead of (1, 2)" in refusal(
        handmade.save(tmp_path, content)
    )
