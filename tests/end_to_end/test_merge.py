"""Merged checkpoints in fairseq's own hands, with the real commands and without the package."""

import shlex
import sys
from collections import OrderedDict

import adapter_files
import pytest
import torch
from console import ROOT, USER_DIR, assert_alike, generate_args, lslora, run

from lslora_fairseq import cli
from lslora_fairseq.errors import UserError

DECODE = ["--cpu", "--gen-subset", "test", "--beam", "3", "--num-workers", "0", "--max-len-b", "30"]
PLAIN = {str, int, float, bool, type(None), torch.Tensor}


def hypotheses(command, *args, **kwargs):
    _, out, _ = run(command, *args, **kwargs)
    lines = [line for line in out.splitlines() if line.startswith("H-")]
    assert len(lines) == 8
    return lines


@pytest.fixture(scope="module")
def expected(corpus, finetuned):
    """What the fine-tuned model itself gives."""
    return hypotheses("fairseq-generate", *generate_args(corpus, finetuned[0], "en", "de"))


@pytest.fixture(scope="module")
def merged(finetuned, tmp_path_factory):
    """(checkpoint of en-de, the line that was printed)."""
    path = tmp_path_factory.mktemp("merged") / "en-de.pt"
    _, out, _ = lslora("merge", finetuned[0], "--pair", "en-de", "--out", path)
    return path, out


def is_plain(value):
    if type(value) in (dict, OrderedDict):
        inside = [*value, *value.values(), *getattr(value, "__dict__", {}).values()]
        return all(map(is_plain, inside))
    return all(map(is_plain, value)) if type(value) is list else type(value) in PLAIN


def test_stock_fairseq_decodes_it_with_the_line_that_is_printed(corpus, expected, merged):
    """The same text and the same scores."""
    path, line = merged
    command, _, *words = shlex.split(line)
    assert words[:2] == ["--path", str(path)] and "--user-dir" not in words
    assert_alike(hypotheses(command, corpus.data, *words, *DECODE, fresh=True), expected)


def test_it_holds_plain_values(merged):
    content = torch.load(merged[0], weights_only=True)
    assert is_plain(content) and content["args"] is None
    assert content["cfg"]["model"]._name == content["cfg"]["model"]["_name"] == "transformer"
    # shared embeddings are there once, and no path of the run
    assert merged[0].stat().st_size < 350_000
    assert str(USER_DIR).encode() not in merged[0].read_bytes()


def test_a_folder_from_the_base_and_files(corpus, finetuned, merged, tmp_path):
    """A pattern gives a file for each direction; adapters come from files."""
    files, out = tmp_path / "files", tmp_path / "merged"
    cli.main(["extract", str(finetuned[0]), "--out", str(files)])
    given = ["--base", corpus.base, "--adapters", files, "--pair", "en-*,ja-en", "--out", out]
    _, printed, _ = lslora("merge", *given)
    names = ["en-de.pt", "en-fr.pt", "en-ja.pt", "ja-en.pt"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [line.split()[3] for line in printed.splitlines()] == [str(out / n) for n in names]
    content, expected = torch.load(out / "en-de.pt"), torch.load(merged[0])
    assert content["cfg"]["task"] == expected["cfg"]["task"]
    assert content["model"].keys() == expected["model"].keys()
    for key, weight in expected["model"].items():
        assert torch.equal(content["model"][key], weight), key
    others = [torch.load(out / name)["model"]["decoder.layers.1.fc2.weight"] for name in names]
    assert not any(torch.equal(others[0], other) for other in others[1:])


def test_this_package_decodes_it_too(corpus, expected, merged):
    """As a stock model, whose languages and tokens its options tell."""
    args = generate_args(corpus, merged[0], "en", "de")
    assert_alike(hypotheses("fairseq-generate", *args), expected)


def test_from_python_without_the_package(corpus, merged):
    code = (
        "import sys, torch; from fairseq import checkpoint_utils as c; "
        "(m,), cfg, task = c.load_model_ensemble_and_task(sys.argv[1:2], "
        "{'data': sys.argv[2]}); task.load_dataset('test'); print(type(m).__name__, "
        "len(task.dataset('test')), 'lslora_fairseq' in sys.modules)"
    )
    _, out, _ = run(sys.executable, "-c", code, merged[0], corpus.data, fresh=True)
    assert out.splitlines()[-1] == "TransformerModel 8 False"


def test_ctranslate2_gives_the_same_tokens(corpus, merged):
    """Where it is installed: with its own converter, and int8 as well."""
    pytest.importorskip("ctranslate2")
    script = ROOT / "scripts" / "ctranslate2_merged.py"
    _, out, _ = run(sys.executable, script, merged[0], corpus.data, fresh=True)
    assert "float32     8 sentences as fairseq" in out and "int8" in out


def test_what_is_refused(corpus, finetuned, merged, tmp_path):
    checkpoint, new = finetuned[0], ["--out", tmp_path / "x"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for args, told in (
        ([checkpoint, *new], "of which a merged model has those of one direction: give --pair"),
        ([checkpoint, *new, "--pair", "en-xx"], f"no direction of {checkpoint} fits 'en-xx'"),
        ([checkpoint, *new, "--pair", ","], "--pair names no direction"),
        ([checkpoint, "--pair", "en-de", "--out", merged[0]], f"{merged[0]} is there already"),
        ([checkpoint, "--pair", "en-*", "--out", tmp_path / "full"], "full is there already: name"),
        ([checkpoint, "--pair", "en-de", "--out", tmp_path / "a/x"], "cannot write --out"),
        ([checkpoint, "--base", corpus.base, *new], "name a checkpoint with adapters, or instead"),
        (["--base", corpus.base, *new], "name a checkpoint with adapters, or instead of it"),
        ([corpus.base, "--pair", "en-de", *new], "has no adapters: name a checkpoint"),
        (["--base", checkpoint, "--adapters", tmp_path, *new], f"{tmp_path} holds no adapter file"),
    ):  # fmt: skip
        with pytest.raises(UserError) as ended:
            cli.main(["merge", *map(str, args)])
        line = str(ended.value)
        assert line.startswith("lslora: error: ") and told in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_adapters_of_all_languages_alone_need_no_pair(tmp_path, capsys):
    options = {"lora_rank": "0", "lora_shared_rank": 2}
    made = adapter_files.model(**options)
    path = adapter_files.save(tmp_path / "plain.pt", made, **options)
    given = ["merge", path, "--out", str(tmp_path / "out.pt")]
    with pytest.raises(UserError, match="one file serves every direction: leave out --pair"):
        cli.main([*given, "--pair", "en-de"])
    cli.main(given)
    assert "-s SOURCE -t TARGET --langs de,en,fr,ja" in capsys.readouterr().out
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    made.merge(0, 0)
    for key, weight in made.state_dict().items():
        assert torch.equal(weights[key], weight), key
