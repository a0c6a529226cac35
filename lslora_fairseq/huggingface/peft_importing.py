"""Folders of PEFT become adapters of languages, on a base model's state dict."""

import os
from dataclasses import asdict, replace
from typing import NamedTuple

import torch

from lslora_fairseq import checkpoints
from lslora_fairseq.adapters.header import PROJECTION
from lslora_fairseq.analysis import trained
from lslora_fairseq.analysis.trained import by_adapters, owners, shared_sites, sizes
from lslora_fairseq.config import LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.huggingface import dictionary, peft
from lslora_fairseq.huggingface.peft_exporting import LM_HEAD, of_pair
from lslora_fairseq.huggingface.twin import PREFIX
from lslora_fairseq.identity import Identity, describe
from lslora_fairseq.keys import EMBEDDINGS, RECORD
from lslora_fairseq.languages import Languages
from lslora_fairseq.lora.adapters import PRUNED
from lslora_fairseq.lora.plan import (
    MODULES,
    SHARED,
    SIDES,
    adapter_columns,
    default_encoder_sides,
    parse_index_sides,
)

TIER = "medium"  # of languages, unless --lora-tiers tells another
_EMBEDDED = [PREFIX + key.removesuffix(".weight") for key in EMBEDDINGS[:2]]


class Folder(NamedTuple):
    """A folder, and whose adapters it holds.

    Attributes:
        path: of the folder
        owners: side -> language, or ``shared`` -> ``shared``
        modules: name of each linear in fairseq -> :class:`~lslora_fairseq.huggingface.peft.Factors`
    """

    path: str
    owners: dict
    modules: dict


def read(text):
    """A :class:`Folder` from ``NAME=FOLDER``, or from a folder that has such a name.

    Args:
        text: where NAME is ``en-source``, ``fr-target``, ``en-fr`` or ``shared``

    Raises:
        ConfigError: the name tells no owner, the folder cannot be read, or its adapters cannot be
            represented; with all reasons.
    """
    name, equals, path = text.partition("=")
    if not equals:
        name, path = os.path.basename(os.path.normpath(text)), text
    first, _, second = name.partition("-")
    if name == SHARED:
        found = {SHARED: SHARED}
    elif second in SIDES and first:
        found = {second: first}
    elif first and second:
        found = of_pair(name)
        del found[SHARED]
    else:
        raise ConfigError(
            f"{text} does not tell whose adapters it holds: write NAME=FOLDER with a NAME such as "
            "en-source, fr-target, en-fr or shared"
        )
    if not os.path.isdir(path):
        raise ConfigError(f"{path}: no such folder: name one that PEFT wrote")
    modules, reasons = peft.read(path)
    named = {}
    for module, factors in modules.items():
        if _is_linear(module):
            named[module.removeprefix(PREFIX)] = factors
    rest = {module: modules[module] for module in modules if not _is_linear(module)}
    if name == SHARED and rest.keys() == {LM_HEAD, *_EMBEDDED}:
        whole = rest.pop(LM_HEAD)
        if all(_is_turned(whole, other) for other in rest.values()):
            named[PROJECTION] = whole
            rest = {}
    if rest:
        reasons.append(f"it adapts {listed(rest)}, which adapters of languages do not")
    if not modules:
        reasons.append("it holds no adapter")
    if reasons:
        raise ConfigError(
            f"{path} cannot become adapters of languages: {'; '.join(reasons)}; name a plain LoRA "
            f"adapter of {', '.join(MODULES['decoder'])}"
        )
    return Folder(path, found, named)


def _is_linear(module):
    stack, _, rest = module.removeprefix(PREFIX).partition(".layers.")
    number, _, name = rest.partition(".")
    return module.startswith(PREFIX) and number.isdigit() and name in MODULES.get(stack, ())


def _is_turned(whole, other):
    """Whether an embedding has the same adapter as the projection."""
    same = torch.equal(whole.A, other.B.t()) and torch.equal(whole.B, other.A.t())
    return same and whole.alpha == other.alpha


class Importing:
    """What folders give a base model.

    Args:
        base: path of the base model's checkpoint
        words: path of its dictionary file
        folders: list of :class:`Folder`
        given: options of :class:`LSLoConfig` by name: tiers and index sides, or None

    Raises:
        ConfigError: they do not go together.
    """

    def __init__(self, base, words, folders, given):
        self.base, self.folders = base, folders
        if not os.path.isfile(base):
            raise ConfigError(f"--base {base}: no such file: name the checkpoint of the base model")
        checkpoints.allow_fairseq_checkpoints()
        self.options, self.weights = checkpoints.read_checkpoint(base)
        if self.options.get("lora_tiers") is not None:
            raise ConfigError(f"--base {base} has adapters of its own: name the base model")
        self.layers, self.dims = sizes(base, self.weights)
        self.sides = self._sides(given)
        self.owned = self._owned()
        self.identity = self._identity(words)
        self.config = self._config(given)

    def trained(self):
        """The :class:`~lslora_fairseq.analysis.trained.Trained` model."""
        plan = resolve(self.config, self.layers, self.dims)
        state = dict(self.weights)
        for key, sites in by_adapters([*plan.sites, *shared_sites(plan)]).items():
            found = {o: self._matrix(o, rank, sites) for o, rank in owners(plan, sites[0]).items()}
            state.update({f"{key}.lora_{owner}": matrix for owner, matrix in found.items()})
            whole = torch.cat([*found.values()])
            state[f"{key}.{PRUNED}"] = torch.zeros_like(whole, dtype=torch.uint8)
        state[RECORD] = replace(self.identity, adapters=describe(plan)).record()
        options = {**self.options, **asdict(self.config), "finetune_from_model": self.base}
        return trained.of(self.base, options, state)

    def _sides(self, given):
        """Stack -> the side of each of its layers."""
        usual = {"encoder": default_encoder_sides(self.layers["encoder"]), "decoder": "target"}
        return {
            stack: parse_index_sides(
                given.get(f"{stack}_index_side") or usual[stack],
                self.layers[stack],
                f"--{stack}-index-side",
            )
            for stack in usual
        }

    def _owned(self):
        """Owner -> side -> name of a linear -> factors."""
        found = {}
        for folder in self.folders:
            for side, owner in folder.owners.items():
                ours = found.setdefault(owner, {})
                if side in ours:
                    raise ConfigError(
                        f"{folder.path}: the {side} adapters of {owner} are there twice: name one "
                        "of them"
                    )
                ours[side] = self._of_side(folder, side)
        return {owner: sides for owner, sides in found.items() if any(sides.values())}

    def _of_side(self, folder, side):
        """The modules of a folder that a side indexes; of what is not of a direction, that is all
        of them."""
        if side == SHARED:
            return folder.modules
        found = {}
        for name, factors in folder.modules.items():
            stack, _, number, *_ = name.split(".")
            layers = self.sides[stack]
            if int(number) < len(layers) and layers[int(number)] == side:
                found[name] = factors
            elif len(folder.owners) == 1 or int(number) >= len(layers):
                raise ConfigError(
                    f"{folder.path} adapts {name}, which is no layer of {self.base} that the "
                    f"{side} language indexes: give the --{stack}-index-side that the adapters "
                    "were trained with"
                )
        return found

    def _config(self, given):
        """The :class:`LSLoConfig` of a model with all these adapters."""
        codes = sorted(owner for owner in self.owned if owner != SHARED)
        if not codes:
            raise ConfigError(
                f"{self.folders[0].path} is what languages share: name adapters of languages, too"
            )
        config = LSLoConfig(lora_tiers=given.get("lora_tiers") or f"{TIER}={','.join(codes)}")
        named = Languages.parse(config.lora_tiers).codes
        if list(named) != codes:
            raise ConfigError(
                f"--lora-tiers names {listed(named)}, and the folders hold {listed(codes)}: name "
                "the same languages"
            )
        for stack, sides in self.sides.items():
            names = [n.split(".") for n in self._linears() if n.startswith(f"{stack}.layers.")]
            modules = {".".join(name[3:]) for name in names}
            numbers = sorted({int(name[2]) for name in names})
            setattr(config, f"{stack}_index_side", ",".join(f"{side}*1" for side in sides))
            chosen = [name for name in MODULES[stack] if name in modules]
            setattr(config, f"{stack}_target_modules", ",".join(chosen) or "none")
            if len(numbers) < len(sides) and numbers:
                setattr(config, f"{stack}_lora_layers", ",".join(map(str, numbers)))
        ranks, alphas = zip(*(self._rank(code) for code in codes))
        config.lora_rank = ",".join(f"{code}={rank}" for code, rank in zip(codes, ranks))
        config.lora_alpha = ",".join(f"{code}={alpha}" for code, alpha in zip(codes, alphas))
        if SHARED in self.owned:
            config.lora_embedding_rank = len(getattr(self._embedding(), "A", ()))
            if self._parts(SHARED):
                config.lora_shared_rank, config.lora_shared_alpha = self._rank(SHARED)
        return config

    def _linears(self):
        return {n for sides in self.owned.values() for modules in sides.values() for n in modules}

    def _parts(self, owner):
        """All factors of an owner but those of the embeddings."""
        sides = self.owned[owner].values()
        return [f for modules in sides for name, f in modules.items() if name != PROJECTION]

    def _embedding(self):
        return self.owned[SHARED][SHARED].get(PROJECTION)

    def _rank(self, owner):
        """Rank and alpha of an owner, which are the same in all its modules: the largest rank, and
        as alpha the rank, into which other scalings are folded."""
        found = {(len(factors.A), factors.alpha) for factors in self._parts(owner)}
        if len(found) == 1:
            return found.pop()
        rank = max(rank for rank, _ in found)
        return rank, rank

    def _matrix(self, owner, rank, sites):
        """An owner's matrix of a layer: (rank, columns); zero where no folder has an adapter."""
        columns, width = adapter_columns(sites)
        matrix = torch.zeros(rank, width + sum(site.out_features for site in sites))
        for site in sites:
            factors = self.owned[owner].get(site.side, {}).get(site.name)
            if factors is None:
                continue
            A, B, alpha = factors
            if (A.size(1), len(B)) != (site.in_features, site.out_features):
                raise ConfigError(
                    f"{site.name} of {owner} is {len(B)} × {A.size(1)}, and in {self.base} "
                    f"{site.out_features} × {site.in_features}: name the base model that the "
                    "adapters were trained on"
                )
            a, b = columns[site.module]
            matrix[: len(A), a] = A.float()
            own = (rank, self._rank(owner)[1]) if site.name != PROJECTION else (rank, rank)
            same = (len(A), alpha) == own
            matrix[: len(A), b] = B.float().t() * (1 if same else alpha / len(A) * own[0] / own[1])
        return matrix

    def _identity(self, words):
        identity = Identity.from_options(self.base, self.options)
        if identity.langs is None:
            raise ConfigError(
                f"--base {self.base} does not tell its languages: name one of lslora import-hf, or "
                "that was trained with --langs"
            )
        unknown = sorted(self.owned.keys() - {SHARED, *identity.langs})
        if unknown:
            raise ConfigError(
                f"--base {self.base} does not have {listed(unknown)}: write the codes as it does, "
                f"{listed(identity.langs)}"
            )
        rows = len(self.weights[EMBEDDINGS[0]])
        lines, symbols = dictionary.symbols(words, identity, rows)
        return replace(identity, lines=len(lines), appended=symbols[len(lines) :])
