"""The demand of each language: what pruning leaves of its adapters (method, section 5)."""

import logging
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from tqdm import tqdm

from lslora_fairseq.config import AdapterPlan
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.lora.plan import SIDES, adapter_columns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demand:
    """Entries of B that survive, at each site of the plan and for each language.

    Attributes:
        plan: the :class:`AdapterPlan`
        kept: site -> (languages,) counts
        untrained: side -> codes whose B is zero in every layer that this side indexes
        untouched: side -> those of them of which nothing is pruned either: they were never updated
            and took no part in pruning; they count as 0 in *kept*, and not in :attr:`sparsity`
        scope: the run's ``--pruning-scope``, None if the checkpoint does not tell
        final_sparsity: the share that the run was to remove in the end, None likewise
    """

    plan: AdapterPlan
    kept: dict
    untrained: dict
    untouched: dict
    scope: Optional[str]
    final_sparsity: Optional[float]

    def entries(self, site):
        """(languages,) entries of B at a site, pruned or not."""
        return np.array(self.plan.ranks) * site.out_features

    @property
    def sparsity(self):
        """The share removed of all entries of B that took part in pruning."""
        entries = 0
        for site in self.kept:
            of_language = dict(zip(self.plan.languages.codes, self.entries(site).tolist()))
            absent = self.untouched.get(site.side, ())
            entries += sum(n for code, n in of_language.items() if code not in absent)
        kept = sum(int(kept.sum()) for kept in self.kept.values())
        return 1 - kept / entries if entries else 0.0

    @property
    def tiers(self):
        """tier -> its codes, in the inventory's order."""
        languages = self.plan.languages
        return {
            tier: [code for code in languages.codes if languages.tier(code) == tier]
            for tier in languages.tiers
        }

    def sites(self, **where):
        """The sites with these attributes, such as ``stack="encoder", module="fc1"``."""
        return [
            site
            for site in self.plan.sites
            if all(getattr(site, name) == value for name, value in where.items())
        ]

    def shares(self, sites):
        """The share of each language's entries that survives at these sites.

        Returns:
            (languages,) in [0, 1]; nan without any site
        """
        if not sites:
            return np.full(len(self.plan.languages), np.nan)
        return sum(self.kept[s] for s in sites) / sum(self.entries(s) for s in sites)

    def mean(self, shares, tier=None):
        """The mean of some shares over the languages of a tier; None for all languages."""
        languages = self.plan.languages
        chosen = [tier in (None, languages.tier(code)) for code in languages.codes]
        return float(shares[chosen].mean())

    def modules(self, stack):
        """The module types of a stack that have adapters, in the plan's order."""
        return tuple(dict.fromkeys(site.module for site in self.sites(stack=stack)))

    def warnings(self):
        """What keeps the shares from saying what a language needs, a line each."""
        lines = []
        if len(set(self.plan.ranks)) > 1:
            lines.append(
                "ranks differ: the shares of languages cannot be compared, since each is one of "
                "another size; train with the same --lora-rank for all"
            )
        if self.scope == "language":
            lines.append(
                "--pruning-scope language leaves the same share of every language: only layers "
                "and modules can be compared; train with --pruning-scope layer"
            )
        if self.final_sparsity and self.sparsity < self.final_sparsity - 0.005:
            lines.append(
                f"pruning has removed {self.sparsity:.1%} and was to remove "
                f"{self.final_sparsity:.1%} in the end: take the run's last checkpoint"
            )
        for side, codes in self.untouched.items():
            lines.append(
                f"never updated where the {side} language indexes: {listed(codes)}, as of a "
                f"language that is never the {side}: it took no part in pruning there, and the 0 "
                "shown does not mean that it needs nothing; train with directions from and into "
                "each, or leave it out of --lora-tiers"
            )
        for side, codes in self.untrained.items():
            codes = [code for code in codes if code not in self.untouched.get(side, ())]
            if not codes:
                continue
            lines.append(
                f"nothing is left of {listed(codes)} where the {side} language indexes, as of a "
                f"language that is never the {side}: that does not show that it needs nothing, "
                "and the others keep the more for it; train with directions from and into each, "
                "or leave it out of --lora-tiers"
            )
        return lines


def measure(checkpoint):
    """The :class:`Demand` in a pruned checkpoint.

    Args:
        checkpoint: a :class:`~lslora_fairseq.analysis.trained.Trained`

    Raises:
        ConfigError: it is not pruned, nothing is left, or no adapter is a language's.
    """
    plan = checkpoint.plan
    if not plan.sites:
        raise ConfigError(
            f"{checkpoint.path} has shared adapters alone (--lora-rank 0), which tell nothing of a "
            "language: train with the same --lora-rank for all languages"
        )
    codes, ranks = plan.languages.codes, torch.tensor(plan.ranks)
    language_of_row = torch.arange(len(codes)).repeat_interleave(ranks)
    kept, silent = {}, {side: set(codes) for side in SIDES if plan.needs(side)}
    whole = {side: set(codes) for side in silent}
    progress = tqdm(
        checkpoint.adapters().items(), "reading masks", leave=False, disable=None, delay=1
    )
    for key, sites in progress:
        columns, width_A = adapter_columns(sites)
        mask = checkpoint.kept(key)
        for site in sites:
            per_row = mask[:, columns[site.module][1]].sum(1)
            kept[site] = torch.zeros_like(ranks).index_add_(0, language_of_row, per_row).numpy()
        unheard = silent[sites[0].side]
        for code in list(unheard):
            if checkpoint.weights[f"{key}.lora_{code}"][:, width_A:].any():
                unheard.remove(code)
        whole[sites[0].side] -= {codes[i] for i in language_of_row[~mask.all(1)].tolist()}
    untouched = {side: sorted(silent[side] & whole[side]) for side in silent}
    for site, counts in kept.items():
        counts[[plan.languages.index(code) for code in untouched[site.side]]] = 0
    demand = Demand(
        plan,
        kept,
        {side: sorted(unheard) for side, unheard in silent.items() if unheard},
        {side: unheard for side, unheard in untouched.items() if unheard},
        checkpoint.options.get("pruning_scope"),
        checkpoint.options.get("pruning_final_sparsity"),
    )
    if not 0 < demand.sparsity < 1:
        found = "has lost every entry of B" if demand.sparsity else "is not pruned"
        raise ConfigError(
            f"{checkpoint.path} {found}, and demand is what pruning leaves: train with the same "
            "--lora-rank for all, --optimizer pruned_adam, --pruning-scope layer and "
            "--pruning-final-sparsity 0.9, until the schedule ends"
        )
    return demand


def read_demand(checkpoint):
    """As :func:`measure`; what keeps it from being taken at its word is logged as warnings."""
    demand = measure(checkpoint)
    for line in demand.warnings():
        logger.warning(line)
    return demand
