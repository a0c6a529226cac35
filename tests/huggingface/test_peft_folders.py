"""Folders of PEFT, out and in again; peft is not needed."""

import json
from argparse import Namespace

import adapter_files
import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

from lslora_fairseq import cli
from lslora_fairseq.adapters.assembly import assembled
from lslora_fairseq.adapters.merging import Merging
from lslora_fairseq.analysis import trained
from lslora_fairseq.errors import ConfigError, UserError
from lslora_fairseq.huggingface import peft
from lslora_fairseq.huggingface.peft import Factors

SHARED = {"lora_shared_rank": 2, "lora_shared_alpha": 3.0, "lora_embedding_rank": 3}
KINDS = {
    "tiers": {"lora_rank": "de=1,en=2,fr=3,ja=5", "lora_alpha": "de=4,en=8,fr=2,ja=1"},
    "sides": {"encoder_index_side": "target*1,source*3", "decoder_index_side": "source,target"},
    "layers": {"encoder_lora_layers": "0,3", "decoder_target_modules": "encoder_attn.out_proj,fc2"},
    "target alone": {"encoder_index_side": "target"},
    "shared": {**SHARED, "lora_alpha": "5"},
}
OUTWARD = {
    "square": {"lora_shape": "square", "encoder_target_modules": "fc1,fc2"},
    "learned sides": {"lora_weight_learning": True, **SHARED},
    "plain": {"lora_rank": "0", **SHARED},
}


class Model:
    """A checkpoint with adapters, the options that it was trained with, and its base."""

    def __init__(self, folder, options):
        self.folder, self.options = folder, options
        made = adapter_files.model(**options)
        for layer in (*made.encoder.layers, *made.decoder.layers):
            if hasattr(layer, "side_weights"):
                layer.side_weights.logits.data.copy_(torch.tensor([[0.3, -0.9]]))
        self.path = adapter_files.save(folder / "checkpoint.pt", made, **options)
        told = {**toy.OPTIONS, **adapter_files.LANGTOKS, "langs": [*toy.CODES]}
        told = {name: value for name, value in told.items() if not name.startswith("lora_")}
        base = {"args": Namespace(**told), "model": adapter_files.base_of(made)}
        torch.save(base, folder / "base.pt")
        text = "".join(f"w{n} 1\n" for n in range(30))
        (folder / "dict.txt").write_text(text, encoding="utf-8")

    def export(self, *args):
        cli.main(["export-peft", self.path, "--out", str(self.folder / "peft"), *args])
        return {place.name: place for place in sorted((self.folder / "peft").iterdir())}

    def import_(self, *folders, more=(), out="adapters"):
        out = self.folder / out
        base = ["--base", self.folder / "base.pt", "--dict", self.folder / "dict.txt"]
        cli.main(["import-peft", *map(str, (*folders, *base, "--out", out, *more))])
        _, content, changed = assembled(str(self.folder / "base.pt"), [str(out)])
        options = {**vars(content["args"]), **changed}
        return Merging(trained.of("the assembled model", options, content["model"]))

    def sides(self):
        return [
            word
            for stack in ("encoder", "decoder")
            if f"{stack}_index_side" in self.options
            for word in (f"--{stack}-index-side", self.options[f"{stack}_index_side"])
        ]

    def merged(self, pair):
        return Merging(trained.read(self.path)).weights(pair)

    def refusal(self, *folders, more=()):
        with pytest.raises(UserError) as ended:
            self.import_(*folders, more=more, out="refused")
        return str(ended.value)


@pytest.fixture(params=KINDS)
def model(request, tmp_path):
    return Model(tmp_path, KINDS[request.param])


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-6, msg=key)


def added(base, *folders):
    """A base's weights with what the folders add, by PEFT's formula."""
    found = {key: weight.clone() for key, weight in base.items()}
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        assert len(tensors) == 2 * len(config["target_modules"])
        for name in config["target_modules"]:
            scaling = config["alpha_pattern"][name] / config["rank_pattern"][name]
            prefix = f"base_model.model.{name}.lora_"
            key = name.removeprefix("model.").replace("lm_head", "decoder.output_projection")
            if name.endswith("embed_tokens"):
                factors = (tensors[f"{prefix}embedding_{x}"] for x in "BA")
                delta = torch.linalg.multi_dot([*factors]).t()
            else:
                delta = tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
            found[f"{key}.weight"] += scaling * delta
    return found


@pytest.mark.parametrize("options", [*KINDS.values(), *OUTWARD.values()], ids=[*KINDS, *OUTWARD])
def test_what_folders_add_is_what_is_merged(options, tmp_path):
    """Halves add up to the direction, and its own folder is their sum."""
    model = Model(tmp_path, options)
    folders = model.export()
    base = torch.load(tmp_path / "base.pt", weights_only=False)["model"]
    pair = None if options is OUTWARD["plain"] else "fr-ja"
    expected = model.merged(pair)
    parts = [folders[n] for n in ("fr-source", "ja-target", "shared") if n in folders]
    same(added(base, *parts), expected)
    sides = 0 if pair is None else 1 + ("fr-source" in folders)
    assert len(folders) == sides * len(toy.CODES) + ("shared" in folders)
    if pair:
        out = tmp_path / "pairs"
        cli.main(["export-peft", model.path, "--pair", "fr-j*", "--out", str(out)])
        assert [p.name for p in out.iterdir()] == ["fr-ja"]
        same(added(base, out / "fr-ja"), expected)


def test_halves_come_back(model):
    """All directions of the files that are written are those of the checkpoint."""
    folders = model.export()
    found = model.import_(*folders.values(), more=model.sides())
    assert found.directions == Merging(trained.read(model.path)).directions
    for pair in ("fr-ja", "de-en"):
        same(found.weights(pair), model.merged(pair))


def test_a_direction_comes_back(model):
    """For the sides that are given; the other halves of its languages add nothing."""
    model.export("--pair", "fr-ja")
    if "lora_embedding_rank" in model.options:
        told = model.refusal(model.folder / "peft" / "fr-ja")
        assert "it adapts " in told and "lm_head" in told and "embed_tokens" in told
        return
    place = model.folder / "peft" / "fr-ja"
    has_source = model.options.get("encoder_index_side") != "target"
    tiers = "high=fr;low=ja" if has_source else "low=ja"
    found = model.import_(place, more=[*model.sides(), "--lora-tiers", tiers])
    assert found.plan.languages.spec == tiers
    same(found.weights("fr-ja"), model.merged("fr-ja"))


def published(folder, modules, **config):
    """A folder as peft writes it: short names of modules, no patterns."""
    folder.mkdir()
    tensors = {}
    for name, (A, B) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj", "fc1"], "rank_pattern": {}, "alpha_pattern": {}, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def some_modules(rank=2):
    names = {"model.encoder.layers.0.self_attn.q_proj": 16, "model.encoder.layers.3.fc1": 32}
    names["model.decoder.layers.1.encoder_attn.q_proj"] = 16
    return {name: (torch.randn(rank, 16), torch.randn(n, rank)) for name, n in names.items()}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"fc1": 3}}])
def test_an_adapter_of_others(tmp_path, config):
    """Scaled by alpha / rank or alpha / √rank, all layers or some."""
    model, modules = Model(tmp_path, {}), some_modules()
    folder = published(tmp_path / "en-fr", modules, **config)
    found = model.import_(folder).weights("en-fr")
    base = torch.load(tmp_path / "base.pt", weights_only=False)["model"]
    expected = dict(base)
    for name, (A, B) in modules.items():
        alpha = config.get("alpha_pattern", {}).get(name[-3:], 8)
        scaling = alpha / (2**0.5 if "use_rslora" in config else 2)
        key = f"{name.removeprefix('model.')}.weight"
        expected[key] = expected[key] + scaling * B @ A
    same(found, expected)
    assert not torch.equal(
        found["encoder.layers.3.fc1.weight"], base["encoder.layers.3.fc1.weight"]
    )


def test_what_is_not_plain_lora(tmp_path):
    model = Model(tmp_path, {})
    modules = {
        **some_modules(),
        "model.encoder.embed_positions": (torch.ones(2, 3), torch.ones(3, 2)),
    }
    told = model.refusal(
        published(
            tmp_path / "en-fr", modules, use_dora=True, bias="all", modules_to_save=["lm_head"],
            init_lora_weights="pissa", r=4, rank_pattern={"(": 2}, alpha_pattern={"fc1": "x"},
            target_modules=["q_proj", "fc2", "embed_positions", "model.decoder.layers.0.fc1"],
        )
    )  # fmt: skip
    for reason in (
        "it has use_dora True", "it has bias all", "it has modules_to_save ['lm_head']",
        "it has init_lora_weights pissa", "it lacks the adapter of model.decoder.layers.0.fc1",
        "layers.3.fc1, which is none of its target modules",
        "it adapts model.encoder.embed_positions", "q_proj has rank 2, and its settings say 4",
        "name a plain LoRA adapter of self_attn.q_proj",
    ):  # fmt: skip
        assert reason in told, reason


def test_what_else_is_refused(tmp_path):
    model, modules = Model(tmp_path, {}), some_modules()
    folder = published(tmp_path / "en-fr", modules)
    for folders, more, told in (
        ([f"en={folder}"], [], "write NAME=FOLDER with a NAME such as en-source"),
        ([tmp_path / "xx-fr"], [], "no such folder: name one that PEFT wrote"),
        ([f"xx-fr={folder}"], [], "base.pt does not have xx: write the codes as it does, de, en"),
        ([folder, f"en-source={folder}"], [], "the source adapters of en are there twice"),
        ([f"en-source={folder}"], [], "which is no layer of"),
        ([f"shared={folder}"], [], "is what languages share: name adapters of languages, too"),
        (
            [folder],
            ["--lora-tiers", "high=en"],
            "--lora-tiers names en, and the folders hold en, fr",
        ),
        ([folder], ["--encoder-index-side", "source*9"], "names a side for 9 layers"),
        ([folder], ["--dict", tmp_path / "none.txt"], "--dict"),
        ([folder], ["--base", model.path], "has adapters of its own: name the base model"),
        (
            [folder],
            ["--base", tmp_path / "none.pt"],
            "no such file: name the checkpoint of the base",
        ),
    ):
        assert told in model.refusal(*folders, more=more), told
    (tmp_path / "en-fr" / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "cannot read" in model.refusal(folder)
    (tmp_path / "en-fr" / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in model.refusal(folder)
    wide = published(tmp_path / "de-fr", {"model.encoder.layers.0.fc1": modules.popitem()[1]})
    assert "fc1 of de is 16 × 16, and in" in model.refusal(wide)


def test_a_folder_that_peft_would_take_otherwise_is_not_written(tmp_path):
    """PEFT passes over tensors that it does not look for, and takes the first pattern that fits."""
    odd = {
        "model.encoder.layers.0.fc.": Factors(torch.ones(1, 4), torch.ones(4, 1), 1),
        "model.encoder.layers.0.fc1": Factors(torch.ones(2, 4), torch.ones(4, 2), 2),
    }
    with pytest.raises(ConfigError, match="fc1 has rank 2, and its settings say 1"):
        peft.write(str(tmp_path), odd, None, "")


def test_cards_and_names(tmp_path):
    model = Model(tmp_path, KINDS["shared"])
    folders = model.export("--base-name", "hub/nllb")
    card = (folders["en-source"] / "README.md").read_text("utf-8")
    assert 'base_model: "hub/nllb"' in card and '["en-source", "de-target", "shared"]' in card
    assert "three times" in (folders["shared"] / "README.md").read_text("utf-8")
    config = json.loads((folders["shared"] / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "hub/nllb"
    (tmp_path / "plain").mkdir()
    plain = Model(tmp_path / "plain", OUTWARD["plain"])
    with pytest.raises(UserError, match="belong to all languages alike: leave out --pair"):
        plain.export("--pair", "en-fr")
