"""The evidence's corpus and its jobs: what may not leak, and what is not done twice."""

import sys
from pathlib import Path

import polib
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "evidence"))

import corpus
from jobs import Jobs

from lslora_fairseq.errors import ConfigError


def catalogue(folder, package, language, name, pairs):
    """A compiled catalogue where a package has it."""
    path = folder / package / "usr" / "share" / "locale" / language / "LC_MESSAGES" / f"{name}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = polib.POFile()
    made.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for source, target in pairs:
        made.append(polib.POEntry(msgid=source, msgstr=target))
    made.save_as_mofile(str(path))


def numbered(language, word, count):
    return [(f"The {word} {i} is _here", f"{language} {word} {i} d~a") for i in range(count)]


@pytest.fixture
def programs(tmp_path):
    for language, count in (("de", 40), ("oc", 30)):
        # five messages of the spreadsheet are the editor's, too
        own = numbered(language, "page", count) + numbered(language, "cell", 5)
        catalogue(tmp_path, "editor", language, "editor", own)
        catalogue(tmp_path, "office", language, "sc", numbered(language, "cell", count))
        context = [("STR|The mail is here", f"{language} mail da"), *own[:3]]
        catalogue(tmp_path, "mail", language, "mail", context + numbered(language, "mail", count))
    return tmp_path


def build(folder, *more):
    args = ["--programs", str(folder), "--out", str(folder / "out"), "--few", "sc", "--more",
            "mail", "--languages", "de", "oc", "--held-out", "3", "5", *more]  # fmt: skip
    return corpus.build(corpus.parse_args(args))


def texts(folder, group, split):
    found = set()
    for path in (folder / "out" / group).glob(f"{split}.*"):
        found.update(path.read_text(encoding="utf-8").splitlines())
    return found


def test_the_base_has_seen_nothing_of_the_other_programs(programs):
    build(programs)
    base = texts(programs, "base", "*")
    assert base and not base & (texts(programs, "few", "*") | texts(programs, "more", "*"))
    for group in ("base", "few", "more"):
        train, held_out = texts(programs, group, "train"), texts(programs, group, "[vt][ea][ls]*")
        assert train and held_out and not train & held_out
    assert "The mail is here" in texts(programs, "more", "*")  # no context, no mark of a key
    assert not any("_" in text or "~" in text for text in base)


def test_few_messages_are_the_same_in_every_language(programs):
    counts = build(programs, "--few-messages", "10")
    assert counts["few", "train", "de"] == counts["few", "train", "oc"] == 10
    english = [
        (programs / "out" / "few" / f"train.en-{code}.en").read_text("utf-8").splitlines()
        for code in ("de", "oc")
    ]
    assert sorted(english[0]) == sorted(english[1])


def test_a_catalogue_that_is_not_there_is_named(programs):
    with pytest.raises(FileNotFoundError, match="no catalogue none.mo of --more"):
        build(programs, "--more", "none")


def test_a_job_is_done_once_and_again_when_what_it_rests_on_has_changed(tmp_path):
    jobs = Jobs(tmp_path, [0])

    def ran():
        return (tmp_path / "made" / "count").read_text() if (tmp_path / "made").exists() else ""

    def run(word, text="data"):
        jobs.run("data", ["sh", "-c", f"echo {text} >{{out}}/text"])
        jobs.run("made", ["sh", "-c", f"echo {word} >>{{out}}/count; echo told"], after=["data"])
        return ran()

    assert run("a") == run("a") == "a\n"
    assert jobs.log("made").endswith("told\n") and jobs.facts("made")["peak_mib"] > 0
    assert run("b") == "b\n"  # begun in an empty folder
    assert run("b", "other data") == "b\n" and jobs.facts("made")["after"]


def test_a_job_that_failed_is_told_and_goes_on_where_it_stopped(tmp_path):
    jobs = Jobs(tmp_path, [0])
    command = ["sh", "-c", "echo x >>{out}/count; echo out of luck; test -e {out}/../go"]
    with pytest.raises(ConfigError, match="made failed, see .*made.log: .*out of luck"):
        jobs.run("made", command)
    (tmp_path / "go").touch()
    jobs.run("made", command)
    assert (tmp_path / "made" / "count").read_text() == "x\nx\n"
    assert jobs.log("made").count("\nout of luck\n") == 2


def test_a_job_goes_on_where_another_one_left_off(tmp_path):
    jobs = Jobs(tmp_path, [0])
    jobs.run("short", ["sh", "-c", "echo a >>{out}/steps; echo told a"])
    for _ in range(2):
        jobs.run("long", ["sh", "-c", "echo b >>{out}/steps; echo told b"], (), "short")
    assert (tmp_path / "long" / "steps").read_text() == "a\nb\n"
    assert (tmp_path / "short" / "steps").read_text() == "a\n"
    told = [line for line in jobs.log("long").splitlines() if line.startswith("told")]
    assert told == ["told a", "told b"]
