"""Adapter files that make up one model."""

import os
from dataclasses import asdict

from lslora_fairseq.adapters.files import SUFFIX, read
from lslora_fairseq.config import LSLoConfig
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.languages import Languages
from lslora_fairseq.lora.plan import SHARED

TIERS = ("high", "medium", "low")  # the usual ones, in their usual order
# what has to be the same in all files, and what is to be done where it is not
SAME = {
    "base": "name files that were trained on one base model",
    "options": "adapters of one model have the same modules, layers, sides and shape; choose some "
    "that have, or train again with the options of the others",
    "tokens": "choose files that were trained with the same language tokens",
    "lines": "choose files that were trained with the same dictionary file",
    "extra_data": "choose files that were trained with the same --extra-data",
    "shared": "what the languages share was trained with them; choose languages of one run, or of "
    "runs that kept it (--lora-train-languages)",
}


def paths_in(places):
    """The adapter files that files and folders name.

    Raises:
        ConfigError: a folder has none.
    """
    found = []
    for place in map(str, places):
        if not os.path.isdir(place):
            found.append(place)
            continue
        names = sorted(name for name in os.listdir(place) if name.endswith(SUFFIX))
        if not names:
            raise ConfigError(
                f"{place} holds no adapter file (*{SUFFIX}): name a folder that lslora extract "
                "wrote"
            )
        found += [os.path.join(place, name) for name in names]
    return found


class Collection:
    """Files that go together.

    Args:
        places: files, and folders of them

    Raises:
        ConfigError: a file is refused, a language is there twice, or files do not go together.

    Attributes:
        files: language, or ``shared`` -> :class:`~lslora_fairseq.adapters.files.AdapterFile`
        languages: the :class:`Languages`
    """

    def __init__(self, places):
        self.files = {}
        for path in paths_in(places):
            self._add(read(path))
        first, *others = self.files.values()
        for file in others:
            _check_same(first, file)
        self.first = first.header
        own = {code: file.header.tier for code, file in self.files.items() if code != SHARED}
        if self.first.shared is not None and SHARED not in self.files:
            raise ConfigError(
                f"{first.path} needs {SHARED}{SUFFIX}, what the languages of its run share: name "
                "that file too, or the folder"
            )
        tiers = own or self.files[SHARED].header.tiers
        if not tiers:
            raise ConfigError(
                f"{first.path} is what languages share beside adapters of their own: name those of "
                "some languages too"
            )
        order = sorted(tiers, key=lambda code: (_place(tiers[code]), code))
        self.languages = Languages({code: tiers[code] for code in order})
        self._own = own

    def _add(self, file):
        owner = file.header.owner
        other = self.files.setdefault(owner, file)
        if other is file:
            return
        if owner != SHARED:
            raise ConfigError(
                f"{owner} is there twice, {other.path} and {file.path}: name one of them"
            )
        _check_same(other, file)

    @property
    def path(self):
        """What stands for the files in messages."""
        path, *others = (file.path for file in self.files.values())
        return f"{path} and {len(others)} more" if others else path

    @property
    def codes(self):
        """Languages with adapters, or with none of their own."""
        return self.languages.codes

    def options(self):
        """The options of a model with these adapters: every one of :class:`LSLoConfig`, by name."""
        modules = {code: self.files[code].header.modules for code in self._own}
        for code, ours in modules.items():
            if len({(m.rank, m.alpha) for m in ours}) != 1:
                raise ConfigError(
                    f"{self.files[code].path} has modules of several ranks or alphas, and a model "
                    "of this package has one for each language: train the language with one"
                )
        config = LSLoConfig(**self.first.options)
        config.lora_tiers, config.lora_rank, config.lora_alpha = self.languages.spec, "0", None
        if modules:
            ranks, alphas = (
                [getattr(modules[code][0], name) for code in self.codes]
                for name in ("rank", "alpha")
            )
            config.lora_rank = self.languages.spelled(ranks)
            config.lora_alpha = None if alphas == ranks else self.languages.spelled(alphas)
        return asdict(config)

    def task_options(self):
        """The options of a task that tell which sentence has which token, by name."""
        tokens = dict(self.first.tokens)
        langtoks = tokens["langtoks"].items()
        tokens["langtoks"] = {category: tuple(specs) for category, specs in langtoks}
        return tokens


def _check_same(first, file):
    for name, remedy in SAME.items():
        one, other = (getattr(f.header, name) for f in (first, file))
        if one == other:
            continue
        what = name
        if isinstance(one, dict):
            odd = next(k for k in {**one, **other} if one.get(k) != other.get(k))
            what, one, other = odd, one.get(odd), other.get(odd)
        one, other = (ascii(v)[:40] for v in (one, other))
        raise ConfigError(
            f"{first.path} and {file.path} do not go together, {what} is {one} and {other}: "
            f"{remedy}"
        )


def _place(tier):
    return TIERS.index(tier) if tier in TIERS else len(TIERS)
