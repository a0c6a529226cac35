"""Folders of ``lslora evaluate`` that cannot be read."""

import re

import pytest
from folders import change, save, texts

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation import saved

AGAIN = "run lslora evaluate again, with the same arguments"


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "results", texts(0.3, number=3))


def told(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_read(folder):
    content = texts(0.3, number=3)
    results = saved.load(str(folder))
    assert list(results["directions"]) == list(content)
    for pair, files in content.items():
        for kind, lines in files.items():
            checksums = results["directions"][pair]["sha256"]
            assert saved.read_lines(str(folder), pair, kind, checksums) == lines


def test_other_line_ends_are_part_of_a_sentence(tmp_path):
    lines = ["a\u2028b", "", "c\x0cd\x85e", ""]
    content = {"en-de": {"src": lines, "ref": lines, "hyp": lines}}
    folder = save(tmp_path / "results", content)
    checksums = saved.load(folder)["directions"]["en-de"]["sha256"]
    assert saved.read_lines(folder, "en-de", "hyp", checksums) == lines


def test_no_folder_and_no_results(tmp_path):
    gone = tmp_path / "gone"
    assert told(saved.load, gone) == (
        f"{gone}: no such folder: name one that lslora evaluate wrote"
    )
    assert told(saved.load, tmp_path) == (
        f"{tmp_path} holds no scores.json: name a folder that lslora evaluate wrote"
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"version": null}', '{"version": 1}', '{"version": 1, "directions": 3}'],
)  # fmt: skip
def test_damaged_results(folder, content):
    path = folder / "scores.json"
    path.write_text(content)
    message = re.sub(r"\(\w+: .*?\)(?=: delete)", "(…)", told(saved.load, folder))
    assert message == f"{path} is damaged (…): delete the folder and {AGAIN}"


def test_bytes_that_are_no_text(folder):
    (folder / "scores.json").write_bytes(b"\xff\xfe\x00")
    assert "is damaged (UnicodeDecodeError: " in told(saved.load, folder)


def test_a_later_version(folder):
    change(folder, lambda content: content.update(version=2, directions=None))
    assert told(saved.load, folder) == (
        f"{folder / 'scores.json'} is of version 2, this lslora_fairseq reads up to 1: update it, "
        "or evaluate again with this one"
    )


def test_incomplete_results(folder):
    change(folder, lambda content: content["directions"]["de-en"]["scores"].pop("chrF++"))
    path = folder / "scores.json"
    assert told(saved.load, folder) == f"{path} lacks scores of de-en: {AGAIN}"
    change(folder, lambda content: content.update(directions={}))
    assert told(saved.load, folder) == f"{path} lacks scores of directions: {AGAIN}"
    change(folder, lambda content: content.pop("tiers"))
    assert told(saved.load, folder) == f"{path} lacks tiers: {AGAIN}"


def test_a_file_that_is_gone_or_has_changed(folder):
    checksums = saved.load(folder)["directions"]["en-de"]["sha256"]
    path = folder / "en-de.hyp"
    path.write_text("another\n")
    assert told(saved.read_lines, folder, "en-de", "hyp", checksums) == (
        f"{path} has changed since it was scored: {AGAIN}"
    )
    path.unlink()
    assert told(saved.read_lines, folder, "en-de", "hyp", checksums) == (
        f"{path} cannot be read (No such file or directory): {AGAIN}"
    )
