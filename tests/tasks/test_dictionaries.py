"""Dictionaries that hold the same are one object in a task, and in no other."""

from pathlib import Path

from commands import refused, set_up, training
from console import with_option


def test_languages_share_what_holds_the_same(data):
    task, _ = set_up(training(data))
    first = task.dicts["de"]
    assert len(task.dicts) == 4 and all(found is first for found in task.dicts.values())
    assert first.rows_in_file == 24 and len(first) == 28


def test_another_task_has_its_own(data):
    """Its languages have another order, and so their tokens."""
    words = with_option(training(data), "--langs", "ja,fr,en,de")
    tasks = [set_up(each)[0] for each in (training(data), words)]
    tokens = [[task.dicts["de"].index(f"__{la}__") for la in ("de", "ja")] for task in tasks]
    assert tokens == [[24, 27], [27, 24]]


def test_what_differs_is_refused(data, tmp_path):
    for path in Path(data).iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    with open(tmp_path / "dict.fr.txt", "a") as file:
        file.write("more 1\n")
    refused(set_up, training(tmp_path), f"the files dict.CODE.txt in {tmp_path} differ from lang")
