"""Adapters in the hands of peft itself, where it is installed."""

import json

import adapter_files
import hub
import pytest
import torch
import toy
from safetensors.torch import load_file

from lslora_fairseq import cli
from lslora_fairseq.adapters.merging import Merging
from lslora_fairseq.analysis import trained

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT = ["hello world, this is a test", "und noch eine Zeile", "une autre ligne de texte"] * 9
SHARED = {"lora_shared_rank": 2, "lora_shared_alpha": 3.0, "lora_embedding_rank": 3}
KINDS = {
    "tiers": {"lora_rank": "de=1,en=2,fr=3,ja=5", "lora_alpha": "de=4,en=8,fr=2,ja=1"},
    "square": {"lora_shape": "square", "encoder_target_modules": "fc1,fc2"},
    "learned sides": {"lora_weight_learning": True},
    "shared": {**SHARED, "lora_alpha": "5"},
    "learned and shared": {"lora_weight_learning": True, **SHARED},
}


class Exported:
    """A model with adapters of a kind, its base for transformers, and its adapters for peft."""

    def __init__(self, folder, options):
        self.folder = folder
        made = adapter_files.model(**options)
        for layer in (*made.encoder.layers, *made.decoder.layers):
            if hasattr(layer, "side_weights"):
                layer.side_weights.logits.data.copy_(torch.tensor([[0.3, -0.9]]))
        self.path = adapter_files.save(folder / "checkpoint.pt", made, **options)
        words = folder / "dict.txt"
        words.write_text("".join(f"w{n} 1\n" for n in range(30)), encoding="utf-8")
        spm = hub.spm(folder / "spm.model", TEXT, size=90)
        given = ["--dict", str(words), "--spm", str(spm), "--without-adapters"]
        cli.main(["export-hf", self.path, "--out", str(folder / "base"), *given])
        cli.main(["export-peft", self.path, "--out", str(folder / "halves")])
        cli.main(["export-peft", self.path, "--pair", "*-*", "--out", str(folder / "pairs")])
        self.made = made.eval()

    def base(self):
        load = transformers.M2M100ForConditionalGeneration.from_pretrained
        return load(self.folder / "base").eval()

    def halves(self, model, source, target):
        """The model with the halves of a direction, active together."""
        names = [f"{source}-source", f"{target}-target", "shared"]
        names = [name for name in names if (self.folder / "halves" / name).exists()]
        for name in names:
            place = self.folder / "halves" / name
            if isinstance(model, peft.PeftModel):
                model.load_adapter(place, adapter_name=name)
            else:
                model = peft.PeftModel.from_pretrained(model, place, adapter_name=name)
        model.base_model.set_adapter(names)
        return model.eval()

    def pair(self, name, model=None):
        load = peft.PeftModel.from_pretrained
        return load(model or self.base(), self.folder / "pairs" / name, adapter_name=name).eval()


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("peft"), KINDS[request.param])


def logits(model, batch, **kwargs):
    source = batch["src_tokens"]
    told = {"input_ids": source, "attention_mask": source.ne(1)}
    with torch.no_grad():
        return model(**told, decoder_input_ids=batch["prev_output_tokens"], **kwargs).logits


def check(found, expected, batch):
    kept = batch["prev_output_tokens"].ne(1)
    scale = expected[kept].abs().max()
    torch.testing.assert_close(found[kept] / scale, expected[kept] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pair", [("fr", "ja"), ("ja", "de")])
def test_logits_of_halves_and_pairs(exported, pair):
    source, target = (toy.CODES.index(code) for code in pair)
    batch = toy.batch([(source, target)] * 4)
    with torch.no_grad():
        expected = exported.made(**batch)[0]
    check(logits(exported.pair("-".join(pair)), batch), expected, batch)
    check(logits(exported.halves(exported.base(), *pair), batch), expected, batch)
    plain = logits(exported.base(), batch)
    assert (plain - expected).abs().max() > 0.1


def test_greedy_tokens(exported):
    """Of the merged model in transformers, halves and pair."""
    merged = Merging(trained.read(exported.path)).weights("en-fr")
    ours = exported.base()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            key = name.removeprefix("model.").replace("shared", "encoder.embed_tokens")
            weight.copy_(merged[key])
    source = toy.batch([(1, 2)] * 4)["src_tokens"]
    told = {"input_ids": source, "attention_mask": source.ne(1), "forced_bos_token_id": 36}
    how = {"max_new_tokens": 12, "max_length": None, "num_beams": 1, "early_stopping": False}
    expected = ours.generate(**told, **how)
    assert torch.equal(exported.pair("en-fr").generate(**told, **how), expected)
    halves = exported.halves(exported.base(), "en", "fr")
    assert torch.equal(halves.generate(**told, **how), expected)
    assert not torch.equal(exported.base().generate(**told, **how), expected)


def test_a_mixed_batch(exported):
    """One adapter for each sentence, by name."""
    pairs = [("en", "fr"), ("fr", "ja"), ("de", "en"), ("en", "fr")]
    batch = toy.batch([tuple(map(toy.CODES.index, pair)) for pair in pairs])
    with torch.no_grad():
        expected = exported.made(**batch)[0]
    names = ["-".join(pair) for pair in pairs]
    model = exported.pair(names[0])
    for name in dict.fromkeys(names[1:3]):
        model.load_adapter(exported.folder / "pairs" / name, adapter_name=name)
    check(logits(model.eval(), batch, adapter_names=names), expected, batch)


def test_peft_uses_every_tensor(exported):
    """Those of the folder are those of the loaded adapter, and no other module has one."""
    place = exported.folder / "pairs" / "en-fr"
    saved = load_file(place / "adapter_model.safetensors")
    told = {"adapter_name": "en-fr", "save_embedding_layers": False}
    found = peft.get_peft_model_state_dict(exported.pair("en-fr"), **told)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    config = json.loads((place / "adapter_config.json").read_text("utf-8"))
    assert len(saved) == 2 * len(config["target_modules"])
    assert [*config["rank_pattern"]] == [*config["alpha_pattern"]] == config["target_modules"]
