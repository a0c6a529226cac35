"""What a checkpoint is, and what happens where it is not what a model is."""

import copy
import re

import pytest
import torch
from toy import ALL_CODES, OPTIONS, batch, build, dictionary, set_adapters, task

from lslora_fairseq.errors import ConfigError, UserError
from lslora_fairseq.identity import Identity, describe
from lslora_fairseq.keys import RECORD
from lslora_fairseq.lora.adapters import LayerAdapters
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

CODES = ["de", "en", "fr", "ja"]


def model_with(langs=CODES, seed=1, **options):
    """A model whose language tokens stand in this order."""
    torch.manual_seed(seed)
    made = task()
    made.langs = list(langs)
    made.source_dictionary.symbols[-4:] = [f"__{lang}__" for lang in langs]
    made.source_dictionary.indices = {s: i for i, s in enumerate(made.source_dictionary.symbols)}
    args = type("Args", (), {})()
    vars(args).update(OPTIONS, **options)
    return LSLoTransformerModel.build_model(args, made)


def test_a_record_reads_back():
    told = Identity("a.pt", "big", ["wo", "zh-Hans"], "mbart", ["main", "mined"], ["mono_dae"], {})
    again = Identity.from_record(told.record(), "b.pt")
    told.path = "b.pt"
    assert again == told


def test_records_average_to_themselves():
    record = Identity(langs=[f"l{i}" for i in range(200)]).record()
    assert record.dtype == torch.int32
    total = record.clone()
    for _ in range(99):
        total += record
    assert torch.equal(total // 100, record)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r[:-1], f"x.pt holds a damaged {RECORD}: copy it again"),
        (lambda r: r + 1, f"x.pt holds a damaged {RECORD}"),
        (lambda r: r * 1000, f"x.pt holds a damaged {RECORD}"),
        (lambda r: torch.tensor(list(b"[]")), f"x.pt holds a damaged {RECORD}"),
        (
            lambda r: torch.tensor(list(b'{"version": 9}')),
            f"x.pt holds a {RECORD} of version 9, this package reads 3: update lslora_fairseq",
        ),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error(change, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Identity.from_record(change(Identity().record()), "x.pt")


def test_a_mean_that_became_floating_point_is_read():
    told = Identity(langs=["wo"])
    assert Identity.from_record(told.record().float(), "the checkpoint") == told


@pytest.mark.parametrize("specs", [["main"], ["main", "mined"]])
def test_symbols_are_appended_for_every_spec(specs):
    from fairseq.data.multilingual.multilingual_utils import augment_dictionary

    made = dictionary(5)
    lines = list(made.symbols)
    augment_dictionary(made, ["xx", "de"], "multilingual", specs, {"mono_dae": "x"})
    told = Identity(langs=["xx", "de"], langtoks_specs=specs, extra_data=["mono_dae"])
    assert told.symbols(lines) == made.symbols
    assert "<mask>" in made.symbols


def test_what_a_model_is_goes_wherever_its_weights_go():
    model = model_with(lora_alpha="de=4,high=8,low=2", lora_shape="square")
    told = Identity.from_record(model.state_dict()[RECORD], "x.pt")
    assert told.langs == CODES
    assert told.adapters == describe(model.plan)
    assert told.adapters["alphas"] == {"de": 4.0, "en": 8.0, "fr": 2.0, "ja": 2.0}
    assert told.adapters["tiers"] == {"de": "high", "en": "high", "fr": "low", "ja": "low"}
    assert ["encoder.layers.0.fc1", "source", 16, 16] in told.adapters["sites"]


SWAPPED = "encoder.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_alpha": "32"}, "alpha of de is 1 there and 32.0 here: leave out --lora-alpha, or"),
        (
            {"encoder_target_modules": "self_attn.q_proj,self_attn.v_proj,fc1,fc2"},
            f"only the checkpoint has adapters of {SWAPPED}, source side, 16 × 16: give the target",
        ),
        (
            {"encoder_index_side": "source*2,target*2"},
            "only the checkpoint has adapters of encoder.layers.2.self_attn.q_proj, source side",
        ),
        ({"lora_tiers": "high=de,en;low=fr,oc", "lora_rank": "de=1,en=2,fr=3,oc=5"}, "has adapt"),
        ({"lora_rank": "de=1,en=2,fr=3,ja=4"}, "rank of ja is 5 there and 4 here: leave out"),
        ({"lora_rank": "0", "lora_shared_rank": 2}, "rank of de is 1 there and 0 here: leave out"),
    ],
)
def test_weights_that_contradict_the_model_are_refused(options, message):
    """Also where every shape fits, as with another alpha."""
    state = build().state_dict()
    other = build(**options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match=f"^lslora: error: the checkpoint .*{re.escape(message)}"):
        other.load_state_dict(state)
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("there, here, told", [
    ({"lora_shared_rank": 3}, {"lora_shared_rank": 2}, "rank 3 and alpha 3, this model rank 2 and"),
    (
        {"lora_shared_rank": 3},
        {"lora_shared_rank": 3, "lora_shared_alpha": 6.0},
        "rank 3 and alpha 3, this model rank 3 and alpha 6.0",
    ),
    ({"lora_shared_rank": 3}, {}, "rank 3 and alpha 3, this model none"),
    ({}, {"lora_shared_rank": 3}, "none, this model rank 3 and alpha 3"),
])  # fmt: skip
def test_other_shared_adapters_are_refused(there, here, told):
    message = f"does not fit this model: of the shared adapters it has {told}"
    with pytest.raises(UserError, match=f"^lslora: error: the checkpoint {message}") as caught:
        build(**here).load_state_dict(build(**there).state_dict())
    assert "leave out --lora-shared-rank and --lora-shared-alpha, or give" in str(caught.value)


@pytest.mark.parametrize(
    "there, here, told",
    [(3, 2, "rank 3, this model rank 2"), (3, 0, "rank 3, this model none"), (0, 3, "none, this")],
)
def test_another_adapter_of_the_embeddings_is_refused(there, here, told):
    state = build(lora_embedding_rank=there).state_dict()
    message = f"does not fit this model: of the embeddings' adapter it has {told}"
    with pytest.raises(UserError, match=f"^lslora: error: the checkpoint {message}") as caught:
        build(lora_embedding_rank=here).load_state_dict(state)
    assert "leave out --lora-embedding-rank, or give the checkpoint's" in str(caught.value)


def test_freezing_shared_adapters_does_not_make_them_others():
    build(lora_shared_rank=3, lora_train_languages=ALL_CODES).load_state_dict(
        build(lora_shared_rank=3, lora_shared_alpha=3.0).state_dict()
    )


def test_modules_that_differ_in_name_alone_are_told_apart():
    """q and k, or q and v: the same shapes."""
    two = {"encoder_target_modules": "self_attn.q_proj,self_attn.k_proj"}
    other = build(encoder_target_modules="self_attn.q_proj,self_attn.v_proj")
    with pytest.raises(UserError, match=f"only the checkpoint has adapters of {SWAPPED}"):
        other.load_state_dict(build(**two).state_dict())


def test_language_tokens_in_another_order_are_matched_by_token():
    model = set_adapters(model_with()).eval()
    other = model_with(["ja", "de", "fr", "en"], seed=5).eval()
    other.load_state_dict(model.state_dict())
    place = torch.tensor(
        [other.encoder.dictionary.index(s) for s in model.encoder.dictionary.symbols]
    )
    net_input = batch([(0, 1), (3, 2)])
    net_input["src_tokens"][:, 0] = torch.tensor([34, 37])  # the tokens of de and ja
    moved = {k: place[v] if v.dim() == 2 else v for k, v in net_input.items()}
    assert not torch.equal(net_input["src_tokens"], moved["src_tokens"])
    with torch.no_grad():
        expected, found = model(**net_input)[0], other(**moved)[0][..., place]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # and again: what it now holds is in its own order
    rows = other.encoder.embed_tokens.weight.clone()
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(other.encoder.embed_tokens.weight, rows)


def older(state):
    """A state dict as it was before masks could be averaged and a record told what it is."""
    state = dict(state)
    del state[RECORD]
    for key in [k for k in state if k.endswith(".pruned")]:
        state[key.removesuffix("pruned") + "mask"] = state.pop(key) == 0
    return state


def pruned_model(seed, **options):
    model = set_adapters(build(**options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for holder in model.modules():
        if isinstance(holder, LayerAdapters):
            holder.mask.copy_(torch.rand(holder.mask.shape, generator=generator) > 0.5)
            holder.refresh_pruned()
            for language in range(len(holder.names)):
                holder.weight(language).data.mul_(holder.mask[holder.rows(language)])
    return model


def test_a_checkpoint_of_an_earlier_version_loads():
    model, other = pruned_model(3), build(seed=4)
    other.load_state_dict(older(model.state_dict()))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_shared_rank": 3, "lora_shared_alpha": 2.0}, {"lora_embedding_rank": 3}],
)
def test_what_is_pruned_in_all_of_an_average_stays_so(options):
    """Summed up and divided, whole numbers with their remainder dropped, as fairseq's script."""
    models = [pruned_model(seed, **options) for seed in (3, 4, 5)]
    total = {k: v.clone() for k, v in models[0].state_dict().items()}
    for model in models[1:]:
        for key, value in model.state_dict().items():
            total[key] += value
    for value in total.values():
        value.div_(3) if value.is_floating_point() else value.floor_divide_(3)
    average = build(seed=9, **options)
    average.load_state_dict(total)
    for name, holder in average.named_modules():
        if isinstance(holder, LayerAdapters):
            masks = [m.get_submodule(name).mask for m in models]
            assert torch.equal(holder.mask, masks[0] | masks[1] | masks[2])
            assert holder.is_pruned
            for language in range(len(holder.names)):
                kept = holder.mask[holder.rows(language)]
                assert not holder.weight(language)[~kept].any()
    average.eval()
    expected = average(**batch([(0, 1)] * 2))[0]
    average.merge(0, 1)
    torch.testing.assert_close(average(**batch([(0, 1)] * 2))[0], expected, atol=1e-5, rtol=1e-5)
