"""Files and a base model become the model that they came from, or the line that says why not."""

import re
from dataclasses import replace

import adapter_files
import pytest
import torch
from toy import CODES

from lslora_fairseq.adapters import files, fingerprint
from lslora_fairseq.adapters.assembly import Assembly
from lslora_fairseq.adapters.collection import Collection
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import EMBEDDINGS, RECORD

BASE = Identity("base.pt", "transformer", list(CODES))
SHARED = {"lora_shared_rank": 2, "lora_shared_alpha": 4.0, "lora_embedding_rank": 3}


def assembled(places, made, base=BASE):
    """The state dict of files on the base of a model."""
    state = adapter_files.base_of(made)
    Assembly(Collection(places), base).assemble(state)
    return state


def without_effect(state, made):
    """Zeroes the rows of A of which all of B is pruned, as they come back from a file."""
    for linear in made.adapted_linears():
        for side, adapters in linear.adapters.items():
            key = linear.site.name.removesuffix(linear.site.module) + f"{side}_adapters"
            for language, name in enumerate(adapters.names):
                a, b = adapters.columns[linear.site.module]
                dead = ~adapters.mask[adapters.rows(language)][:, b].any(1)
                state[f"{key}.{name}"][dead, a] = 0
    return state


def same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        SHARED,
        {"lora_alpha": "de=4,high=8,low=2", "lora_shape": "square"},
        {"lora_rank": "0", "lora_shared_rank": 3},
        {"encoder_target_modules": "fc1,self_attn.out_proj", "decoder_lora_layers": "1"},
        {"encoder_index_side": "target", "decoder_target_modules": "none"},
        {"share_all_embeddings": False},
        {"prune": 0.0},
        {"prune": 0.02},
        {"prune": 1.0},
    ],
)
def test_a_model_comes_back_bit_by_bit(tmp_path, options):
    options = dict(options)
    made = adapter_files.model(prune=options.pop("prune", 0.7), **options)
    folder = adapter_files.write(tmp_path, made, **options)
    found = assembled([folder], made)
    told = Identity.from_record(found.pop(RECORD), "x")
    expected = {k: w.clone() for k, w in made.state_dict().items() if k != RECORD}
    same(found, without_effect(expected, made))
    base = fingerprint.of_base(found, made.identity.lines)
    assert told == replace(made.identity, path="x", arch="lslora_transformer", base=base)


def test_masks_of_A_come_back_too(tmp_path):
    """--pruning-target AB, of components that add nothing as well."""
    made = adapter_files.model()
    generator = torch.Generator().manual_seed(0)
    for layer in (*made.encoder.layers, *made.decoder.layers):
        for side in ("source", "target"):
            holder = getattr(layer, f"{side}_adapters", None)
            if holder is not None:
                holder.mask &= torch.rand(holder.mask.shape, generator=generator) > 0.5
                for language in range(len(holder.names)):
                    holder.weight(language).data.mul_(holder.mask[holder.rows(language)])
    found = assembled([adapter_files.write(tmp_path, made)], made)
    found.pop(RECORD)
    expected = {k: w.clone() for k, w in made.state_dict().items() if k != RECORD}
    same(found, without_effect(expected, made))


def test_languages_of_runs_with_other_orders_and_languages(tmp_path):
    """Rows and columns follow their tokens; what a language has is what it had."""
    first = adapter_files.model()
    other = ["fr", "de", "oc", "en"]
    options = {"lora_tiers": "high=de;low=oc,fr,en", "lora_rank": "2"}
    second = adapter_files.model(other, seed=2, **options)
    lines = first.identity.lines
    with torch.no_grad():  # the same base: words, and the tokens that both have
        state, own = second.state_dict(), first.state_dict()
        for key, weight in adapter_files.base_of(first).items():
            if key not in EMBEDDINGS:
                state[key].copy_(weight)
        rows = state[EMBEDDINGS[0]]
        rows[:lines] = own[EMBEDDINGS[0]][:lines]
        for place, code in enumerate(other):
            if code in CODES:
                rows[lines + place] = own[EMBEDDINGS[0]][lines + CODES.index(code)]
    a = adapter_files.write(tmp_path / "a", first, ["ja"])
    b = adapter_files.write(tmp_path / "b", second, ["oc", "fr"], **options)
    found = assembled([a / "ja.safetensors", b], first)
    told = Identity.from_record(found[RECORD], "x")
    assert told.langs == [*CODES, "oc"] and told.appended[-1] == "__oc__"
    assert told.adapters["ranks"] == {"fr": 2, "ja": 5, "oc": 2}
    assert told.adapters["tiers"] == {"fr": "low", "ja": "low", "oc": "low"}
    for key in EMBEDDINGS:
        assert torch.equal(found[key][:-1], own[key])
        assert torch.equal(found[key][-1], rows[lines + 2])  # random, frozen, its own
    for made, codes in ((first, ["ja"]), (second, ["oc", "fr"])):
        expected = without_effect({k: w.clone() for k, w in made.state_dict().items()}, made)
        for key in [key for key in found if key.rpartition("lora_")[2] in codes]:
            assert torch.equal(found[key], expected[key]), key


def test_the_embeddings_adapter_follows_the_words(tmp_path):
    """A language that is new to the run has a fresh column."""
    made = adapter_files.model(["ja", "en"], lora_tiers="low=en,ja", lora_rank="2", **SHARED)
    options = {"lora_tiers": "low=en,ja", "lora_rank": "2", **SHARED}
    folder = adapter_files.write(tmp_path, made, **options)
    base = adapter_files.base_of(made)
    lines = made.identity.lines
    for key in EMBEDDINGS:  # a base that knows more languages, in another order
        weight = base[key]
        base[key] = torch.cat([weight[:lines], weight[-1:], weight[-2:-1] * 2, weight[-2:-1]])
    Assembly(Collection([folder]), replace(BASE, langs=["en", "fr", "ja"])).assemble(base)
    key = "embedding_adapters.lora_shared"
    before, after = made.state_dict()[key], base[key]
    assert torch.equal(after[:, : 16 + lines], before[:, : 16 + lines])
    ja, en = before[:, -2], before[:, -1]
    assert torch.equal(after[:, -3:], torch.stack([en, torch.zeros(3), ja], 1))
    assert not base["embedding_adapters.pruned"].any()


def test_a_base_that_does_not_tell_its_languages(tmp_path):
    made = adapter_files.model()
    folder = adapter_files.write(tmp_path, made)
    silent = Identity("base.pt")
    found = assembled([folder], made, silent)
    assert Identity.from_record(found[RECORD], "x").langs == list(CODES)
    state = adapter_files.base_of(made)
    for key in EMBEDDINGS:
        state[key] = torch.cat([state[key], state[key][:1]])
    with pytest.raises(ConfigError, match="^base.pt has 5 embedding rows beyond the 34 of"):
        Assembly(Collection([folder]), silent).assemble(state)


def test_a_copy_of_the_base_in_half_precision_is_the_same(tmp_path):
    made = adapter_files.model()
    folder = adapter_files.write(tmp_path, made)
    state = {k: w.half() if w.is_floating_point() else w for k, w in made.state_dict().items()}
    half = {k: state[k] for k in adapter_files.base_of(made)}
    Assembly(Collection([folder]), BASE).assemble(half)
    assert half["encoder.layers.0.fc1.weight"].dtype == torch.half
    assert torch.equal(
        half["encoder.layers.0.source_adapters.lora_fr"].isfinite().all(), torch.tensor(True)
    )


KEYS = ("encoder.layers.1.fc1.weight", "decoder.layer_norm.bias", EMBEDDINGS[0])


@pytest.mark.parametrize("key", KEYS)
def test_another_base_is_refused(tmp_path, key):
    made = adapter_files.model()
    folder = adapter_files.write(tmp_path, made)
    state = adapter_files.base_of(made)
    state[key] = state[key].clone()
    state[key].view(-1)[7] += 0.01
    told = f"^base.pt is not the base model of {folder}/de.safetensors and 3 more: its fingerprint"
    with pytest.raises(ConfigError, match=told):
        Assembly(Collection([folder]), BASE).assemble(state)


def changed(path, change):
    path.write_bytes(adapter_files.rewritten(path, change))


def refusal(places, made, base=BASE):
    with pytest.raises(ConfigError) as caught:
        assembled(places, made, base)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_what_does_not_go_together(tmp_path):
    made = adapter_files.model()
    first = adapter_files.write(tmp_path / "first", made)
    options = {"encoder_index_side": "source*2,target*2"}
    sides = adapter_files.write(tmp_path / "sides", adapter_files.model(**options), **options)
    other = adapter_files.write(tmp_path / "other", adapter_files.model(seed=5))
    shared = adapter_files.write(tmp_path / "shared", adapter_files.model(**SHARED), **SHARED)
    again = adapter_files.write(tmp_path / "again", adapter_files.model(seed=5, **SHARED), **SHARED)
    fr = first / "fr.safetensors"
    for places, told in (
        ([fr, sides / "de.safetensors"], "encoder_index_side is 'source*3,target*1' and 'source*2"),
        ([fr, other / "de.safetensors"], "do not go together, base is '"),
        ([fr, first], f"fr is there twice, {fr} and {fr}: name one of them"),
        (
            [fr, shared / "de.safetensors"],
            "lora_embedding_rank is 0 and 3: adapters of one model",
        ),
        ([shared / "fr.safetensors"], "needs shared.safetensors, what the languages of its run"),
        ([shared / "shared.safetensors"], "is what languages share beside adapters of their own"),
        ([shared / "fr.safetensors", again / "shared.safetensors"], "base is '"),
        ([tmp_path], f"{tmp_path} holds no adapter file (*.safetensors): name a folder that"),
    ):
        assert told in refusal(places, made)


def test_languages_beside_another_shared_part_are_refused(tmp_path):
    made = adapter_files.model(**SHARED)
    one = adapter_files.write(tmp_path / "one", made, ["fr"], **SHARED)
    with torch.no_grad():
        made.encoder.layers[0].shared_adapters.lora_shared[0, 0] += 0.1
    two = adapter_files.write(tmp_path / "two", made, ["de"], **SHARED)
    told = refusal([one, two / "de.safetensors"], made)
    assert "do not go together, shared is '" in told and "--lora-train-languages" in told
    assert "do not go together, shared is" in refusal([one, two], made)


def test_shared_parts_that_are_one_go_together(tmp_path):
    made = adapter_files.model(**SHARED)
    one = adapter_files.write(tmp_path / "one", made, ["fr"], **SHARED)
    two = adapter_files.write(tmp_path / "two", made, ["de"], **SHARED)
    found = assembled([one, two], made)
    assert Identity.from_record(found[RECORD], "x").adapters["shared"] == [2, 4.0]


def test_ranks_that_differ_between_modules_are_refused(tmp_path):
    """The format knows them, the model does not."""
    made = adapter_files.model(prune=0.0)
    folder = adapter_files.write(tmp_path, made, ["fr"])
    name = "encoder.layers.0.fc1"

    def change(header, tensors):
        (module,) = (m for m in header["modules"] if m[0] == name)
        module[4] -= 1
        tensors[f"{name}.lora_A"] = tensors[f"{name}.lora_A"][1:].clone()
        tensors[f"{name}.lora_B"] = tensors[f"{name}.lora_B"][:, 1:].clone()
        for counts in (header["entries"], header["kept"]):
            counts[0] -= module[2]
            counts[1] -= module[3]

    changed(folder / "fr.safetensors", change)
    assert files.read(folder / "fr.safetensors")
    assert "has modules of several ranks or alphas" in refusal([folder], made)


def test_options_of_strangers_that_do_not_fit(tmp_path):
    made = adapter_files.model(prune=0.0)
    for number, (name, value, told) in enumerate(
        (
            ("encoder_index_side", "source*999999999999,target", "names a side for 1000000000000"),
            ("encoder_lora_layers", "0-99999999999999", "is not within the model's layers 0-3"),
            (
                "encoder_target_modules",
                "fc1",
                "encoder.layers.0.fc2 is adapted in another size",
            ),
            ("lora_shape", "round", "--lora-shape round must be full or square"),
        )
    ):
        folder = adapter_files.write(tmp_path / str(number), made, ["fr"])

        def change(header, tensors, name=name, value=value):
            header["options"][name] = value

        changed(folder / "fr.safetensors", change)
        path = re.escape(str(folder / "fr.safetensors"))
        assert re.match(f"{path} does not fit base.pt: .*{told}", refusal([folder], made))


def test_sizes_of_strangers_that_do_not_fit(tmp_path):
    """A module's claims are compared with the model before anything of its size is made."""
    made = adapter_files.model(prune=1.0)
    folder = adapter_files.write(tmp_path, made, ["fr"])

    def change(header, tensors):
        module = header["modules"][0]
        for counts in (header["entries"], header["kept"]):
            counts[0] += module[4] * ((1 << 28) - module[2])
        module[2] = 1 << 28
        tensors[f"{module[0]}.lora_A"] = torch.ones(0, 1 << 28)

    changed(folder / "fr.safetensors", change)
    assert "self_attn.q_proj is adapted in another size" in refusal([folder], made)


def test_a_token_of_another_width(tmp_path):
    made = adapter_files.model()
    folder = adapter_files.write(tmp_path, made, ["fr"])
    row = "encoder.embed_tokens.row"
    changed(folder / "fr.safetensors", lambda h, tensors: tensors.update({row: torch.ones(17)}))
    assert "has a token of 17 numbers, the base model embeddings of 16" in refusal([folder], made)


def test_a_language_that_nobody_knows(tmp_path):
    """Neither the base has its token, nor a file its row."""
    made = adapter_files.model(["de", "en", "oc"], lora_tiers="high=de,en,oc", lora_rank="2")
    options = {"lora_tiers": "high=de,en,oc", "lora_rank": "2"}
    folder = adapter_files.write(tmp_path, made, ["oc"], **options)

    def change(header, tensors):
        header["rows"] = []
        del tensors["encoder.embed_tokens.row"]

    changed(folder / "oc.safetensors", change)
    state = adapter_files.base_of(made)
    for key in EMBEDDINGS:
        state[key] = state[key][:-1]
    with pytest.raises(ConfigError, match="^base.pt does not have __oc__, and no file has"):
        Assembly(Collection([folder]), replace(BASE, langs=["de", "en"])).assemble(state)
    assert refusal([folder], made, replace(BASE, langs=["de", "xx"])).startswith(
        "base.pt has 3 emb"
    )


def test_a_base_with_adapters_of_its_own(tmp_path):
    folder = adapter_files.write(tmp_path, adapter_files.model())
    with pytest.raises(ConfigError, match="^x.pt has adapters of its own, and those of"):
        Assembly.for_base(Collection([folder]), "x.pt", {"lora_tiers": "high=de"})
