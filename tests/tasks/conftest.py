import pytest
from console import LANGS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with dictionaries alone: all that building a task and a model reads."""
    folder = tmp_path_factory.mktemp("data")
    for lang in LANGS.split(","):
        (folder / f"dict.{lang}.txt").write_text("".join(f"w{i} 1\n" for i in range(20)))
    return str(folder)
