"""The corpus, base model and fine-tuned model that the end-to-end tests share.

The text is real: the translations that the installed packages wtforms and humanize ship.
"""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import polib
import pytest
import sentencepiece
import torch
from console import LANGS, finetune_args, run, train_args
from filelock import FileLock

Corpus = namedtuple("Corpus", "data base spm dictionary text")

CODES = LANGS.split(",")
CATALOGUES = (("wtforms", "wtforms"), ("humanize", "humanize"))


def _messages(lang):
    """English -> translation, from the catalogues of one language."""
    found = {}
    for package, domain in CATALOGUES:
        locale = Path(find_spec(package).submodule_search_locations[0]) / "locale"
        for folder in sorted(locale.glob(f"{lang}*")):
            for entry in polib.pofile(str(folder / "LC_MESSAGES" / f"{domain}.po")):
                if entry.msgstr and not entry.fuzzy and "\n" not in entry.msgid + entry.msgstr:
                    found.setdefault(entry.msgid, entry.msgstr)
    return found


def _shared(tmp_path_factory, worker_id, name, make):
    """A folder that is made once, by the first of the processes that run the tests.

    Args:
        make: is called with the folder, which tests may read but not change
    """
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # this process runs a part of the tests
        shared = shared.parent
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            make(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, worker_id):
    """Real parallel text of English with German, French and Japanese, binarised, and a base."""
    return _read_corpus(_shared(tmp_path_factory, worker_id, "corpus", _make_corpus))


@pytest.fixture(scope="session")
def finetuned(corpus, tmp_path_factory, worker_id):
    """(checkpoint, stdout of the training) of console.finetune_args without further options."""

    def train(folder):
        args = finetune_args(corpus, folder / "run")
        (folder / "stdout").write_text(run("fairseq-train", *args)[1], encoding="utf-8")

    folder = _shared(tmp_path_factory, worker_id, "finetuned", train)
    return folder / "run" / "checkpoint_last.pt", (folder / "stdout").read_text("utf-8")


def _read_corpus(folder):
    base = folder / "base" / "checkpoint_last.pt"
    text = {lang: (folder / f"all.{lang}").read_text("utf-8").splitlines() for lang in CODES}
    return Corpus(folder / "data", base, folder / "spm.model", folder / "dict.txt", text)


def _make_corpus(folder):
    langs = [lang for lang in CODES if lang != "en"]
    messages = {lang: _messages(lang) for lang in langs}
    english = sorted(set.intersection(*(set(m) for m in messages.values())))
    assert len(english) > 40
    text = {"en": english, **{lang: [m[e] for e in english] for lang, m in messages.items()}}
    for lang, lines in text.items():
        (folder / f"all.{lang}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=[str(folder / f"all.{lang}") for lang in text],
        model_prefix=str(folder / "spm"),
        vocab_size=500,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [spm.id_to_piece(i) for i in range(3, spm.get_piece_size())]
    dictionary = folder / "dict.txt"
    dictionary.write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    for lang, lines in text.items():
        encoded = [" ".join(spm.encode(line, out_type=str)) for line in lines]
        for split, part in (
            ("train", encoded[16:]),
            ("valid", encoded[:8]),
            ("test", encoded[8:16]),
        ):
            (folder / f"{split}.{lang}").write_text("\n".join(part) + "\n", encoding="utf-8")

    def binarise(lang):
        run(
            "fairseq-preprocess", "-s", "en", "-t", lang, "--trainpref", folder / "train",
            "--validpref", folder / "valid", "--testpref", folder / "test", "--destdir",
            folder / "data", "--srcdict", dictionary, "--tgtdict", dictionary,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(binarise, langs))
    run(
        "fairseq-train",
        *train_args(
            _read_corpus(folder), folder / "base", "--arch", "transformer", "--optimizer", "adam",
            "--max-epoch", "15", "--disable-validation", task="translation_multi_simple_epoch",
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
