"""A base model and adapter files become a model with adapters, on a state dict."""

import logging
import os
from dataclasses import replace

import torch

from lslora_fairseq import checkpoints
from lslora_fairseq.adapters import fingerprint, packing
from lslora_fairseq.adapters.collection import Collection
from lslora_fairseq.adapters.files import row_name
from lslora_fairseq.adapters.header import PROJECTION
from lslora_fairseq.analysis.trained import by_adapters, owners, shared_sites, sizes
from lslora_fairseq.config import LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.identity import Identity, describe
from lslora_fairseq.keys import EMBEDDINGS, RECORD, tidy
from lslora_fairseq.lora.adapters import PRUNED
from lslora_fairseq.lora.plan import adapter_columns

logger = logging.getLogger(__name__)
ARCH = "lslora_transformer"


class Assembly:
    """Adapters from files for a base model.

    Args:
        adapters: :class:`~lslora_fairseq.adapters.collection.Collection`
        base: :class:`~lslora_fairseq.identity.Identity` of the base model
    """

    def __init__(self, adapters, base):
        self.adapters, self.base = adapters, base

    @classmethod
    def for_base(cls, adapters, path, options):
        """For the checkpoint of a base model.

        Args:
            path: what stands for it in messages
            options: those in it, by name

        Raises:
            ConfigError: it has adapters of its own.
        """
        if options.get("lora_tiers") is not None:
            raise ConfigError(
                f"{path} has adapters of its own, and those of {adapters.path} need the base model "
                "that they were trained on: name that"
            )
        return cls(adapters, Identity.from_options(path, options))

    def model_options(self):
        """Options that a model with these adapters is built with, by name."""
        return {**self.adapters.options(), "arch": ARCH, "_name": ARCH}

    def options(self, rows):
        """What the options of a checkpoint of the base become, by name.

        Args:
            rows: of the base's embeddings
        """
        langs = {"langs": self.identity(rows).langs, "lang_dict": None}
        return {**self.model_options(), **self.adapters.task_options(), **langs}

    def known(self):
        """The :class:`~lslora_fairseq.identity.Identity` of the base, whose languages are those of
        the files, too."""
        langs = self.base.langs or self.adapters.first.langs
        more = [code for code in self.adapters.codes if code not in langs]
        return replace(self.base, langs=[*langs, *more])

    def identity(self, rows):
        """Languages and tokens of the assembled model: those of the base, then new ones.

        Raises:
            ConfigError: the base's language tokens cannot be told.
        """
        first, base = self.adapters.first, self.base
        langs, appended = self._tokens_of_base(rows - first.lines)
        langs += [code for code in self.adapters.codes if code not in langs]
        tokens = first.tokens
        found = Identity(
            base.path, ARCH, langs, tokens["lang_tok_style"], tokens["langtoks_specs"],
            first.extra_data, lines=first.lines, base=first.base,
        )  # fmt: skip
        found.appended = [s for s in found.symbols([]) if s not in self._in_dictionary()]
        found.new = [s for s in found.appended if s not in appended]
        if {*appended} - {*found.appended}:
            raise ConfigError(
                f"{base.path} has tokens of other languages or styles than {self.adapters.path}: "
                "name the base model that they were trained on"
            )
        return found

    def _tokens_of_base(self, count):
        """The base's languages in order, and the *count* symbols that it has beyond the dictionary
        file."""
        if self.base.langs is not None:
            inside = self._in_dictionary()
            appended = [s for s in self.base.symbols([]) if s not in inside]
            if len(appended) == count:
                return list(self.base.langs), appended
        headers = [file.header for file in self.adapters.files.values()]
        told = {tuple(h.langs): h.appended for h in headers if len(h.appended) == count}
        if self.base.langs is None and len(told) == 1:
            ((langs, appended),) = told.items()
            return list(langs), appended
        raise ConfigError(
            f"{self.base.path} has {count} embedding rows beyond the {self.adapters.first.lines:,} "
            "of the dictionary file, and which language tokens they are cannot be told from it: "
            "name the base model that the adapters were trained on"
        )

    def _in_dictionary(self):
        """Language tokens that are known to stand in the dictionary file."""
        found = set()
        for file in self.adapters.files.values():
            header = file.header
            about = Identity(
                "", None, header.langs, header.tokens["lang_tok_style"],
                header.tokens["langtoks_specs"], header.extra_data,
            )  # fmt: skip
            found.update(s for s in about.symbols([]) if s not in header.appended)
        return found

    def assemble(self, state):
        """Turns the base's state dict into that of the assembled model, in place.

        Raises:
            ConfigError: it is another base, or the adapters do not fit it.
        """
        tidy(state)
        lines, path = self.adapters.first.lines, self.base.path
        found = fingerprint.of_base(state, lines)
        if found != self.adapters.first.base:
            raise ConfigError(
                f"{path} is not the base model of {self.adapters.path}: its fingerprint is "
                f"{found[:12]}…, theirs {self.adapters.first.base[:12]}…: name the base model that "
                "they were trained on"
            )
        if not any(key.startswith(("decoder.output_", "decoder.adaptive_")) for key in state):
            # early versions of fairseq did not save a matrix twice
            state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
        known = self.identity(rows_of(path, state))
        self._place_rows(state, known)
        plan = self._plan(state)
        for key, sites in by_adapters([*plan.sites, *shared_sites(plan)]).items():
            masks = []
            for owner in owners(plan, sites[0]):
                state[f"{key}.lora_{owner}"], mask = self._layer(owner, sites, known)
                masks.append(mask)
            state[f"{key}.{PRUNED}"] = torch.cat(masks).logical_not_().to(torch.uint8)
        known.adapters = describe(plan)
        state[RECORD] = known.record()
        logger.info(
            "adapters of %s loaded from %s onto %s", listed(self.adapters.files),
            self.adapters.path, path,
        )  # fmt: skip

    def _place_rows(self, state, known):
        """Brings the embeddings' rows into the order of *known*; those of tokens from the files."""
        lines, new = known.lines, {}
        for code in self.adapters.codes:
            file = self.adapters.files.get(code)
            if file and file.header.rows:
                new[file.header.token] = file
        _, before = self._tokens_of_base(len(state[EMBEDDINGS[0]]) - lines)
        beyond = known.appended
        unknown = [symbol for symbol in beyond if symbol not in new and symbol not in before]
        if unknown:
            raise ConfigError(
                f"{self.base.path} does not have {listed(unknown)}, and no file has its row: leave "
                "the language out, or extract it again from its checkpoint"
            )
        for key in EMBEDDINGS:
            weight = state.get(key)
            rows = [
                _row(new[symbol], key, weight)
                if symbol in new
                else weight[lines + before.index(symbol)]
                for symbol in (beyond if weight is not None else ())
            ]
            if rows and not torch.equal(weight[lines:], torch.stack(rows)):
                state[key] = torch.cat([weight[:lines], torch.stack(rows)])

    def _plan(self, state):
        """The :class:`~lslora_fairseq.config.AdapterPlan`, which all files fit."""
        config = LSLoConfig(**self.adapters.options())
        try:
            plan = resolve(config, *sizes(self.base.path, state))
        except ConfigError as error:
            raise ConfigError(
                f"{self.adapters.path} does not fit {self.base.path}: {error}"
            ) from None
        for owner, file in self.adapters.files.items():
            sites = plan.sites if owner in self.adapters.codes else shared_sites(plan)
            expected = {(s.name, s.side, s.in_features, _words(s, file.header)) for s in sites}
            odd = expected ^ {tuple(module[:4]) for module in file.header.modules}
            if odd:
                raise ConfigError(
                    f"{file.path} does not fit {self.base.path}: {min(odd)[0]} is adapted in "
                    "another size, on another side, or only in one of them: name the base model "
                    "that it was trained on"
                )
        return plan

    def _layer(self, owner, sites, known):
        """An owner's matrix of a layer, and its mask: (rank, columns)."""
        file = self.adapters.files[owner]
        modules = {module.name: module for module in file.header.modules}
        columns, width = adapter_columns(sites)
        features = width + sum(site.out_features for site in sites)
        rank = modules[sites[0].name].rank
        weight = torch.zeros(rank, features)
        mask = torch.ones(rank, features, dtype=torch.bool)
        for site in sites:
            n_in, n_out = modules[site.name][2:4]
            for whole, (A, B) in zip(
                (weight, mask), packing.unpack(site.name, file.tensors, n_in, n_out, rank)
            ):
                a, b = columns[site.module]
                whole[:, a] = A
                whole[:, b] = (
                    B.t()
                    if site.name != PROJECTION
                    else _words_of(B.t(), whole[:, b], file.header, known)
                )
        return weight, mask


def assembled(base, places):
    """A base model's checkpoint becomes that of a model with adapters.

    Args:
        base: path of the checkpoint
        places: adapter files, and folders of them

    Returns:
        the :class:`~lslora_fairseq.adapters.collection.Collection`; all that the checkpoint holds,
        assembled, but for the state of its optimizer; the options that change, by name

    Raises:
        ConfigError: something cannot be read, or does not go together.
    """
    adapters = Collection(places)
    if not os.path.isfile(base):
        raise ConfigError(f"--base {base}: no such file: name the checkpoint of the base model")
    checkpoints.allow_fairseq_checkpoints()
    content = {**checkpoints.load_checkpoint(base), "last_optimizer_state": None}
    assembly = Assembly.for_base(adapters, base, checkpoints.options_of(content))
    changed = assembly.options(rows_of(base, content["model"]))
    assembly.assemble(content["model"])
    return adapters, content, changed


def rows_of(path, state):
    """Number of rows of a base model's embeddings.

    Raises:
        ConfigError: it is another kind of model.
    """
    if EMBEDDINGS[0] not in state:
        raise ConfigError(
            f"{path} holds no {EMBEDDINGS[0]}: name a checkpoint of fairseq's transformer"
        )
    return len(state[EMBEDDINGS[0]])


def _row(file, key, weight):
    """The row of a language's token in one of the embedding matrices."""
    own = key if key in file.header.rows else file.header.rows[0]
    row = file.tensors[row_name(own)]
    if row.shape != weight.shape[1:]:
        raise ConfigError(
            f"{file.path} has a token of {len(row)} numbers, the base model embeddings of "
            f"{weight.size(1)}: name the base model that it was trained on"
        )
    return row.to(weight.dtype)


def _words(site, header):
    """Out-features of a site in a file: the words of its own run where it adapts the embeddings."""
    if site.name == PROJECTION:
        return header.lines + len(header.appended)
    return site.out_features


def _words_of(columns, fresh, header, known):
    """Columns that belong to words, in the order of *known*; *fresh* ones of new words."""
    place = {symbol: header.lines + i for i, symbol in enumerate(header.appended)}
    fresh = fresh.clone()
    fresh[:, : known.lines] = columns[:, : known.lines]
    for i, symbol in enumerate(known.appended, known.lines):
        if symbol in place:
            fresh[:, i] = columns[:, place[symbol]]
    return fresh
