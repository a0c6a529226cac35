"""What a checkpoint is: its languages, their tokens in order, and its adapters.

A checkpoint of this package carries that as a record inside its state dict, so that it holds
wherever the weights go: into an average, through Python, under other options. What a stock
checkpoint is, its own options tell.
"""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Optional

import torch

from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.keys import RECORD

VERSION = 3  # of version 1 are records without lines, appended and base, of 2 those without new


@dataclass
class Identity:
    """What is known of a checkpoint.

    Attributes:
        path: the file, or what stands for it in messages
        arch: its architecture, or None if the checkpoint does not tell
        langs: the languages in the order in which it appended their tokens, or None
        lang_tok_style, langtoks_specs, extra_data: fairseq's options that shape these tokens
        adapters: :func:`describe` of its adapters; None for a model without, or that does not tell
        lines: symbols of the dictionary file, specials included, or None
        appended: the symbols that the model has beyond these, in order, or None
        base: fingerprint of the base model that its adapters were begun on, or None
        new: those of the appended symbols that this base model does not have
    """

    path: str = "the checkpoint"
    arch: Optional[str] = None
    langs: Optional[list] = None
    lang_tok_style: str = "multilingual"
    langtoks_specs: list = field(default_factory=lambda: ["main"])
    extra_data: list = field(default_factory=list)
    adapters: Optional[dict] = None
    lines: Optional[int] = None
    appended: Optional[list] = None
    base: Optional[str] = None
    new: list = field(default_factory=list)

    @classmethod
    def from_options(cls, path, options):
        """From the options that a checkpoint was trained with, by name."""
        langs = _listed(options.get("langs"))
        if langs is None and options.get("lang_dict") is None and options.get("lang_pairs"):
            pairs = _listed(options["lang_pairs"])
            langs = sorted({lang for pair in pairs for lang in pair.split("-")})
        return cls(
            path,
            options.get("arch"),
            langs,
            options.get("lang_tok_style") or "multilingual",
            _listed(options.get("langtoks_specs")) or ["main"],
            list(options.get("extra_data") or []),
        )

    @classmethod
    def from_record(cls, record, path):
        """From the record in a state dict.

        Raises:
            ConfigError: it cannot be read, or comes from a later version of this package.
        """
        try:
            found = json.loads(bytes(record.long().tolist()))
            written_as = found.pop("version")
            if written_as in range(1, VERSION + 1):
                return cls(**{**found, "path": path})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{path} holds a damaged {RECORD}: copy it again, or name another checkpoint"
            ) from None
        raise ConfigError(
            f"{path} holds a {RECORD} of version {written_as}, this package reads {VERSION}: "
            "update lslora_fairseq"
        )

    def record(self):
        """(bytes,) int32 tensor. Being whole numbers that are far from overflow, several equal
        ones have themselves as their average."""
        facts = {"version": VERSION, **asdict(self)}
        del facts["path"]
        return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.int32)

    def symbols(self, lines):
        """Its dictionary: *lines* (specials included) and the tokens appended to them, or None."""
        if self.langs is None:
            return None
        # not for who reads a record alone: fairseq takes seconds
        from fairseq.data.multilingual.multilingual_utils import augment_dictionary

        grown = _Symbols(lines)
        augment_dictionary(
            grown, self.langs, self.lang_tok_style, self.langtoks_specs, self.extra_data
        )
        return list(grown)

    def token(self, code):
        """The token of a language in the dictionary."""
        from fairseq.data.multilingual.multilingual_utils import get_lang_tok

        return get_lang_tok(code, self.lang_tok_style)

    def tokens(self, code):
        """All tokens of a language, one for each of ``--langtoks-specs``."""
        from fairseq.data.multilingual.multilingual_utils import get_lang_tok

        return [get_lang_tok(code, self.lang_tok_style, spec) for spec in self.langtoks_specs]

    def check_adapters(self, here, added=()):
        """Raises ConfigError where its adapters contradict those of a model.

        Args:
            here: :func:`describe` of the model's adapters
            added: languages that the model alone may have
        """
        there = self.adapters
        for name, option in (("ranks", "--lora-rank"), ("alphas", "--lora-alpha")):
            if there[name].keys() - {*added} != here[name].keys() - {*added}:
                raise ConfigError(
                    f"{self.path} has adapters of {listed(there[name])}, this model of "
                    f"{listed(here[name])}: leave out --lora-tiers, or name the same languages"
                )
            for code, value in there[name].items():
                if value != here[name][code]:
                    raise ConfigError(
                        f"{self.path} does not fit this model: {name[:-1]} of {code} is {value} "
                        f"there and {here[name][code]} here: leave out {option}, or give the "
                        "checkpoint's"
                    )
        if there.get("shared") != here.get("shared"):
            found, ours = (
                "rank {} and alpha {}".format(*a["shared"]) if a.get("shared") else "none"
                for a in (there, here)
            )
            raise ConfigError(
                f"{self.path} does not fit this model: of the shared adapters it has {found}, this "
                f"model {ours}: leave out --lora-shared-rank and --lora-shared-alpha, or give the "
                "checkpoint's"
            )
        if there.get("embeddings") != here.get("embeddings"):
            found, ours = (
                f"rank {a['embeddings']}" if a.get("embeddings") else "none" for a in (there, here)
            )
            raise ConfigError(
                f"{self.path} does not fit this model: of the embeddings' adapter it has {found}, "
                f"this model {ours}: leave out --lora-embedding-rank, or give the checkpoint's"
            )
        odd = [s for s in there["sites"] if s not in here["sites"]]
        odd += [s for s in here["sites"] if s not in there["sites"]]
        if odd:
            module, side, n_in, n_out = odd[0]
            has = "the checkpoint" if odd[0] in there["sites"] else "this model"
            raise ConfigError(
                f"{self.path} does not fit this model: only {has} has adapters of {module}, "
                f"{side} side, {n_in} × {n_out}: give the target modules, layers, index sides and "
                "--lora-shape it was trained with, or none of them"
            )


def describe(plan):
    """What defines the adapters of an :class:`~lslora_fairseq.config.AdapterPlan`, in plain
    values: tiers, ranks and alphas by language, rank and alpha of the shared ones and rank of the
    embeddings' if there are any, and for each site its module path, side, in- and out-features."""
    codes = plan.languages.codes
    shared = {"shared": [plan.shared_rank, plan.shared_alpha]} if plan.shared_rank else {}
    if plan.embedding_rank:  # how many words there are is the dictionary's affair
        shared["embeddings"] = plan.embedding_rank
    return {
        **shared,
        "tiers": {code: plan.languages.tier(code) for code in codes},
        "ranks": dict(zip(codes, plan.ranks)),
        "alphas": dict(zip(codes, plan.alphas)),
        "sites": [[s.name, s.side, s.in_features, s.out_features] for s in plan.all_sites],
    }


def plugin_version():
    """This package's version."""
    try:
        return version("lslora_fairseq")
    except PackageNotFoundError:
        return "uninstalled"


def _listed(value):
    return value.split(",") if isinstance(value, str) else None if value is None else list(value)


class _Symbols(dict):
    """A dictionary's symbols in order, as fairseq appends to them."""

    def __init__(self, lines):
        super().__init__(dict.fromkeys(lines))

    def add_symbol(self, symbol):
        self.setdefault(symbol)
