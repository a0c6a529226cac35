"""Models of fairseq become folders of Hugging Face; transformers is not needed."""

import json

import adapter_files
import hub
import pytest
import torch
from fairseq.data import Dictionary
from safetensors import safe_open
from safetensors.torch import load_file

from lslora_fairseq import cli
from lslora_fairseq.adapters.merging import Merging
from lslora_fairseq.analysis import trained
from lslora_fairseq.checkpoints import read_checkpoint
from lslora_fairseq.errors import UserError
from lslora_fairseq.huggingface import importing, sentencepiece_model
from lslora_fairseq.huggingface.tokenizer import Tokenizer
from lslora_fairseq.keys import EMBEDDINGS

TEXT = ["hello world, this is a test", "und noch eine Zeile", "une autre ligne de texte"] * 9
SHARED = {"lora_shared_rank": 2, "lora_shared_alpha": 3.0, "lora_embedding_rank": 3}


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return hub.spm(tmp_path_factory.mktemp("spm") / "spm.model", TEXT, size=90)


def export(checkpoint, out, *args):
    cli.main(["export-hf", *map(str, (checkpoint, "--out", out, *args))])
    return json.loads((out / "config.json").read_text("utf-8")), load_file(
        out / "model.safetensors"
    )


def refusal(*args):
    with pytest.raises(UserError) as ended:
        cli.main(["export-hf", *map(str, args)])
    return str(ended.value)


def adapted(folder, spm, **options):
    """A checkpoint with adapters, and its dictionary as options of the command."""
    made = adapter_files.model(**options)
    dictionary = folder / "dict.txt"
    dictionary.write_text("".join(f"w{n} 1\n" for n in range(30)), encoding="utf-8")
    path = adapter_files.save(folder / "checkpoint.pt", made, **options)
    return path, ["--dict", dictionary, "--spm", spm]


@pytest.mark.parametrize("form", ["m2m", "nllb"])
def test_in_and_out_and_in_again(form, spm, tmp_path):
    """Every bit, every number of a token, and the options come back."""
    getattr(hub, form)(tmp_path / "hf", spm, activation_function="gelu")
    ours, again = tmp_path / "ours", tmp_path / "again"
    importing.write(str(tmp_path / "hf"), str(ours))
    files = ["--dict", ours / "dict.txt", "--spm", ours / "sentencepiece.bpe.model"]
    config, tensors = export(ours / "model.pt", tmp_path / "out", *files)
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], weight) for key, weight in expected.items())
    told = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    same = told.keys() & config.keys() - {"encoder_layerdrop", "decoder_layerdrop"}
    assert {k: config[k] for k in same} == {k: told[k] for k in same} and len(same) > 15
    assert not config["encoder_layerdrop"] and config["tie_word_embeddings"]
    importing.write(str(tmp_path / "out"), str(again))
    for name in ("dict.txt", "langs.txt", "sentencepiece.bpe.model"):
        assert (again / name).read_bytes() == (ours / name).read_bytes(), name
    (first, weights), (second, others) = (read_checkpoint(f / "model.pt") for f in (ours, again))
    assert first == second and weights.keys() == others.keys()
    assert all(torch.equal(others[key], weight) for key, weight in weights.items())


def test_a_direction_is_merged(spm, tmp_path):
    path, files = adapted(tmp_path, spm, **SHARED)
    config, tensors = export(path, tmp_path / "out", "--pair", "fr-ja", *files)
    expected = Merging(trained.read(path)).weights("fr-ja")
    embeddings = [expected.pop(key) for key in EMBEDDINGS]
    assert torch.equal(tensors.pop("model.shared.weight"), embeddings[0])
    kept = {k: w for k, w in expected.items() if "version" not in k and "positions" not in k}
    assert tensors.keys() == {f"model.{key}" for key in kept}
    assert all(torch.equal(tensors[f"model.{key}"], weight) for key, weight in kept.items())
    assert config["vocab_size"] == 38 and config["torch_dtype"] == "float32"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))
    assert generation["forced_bos_token_id"] == 37 and generation["decoder_start_token_id"] == 2
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))
    first, text, last = tokenizer["post_processor"]["single"]
    assert first["SpecialToken"]["id"] == "__fr__" and last["SpecialToken"]["id"] == "</s>"
    assert "from fr to ja" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_base_in_half_precision_stays_one_dtype(spm, tmp_path):
    """What is merged is fp32, and so is then all."""
    path, files = adapted(tmp_path, spm)
    content = torch.load(path)
    weights = {k: w.half() if w.is_floating_point() else w for k, w in content["model"].items()}
    torch.save({**content, "model": weights}, path)
    config, tensors = export(path, tmp_path / "merged", "--pair", "de-en", *files)
    assert {w.dtype for w in tensors.values()} == {torch.float32}
    assert config["torch_dtype"] == "float32"
    config, tensors = export(path, tmp_path / "base", "--without-adapters", *files)
    assert {w.dtype for w in tensors.values()} == {torch.float16}
    assert config["torch_dtype"] == "float16"
    key = "decoder.layers.1.fc2.weight"
    assert torch.equal(tensors[f"model.{key}"], weights[key])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_symbol_has_the_dictionarys_number(corpus, kind, tmp_path):
    model, words = corpus.spm, corpus.dictionary
    if kind == "bpe":
        model, words = hub.spm(tmp_path / "bpe.model", corpus.text["de"]), tmp_path / "dict.txt"
        words.write_text("".join(f"{p} 1\n" for p in hub.pieces(model)), encoding="utf-8")
    read = sentencepiece_model.read(model)
    tokens = {code: f"__{code}__" for code in ("de", "en", "fr", "ja")}
    symbols = [*Dictionary.load(str(words)).symbols, *tokens.values()]
    made = Tokenizer(symbols, tokens, read).files()["tokenizer.json"]
    vocab = made["model"]["vocab"]
    found = [piece for piece, _ in vocab] if kind == "unigram" else [*vocab]
    assert found == symbols and made["model"]["type"].lower() == kind
    assert all(symbols[token["id"]] == token["content"] for token in made["added_tokens"])
    assert len(made["added_tokens"]) == 8
    assert made["normalizer"]["normalizers"][0]["type"] == "Precompiled"
    assert len(read.characters) > 1000 and read.adds_prefix and not read.falls_back


def test_nllbs_codes_are_their_own_tokens(spm, tmp_path):
    hub.nllb(tmp_path / "hf", spm)
    importing.write(str(tmp_path / "hf"), str(tmp_path / "ours"))
    files = ["--dict", tmp_path / "ours/dict.txt", "--spm", spm]
    export(tmp_path / "ours" / "model.pt", tmp_path / "out", *files)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    langs = settings["additional_special_tokens"]
    assert langs[:2] == ["deu_Latn", "eng_Latn"] and "sat_Olck" in langs
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_all_reasons_are_in_one_message(spm, tmp_path):
    options = {
        "encoder_normalize_before": False, "decoder_normalize_before": False,
        "share_all_embeddings": False, "encoder_learned_pos": True, "decoder_learned_pos": True,
        "layernorm_embedding": True, "activation_fn": "tanh", "lang_tok_replacing_bos_eos": True,
    }  # fmt: skip
    path, files = adapted(tmp_path, spm, **options)
    told = refusal(path, "--pair", "de-en", "--out", tmp_path / "out", *files)
    assert "cannot become a M2M100ForConditionalGeneration (9 reasons): " in told
    for option in (
        "without --encoder-normalize-before", "without --decoder-normalize-before",
        "without --share-all-embeddings", "with --encoder-learned-pos",
        "with --decoder-learned-pos", "with --layernorm-embedding", "with --activation-fn tanh",
        "with --lang-tok-replacing-bos-eos", "its embeddings are not one matrix",
    ):  # fmt: skip
        assert option in told, option
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(corpus, spm, tmp_path):
    path, files = adapted(tmp_path, spm)
    new = ["--out", tmp_path / "out"]
    assert "of languages: give --pair, such as de-en, or --without-" in refusal(path, *new, *files)
    assert "of languages: give --pair" in refusal(path, *new, *files, "--pair", "de-xx")
    both = ["--pair", "de-en", "--without-adapters"]
    assert "of languages: give --pair" in refusal(path, *new, *files, *both)
    words = ["--dict", corpus.dictionary, "--spm", spm, "--without-adapters"]
    assert "has 38 embedding rows, --dict" in refusal(path, *new, *words)
    words[1] = tmp_path / "nothing"
    assert "--dict" in refusal(path, *new, *words)
    words[1:4:2] = files[1], files[1]
    assert "is no SentencePiece model: name the one" in refusal(path, *new, *words)
    assert "no such file" in refusal(tmp_path / "nothing.pt", *new, *files)
    told = refusal(corpus.base, *new, *files, "--pair", "de-en")
    assert "has no adapters: leave out --pair and --without-adapters" in told
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "is there already" in refusal(path, *new, *files, "--without-adapters")


def test_adapters_of_all_languages_alone_are_merged_for_all(spm, tmp_path):
    path, files = adapted(tmp_path, spm, lora_rank="0", lora_shared_rank=2)
    _, merged = export(path, tmp_path / "out", *files)
    _, base = export(path, tmp_path / "base", *files, "--without-adapters")
    key = "model.encoder.layers.0.fc1.weight"
    assert not torch.equal(merged[key], base[key])
    told = refusal(path, "--out", tmp_path / "x", *files, "--pair", "de-en")
    assert "adapters that all languages share alone: give --without-adapters, or neither" in told


def test_pieces_that_the_dictionary_lacks_are_told(corpus, tmp_path, capsys):
    path, files = adapted(tmp_path, corpus.spm)
    export(path, tmp_path / "out", *files, "--without-adapters")
    told = capsys.readouterr().err
    assert told.startswith("WARNING: the dictionary lacks") and "<unk>" in told
