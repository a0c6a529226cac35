"""``lslora doctor`` on the test corpus: the good case, and each kind of trouble."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from console import LANGS, TIERS, lslora, run

from lslora_fairseq import doctor
from lslora_fairseq.cli import build_parser
from lslora_fairseq.doctor import checks, memory
from lslora_fairseq.doctor.report import Line, Report
from lslora_fairseq.errors import ConfigError


def diagnose(*args):
    """(exit status, check -> line, what was not checked) of a run in this process."""
    args = build_parser("doctor").parse_args(["doctor", *map(str, args), "--format", "json"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = args.run(args)
    assert not err.getvalue()
    report = json.loads(out.getvalue())
    lines = {line["check"]: line for line in report["lines"]}
    assert len(lines) == len(report["lines"])
    bad = [line["status"] for line in report["lines"]]
    assert (report["warnings"], report["errors"]) == (bad.count("warning"), bad.count("error"))
    assert status == (1 if report["errors"] else 0)
    return status, lines, report["not_checked"]


def troubles(lines):
    return {name: line["status"] for name, line in lines.items() if line["status"] != "ok"}


@pytest.fixture
def tuned(finetuned):
    """A checkpoint of this package."""
    return finetuned[0]


def test_without_options_the_versions_and_what_else_there_is():
    status, lines, not_checked = diagnose()
    assert status == 0
    assert list(lines) == ["Python", "fairseq", "torch", "numpy", "omegaconf", "sacrebleu"]
    assert list(not_checked) == [check.name for check in checks.CHECKS]
    assert not_checked["<unk>"] == "--data"


def test_everything_in_order(corpus, tmp_path):
    args = ["--checkpoint", corpus.base, "--data", corpus.data, "--langs", LANGS]
    args += ["--lora-tiers", TIERS, "--lora-rank", "high=2,low=4", "--max-tokens", "600", "--cpu"]
    status, lines, not_checked = diagnose(*args, "--save-dir", tmp_path / "run")
    assert (status, troubles(lines), not_checked) == (0, {}, {})
    assert {"<unk> in train", "<unk> in valid", "<unk> in test"} <= set(lines)
    assert lines["<unk> in train"]["values"]["tokens"] > 500
    assert "6 directions" in lines["data"]["found"]
    assert lines["language tokens"]["found"].endswith("0 in the dictionary file, 4 appended to it")
    # the counts that fairseq-train logs for these options are tested in models/
    assert "4 languages, 31 linears" in lines["adapters"]["found"]
    parts = lines["memory"]["values"]["parts"]
    assert lines["memory"]["values"]["bytes"] == sum(parts.values())
    # the table tells the same
    _, out, _ = lslora("doctor", *args)
    assert out.splitlines()[-1] == f"{len(lines) - 1} ok, 0 warnings, 0 errors"
    assert "ok       language order   that of the checkpoint" in out.splitlines()


def test_the_memory_of_a_base_in_bf16(corpus):
    args = ["--checkpoint", corpus.base, "--data", corpus.data, "--lora-tiers", TIERS, "--cpu"]
    whole, half = (
        diagnose(*args, "--max-tokens", "600", *more)[1]["memory"]
        for more in ([], ["--lora-base-dtype", "bf16"])
    )
    assert "to train with bf16 base, 600 tokens" in half["found"]
    bases = [line["values"]["parts"]["base model"] for line in (whole, half)]
    assert bases[0] == 2 * bases[1]
    for more, told in (
        (["--lora-base-dtype", "float16"], "float16 must be fp32, bf16 or fp16"),
        (["--fp16", "--lora-base-dtype", "bf16"], "not allowed with argument --fp16"),
    ):
        status, _, err = lslora("doctor", *args, *more, check=False)
        assert status == 2 and told in err


def test_how_the_base_was_trained_is_not_how_it_is_fine_tuned(corpus, tmp_path):
    state = torch.load(corpus.base)
    vars(state["cfg"]["model"]).update(
        encoder_layerdrop=0.1, store_ema=True, ddp_backend="fully_sharded", tpu=True, bf16=True
    )
    torch.save(state, tmp_path / "base.pt")
    args = ["--data", corpus.data, "--langs", LANGS, "--lora-tiers", TIERS]
    _, lines, _ = diagnose("--checkpoint", tmp_path / "base.pt", *args)
    assert troubles(lines) == {}
    assert "4 languages, 31 linears" in lines["adapters"]["found"]


def test_the_size_of_a_checkpoint_is_that_of_the_file(corpus, tuned):
    _, lines, _ = diagnose("--checkpoint", tuned, "--save-dir", tuned.parent)
    size = tuned.stat().st_size
    assert not troubles(lines)
    assert lines["disk"]["values"]["bytes"] == pytest.approx(size, rel=0.35)


def test_files_that_are_not_there_or_not_what_they_should_be(corpus, tmp_path):
    status, lines, not_checked = diagnose(
        "--checkpoint", corpus.dictionary, "--data", tmp_path / "none", "--dict", tmp_path / "no"
    )
    assert status == 1
    assert troubles(lines) == {"checkpoint": "error", "data": "error", "dictionary": "error"}
    assert "cannot read the checkpoint" in lines["checkpoint"]["found"]
    assert "name the one that fairseq-preprocess wrote" in lines["data"]["found"]
    assert "No such file or directory" in lines["dictionary"]["found"]
    assert not_checked["memory"] == "what failed above"


def test_a_folder_without_data(corpus, tmp_path):
    _, lines, _ = diagnose("--data", tmp_path)
    assert "holds no file such as train.en-de.en.idx" in lines["data"]["found"]
    assert "holds no dict.*.txt" in lines["dictionary"]["found"]


def test_dictionaries_that_differ(corpus, tmp_path):
    data = shutil.copytree(corpus.data, tmp_path / "data")
    lines = (data / "dict.fr.txt").read_text("utf-8").splitlines(keepends=True)
    (data / "dict.fr.txt").write_text("".join(lines[1:]), "utf-8")
    _, found, _ = diagnose("--data", data)
    assert troubles(found) == {"dictionary": "error"}
    assert found["dictionary"]["found"].startswith(f"{data}/dict.fr.txt differs from")
    assert "--srcdict" in found["dictionary"]["remedy"]


def test_a_dictionary_that_is_not_that_of_the_checkpoint_and_data(corpus, tmp_path):
    lines = corpus.dictionary.read_text("utf-8").splitlines(keepends=True)
    shorter = tmp_path / "dict.txt"
    shorter.write_text("".join(lines[:50]), "utf-8")
    args = ["--checkpoint", corpus.base, "--data", corpus.data, "--dict", shorter]
    status, found, _ = diagnose(*args)
    assert status == 1
    wrong = troubles(found)
    assert wrong.pop("dictionary") == wrong.pop("embedding rows") == "error"
    assert set(wrong) >= {"<unk> in train"}
    assert "50 dictionary lines + 4 specials + 4 language" in found["embedding rows"]["found"]
    assert "the dictionary ends at 53" in found["<unk> in train"]["found"]
    # more lines after those of the data change no number in it
    longer = tmp_path / "longer.txt"
    longer.write_text("".join([*lines, "__de__ 1\n"]), "utf-8")
    _, found, _ = diagnose("--data", corpus.data, "--dict", longer)
    assert not troubles(found)
    assert "1 in the dictionary file, 3 appended" in found["language tokens"]["found"]


def test_languages_in_another_order(corpus, tuned):
    """Rows of a base are matched by token; a run that is resumed keeps its order."""
    args = ["--data", corpus.data, "--langs", "ja,fr,en,de"]
    _, found, _ = diagnose(*args, "--checkpoint", corpus.base)
    assert not troubles(found)
    assert "rows are matched by token" in found["language order"]["found"]
    assert found["embedding rows"]["found"].endswith("matched by token")
    _, found, _ = diagnose(*args, "--checkpoint", tuned)
    assert troubles(found) == {"language order": "error"}
    assert "resume with the old one" in found["language order"]["found"]


def test_languages_that_lack_a_row_a_token_or_an_adapter(corpus):
    args = ["--data", corpus.data, "--checkpoint", corpus.base, "--langs", "de,en,fr,ko"]
    _, out, _ = lslora("doctor", *args, "--lora-tiers", "all=de,en,it", check=False)
    rows = [row for row in out.splitlines() if row[9:].startswith("language tokens")]
    assert [row.split()[0] for row in rows] == ["error", "warning", "warning", "warning"]
    assert "it of --lora-tiers: absent from --langs (de,en,fr,ko)" in rows[0]
    assert "ja of the data: absent from --langs" in rows[1]
    assert "fr, ja of the data: absent from --lora-tiers" in rows[2]
    assert "__ko__: new to the base model" in rows[3]
    _, out, _ = lslora("doctor", *args)
    assert "1 of its languages are not in --langs" in out


def test_languages_are_told_as_to_fairseq_train(corpus, tmp_path):
    """By --langs or --lang-dict, in their order, else by --lang-pairs, sorted."""
    args = ["--checkpoint", corpus.base, "--data", corpus.data]
    (tmp_path / "langs").write_text("ja\nfr\n\n en\nde\n")
    pairs = ["--lang-pairs", "ja-en,en-de,fr-en"]
    _, found, _ = diagnose(*args, "--lang-dict", tmp_path / "langs", *pairs)
    assert not troubles(found)
    assert "rows are matched by token" in found["language order"]["found"]
    _, found, _ = diagnose(*args, *pairs)
    assert not troubles(found)
    assert found["language order"]["found"] == "that of the checkpoint"  # it was inferred, too
    assert "3 directions" in found["data"]["found"]
    (tmp_path / "pairs").write_text("en-ja\n")
    _, found, _ = diagnose(*args, "--lang-pairs", tmp_path / "pairs")
    assert not troubles(found)
    assert "2 of its languages are not in --langs" in found["language order"]["found"]
    assert found["language tokens"]["found"].startswith("2 languages")
    assert set(found["<unk> in train"]["values"]["share"]) == {"en", "ja"}


def test_languages_that_are_told_wrongly(corpus, tmp_path):
    (tmp_path / "langs").write_text("de\nen\n")
    langs = ["--lang-dict", tmp_path / "langs"]
    _, found, _ = diagnose("--data", corpus.data, *langs, "--langs", "de,en")
    assert "--langs and --lang-dict exclude each other" in found["dictionary"]["found"]
    _, found, _ = diagnose("--data", corpus.data, "--lang-dict", tmp_path / "no")
    assert f"--lang-dict {tmp_path}/no (No such file or directory)" in found["dictionary"]["found"]
    _, found, _ = diagnose("--data", corpus.data, "--lang-pairs", "de-en,deen")
    assert "--lang-pairs: cannot read 'deen'" in found["data"]["found"]
    _, found, _ = diagnose("--data", corpus.data, *langs, "--lang-pairs", "de-en,ja-fr")
    assert "no train data of ja-fr: prepare it" in found["data"]["found"]
    assert "fr, ja of the data: absent from --langs" in found["language tokens"]["found"]


def untold(corpus, folder, **options):
    """A base of the corpus that does not tell its languages, as bases from elsewhere."""
    state = torch.load(corpus.base)
    names = ("langs", "lang_pairs", "lang_dict")
    for section in (state["cfg"]["task"], state["cfg"]["model"]):
        vars(section).update(dict.fromkeys(names), **options)
    torch.save(state, folder / "base.pt")
    return folder / "base.pt"


def test_an_order_of_languages_that_nothing_tells(corpus, tmp_path):
    args = ["--checkpoint", untold(corpus, tmp_path), "--data", corpus.data, "--langs", LANGS]
    status, found, _ = diagnose(*args)
    assert (status, troubles(found)) == (0, {"language order": "warning"})
    line = found["language order"]
    assert "__de__ __en__ __fr__ __ja__ are no lines of the dictionary file" in line["found"]
    assert "the order of their rows cannot be known" in line["found"]
    assert "that its authors published" in line["remedy"]
    assert "NLLB has pes_Arab before fij_Latn" in line["remedy"]
    base = untold(corpus, tmp_path, lang_dict="langs.txt")
    _, found, _ = diagnose("--checkpoint", base, *args[2:])
    assert "give the order of langs.txt as" in found["language order"]["remedy"]


def test_the_dictionary_file_may_hold_the_order_of_languages(corpus, tmp_path):
    lines = corpus.dictionary.read_text("utf-8") + "".join(f"__{c}__ 1\n" for c in LANGS.split(","))
    (tmp_path / "dict.txt").write_text(lines, "utf-8")
    args = ["--checkpoint", untold(corpus, tmp_path), "--data", corpus.data]
    _, found, _ = diagnose(*args, "--dict", tmp_path / "dict.txt", "--langs", "ja,fr,en,de")
    assert not troubles(found)
    assert found["language order"]["found"] == (
        "the checkpoint does not tell its languages; the dictionary file holds their tokens in its "
        "order"
    )


def test_text_of_another_vocabulary(corpus, tmp_path):
    """Japanese in a dictionary without Japanese."""
    lines = corpus.dictionary.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "dict.txt").write_text("".join(n for n in lines if n.isascii()), "utf-8")
    train = corpus.dictionary.parent / "train"
    run(
        "fairseq-preprocess", "-s", "en", "-t", "ja", "--trainpref", train,
        "--destdir", tmp_path / "data", "--srcdict", tmp_path / "dict.txt",
        "--tgtdict", tmp_path / "dict.txt",
    )  # fmt: skip
    _, found, _ = diagnose("--data", tmp_path / "data")
    assert troubles(found) == {"<unk> in train": "error"}
    line = found["<unk> in train"]
    assert line["values"]["worst_file"] == "train.en-ja.ja"
    assert line["values"]["share"]["ja"] > 0.5
    assert "most in train.en-ja.ja" in line["found"]
    assert "SentencePiece model of the base model" in line["remedy"]


def test_data_that_is_cut_short(corpus, tmp_path):
    data = shutil.copytree(corpus.data, tmp_path / "data")
    cut = data / "train.en-fr.fr.bin"
    cut.write_bytes(cut.read_bytes()[:100])
    _, found, _ = diagnose("--data", data)
    assert troubles(found) == {"<unk>": "error"}
    assert f"cannot read {data}/train.en-fr.fr (" in found["<unk>"]["found"]
    assert "run fairseq-preprocess again" in found["<unk>"]["found"]


@pytest.mark.parametrize(
    "args, told",
    [
        (["--arch", "lslora_m2m_124_175m"], "choose the --arch and sizes of the checkpoint"),
        (["--arch", "lslora_m2m"], "--arch lslora_m2m is unknown: choose one of lslora_m2m_100_1b"),
        (["--lora-rank", "99"], "--lora-rank: rank 99 of de must lie between 1 and 32"),
        (
            ["--lora-shared-rank", "2", "--lora-train-languages", "en"],
            "--lora-train-languages keeps the other languages' adapters, and",
        ),
    ],
)
def test_options_that_do_not_fit_the_model(corpus, args, told):
    status, found, _ = diagnose("--checkpoint", corpus.base, "--lora-tiers", TIERS, *args)
    assert status == 1
    assert told in found["adapters"]["found"]


def test_shared_adapters_are_counted(corpus):
    args = ["--checkpoint", corpus.base, "--lora-tiers", TIERS, "--max-tokens", "600", "--cpu"]
    args += ["--lora-embedding-rank", "0"]
    found = {}
    for rank, shared in (("2", "0"), ("2", "3"), ("0", "3")):
        _, lines, _ = diagnose(*args, "--lora-rank", rank, "--lora-shared-rank", shared)
        assert not troubles(lines)
        found[rank, shared == "3"] = lines
    told = {key: lines["adapters"]["found"] for key, lines in found.items()}
    assert told["2", True].endswith(": 4 languages, 31 linears, shared adapters of rank 3")
    assert told["0", True].endswith(": 4 languages, 31 linears, shared adapters of rank 3 alone")
    counts = {key: int(text.split()[0].replace(",", "")) for key, text in told.items()}
    assert counts["2", True] == counts["2", False] + counts["0", True]
    # four languages of rank 2
    assert counts["2", False] * 3 == counts["0", True] * 8
    memory = {key: lines["memory"]["values"]["parts"] for key, lines in found.items()}
    assert memory["0", True]["optimizer"] == 8 * counts["0", True]


def test_the_embeddings_adapter_is_counted(corpus):
    args = ["--checkpoint", corpus.base, "--lora-tiers", TIERS]
    words = torch.load(corpus.base)["model"]["encoder.embed_tokens.weight"].size(0)
    counts = []
    for rank in ("0", "3"):
        more = ["--lora-embedding-rank", rank]
        _, found, _ = diagnose(*args, *more, "--lora-shared-rank", "2")
        assert not troubles(found)
        counts.append(int(found["adapters"]["found"].split()[0].replace(",", "")))
    told = "31 linears, shared adapters of rank 2, an adapter of the embeddings of rank 3"
    assert found["adapters"]["found"].endswith(told)
    assert counts[1] - counts[0] == 3 * (32 + words)
    _, found, _ = diagnose(*args, "--lora-rank", "0", "--lora-shared-rank", "0", *more)
    assert found["adapters"]["found"].endswith(
        "0 linears, an adapter of the embeddings of rank 3 alone"
    )
    assert found["adapters"]["found"].startswith(f"{3 * (32 + words):,} trainable parameters")


def test_other_adapters_than_those_of_the_run_that_is_resumed(tuned):
    _, found, _ = diagnose("--checkpoint", tuned, "--lora-rank", "4")
    assert troubles(found) == {"adapters": "error"}
    assert "--lora-rank 4 differs from high=2,low=4" in found["adapters"]["found"]


SIZES = memory.Shape(10**9, 10**6, 12, 12, 1024, 4096, 256_000)


def inputs(**args):
    args = {"precision": "amp", "max_tokens": 4000, "checkpoint_activations": False, **args}
    args = {"cpu": False, "save_dir": "runs", "criterion": None, **args}
    args = SimpleNamespace(**args)
    checkpoint = SimpleNamespace(size=4 * 10**9)
    return SimpleNamespace(args=args, shape=SIZES, process=10**9, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "free, status, told",
    [
        (2**50, "ok", "free (GPU)"),
        (1.1, "warning", "free (GPU)"),
        (0.9, "error", "free (GPU)"),
        (None, "warning", "cannot read what is free"),
    ],
)
def test_memory_that_is_short(monkeypatch, free, status, told):
    need = sum(memory.estimate(SIZES, "amp", 4000).values())
    free = free if free is None or free > 2 else int(free * need)
    monkeypatch.setattr(memory, "free_on_device", lambda cpu: ("GPU", free))
    monkeypatch.setattr(memory, "free_on_cpu", lambda: 2**50)
    train, load = checks.check_memory(inputs())
    assert (train.status, load.status) == (status, "ok")
    assert told in train.found
    assert bool(train.remedy) == (status != "ok")
    assert load.values["bytes"] == 10**9 + memory.loading_peak(SIZES, 4 * 10**9)


def test_the_criterion_of_the_run_counts(monkeypatch):
    ours = "lslora_label_smoothed_cross_entropy"
    monkeypatch.setattr(memory, "free_on_device", lambda cpu: ("GPU", 1))
    monkeypatch.setattr(memory, "free_on_cpu", lambda: 2**50)
    found = {}
    for name in ("label_smoothed_cross_entropy", ours):
        train, _ = checks.check_memory(inputs(criterion=name))
        found[name] = train.values["parts"]["output distribution"]
        assert (f"add --criterion {ours}, lower" in train.remedy) == (name != ours)
    assert found[ours] <= 2**30 < found["label_smoothed_cross_entropy"] / 10
    with pytest.raises(ConfigError, match=f"--criterion cross is unknown: the recipes use {ours}"):
        checks.check_memory(inputs(criterion="cross"))


def test_on_a_cpu_the_process_counts(monkeypatch):
    monkeypatch.setattr(memory, "free_on_cpu", lambda: 2**50)
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    train, _ = checks.check_memory(inputs())
    assert train.values["parts"] == memory.estimate(SIZES, "amp", 4000, process=10**9)
    assert train.values["parts"]["process"] == 10**9


@pytest.mark.parametrize("times, status", [(4, "ok"), (2, "warning"), (0.5, "error")])
def test_a_disk_that_is_nearly_full(monkeypatch, times, status):
    size = memory.checkpoint_size(SIZES, "amp")
    monkeypatch.setattr(memory, "free_on_disk", lambda folder: int(times * size))
    (line,) = checks.check_disk(inputs())
    assert line.status == status
    assert ("name another --save-dir" in line.remedy) == (status != "ok")


def test_the_exit_status_counts_errors_alone(monkeypatch, capsys):
    monkeypatch.setattr(doctor.versions, "check", lambda found: [Line("warning", "a", "b", "c")])
    broken = SimpleNamespace(import_error="broken")
    monkeypatch.setattr(doctor.versions, "installed", lambda: broken)
    assert doctor.run(SimpleNamespace(format="table")) == 0
    assert "0 ok, 1 warning, 0 errors" in capsys.readouterr().out
    monkeypatch.setattr(doctor.versions, "check", lambda found: [Line("error", "a", "b", "c")])
    assert doctor.run(SimpleNamespace(format="table")) == 1


def test_a_table():
    report = Report(
        [Line("ok", "a", "fine"), Line("error", "longer", "bad", "mend it")], {"b": "--b"}
    )
    assert report.table().splitlines() == [
        "ok       a       fine",
        "error    longer  bad",
        "                 remedy: mend it",
        "-        b       not checked: needs --b",
        "1 ok, 0 warnings, 1 error",
    ]
