"""What goes in and comes out, in the hands of transformers itself, where it is installed."""

import json

import hub
import pytest
import sentencepiece
import torch
from console import LANGS
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data import Dictionary
from greedy import compare, greedy, interactive, load

from lslora_fairseq import cli
from lslora_fairseq.huggingface import sentencepiece_model
from lslora_fairseq.huggingface.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

MORE = ["Unknown ☃ signs,  and spaces", "a"]
FORMS = {"m2m": ("en", "fr", "__{}__"), "nllb": ("eng_Latn", "fra_Latn", "{}")}


@pytest.fixture(scope="module")
def lines(corpus):
    return corpus.text["en"][:12] + corpus.text["ja"][:4] + MORE


@pytest.fixture(scope="module", params=FORMS)
def imported(request, corpus, tmp_path_factory):
    """(form, folder of transformers, what import-hf makes of it)."""
    form, folder = request.param, tmp_path_factory.mktemp(request.param)
    text = [line for lines in corpus.text.values() for line in lines]
    model = hub.spm(folder / "spm.model", text)
    getattr(hub, form)(folder / "hf", model)
    cli.main(["import-hf", str(folder / "hf"), "--out", str(folder / "ours")])
    if form == "nllb":  # the form of the file is as published, its rules are from transformers
        path = folder / "hf" / "tokenizer.json"
        added = json.loads(path.read_text("utf-8"))["added_tokens"]
        path.unlink()
        transformers.NllbTokenizerFast.from_pretrained(folder / "hf").save_pretrained(
            folder / "made"
        )
        made = json.loads((folder / "made" / "tokenizer.json").read_text("utf-8"))
        hub.write_json(folder / "hf", "tokenizer.json", {**made, "added_tokens": added})
    return form, folder / "hf", folder / "ours"


def test_greedy_tokens_line_by_line(imported, lines):
    """Pieces, language tokens and translations of fairseq are those of transformers."""
    form, hf, ours = imported
    source, target, spelling = FORMS[form]
    found = interactive(
        lines, source, target, ours, "--path", ours / "model.pt", "--fixed-dictionary",
        ours / "dict.txt", "--lang-dict", ours / "langs.txt", "--encoder-langtok", "src",
        "--decoder-langtok", "--task", "translation_multi_simple_epoch", "--lang-pairs",
        f"{source}-{target}", "--sentencepiece-model", ours / "sentencepiece.bpe.model",
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf, src_lang=source)
    forced = tokenizer.convert_tokens_to_ids(spelling.format(target))
    symbols = Dictionary.load(str(ours / "dict.txt")).symbols
    names = symbols, f"__{target}__"
    expected = greedy(load(hf), tokenizer, lines, *names, forced_bos_token_id=forced)
    compare(found, expected)
    assert len({piece for line in found[1] for piece in line}) > 20


@pytest.fixture(scope="module")
def merged(corpus, finetuned, tmp_path_factory):
    """(checkpoint of lslora merge, folder of lslora export-hf) of a direction."""
    folder = tmp_path_factory.mktemp("merged")
    given = [str(finetuned[0]), "--pair", "en-de", "--out"]
    cli.main(["merge", *given, str(folder / "en-de.pt")])
    files = ["--dict", str(corpus.dictionary), "--spm", str(corpus.spm)]
    cli.main(["export-hf", *given, str(folder / "hf"), *files])
    return folder / "en-de.pt", folder / "hf"


def test_a_merged_direction_decodes_the_same(corpus, finetuned, merged, lines):
    """Pieces of raw text, and greedy tokens, are those of the model with adapters."""
    found = interactive(
        lines, "en", "de", corpus.data, "--path", finetuned[0], "--task",
        "translation_multi_lslora", "--sentencepiece-model", corpus.spm,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged[1])
    symbols = Dictionary.load(str(corpus.dictionary)).symbols
    symbols += [f"__{code}__" for code in LANGS.split(",")]
    compare(found, greedy(load(merged[1]), tokenizer, lines, symbols, "__de__"))
    assert len({piece for line in found[1] for piece in line}) > 5


def test_logits_of_a_merged_direction(corpus, merged):
    given = {"data": str(corpus.data)}
    (ours,), _, task = load_model_ensemble_and_task([str(merged[0])], given)
    task.load_dataset("test")
    batch = task.dataset("test").collater([task.dataset("test")[n] for n in range(8)])["net_input"]
    with torch.no_grad():
        expected = ours.eval()(**batch)[0]
        mask = batch["src_tokens"].ne(1)
        told = {"input_ids": batch["src_tokens"], "attention_mask": mask}
        found = load(merged[1])(**told, decoder_input_ids=batch["prev_output_tokens"]).logits
    kept = batch["prev_output_tokens"].ne(1)
    assert (mask.sum(1).unique().numel()) > 2 and expected[kept].abs().max() > 1
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_tokenizer_on_all_text(corpus, kind, tmp_path):
    """Every line of every language, after every language token: numbers are the dictionary's."""
    text = [line for lines in corpus.text.values() for line in lines]
    model = hub.spm(tmp_path / "spm.model", text, kind, 400)
    read = sentencepiece.SentencePieceProcessor(model_file=str(model))
    words = tmp_path / "dict.txt"
    words.write_text("".join(f"{piece} 1\n" for piece in reversed(hub.pieces(model))), "utf-8")
    dictionary = Dictionary.load(str(words))
    codes = ["oc", "en", "de_AT", "zho_Hant"]  # in no order
    tokens = {code: f"__{code}__" for code in codes}
    for token in tokens.values():
        dictionary.add_symbol(token)
    made = Tokenizer(dictionary.symbols, tokens, sentencepiece_model.read(model))
    for name, content in made.files().items():
        hub.write_json(tmp_path, name, content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for number, line in enumerate([*text, *MORE, "  spaces around  it "]):
        code = codes[number % 4]
        pieces = " ".join([tokens[code], *read.encode(line, out_type=str)])
        expected = dictionary.encode_line(pieces, add_if_not_exist=False).tolist()
        assert tokenizer(f"{made.langs[code]} {line}")["input_ids"] == expected, line
        if dictionary.unk() not in expected:
            said = tokenizer.decode(expected, skip_special_tokens=True)
            assert said == read.decode(read.encode(line, out_type=str))
    for code in codes:
        assert tokenizer.convert_tokens_to_ids(made.langs[code]) == dictionary.index(tokens[code])
    assert made.langs["zho_Hant"] == "zho_Hant" and made.langs["oc"] == "__oc__"
