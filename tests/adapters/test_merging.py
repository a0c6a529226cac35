"""What lslora merge writes is what the model itself merges, bit by bit."""

import adapter_files
import pytest
import torch
from toy import CODES, OPTIONS

from lslora_fairseq.adapters.assembly import Assembly
from lslora_fairseq.adapters.collection import Collection
from lslora_fairseq.adapters.merging import Merging
from lslora_fairseq.analysis import trained
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import FUSED_COPIES, RECORD

SHARED = {"lora_shared_rank": 2, "lora_shared_alpha": 3.0, "lora_embedding_rank": 3}
PLAIN = {"lora_rank": "0", **SHARED}


def merging(folder, made, **options):
    return Merging(trained.read(adapter_files.save(folder / "checkpoint.pt", made, **options)))


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        SHARED,
        PLAIN,
        {"lora_alpha": "de=4,high=8,low=2", "lora_shape": "square"},
        {"encoder_index_side": "target", "decoder_target_modules": "none"},
        {"share_all_embeddings": False},
        {"lora_weight_learning": True},
        {"lora_weight_learning": True, **SHARED},
    ],
)
def test_weights_are_those_of_the_merged_model(tmp_path, options):
    made = adapter_files.model(**options)
    for layer in (*made.encoder.layers, *made.decoder.layers):
        if hasattr(layer, "side_weights"):
            layer.side_weights.logits.data.copy_(torch.tensor([[0.3, -0.9]]))
    before = merging(tmp_path, made, **options)
    pair = None if options is PLAIN else "fr-ja"
    found = before.weights(pair)
    made.merge(CODES.index("fr"), CODES.index("ja"))
    same(found, made.state_dict())
    base = adapter_files.base_of(adapter_files.model(**options))
    changed = [key for key in found if not torch.equal(found[key], base[key])]
    assert f"{before.plan.all_sites[0].name}.weight" in changed


def test_each_direction_is_another(tmp_path):
    made = adapter_files.model()
    ours = merging(tmp_path, made)
    assert (
        ours.directions[:4] == ["de-en", "de-fr", "de-ja", "en-de"] and len(ours.directions) == 12
    )
    fr, ja = (ours.weights(pair) for pair in ("en-fr", "en-ja"))
    key = "decoder.layers.1.fc2.weight"
    assert not torch.equal(fr[key], ja[key])


def test_half_precision_is_merged_in_fp32(tmp_path):
    """A model in fp32 that loads such a checkpoint has these weights."""
    made, wanted = (adapter_files.model(**SHARED) for _ in range(2))
    halved = {k: w.half() if w.is_floating_point() else w for k, w in made.state_dict().items()}
    wanted.load_state_dict(halved)
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(adapter_files.save(path, made, **SHARED))
    torch.save({**saved, "model": halved}, path)
    found = Merging(trained.read(str(path))).weights("fr-ja")
    wanted.merge(CODES.index("fr"), CODES.index("ja"))
    same({k: w.to(wanted.state_dict()[k].dtype) for k, w in found.items()}, wanted.state_dict())
    assert found["encoder.layers.0.fc1.weight"].dtype == torch.float


def test_files_on_their_base_are_merged_the_same(tmp_path):
    made = adapter_files.model(**SHARED)
    files = Collection([adapter_files.write(tmp_path, made, **SHARED)])
    state = adapter_files.base_of(made)
    state |= {f"encoder.layers.0.{name}": torch.ones(2) for name in FUSED_COPIES}
    assembly = Assembly(files, Identity("base.pt", "transformer", list(CODES)))
    options = {**OPTIONS, **assembly.options(38)}
    assembly.assemble(state)
    assert not any(key.endswith(FUSED_COPIES) for key in state)
    found = Merging(trained.of("base.pt", options, state)).weights("de-fr")
    made.merge(CODES.index("de"), CODES.index("fr"))
    same(found, made.state_dict())


def test_copies_for_the_fused_path_are_left_out(tmp_path):
    """Stock fairseq 0.12.2 makes them anew, its main branch does not know them."""
    made = adapter_files.model()
    path = adapter_files.save(tmp_path / "checkpoint.pt", made)
    state = torch.load(path)
    state["model"].update({f"encoder.layers.0.{name}": torch.ones(2) for name in FUSED_COPIES})
    number = "encoder.embed_positions._float_tensor"
    state["model"][number] = torch.ones(1)
    torch.save(state, path)
    found = Merging(trained.read(path)).weights("en-de")
    assert not any(key.endswith(FUSED_COPIES) for key in found)
    assert found[number] == 0  # it was whatever stood in memory


def test_how_tokens_are_told_to_stock_fairseq(tmp_path):
    made = adapter_files.model()
    specs = {"encoder_langtok": "tgt", "decoder_langtok": False, "fixed_dictionary": "a b.txt"}
    ours = merging(tmp_path, made, **specs, lang_tok_replacing_bos_eos=True)
    ours.identity.lang_tok_style, ours.identity.extra_data = "mbart", ["mono_dae"]
    line = ours.command("x.pt", "en-fr")
    assert line == (
        "fairseq-generate DATA --path x.pt --task translation_multi_simple_epoch --lang-pairs "
        "en-fr -s en -t fr --langs de,en,fr,ja --encoder-langtok tgt --lang-tok-replacing-bos-eos "
        "--lang-tok-style mbart --extra-data '{'\"'\"'mono_dae'\"'\"': '\"'\"''\"'\"'}' "
        "--fixed-dictionary 'a b.txt'"
    )
    other = merging(tmp_path, made, langtoks={"main": ("src", None), "mined": ("tgt", "tgt")})
    assert "--langtoks" in other.command("x.pt", "en-fr")
    assert other.checkpoint("en-fr")["cfg"]["task"]["langtoks"] == {"main": ["src", None]}


def test_a_checkpoint_that_does_not_tell_its_languages(tmp_path):
    made = adapter_files.model()
    path = adapter_files.save(tmp_path / "checkpoint.pt", made, langs=None)
    state = torch.load(path)
    del state["model"][RECORD]
    torch.save(state, path)
    with pytest.raises(ConfigError, match="does not tell its languages, as an earlier version"):
        Merging(trained.read(path))
