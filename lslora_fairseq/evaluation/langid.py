"""How many hypotheses are in another language than they should be, by py3langid.

py3langid ships its model (4.6 MB, 139 languages) and takes 0.2 ms for a sentence. A single word or
a short sentence is often taken for another language, and so are names, numbers, and close languages
(Xhosa and Zulu): a few per cent of a perfect translation count as off-target. Compare the share
with that of the references, or between systems.
"""

from functools import cache
from importlib.metadata import version as version_of

from lslora_fairseq.errors import ConfigError

# what py3langid tells apart, but the text of a test set does not: written alike
SAME = {"nb": "no", "wuu": "zh", "ary": "ar", "arz": "ar"}


def version():
    """The library and its version.

    Raises:
        ConfigError: it is not installed.
    """
    _libraries()
    return f"py3langid {version_of('py3langid')}"


def off_target(hypotheses, target):
    """Share of hypotheses that are in another language; an empty one is.

    Args:
        hypotheses: plain text, one sentence each
        target: language code of ISO 639, with or without a script: ``de``, ``deu``, ``deu_Latn``

    Returns:
        0 to 1, or None where the library does not know the language, or there are no hypotheses

    Raises:
        ConfigError: the library is not installed.
    """
    py3langid, _ = _libraries()
    language = known(target)
    if language is None or not hypotheses:
        return None
    off = 0
    for line in hypotheses:
        found = py3langid.classify(line)[0] if line.strip() else None
        off += SAME.get(found, found) != language
    return off / len(hypotheses)


def known(code):
    """The library's name of a language; None where it has none.

    A language that ISO 639-3 counts as a part of one that the library knows is taken for that:
    ``zsm`` (Standard Malay) is ``ms``.
    """
    _, langcodes = _libraries()
    names = _names()
    for macro in (False, True):
        try:
            tag = langcodes.standardize_tag(code.replace("-", "_").split("_")[0], macro=macro)
        except langcodes.LanguageTagError:
            return None
        tag = tag.split("-")[0]
        if tag in names or tag in SAME:
            name = names.get(tag, tag)
            return SAME.get(name, name)
    return None


@cache
def _names():
    """Code in langcodes' standard form -> the library's name."""
    py3langid, langcodes = _libraries()
    return {langcodes.standardize_tag(name): name for name, _ in py3langid.rank("")}


def _libraries():
    try:
        import langcodes
        import py3langid
    except ImportError as error:
        raise ConfigError(
            f"off-target hypotheses are counted with py3langid and langcodes ({error.name} is not "
            "installed): pip install 'py3langid>=0.2.2' 'langcodes>=3.3'"
        ) from None
    return py3langid, langcodes
