"""Bad input through the console: one line that names cause and remedy, and nothing is lost.

One command for each kind of mistake, since each takes seconds to start. The checks behind them are
tested case by case where they are made: test_config.py, test_languages.py, test_checkpoints.py,
lora/test_plan.py, models/test_embedding_rows.py, models/test_loading.py,
tasks/test_translation_multi_lslora.py.
"""

import re
from pathlib import Path

import pytest
from console import finetune_args, generate_args, run, with_option, without

QUIET = {"PYTHONWARNINGS": "ignore"}  # hydra warns about fairseq on stderr


def refused(command, args, *told, **kwargs):
    """Runs a command that must fail with one line; *told* are regular expressions of its parts."""
    status, out, err = run(command, *args, check=False, **QUIET, **kwargs)
    assert status == 1, err
    assert "Traceback" not in out + err
    lines = err.splitlines()
    if command == "fairseq-train":
        assert len(lines) == 1, err
    else:  # fairseq logs to stderr in decoding
        assert sum("lslora: error: " in line for line in lines) == 1, err
    assert lines[-1].startswith("lslora: error: ")
    for part in told:
        assert re.search(part, lines[-1]), lines[-1]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def save_dir(tmp_path):
    """A folder with a checkpoint of another run, which must survive."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint_best.pt").write_bytes(b"precious")
    yield folder
    assert contents(folder) == {"checkpoint_best.pt": b"precious"}


@pytest.fixture(scope="module")
def short_run(corpus, tmp_path_factory):
    """(arguments, save dir, stdout) of a run whose pruning schedule ends after it."""
    folder = tmp_path_factory.mktemp("short")
    args = finetune_args(corpus, folder, "--pruning-duration", "10", "--disable-validation")
    args = with_option(with_option(args, "--lang-pairs", "en-de,fr-en"), "--max-epoch", "1")
    _, out, _ = run("fairseq-train", *args)
    return args, folder, out


TRAINING = {
    "a language of the data has no adapter": (
        lambda args: with_option(args, "--lora-tiers", "high=en,de;low=fr"),
        ["no adapter for ja of the data", "add it to --lora-tiers"],
    ),
    "an optimizer of adapters for a model without": (
        lambda args: without(
            without(with_option(args, "--arch", "transformer"), "--lora-tiers"), "--lora-rank"
        ),
        ["a pruned_. optimizer trains adapters", "--arch must be one of lslora_"],
    ),
    "no data folder": (
        lambda args: ["/none/data", *args[1:]],
        ["/none/data/dict.de.txt: no such file", "name the folder that fairseq-preprocess wrote"],
    ),
    "a direction that was not prepared": (
        lambda args: with_option(args, "--lang-pairs", "en-de,de-fr,ja-de"),
        ["has no (train|valid) data of de-fr, ja-de", "prepare it .* or leave the direction out"],
    ),
    "a base of another width": (
        lambda args: [*args, "--encoder-embed-dim", "64", "--decoder-embed-dim", "64"],
        [
            r"base/checkpoint_last.pt does not fit this model",
            r"encoder.embed_tokens.weight: \(\d+, 32\) in the checkpoint, \(\d+, 64\) here",
            r"choose the --arch and sizes of the checkpoint \(transformer\)",
        ],
    ),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training(corpus, save_dir, case):
    change, told = TRAINING[case]
    refused("fairseq-train", change(finetune_args(corpus, save_dir)), *told)


def test_a_base_of_another_vocabulary(corpus, save_dir, tmp_path):
    longer = tmp_path / "dict.txt"
    lines = corpus.dictionary.read_text(encoding="utf-8").splitlines()
    longer.write_text("\n".join([*lines, "more 1", "words 1"]) + "\n", encoding="utf-8")
    found, expected = len(lines) + 4 + 4, len(lines) + 2 + 4 + 4
    refused(
        "fairseq-train",
        finetune_args(corpus, save_dir, "--fixed-dictionary", longer),
        "base/checkpoint_last.pt, trained with 4 languages, has "
        f"{found:,} embedding rows, this run expects {expected:,}: ",
        rf"{len(lines) + 2:,} dictionary lines \+ 4 specials \+ 4 language tokens",
        "use the dictionary of the base model and its --langs in its order",
    )


def test_a_base_that_is_cut_short(corpus, save_dir, tmp_path):
    cut = tmp_path / "cut.pt"
    whole = corpus.base.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    refused(
        "fairseq-train",
        with_option(finetune_args(corpus, save_dir), "--finetune-from-model", cut),
        rf"cannot read the checkpoint {cut} \(",
        "damaged, cut short or no checkpoint; copy it again, or name another one",
    )


def test_a_save_dir_that_cannot_be_made(corpus, save_dir):
    below_a_file = save_dir / "checkpoint_best.pt" / "run"
    refused(
        "fairseq-train",
        finetune_args(corpus, below_a_file),
        rf"cannot write to --save-dir {below_a_file} \(Not a directory\)",
        "name another folder",
    )


def test_a_schedule_that_ends_after_the_run_is_a_warning(short_run):
    _, save_dir, out = short_run
    (warning,) = [line for line in out.splitlines() if "WARNING" in line]
    assert "the pruning schedule ends at epoch 11, after the run's last (1)" in warning
    assert "lower --pruning-begin or --pruning-duration, or train longer" in warning
    assert "done training" in out
    assert [path.name for path in save_dir.iterdir()] == ["checkpoint_last.pt"]


RESUMING = {
    "another pruning schedule": (
        ["--pruning-duration", "9"],
        r"the pruning schedule changed on resume \(--pruning-duration was 10, now 9\)",
        "resume with the old options, or start a new run in another --save-dir",
    ),
    "another order of languages": (
        ["--langs", "ja,fr,en,de"],
        "checkpoint_last.pt was trained with --langs de,en,fr,ja, this run has ja,fr,en,de",
        "resume with the old one",
    ),
}


@pytest.mark.parametrize("case", RESUMING)
def test_resuming(short_run, case):
    args, save_dir, _ = short_run
    more, *told = RESUMING[case]
    before = contents(save_dir)
    refused("fairseq-train", [*with_option(args, "--max-epoch", "2"), *more], *told)
    assert contents(save_dir) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_last_checkpoint(short_run):
    """/dev/full stands for the file that fairseq writes before it takes the checkpoint's name."""
    args, save_dir, _ = short_run
    before = contents(save_dir)
    written = save_dir / "checkpoint_last.pt.tmp"
    written.symlink_to("/dev/full")
    refused(
        "fairseq-train",
        with_option(args, "--max-epoch", "2"),
        rf"cannot write to --save-dir {save_dir} \(No space left on device\)",
        "free some space or name another folder; the checkpoints already there are kept",
    )
    written.unlink()
    assert contents(save_dir) == before


DECODING = {
    "no languages": (
        "fairseq-generate",
        lambda args: without(without(args, "-s"), "-t"),
        ["decoding needs both languages of a direction: give -s and -t"],
    ),
    "an unknown language": (
        "fairseq-generate",
        lambda args: with_option(args, "-t", "ko"),
        [r"en-ko: ko is absent from --langs \(de,en,fr,ja\): choose one of these"],
    ),
    "a file that is no SentencePiece model": (
        "fairseq-interactive",
        lambda args: [*args, "--bpe", "sentencepiece", "--sentencepiece-model", __file__],
        [f"--sentencepiece-model {__file__} is no SentencePiece model: name the model that made"],
    ),
}


@pytest.mark.parametrize("case", DECODING)
def test_decoding(corpus, short_run, case):
    _, save_dir, _ = short_run
    command, change, told = DECODING[case]
    args = generate_args(corpus, save_dir / "checkpoint_last.pt", "en", "fr")
    refused(command, change(args), *told, stdin="Hello\n")


def test_a_traceback_on_request(corpus, save_dir):
    args = with_option(finetune_args(corpus, save_dir), "--lora-rank", "33")
    status, _, err = run("fairseq-train", *args, check=False, LSLORA_TRACEBACK="1")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert re.search(r"ConfigError: --lora-rank: rank 33 of de must lie between 1 and 32", err)
