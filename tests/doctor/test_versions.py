"""Which versions work together: the rules, and reading what is installed."""

from importlib import metadata

import pytest

from lslora_fairseq.doctor import versions
from lslora_fairseq.doctor.versions import Installed, check, installed, numbers

OLD = Installed(
    python="3.10.13",
    libraries={
        "torch": "2.2.2+cu121",
        "numpy": "1.26.4",
        "omegaconf": "2.0.6",
        "sacrebleu": "2.6.0",
    },
    fairseqs={"fairseq": "0.12.2"},
    fairseq_version="0.12.2",
)
NEW = Installed(
    python="3.11.7",
    libraries={"torch": "2.13.0+cpu", "numpy": "2.4.6", "omegaconf": "2.3.1", "sacrebleu": "2.6.0"},
    fairseqs={"ve-fairseq": "0.12.3"},
    fairseq_version="0.12.3",
)


def changed(found, **libraries):
    """A copy with other versions; keywords that are no library are attributes."""
    own = {k: libraries.pop(k) for k in list(libraries) if k not in found.libraries}
    return Installed(**{**vars(found), "libraries": {**found.libraries, **libraries}, **own})


@pytest.mark.parametrize("found", [OLD, NEW])
def test_the_tested_versions(found):
    lines = check(found)
    assert [line.check for line in lines] == ["Python", "fairseq", *found.libraries]
    assert {line.status for line in lines} == {"ok"}
    assert all(line.found.endswith(", tested") and not line.remedy for line in lines)


IMPORT_ERROR = "ValueError: mutable default <class 'CommonConfig'> for field common"


@pytest.mark.parametrize(
    "found, name, status, told, remedy",
    [
        (changed(OLD, python="3.9.18"), "Python", "error", "3.9.18 does not work", "use Python 3"),
        (changed(NEW, python="3.13.1"), "Python", "error", "does not work", "3.11 or 3.12"),
        (
            changed(OLD, python="3.11.7", import_error=IMPORT_ERROR),
            "fairseq",
            "error",
            "fairseq 0.12.2, cannot be imported (ValueError: mutable default",
            "it needs Python 3.10; here pip uninstall fairseq, pip install ve-fairseq==0.12.3",
        ),
        (
            changed(OLD, fairseqs={}, fairseq_version=None, import_error="ModuleNotFoundError: x"),
            "fairseq",
            "error",
            "none without package metadata, cannot be imported (ModuleNotFoundError",
            "pip install fairseq==0.12.2",
        ),
        (
            changed(NEW, fairseqs={"fairseq": "0.12.2", "ve-fairseq": "0.12.3"}),
            "fairseq",
            "error",
            "they overwrite each other's files",
            "pip uninstall fairseq ve-fairseq, then pip install ve-fairseq==0.12.3",
        ),
        (
            changed(OLD, fairseqs={"fairseq": "0.10.2"}),
            "fairseq",
            "error",
            "fairseq 0.10.2 is too old",
            "pip install fairseq==0.12.2",
        ),
        (
            changed(NEW, fairseqs={}, fairseq_version="1.0.0a0+abc"),
            "fairseq",
            "warning",
            "1.0.0a0+abc without package metadata, not tested",
            "tested: fairseq 0.12.2 on Python 3.10; ve-fairseq 0.12.3 on Python 3.11",
        ),
        (changed(OLD, torch="2.1.2"), "torch", "error", "2.1.2 is too old", "'torch>=2.2'"),
        (changed(NEW, torch="2.14.0"), "torch", "warning", "newer than", "tested: 2.2.2, 2.13.0"),
        (changed(OLD, numpy="1.23.0"), "numpy", "error", "is too old", "'numpy>=1.24'"),
        (changed(OLD, numpy="2.0.1"), "numpy", "error", "fairseq 0.12.2", "pip install 'numpy<2'"),
        (
            changed(NEW, torch="2.2.2"),
            "numpy",
            "error",
            "does not work with torch 2.2.2",
            "pip install 'numpy<2'",
        ),
        (changed(OLD, omegaconf="2.3.0"), "omegaconf", "error", "is too new", "omegaconf==2.0.6"),
        (changed(OLD, sacrebleu="2.2.1"), "sacrebleu", "error", "flores101", "'sacrebleu>=2.3'"),
        (changed(OLD, sacrebleu=None), "sacrebleu", "error", "not installed", "pip install sacre"),
    ],
)
def test_versions_that_do_not_work_are_told_with_the_remedy(found, name, status, told, remedy):
    lines = {line.check: line for line in check(found)}
    line = lines.pop(name)
    assert line.status == status
    assert told in line.found
    assert remedy in line.remedy
    assert {other.status for other in lines.values()} == {"ok"} or name == "Python"


@pytest.mark.parametrize("library, version", [("torch", "2.6.0"), ("sacrebleu", "2.4.3")])
def test_versions_between_the_tested_ones_are_fine(library, version):
    (line,) = [n for n in check(changed(NEW, **{library: version})) if n.check == library]
    assert line.status == "ok" and line.found.startswith(f"{version} (tested: ")


def test_a_checkout_is_not_the_stock_release():
    assert OLD.is_stock_release
    assert not changed(OLD, fairseqs={"fairseq": "0.12.2+920a548"}).is_stock_release


@pytest.mark.parametrize(
    "version, expected",
    [("2.13.0+cpu", (2, 13, 0)), ("1.0.0a0+abc", (1, 0, 0)), ("3.12", (3, 12))],
)
def test_numbers(version, expected):
    assert numbers(version) == expected


def test_reading_what_is_installed(monkeypatch):
    known = {"torch": "2.6.0", "fairseq-fixed": "0.12.3.1"}

    def version(name):
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    def broken(name):
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(metadata, "version", version)
    assert installed().import_error is None
    monkeypatch.setattr(versions, "import_module", broken)
    found = installed()
    assert found.libraries == {
        "torch": "2.6.0",
        "numpy": None,
        "omegaconf": None,
        "sacrebleu": None,
    }
    assert found.fairseqs == {"fairseq-fixed": "0.12.3.1"}
    assert (found.fairseq_version, found.import_error) == (None, "ValueError: first line")
