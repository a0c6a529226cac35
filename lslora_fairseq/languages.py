"""The language inventory: codes, resource tiers, and the one stable order of languages.

Languages are sorted here and nowhere else. Every process of a run, and every later run that
loads its checkpoint, derives the same order from the same set of codes.
"""

import os
import re
from collections import Counter

from lslora_fairseq.errors import ConfigError, listed


class Languages:
    """Language codes in their stable order, each in one resource tier.

    Args:
        tier_of: language code -> tier name
    """

    def __init__(self, tier_of):
        if not tier_of:
            raise ConfigError("--lora-tiers names no language: list each language under a tier")
        for key, count in Counter(code.lower() for code in tier_of).items():
            if count > 1:
                twins = sorted(code for code in tier_of if code.lower() == key)
                raise ConfigError(
                    f"--lora-tiers: languages {' and '.join(twins)} differ only in case: "
                    "rename one, files and language tokens would be mixed up"
                )
        dotted = sorted(code for code in tier_of if "." in code)
        if dotted:
            raise ConfigError(
                f"--lora-tiers: {dotted[0]} holds a dot, which separates the parts of a "
                "parameter's name: rename the language"
            )
        for kind, names in (("language", tier_of), ("tier", tier_of.values())):
            for name in names:
                if not name or re.search("[=;,]", name):
                    raise ConfigError(
                        f"--lora-tiers: the {kind} {name!r} is empty or holds '=', ';' or ',', "
                        "which separate languages and tiers in a checkpoint: rename it"
                    )
        both = sorted(set(tier_of) & set(tier_of.values()))
        if both:
            raise ConfigError(
                f"--lora-tiers: {both[0]} is both a language and a tier: rename the tier"
            )
        self.codes = tuple(sorted(tier_of))
        self.tiers = tuple(dict.fromkeys(tier_of.values()))  # in the order of the user
        self._tier_of = dict(tier_of)
        self._index = {code: i for i, code in enumerate(self.codes)}

    def __len__(self):
        return len(self.codes)

    def __contains__(self, code):
        return code in self._index

    def index(self, code):
        """Position of a language in the stable order."""
        return self._index[code]

    def tier(self, code):
        return self._tier_of[code]

    def joined(self, other):
        """These languages and those of another inventory, each in its tier.

        Raises:
            ConfigError: a language of both is in two tiers.
        """
        for code in self.codes:
            if code in other and other.tier(code) != self.tier(code):
                raise ConfigError(
                    f"--lora-tiers: {code} is in the tier {self.tier(code)}, and cannot move to "
                    f"{other.tier(code)}: leave it where it is"
                )
        tiers = dict.fromkeys((*self.tiers, *other.tiers))
        tier_of = {**other._tier_of, **self._tier_of}
        return Languages({c: t for tier in tiers for c, t in tier_of.items() if t == tier})

    @classmethod
    def parse(cls, spec):
        """Reads ``'high=en,fr;low=oc'``, or a TSV file of lines ``code<TAB>tier``.

        Raises:
            ConfigError: the text or file cannot be read, or names a language twice.
        """
        tier_of = {}
        inline = "=" in spec and not os.path.isfile(spec)
        for code, tier in _read_inline(spec) if inline else _read_tsv(spec):
            if code in tier_of:
                raise ConfigError(f"--lora-tiers names {code} twice: keep it in one tier")
            tier_of[code] = tier
        return cls(tier_of)

    @property
    def spec(self):
        """The inventory as the inline text that :meth:`parse` reads, languages sorted."""
        return ";".join(
            f"{tier}={','.join(code for code in self.codes if self._tier_of[code] == tier)}"
            for tier in self.tiers
        )

    def subset(self, text, option):
        """The languages of ``'oc,wo'``, in the stable order.

        Raises:
            ConfigError: there is none, or one is not in the inventory.
        """
        codes = set(_split(text, ","))
        unknown = sorted(code for code in codes if code not in self)
        if unknown or not codes:
            found = listed(unknown) or repr(text)
            raise ConfigError(
                f"{option} names {found}, and not languages of --lora-tiers: choose some of "
                f"{listed(self.codes)}"
            )
        return tuple(code for code in self.codes if code in codes)

    def per_language(self, text, option, convert):
        """One value for each language, in the stable order.

        Args:
            text: ``'8'`` for all, or ``'high=2,low=8,wo=16'``; a language code wins over its tier
            option: the option's name, for messages
            convert: turns the text of one value into the value

        Raises:
            ConfigError: a key is neither tier nor language, or a language has no value.
        """
        text = str(text).strip()
        if "=" not in text:
            return (_convert(text, option, convert),) * len(self)
        values = {}
        for part in _split(text, ","):
            key, _, value = (s.strip() for s in part.partition("="))
            if key not in self.tiers and key not in self:
                raise ConfigError(
                    f"{option}: {key} is neither a tier ({', '.join(self.tiers)}) nor a language "
                    f"({listed(self.codes)}) of --lora-tiers: name one of these, or add it there"
                )
            if key in values:
                raise ConfigError(f"{option} gives two values for {key}: keep one")
            values[key] = _convert(value, option, convert)
        missing = [c for c in self.codes if c not in values and self._tier_of[c] not in values]
        if missing:
            raise ConfigError(
                f"{option} gives no value for {listed(missing)}: add the language or its tier "
                f"({', '.join(dict.fromkeys(self._tier_of[c] for c in missing))})"
            )
        return tuple(values.get(c, values.get(self._tier_of[c])) for c in self.codes)

    def spelled(self, values):
        """The text that :meth:`per_language` reads as these values, one for each language: a single
        value for all, or one for each tier in which all agree, and each language of the others."""
        of_code = dict(zip(self.codes, values))
        if len({*values}) == 1:
            return str(values[0])
        parts = []
        for tier in self.tiers:
            ours = [code for code in self.codes if self._tier_of[code] == tier]
            is_one = len({of_code[code] for code in ours}) == 1
            parts += [(tier, of_code[ours[0]])] if is_one else [(c, of_code[c]) for c in ours]
        return ",".join(f"{key}={value}" for key, value in parts)


def _split(text, separator):
    return [part.strip() for part in text.split(separator) if part.strip()]


def _convert(value, option, convert):
    try:
        return convert(value)
    except ValueError:
        kind = "whole number" if convert is int else "number"
        raise ConfigError(
            f"{option}: {value!r} is not a {kind}: write one {kind} for all, or tier={kind},…"
        ) from None


def _read_inline(spec):
    for group in _split(spec, ";"):
        tier, equals, codes = (s.strip() for s in group.partition("="))
        if not (tier and equals and codes):
            raise ConfigError(
                f"--lora-tiers: cannot read {group!r}: write tier=code,code;tier=code,…"
            )
        for code in _split(codes, ","):
            yield code, tier


def _read_tsv(path):
    if not os.path.isfile(path):
        raise ConfigError(
            f"--lora-tiers: {path!r} is neither a file nor of the form 'high=en,fr;low=oc': "
            "correct the path, or list the languages by tier"
        )
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--lora-tiers: cannot read {path} ({error}): save it as UTF-8 text"
        ) from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 2:
            raise ConfigError(
                f"--lora-tiers: {path} line {number}: expected code<TAB>tier, found {line!r}: "
                "write one language and its tier, with a tab between"
            )
        yield fields[0].strip(), fields[1].strip()
