"""Which versions are installed, and whether they work together; needs no fairseq."""

import re
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Optional

from lslora_fairseq.doctor.report import ERROR, OK, WARNING, Line

STOCK = "fairseq"
FAIRSEQS = (STOCK, "ve-fairseq", "fairseq-fixed")  # distributions that install the same package
LIBRARIES = ("torch", "numpy", "omegaconf", "sacrebleu")
TESTED = {  # what the test suite is run with
    "Python": ("3.10", "3.11", "3.12"),
    "torch": ("2.2.2", "2.13.0"),
    "numpy": ("1.26.4", "2.4.6"),
    "omegaconf": ("2.0.6", "2.3.1"),
    "sacrebleu": ("2.6.0",),
    "fairseq": (
        "fairseq 0.12.2 on Python 3.10",
        "ve-fairseq 0.12.3 on Python 3.11",
        "ve-fairseq 0.12.3 on Python 3.12",
    ),
}
OLDEST = {"torch": "2.2", "numpy": "1.24", "sacrebleu": "2.3"}
ON_THIS_PYTHON = "pip install -r requirements.txt installs the tested versions"


@dataclass(frozen=True)
class Installed:
    """What is installed.

    Attributes:
        python: version
        libraries: name -> version, or None where it is missing
        fairseqs: distribution -> version, of those that are installed
        fairseq_version: of the package that ``import fairseq`` finds, or None
        import_error: why ``import fairseq`` fails, or None
    """

    python: str
    libraries: dict
    fairseqs: dict
    fairseq_version: Optional[str] = None
    import_error: Optional[str] = None

    @property
    def is_stock_release(self):
        """fairseq 0.12.2 as released; a checkout has the same number with a suffix."""
        return self.fairseqs == {STOCK: "0.12.2"}


def numbers(version):
    """``'2.13.0+cpu'`` -> (2, 13, 0)"""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed():
    """Reads what is installed, and tries to import fairseq."""
    version = error = None
    try:
        version = import_module("fairseq").__version__
    except Exception as raised:  # a broken installation may raise anything
        error = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
    found = {name: _version(name) for name in (*LIBRARIES, *FAIRSEQS)}
    return Installed(
        python=".".join(map(str, sys.version_info[:3])),
        libraries={name: found[name] for name in LIBRARIES},
        fairseqs={name: found[name] for name in FAIRSEQS if found[name]},
        fairseq_version=version,
        import_error=error,
    )


def check(found):
    """One line for Python, fairseq and each library.

    Args:
        found: an :class:`Installed`
    """
    return [
        _python(found.python),
        _fairseq(found),
        *(_library(name, version, found) for name, version in found.libraries.items()),
    ]


def _python(version):
    if version.rpartition(".")[0] not in TESTED["Python"]:
        remedy = f"use Python {' or '.join(TESTED['Python'])}"
        return Line(ERROR, "Python", f"{version} does not work", remedy)
    return Line(OK, "Python", f"{version}, tested")


def _fairseq(found):
    named = ", ".join(f"{name} {version}" for name, version in found.fairseqs.items())
    named = named or f"{found.fairseq_version or 'none'} without package metadata"
    modern = numbers(found.python) >= (3, 11)
    fitting = "ve-fairseq==0.12.3" if modern else "fairseq==0.12.2"
    if len(found.fairseqs) > 1:
        return Line(
            ERROR,
            "fairseq",
            f"{named}: they overwrite each other's files",
            f"pip uninstall {' '.join(found.fairseqs)}, then pip install {fitting}",
        )
    if found.import_error:
        if modern and found.is_stock_release:
            remedy = f"it needs Python 3.10; here pip uninstall fairseq, pip install {fitting}"
        else:
            remedy = f"pip install {fitting}; {ON_THIS_PYTHON}"
        return Line(ERROR, "fairseq", f"{named}, cannot be imported ({found.import_error})", remedy)
    version = next(iter(found.fairseqs.values()), found.fairseq_version)
    if numbers(version) < (0, 12, 2):
        return Line(ERROR, "fairseq", f"{named} is too old", f"pip install {fitting}")
    own = f"{named} on Python {found.python.rpartition('.')[0]}"
    if own in TESTED["fairseq"]:
        return Line(OK, "fairseq", f"{named}, tested")
    tested = f"tested: {'; '.join(TESTED['fairseq'])}"
    return Line(WARNING, "fairseq", f"{named}, not tested", tested)


def _library(name, version, found):
    if version is None:
        return Line(ERROR, name, "not installed", f"pip install {name}; {ON_THIS_PYTHON}")
    oldest, tested = OLDEST.get(name), TESTED[name]
    problem = remedy = None
    if oldest and numbers(version) < numbers(oldest):
        why = ": it lacks the tokenizer of spBLEU, flores101" if name == "sacrebleu" else ""
        problem, remedy = f"is too old{why}", f"pip install '{name}>={oldest}'"
    elif name == "numpy" and numbers(version) >= (2,):
        problem, remedy = _numpy_2(found), "pip install 'numpy<2'"
    elif name == "omegaconf" and found.is_stock_release and numbers(version) >= (2, 1):
        problem, remedy = "is too new for fairseq 0.12.2", "pip install omegaconf==2.0.6"
    if problem:
        return Line(ERROR, name, f"{version} {problem}", remedy)
    if version.partition("+")[0] in tested:
        return Line(OK, name, f"{version}, tested")
    remedy = f"tested: {', '.join(tested)}"
    if numbers(version)[:2] > numbers(tested[-1])[:2]:
        return Line(WARNING, name, f"{version}, newer than what was tested", remedy)
    return Line(OK, name, f"{version} ({remedy})")


def _numpy_2(found):
    """Why numpy 2 does not work here, or None."""
    if found.is_stock_release:
        return "does not work with fairseq 0.12.2"
    torch = found.libraries.get("torch")
    if torch and numbers(torch) < (2, 3):
        return f"does not work with torch {torch}, which is built for numpy 1"
    return None
