"""Folders of Hugging Face become checkpoints of fairseq; transformers is not needed."""

import json
import shlex
import shutil
import sys

import hub
import pytest
import torch
from console import ROOT, lslora, run
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from safetensors.torch import load_file, save_file

from lslora_fairseq import cli
from lslora_fairseq.errors import UserError
from lslora_fairseq.huggingface import importing, vocabulary
from lslora_fairseq.keys import EMBEDDINGS

TEXT = ["hello world, this is a test", "und noch eine Zeile", "une autre ligne de texte"] * 9


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return hub.spm(tmp_path_factory.mktemp("spm") / "spm.model", TEXT, size=90)


@pytest.fixture(params=["m2m", "nllb"])
def folder(request, spm, tmp_path):
    getattr(hub, request.param)(tmp_path / "hf", spm)
    return tmp_path / "hf"


def refusal(folder):
    with pytest.raises(UserError) as ended:
        cli.main(["import-hf", str(folder), "--out", str(folder.parent / "out")])
    assert not (folder.parent / "out").exists()
    return str(ended.value).removeprefix("lslora: error: ")


def change(folder, name, **fields):
    content = json.loads((folder / name).read_text("utf-8"))
    hub.write_json(folder, name, {**content, **fields})


def imported(folder):
    """The folder, and the content of the checkpoint in it."""
    out = folder.parent / "out"
    importing.write(str(folder), str(out))
    return out, torch.load(out / "model.pt", weights_only=True)


def test_every_bit_is_there_under_its_other_name(folder):
    theirs = load_file(folder / "model.safetensors")
    shared = theirs.pop("model.shared.weight")
    ours = imported(folder)[1]["model"]
    assert all(torch.equal(ours.pop(key), shared) for key in EMBEDDINGS)
    # without them, fairseq takes the last layer norms away
    assert ours.pop("encoder.version") == ours.pop("decoder.version") == 3
    assert ours.keys() == {key.removeprefix("model.") for key in theirs}
    for key, weight in theirs.items():
        assert torch.equal(ours[key.removeprefix("model.")], weight), key


def test_rows_of_m2m(spm, tmp_path):
    """Pieces in the order of vocab.json, then 100 languages, then 8 rows without a word."""
    hub.m2m(tmp_path / "hf", spm)
    out, _ = imported(tmp_path / "hf")
    symbols = Dictionary.load(str(out / "dict.txt")).symbols
    vocab = json.loads((tmp_path / "hf" / "vocab.json").read_text("utf-8"))
    assert symbols[: len(vocab)] == [*vocab] and symbols[4:6] == hub.pieces(spm)[:-3:-1]
    assert symbols[len(vocab)] == "__af__" and symbols[len(vocab) + 99] == "__zu__"
    assert symbols[-8:] == [f"madeupword{n:04d}" for n in range(8)]
    assert len(symbols) == len(vocab) + 108
    assert (out / "sentencepiece.bpe.model").read_bytes() == spm.read_bytes()


def test_rows_of_nllb_and_an_order_that_is_not_the_alphabets(spm, tmp_path):
    hub.nllb(tmp_path / "hf", spm)
    out, content = imported(tmp_path / "hf")
    langs = (out / "langs.txt").read_text("utf-8").split()
    assert langs == [code.replace("sat_Beng", "sat_Olck") for code in hub.NLLB] != sorted(langs)
    tokens = [f"__{code}__" for code in langs]
    rest = ["<mask>", "madeupword0000", "madeupword0001"]
    symbols = Dictionary.load(str(out / "dict.txt")).symbols
    assert symbols == [*hub.SPECIALS, *hub.pieces(spm), *tokens, *rest]
    assert content["cfg"]["task"]["langs"] == langs and content["args"] is None


@pytest.mark.parametrize("told_by", ["tokenizer_config.json", "added_tokens.json", None])
def test_numbers_of_languages_from_other_files(spm, tmp_path, told_by):
    """As the slow tokenizers write them: numbers where they are told, otherwise the list."""
    folder = tmp_path / "hf"
    hub.nllb(folder, spm)
    start = 4 + len(hub.pieces(spm))
    (folder / "tokenizer.json").unlink()
    # where numbers are told, the order of the list does not matter
    listed = hub.NLLB if told_by is None else sorted(hub.NLLB)
    change(folder, "special_tokens_map.json", additional_special_tokens=listed)
    told = {code: start + n for n, code in enumerate(hub.NLLB)}
    if told_by == "added_tokens.json":
        hub.write_json(folder, told_by, told)
    elif told_by:
        entries = {str(number): {"content": code} for code, number in told.items()}
        change(folder, told_by, added_tokens_decoder=entries)
    out, _ = imported(folder)
    assert (out / "langs.txt").read_text("utf-8").split()[2:5] == [
        "fao_Latn",
        "pes_Arab",
        "fij_Latn",
    ]


def test_m2m_without_a_list_has_that_of_its_tokenizers_class(spm, tmp_path):
    hub.m2m(tmp_path / "hf", spm)
    change(tmp_path / "hf", "special_tokens_map.json", additional_special_tokens=[])
    out, _ = imported(tmp_path / "hf")
    assert (out / "langs.txt").read_text("utf-8").split()[-2:] == ["zh", "zu"]


def test_other_forms_of_the_weights(spm, tmp_path):
    """Shards of safetensors, and a .bin with names that older versions wrote."""
    hub.m2m(tmp_path / "one" / "hf", spm)
    expected = imported(tmp_path / "one" / "hf")[1]["model"]
    for form in ("shards", "bin", "bin shards"):
        folder = tmp_path / form / "hf"
        shutil.copytree(tmp_path / "one" / "hf", folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        ending = "bin" if "bin" in form else "safetensors"
        if ending == "bin":
            shared = tensors["model.shared.weight"]
            more = ("lm_head.weight", "model.encoder.embed_tokens.weight")
            tensors.update(dict.fromkeys(more, shared))
            tensors["model.decoder.embed_positions.weights"] = torch.randn(9, 16)
            tensors["final_logits_bias"] = torch.zeros(1, len(shared))
        write = torch.save if ending == "bin" else save_file
        stem = "pytorch_model" if ending == "bin" else "model"
        if "shards" not in form:
            write(tensors, folder / f"{stem}.{ending}")
        else:
            where = {k: f"{stem}-0000{1 + n % 2}-of-00002.{ending}" for n, k in enumerate(tensors)}
            for name in {*where.values()}:
                write({k: tensors[k] for k, n in where.items() if n == name}, folder / name)
            hub.write_json(folder, f"{stem}.{ending}.index.json", {"weight_map": where})
        found = imported(folder)[1]["model"]
        assert found.keys() == expected.keys(), form
        assert all(torch.equal(found[key], weight) for key, weight in expected.items()), form


def test_what_the_options_are(spm, tmp_path, capsys):
    """They are those of config.json, and are enough for a model of ours and for the doctor."""
    folder = tmp_path / "hf"
    hub.nllb(folder, spm, activation_function="gelu", dropout=0.2)
    cli.main(["import-hf", str(folder), "--out", str(tmp_path / "out"), "--format", "flags"])
    line = capsys.readouterr().out
    words = shlex.split(line)
    assert line.count("\n") == 1 and words[0] == "--finetune-from-model"
    for option, value in (
        ("--encoder-layers", "2"), ("--decoder-layers", "1"), ("--encoder-embed-dim", "16"),
        ("--decoder-ffn-embed-dim", "24"), ("--encoder-attention-heads", "4"),
        ("--activation-fn", "gelu"), ("--dropout", "0.2"), ("--attention-dropout", "0.1"),
    ):  # fmt: skip
        assert words[words.index(option) + 1] == value
    for option in ("--encoder-normalize-before", "--decoder-langtok", "--share-all-embeddings"):
        assert option in words
    options = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["cfg"]["model"]
    assert not options["encoder_layerdrop"] and options["max_source_positions"] == 1024


def test_stock_fairseq_loads_it(folder):
    """Strictly, with the last layer norms of both stacks, which it takes from models without a
    version."""
    out, content = imported(folder)
    told = {"data": str(out), "fixed_dictionary": str(out / "dict.txt")}
    (model,), _, task = load_model_ensemble_and_task([str(out / "model.pt")], told)
    assert type(model) is TransformerModel
    assert len(task.source_dictionary) == len(content["model"][EMBEDDINGS[0]])
    for stack in (model.encoder, model.decoder):
        name = "encoder" if stack is model.encoder else "decoder"
        assert torch.equal(stack.layer_norm.weight, content["model"][f"{name}.layer_norm.weight"])
    assert model.encoder.embed_tokens.weight is model.decoder.output_projection.weight


@pytest.mark.parametrize("form", [pytest.param("m2m", marks=pytest.mark.slow), "nllb"])
def test_doctor_says_ok_on_every_line(form, spm, tmp_path):
    getattr(hub, form)(tmp_path / "hf", spm)
    out, _ = imported(tmp_path / "hf")
    source, target = (out / "langs.txt").read_text("utf-8").split()[1:3]
    for split in ("train", "valid"):
        for lang in (source, target):
            (tmp_path / f"{split}.{lang}").write_text("▁h\n" * 3, encoding="utf-8")
    run(
        "fairseq-preprocess", "-s", source, "-t", target, "--srcdict", out / "dict.txt",
        "--tgtdict", out / "dict.txt", "--trainpref", tmp_path / "train", "--validpref",
        tmp_path / "valid", "--destdir", tmp_path / "data",
    )  # fmt: skip
    _, told, _ = lslora(
        "doctor", "--checkpoint", out / "model.pt", "--data", tmp_path / "data", "--dict",
        out / "dict.txt", "--lang-dict", out / "langs.txt", "--format", "json", "--lora-tiers",
        f"high={source};low={target}", "--cpu",
    )  # fmt: skip
    lines = json.loads(told)["lines"]
    assert len(lines) > 6
    assert [line for line in lines if line["status"] != "ok"] == []


def test_memory_stays_below_that_of_the_model(spm, tmp_path):
    """Both files are mapped or written piece by piece: 1.2 times the model at most."""
    folder, script, peaks = tmp_path / "hf", tmp_path / "peak.py", []
    script.write_text(
        "import resource, sys\nfrom lslora_fairseq.huggingface import importing\n"
        "importing.write(*sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    for dim in (16, 512):
        shutil.rmtree(folder, ignore_errors=True)
        hub.m2m(folder, spm, d_model=dim, encoder_ffn_dim=dim * 16)
        _, out, _ = run(sys.executable, script, folder, tmp_path / f"out{dim}")
        peaks.append(int(out.split()[-1]) * 1024)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 6e7 and size / 2 < peaks[1] - peaks[0] < 1.2 * size


def test_small_100_is_told_the_target_language_alone(spm, tmp_path):
    hub.m2m(tmp_path / "hf", spm)
    (tmp_path / "hf" / "tokenization_small100.py").touch()
    task = imported(tmp_path / "hf")[1]["cfg"]["task"]
    assert task["encoder_langtok"] == "tgt" and task["decoder_langtok"] is False


def test_all_reasons_are_in_one_message(spm, tmp_path):
    folder = tmp_path / "hf"
    hub.m2m(folder, spm)
    fields = {"architectures": ["MBartForConditionalGeneration"], "model_type": "mbart"}
    change(folder, "config.json", **fields, tie_word_embeddings=False, activation_function="silu",
           pad_token_id=0, quantization_config={"bits": 4}, encoder_attention_heads=3)  # fmt: skip
    told = refusal(folder)
    assert told.startswith(f"{folder} cannot become a model of fairseq (6 reasons): ")
    change(folder, "config.json", encoder_layers="x", decoder_layers=0)
    assert "encoder_layers is 'x'; decoder_layers is 0" in refusal(folder)
    for reason in (
        "it is MBartForConditionalGeneration and not M2M100ForConditionalGeneration",
        "its embeddings are not shared (tie_word_embeddings is false)", "it is quantized",
        "pad_token_id is 0 and not 1", "activation_function is silu, which fairseq does not have",
        "16 numbers do not divide among 3 heads", "name a folder of M2M100ForConditional",
    ):  # fmt: skip
        assert reason in told


def test_weights_that_do_not_fit(spm, tmp_path):
    folder = tmp_path / "hf"
    hub.m2m(folder, spm)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.encoder.layer_norm.bias")
    tensors["model.encoder.layernorm_embedding.weight"] = torch.ones(16)
    tensors["model.encoder.layers.1.fc1.weight"] = torch.ones(8, 16)
    tensors["lm_head.weight"] = tensors["model.shared.weight"] + 1
    tensors["final_logits_bias"] = torch.ones(1, 3)
    save_file(tensors, folder / "model.safetensors")
    told = refusal(folder)
    for reason in (
        "its embeddings are not shared (model.shared.weight, lm_head.weight differ)",
        "it has final_logits_bias", "it lacks encoder.layer_norm.bias",
        "it has encoder.layernorm_embedding.weight, which the other model has not",
        "encoder.layers.1.fc1.weight is 8 × 16 and not 32 × 16",
    ):  # fmt: skip
        assert reason in told


def test_tokens_that_do_not_fit(spm, tmp_path):
    folder = tmp_path / "hf"
    hub.nllb(folder, spm)
    start = 4 + len(hub.pieces(spm))
    entries = {"4": {"content": "other"}, "2000": {"content": "<beyond>"}}
    entries[str(start + 1)] = {"content": "fra_Latn"}
    change(folder, "tokenizer_config.json", added_tokens_decoder=entries)
    told = refusal(folder)
    assert f"row {start + 1} is eng_Latn and, in tokenizer_config.json, fra_Latn" in told
    assert "several rows have the token __fra_Latn__" in told
    assert f"row 4 is {hub.pieces(spm)[0]} and, in tokenizer_config.json, other" in told
    assert "it has <beyond> beyond the" in told
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = content["added_tokens"][:4]
    hub.write_json(folder, "tokenizer.json", content)
    change(folder, "special_tokens_map.json", additional_special_tokens=[])
    change(folder, "tokenizer_config.json", added_tokens_decoder={})
    assert "its files do not tell which rows are tokens of languages" in refusal(folder)
    change(folder, "tokenizer_config.json", added_tokens_decoder={"x": 1})
    assert "its tokenizer's files are not as transformers writes them (" in refusal(folder)
    (folder / "sentencepiece.bpe.model").unlink()
    assert "it holds no SentencePiece model" in refusal(folder)


def test_a_vocabulary_that_no_dictionary_file_can_hold(spm, tmp_path):
    folder = tmp_path / "hf"
    hub.m2m(folder, spm)
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    names = [*vocab]
    names[0], names[7], names[9] = "<x>", "a\rb", "__zu__"
    hub.write_json(folder, "vocab.json", {name: n for n, name in enumerate(names)})
    told = refusal(folder)
    assert "its first tokens are <x> <pad> </s> <unk> and not <s> <pad>" in told
    assert "several rows have the token __zu__" in told
    assert "'a\\rb' break a line, and fairseq reads one token a line" in told


def test_files_that_are_missing_or_damaged(spm, tmp_path):
    folder = tmp_path / "hf"
    with pytest.raises(UserError, match="no such folder: name one that save_pretrained wrote"):
        cli.main(["import-hf", str(folder), "--out", str(tmp_path / "out")])
    hub.m2m(folder, spm)
    whole = (folder / "model.safetensors").read_bytes()
    for name, content, told in (
        ("sentencepiece.bpe.model", b"nothing", "is no SentencePiece model"),
        ("model.safetensors", whole[:999], "model.safetensors ("),
        ("model.safetensors", None, "holds no weights (model.safetensors or pytorch_model.bin"),
        ("config.json", b"{", "cannot read"),
        ("config.json", b"[]", "holds no JSON object"),
        ("config.json", None, "holds no config.json: name a folder that"),
    ):
        path = folder / name
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        found = refusal(folder)
        assert told in found and "\n" not in found
        path.write_bytes(before)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    assert "pytorch_model.bin (" in refusal(folder)


@pytest.mark.parametrize("form, rows", [("m2m", 128_112), ("nllb", 256_206), ("m2m_124", 256_125)])
def test_as_many_rows_as_the_public_models_have(form, rows, spm, tmp_path):
    """Made-up pieces, as many as they have; the languages of 124 have numbers of their own."""
    codes = (ROOT / "tests" / "data" / "nllb_codes.txt").read_text("utf-8").split()
    if form == "nllb":
        codes = [*codes[50:202], *codes[:50]]
        hub.nllb(tmp_path / "hf", spm, langs=codes)
    else:
        hub.m2m(tmp_path / "hf", spm)
    count = 128_000 if form == "m2m" else 255_997
    names = [*hub.SPECIALS, *(f"▁{number}" for number in range(count))]
    vocab = {name: number for number, name in enumerate(names)}
    if form == "nllb":
        content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text("utf-8"))
        content["model"]["vocab"] = vocab
        for token in content["added_tokens"][4:]:
            token["id"] += len(vocab) - len(hub.pieces(spm)) - 4
        hub.write_json(tmp_path / "hf", "tokenizer.json", content)
    else:
        hub.write_json(tmp_path / "hf", "vocab.json", vocab)
    if form == "m2m_124":  # in an order that is not that of its tokenizer's class
        codes = codes[:124]
        told = {f"__{code}__": len(vocab) + number for number, code in enumerate(codes)}
        hub.write_json(tmp_path / "hf", "added_tokens.json", told)
    found, reasons = vocabulary.read(str(tmp_path / "hf"), rows)
    assert not reasons and len(found.symbols) + 4 == rows
    assert found.langs == (vocabulary.M2M_100 if form == "m2m" else codes)
    assert found.unused == {"m2m": 8, "nllb": 2, "m2m_124": 0}[form]
    first = found.symbols.index(f"__{found.langs[0]}__") + 4
    assert first == {"m2m": 128_004, "nllb": 256_001, "m2m_124": 256_001}[form]
