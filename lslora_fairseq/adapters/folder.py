"""Writes a folder of adapter files, whole or not at all."""

import os
import shutil
import tempfile
from contextlib import contextmanager

from lslora_fairseq.adapters.card import card
from lslora_fairseq.adapters.extraction import Extraction
from lslora_fairseq.adapters.files import SUFFIX, read
from lslora_fairseq.errors import ConfigError

CARD = "README.md"


def write(path, trained, codes, dtype, licence=None, scores=None):
    """Writes the adapters of a checkpoint.

    Args:
        path: the folder, which is made, and must be empty if it is there
        trained: :class:`~lslora_fairseq.analysis.trained.Trained`
        codes: text that names languages, such as ``oc,wo``; None for all
        dtype: ``fp32``, ``fp16`` or ``bf16``
        licence: identifier of a licence, for the card
        scores: text for the card

    Returns:
        owner -> (header, bytes of the file)

    Raises:
        ConfigError: the folder holds something or cannot be written, or the checkpoint has nothing
            that can be taken out.
    """
    made = Extraction(trained)
    chosen = made.codes
    if codes is not None:
        chosen = trained.plan.languages.subset(codes, "--langs")
        if not made.codes:
            raise ConfigError(
                f"{trained.path} has adapters that all languages share alone: leave out --langs"
            )
    found = {}
    with new(path) as folder:
        for owner, header, content in made.files(chosen, dtype):
            found[owner] = header, _write(folder, owner + SUFFIX, content)
            read(os.path.join(folder, owner + SUFFIX))
        _write(folder, CARD, card(found, trained.options, licence, scores).encode())
    return found


@contextmanager
def new(path):
    """A folder that is filled under another name, and has its own once it is complete.

    Args:
        path: of ``--out``; it must be empty if it is there

    Yields:
        the path of the folder to fill

    Raises:
        ConfigError: it holds something, or cannot be written.
    """
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise ConfigError(f"--out {path} is there already: name a folder that is not, or is empty")
    path = os.path.normpath(path)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        beside = tempfile.mkdtemp(prefix=f"{os.path.basename(path)}.tmp", dir=os.path.dirname(path))
        try:
            yield beside
            os.chmod(beside, 0o777 & ~umask())
            os.replace(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write --out {path} ({error.strerror or error}): free some space or name "
            "another folder"
        ) from None


def _write(folder, name, content):
    """Returns the number of bytes."""
    with open(os.path.join(folder, name), "wb") as file:
        return file.write(content)


def umask():
    """What mkdtemp does not heed."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
