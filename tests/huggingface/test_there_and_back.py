"""From a folder of a hub through training to folders for a hub, with the real commands."""

import json
import shlex
from collections import namedtuple

import hub
import pytest
import sentencepiece
import torch
from console import USER_DIR, lslora, run
from fairseq.data import Dictionary
from greedy import compare, greedy, interactive, load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FORMS = {
    "m2m": {"en": "en", "de": "de", "fr": "fr"},
    "nllb": {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn"},
}
Trained = namedtuple("Trained", "folder checkpoint langs symbols")


@pytest.fixture(scope="module", params=FORMS)
def trained(request, corpus, tmp_path_factory):
    """A folder of each form is imported, and gets adapters for three languages."""
    form, folder = request.param, tmp_path_factory.mktemp(request.param)
    langs = FORMS[form]
    spm = hub.spm(folder / "spm.model", [x for code in langs for x in corpus.text[code]])
    getattr(hub, form)(folder / "hf", spm)
    given = ["import-hf", folder / "hf", "--out", folder / "base", "--format", "flags"]
    flags = shlex.split(lslora(*given)[1])
    words, pieces = folder / "base" / "dict.txt", sentencepiece.SentencePieceProcessor(str(spm))
    for ours, code in langs.items():
        encoded = [" ".join(pieces.encode(line, out_type=str)) for line in corpus.text[ours]]
        for split, part in (("train", encoded[16:]), ("valid", encoded[:8])):
            (folder / f"{split}.{code}").write_text("\n".join(part) + "\n", encoding="utf-8")
    english, *others = langs.values()
    for code in others:
        run(
            "fairseq-preprocess", "-s", english, "-t", code, "--trainpref", folder / "train",
            "--validpref", folder / "valid", "--destdir", folder / "data", "--srcdict", words,
            "--tgtdict", words,
        )  # fmt: skip
    pairs = [pair for code in others for pair in (f"{english}-{code}", f"{code}-{english}")]
    run(
        "fairseq-train", folder / "data", "--user-dir", USER_DIR, "--cpu", "--task",
        "translation_multi_lslora", *flags, "--lang-pairs", ",".join(pairs), "--lora-tiers",
        f"high={english};low={','.join(others)}", "--lora-rank", "high=2,low=4", "--optimizer",
        "pruned_adam", "--pruning-begin", "1", "--pruning-duration", "1", "--max-epoch", "1",
        "--lr", "0.003", "--criterion", "label_smoothed_cross_entropy", "--max-tokens", "600",
        "--num-workers", "0", "--no-epoch-checkpoints", "--save-dir", folder / "run", "--seed", "7",
    )  # fmt: skip
    symbols = Dictionary.load(str(words)).symbols
    return Trained(folder, folder / "run" / "checkpoint_last.pt", langs, symbols)


def test_merged_model_and_halves_decode_as_the_checkpoint(trained, corpus):
    """Token by token, on the folder that the base model came from."""
    folder, checkpoint, langs, symbols = trained
    spm, words = folder / "base" / "sentencepiece.bpe.model", folder / "base" / "dict.txt"
    lslora("export-peft", checkpoint, "--out", folder / "peft")
    given = [checkpoint, "--pair", f"{langs['en']}-{langs['fr']}", "--dict", words, "--spm", spm]
    lslora("export-hf", *given, "--out", folder / "merged")
    lines, source, target = corpus.text["en"][:20], langs["en"], langs["fr"]
    expected = interactive(
        lines, source, target, folder / "data", "--path", checkpoint, "--task",
        "translation_multi_lslora", "--sentencepiece-model", spm, "--fixed-dictionary", words,
    )  # fmt: skip
    assert len({piece for line in expected[1] for piece in line}) > 5
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    names = tokenizer, lines, symbols, f"__{target}__"
    compare(greedy(load(folder / "merged"), *names), expected)
    print(len(lines), "sentences,", sum(map(len, expected[1])), "tokens decoded the same")
    forced = {"forced_bos_token_id": symbols.index(f"__{target}__")}
    base, parts = load(folder / "hf"), [f"{source}-source", f"{target}-target", "shared"]
    plain = greedy(base, *names, **forced)[1]
    model = peft.PeftModel.from_pretrained(base, folder / "peft" / parts[0], adapter_name=parts[0])
    for part in parts[1:]:
        model.load_adapter(folder / "peft" / part, adapter_name=part)
    model.base_model.set_adapter(parts)
    compare(greedy(model.eval(), *names, **forced), expected)
    assert sum(one != other for one, other in zip(plain, expected[1])) > 10


def test_they_are_evaluated_and_come_back(trained):
    """The imported base and the checkpoint have scores, and halves become files again."""
    folder, checkpoint, langs, _ = trained
    words = ["--fixed-dictionary", folder / "base" / "dict.txt"]
    for name, path in (("base", folder / "base" / "model.pt"), ("tuned", checkpoint)):
        given = ["--path", path, "--out", folder / name, "--gen-subset", "valid", "--cpu"]
        given += [*words, "--max-len-b", "20"]
        lslora("evaluate", folder / "data", *given)
        scored = json.loads((folder / name / "scores.json").read_text("utf-8"))["directions"]
        assert f"{langs['en']}-{langs['fr']}" in scored and len(scored) == 4
    halves = folder / "halves"
    lslora("export-peft", checkpoint, "--out", halves)
    _, out, _ = lslora(
        "import-peft", *halves.iterdir(), "--base", folder / "base" / "model.pt", "--dict",
        folder / "base" / "dict.txt", "--out", folder / "files",
    )  # fmt: skip
    assert "shared.safetensors" in out
    files = ["--base", folder / "base" / "model.pt", "--adapters", folder / "files"]
    pair = ["--pair", f"{langs['en']}-{langs['fr']}", "--out"]
    lslora("merge", *files, *pair, folder / "again.pt")
    lslora("merge", checkpoint, *pair, folder / "once.pt")
    (again, once) = (torch.load(folder / f"{n}.pt")["model"] for n in ("again", "once"))
    assert again.keys() == once.keys()
    for key, weight in once.items():
        torch.testing.assert_close(again[key], weight, rtol=1e-5, atol=1e-5, msg=key)
