"""``lslora demand``: how much of its adapters each language needs, and where (section 5)."""

from lslora_fairseq.lora.plan import MODULES
from lslora_fairseq.rendering import figures, tables

EXAMPLES = """\
examples:
  lslora demand runs/estimate/checkpoint_last.pt
      tables by language, layer and module type
  lslora demand runs/estimate/checkpoint_last.pt --plot demand.png
      also a heat map of languages and layers, with bars for module types
  lslora demand runs/estimate/checkpoint_last.pt --format csv > demand.csv
      a row for each language, layer and module

The checkpoint is one of a run with the same --lora-rank for all languages and --pruning-scope
layer: there the languages of a layer compete for what pruning leaves of it. The demand of a
language is the share of its entries of B that survive. The share of a tier is the mean of its
languages. A layer as a whole keeps the share that the schedule says, so that languages and module
types can be compared, but not one layer with another. Adapters that all languages share are pruned
on their own; what survives of them is told in a row of its own, and is in no mean. That of the
embeddings is not pruned.
"""

HEADER = ("language", "tier", "stack", "layer", "module", "side", "entries", "kept", "share")


def add_arguments(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="trained with pruning")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="table", help="(default: table)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw a figure: .png, .pdf or .svg (needs matplotlib)"
    )


def run(args):
    """Prints the demand, draws it if asked to; returns the exit status."""
    # not for --help: torch takes seconds
    from lslora_fairseq.analysis import plot, survivors, trained

    if args.plot:
        figures.check(args.plot)
    checkpoint = trained.read(args.checkpoint)
    demand = survivors.read_demand(checkpoint)
    if args.plot:
        figures.save(plot.figure(demand), args.plot)
    print(FORMATS[args.format](demand))
    return 0


def cells(demand):
    """One row for each language and site, as in :data:`HEADER`."""
    codes, tier = demand.plan.languages.codes, demand.plan.languages.tier
    return [
        (code, tier(code), site.stack, site.layer, site.module, site.side, n, kept, kept / n)
        for index, code in enumerate(codes)
        for site in demand.plan.sites
        for n, kept in [(int(demand.entries(site)[index]), int(demand.kept[site][index]))]
    ]


def by_language(demand):
    """Share of each tier (its mean) and of each of its languages, by stack and in all.

    Returns:
        list of dicts with language (None for the tier), tier, encoder, decoder, all
    """
    shares = {stack: demand.shares(demand.sites(stack=stack)) for stack in MODULES}
    shares["all"] = demand.shares(demand.plan.sites)
    rows = []
    for tier, codes in demand.tiers.items():
        means = {name: demand.mean(values, tier) for name, values in shares.items()}
        rows.append({"language": None, "tier": tier, **means})
        for code in codes:
            index = demand.plan.languages.index(code)
            own = {name: float(values[index]) for name, values in shares.items()}
            rows.append({"language": code, "tier": tier, **own})
    return rows


def by_layer(demand):
    """Mean share of each tier in each layer: list of dicts with stack, layer, tiers, all."""
    layers = dict.fromkeys((site.stack, site.layer) for site in demand.plan.sites)
    return [_tiers(demand, stack=stack, layer=layer) for stack, layer in layers]


def by_module(demand):
    """Mean share of each tier in each module type: list of dicts with stack, module, tiers, all."""
    return [
        _tiers(demand, stack=stack, module=module)
        for stack in MODULES
        for module in demand.modules(stack)
    ]


def _tiers(demand, **where):
    shares = demand.shares(demand.sites(**where))
    tiers = {tier: demand.mean(shares, tier) for tier in demand.tiers}
    return {**where, "tiers": tiers, "all": demand.mean(shares)}


def _table(demand):
    return "\n\n".join(
        [
            _summary(demand),
            _languages_table(demand),
            _tiers_table(demand, "layer", by_layer(demand)),
            _tiers_table(demand, "module", by_module(demand)),
        ]
    )


def _summary(demand):
    ranks = sorted(set(demand.plan.ranks))
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return (
        f"demand: share of a language's entries of B that survive pruning\n"
        f"{len(demand.plan.languages)} languages, {rank}, {demand.sparsity:.1%} of all entries "
        f"removed, scope {demand.scope or 'unknown'}"
    )


def _languages_table(demand):
    rows = [
        (
            row["tier"] if row["language"] is None else f"  {row['language']}",
            *(tables.percent(row[name]) for name in (*MODULES, "all")),
        )
        for row in by_language(demand)
    ]
    return tables.aligned("<>>>", ("language", *MODULES, "all"), rows)


def _tiers_table(demand, name, found):
    tiers = list(demand.tiers)
    rows = [
        (
            f"{row['stack']} {row[name]}",
            *(tables.percent(row["tiers"][tier]) for tier in tiers),
            tables.percent(row["all"]),
        )
        for row in found
    ]
    return tables.aligned("<" + ">" * (len(tiers) + 1), (name, *tiers, "all"), rows)


def _json(demand):
    plan = demand.plan
    return tables.json_text(
        {
            "scope": demand.scope,
            "sparsity": demand.sparsity,
            "final_sparsity": demand.final_sparsity,
            "ranks": dict(zip(plan.languages.codes, plan.ranks)),
            "tiers": demand.tiers,
            "warnings": demand.warnings(),
            "languages": by_language(demand),
            "layers": by_layer(demand),
            "modules": by_module(demand),
            "cells": [dict(zip(HEADER, row)) for row in cells(demand)],
        }
    )


FORMATS = {
    "table": _table,
    "json": _json,
    "csv": lambda demand: tables.csv_text(HEADER, cells(demand)),
}
