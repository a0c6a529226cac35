"""Files of version 1 of the format, which were written once, translate as they did then.

tests/data/adapters_v1/make.py is what made them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from console import USER_DIR, run

from lslora_fairseq.adapters import files

DATA = Path(__file__).resolve().parents[1] / "data" / "adapters_v1"
ADAPTERS = str(DATA / "adapters")
# direction -> adapter files; the last ones in half precision
FILES = [
    ("en", "de", ADAPTERS),
    ("en", "fr", ADAPTERS),
    ("fr", "en", ADAPTERS),
    ("en", "fr", ",".join(str(DATA / f) for f in (
        "adapters/de.safetensors", "adapters/en.safetensors", "adapters/shared.safetensors", "bf16"
    ))),
]  # fmt: skip


def translated(source, target, adapters):
    """The translations of a language's sentences, as pieces; the name of the direction first.

    Args:
        adapters: the value of --lora-adapters; None for the base model alone
    """
    more = ["--lora-adapters", adapters] if adapters else []
    with TemporaryDirectory() as folder:
        _, out, _ = run(
            "fairseq-interactive", folder, "--user-dir", USER_DIR, "--cpu", "--task",
            "translation_multi_lslora", "--fixed-dictionary", DATA / "dict.txt", "--path",
            DATA / "base.pt", "-s", source, "-t", target, "--beam", "3", "--max-len-b", "30",
            "--buffer-size", "20", "--max-tokens", "500", *more,
            stdin=(DATA / f"{source}.txt").read_text("utf-8"),
        )  # fmt: skip
    lines = [line.split("\t") for line in out.splitlines() if line.startswith("H-")]
    texts = {int(number[2:]): text for number, _, text in lines}
    return [f"{source}-{target}", *(texts[number] for number in sorted(texts))]


def test_they_translate_as_they_did():
    expected = (DATA / "translations.txt").read_text("utf-8").splitlines()
    assert [line for pair in FILES for line in translated(*pair)] == expected


def test_the_base_model_alone_translates_otherwise():
    _, *lines = translated("en", "fr", None)
    expected = (DATA / "translations.txt").read_text("utf-8").splitlines()
    start = expected.index("en-fr") + 1
    assert len(lines) == 12 and lines != expected[start : start + 12]


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.safetensors")), ids=lambda path: path.stem)
def test_they_are_written_again_as_they_are(path):
    file = files.read(path)
    assert file.header.version == 1
    assert files.encode(file.header, file.tensors) == path.read_bytes()


def test_every_form_of_a_factor_is_among_them():
    names = {name for path in DATA.rglob("*.safetensors") for name in files.read(path).tensors}
    endings = {name.rpartition("lora_")[2] for name in names if "lora_" in name}
    assert endings == {"A", "B", "B.values", "B.mask", "B.signed"}
