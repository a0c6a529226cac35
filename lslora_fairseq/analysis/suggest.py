"""``lslora suggest``: ranks and modules for a budget of parameters, from the demand (section 5)."""

import heapq
import logging
import re
from dataclasses import astuple, dataclass, fields

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.plan import MODULES
from lslora_fairseq.rendering import tables

logger = logging.getLogger(__name__)

KEPT_FROM = 0.5  # of the stack's share

EXAMPLES = """\
examples:
  lslora suggest runs/estimate/checkpoint_last.pt --budget 393000
      ranks by tier and modules that need at most 393,000 parameters, and why
  lslora suggest runs/estimate/checkpoint_last.pt --budget 2% --per language
      a rank for each language, in all at most 2% of the base model's parameters
  mapfile -t FLAGS < <(lslora suggest runs/estimate/checkpoint_last.pt --budget 1.5M --format flags)
  fairseq-train … "${FLAGS[@]}"
      the flags as words of a shell array

The checkpoint is one that 'lslora demand' can read: see there.

The rule:
  1. Modules. In the encoder and in the decoder, a module type is kept if the share of its entries
     that survives is at least half the share of all adapted modules of that stack.
  2. Ranks. The demand of a language is its share over the kept modules, that of a tier the mean of
     its languages. Every tier (or language) starts at rank 1; then the one with the largest demand
     / (2 rank + 1) gets one more rank, over and over, until the next does not fit the budget.
     This is Webster's way to give out seats: ranks in proportion to demand.
Tiers, layers with adapters, index sides and shape are those of the checkpoint, and among the flags,
since the number of parameters rests on them. --lora-alpha is not: it belongs to training. Adapters
that all languages share, the embeddings' among them, keep their rank and alpha; what they need, in
the kept modules and for the embeddings, is taken off the budget first.
"""


@dataclass(frozen=True)
class Module:
    """A module type of a stack.

    Attributes:
        share: the share of its entries of B that survives, a mean over the languages
        average: that of all adapted modules of the stack
    """

    stack: str
    module: str
    share: float
    average: float

    @property
    def kept(self):
        return self.share > 0 and self.share >= KEPT_FROM * self.average


@dataclass(frozen=True)
class Group:
    """A tier, or a language.

    Attributes:
        languages: how many
        demand: over the kept modules
        rank: the suggested one
        parameters: of all its languages at that rank
    """

    name: str
    languages: int
    demand: float
    rank: int
    parameters: int


@dataclass(frozen=True)
class Suggestion:
    """What to train next.

    Attributes:
        modules, groups: lists of :class:`Module` and :class:`Group`
        budget, base: numbers of parameters
        kept: what stays as it is in the checkpoint: option -> value
        shared, embeddings: parameters of the shared adapters, and of the embeddings'
    """

    modules: list
    groups: list
    budget: int
    base: int
    kept: dict
    shared: int = 0
    embeddings: int = 0

    @property
    def used(self):
        return self.shared + self.embeddings + sum(group.parameters for group in self.groups)

    @property
    def flags(self):
        """option -> value for the next fairseq-train: all that :attr:`used` rests on."""
        flags = {"--lora-rank": ",".join(f"{g.name}={g.rank}" for g in self.groups)}
        for stack in MODULES:
            kept = [m.module for m in self.modules if m.kept and m.stack == stack]
            flags[f"--{stack}-target-modules"] = ",".join(kept) or "none"
        return {**flags, **self.kept}


def kept_options(checkpoint):
    """What the next run takes over from the checkpoint: option -> value."""
    config = checkpoint.config
    kept = {"--lora-tiers": config.lora_tiers, "--lora-shape": config.lora_shape}
    # also 0, which is not the default of new adapters
    kept["--lora-shared-rank"] = str(config.lora_shared_rank)
    if config.lora_shared_alpha is not None:
        kept["--lora-shared-alpha"] = str(config.lora_shared_alpha)
    kept["--lora-embedding-rank"] = str(config.lora_embedding_rank)
    for stack, layers in checkpoint.layers.items():
        chosen = getattr(config, f"{stack}_lora_layers") or f"0-{layers - 1}"
        kept[f"--{stack}-lora-layers"] = chosen
        kept[f"--{stack}-index-side"] = getattr(config, f"{stack}_index_side")
    return kept


def alpha_warning(checkpoint):
    """One line if the checkpoint's adapters were scaled, else None."""
    if checkpoint.plan.alphas == checkpoint.plan.ranks:
        return None
    return (
        f"{checkpoint.path} was trained with --lora-alpha {checkpoint.config.lora_alpha}, which is "
        "not among the flags: it belongs to training, like the learning rate, and scales adapters "
        "by alpha / rank, so that another rank may want another alpha"
    )


def judge_modules(demand):
    """The share of every module type and what it is compared with: list of :class:`Module`."""
    found = []
    for stack in MODULES:
        average = demand.mean(demand.shares(demand.sites(stack=stack)))
        for module in demand.modules(stack):
            share = demand.mean(demand.shares(demand.sites(stack=stack, module=module)))
            found.append(Module(stack, module, share, average))
    return found


def kept_sites(sites, modules):
    """Those of some sites whose module type is kept."""
    kept = {(module.stack, module.module) for module in modules if module.kept}
    return [site for site in sites if (site.stack, site.module) in kept]


def shared_parameters(plan, modules):
    """Parameters of the adapters that all languages share, in the kept modules."""
    return sum(s.entries(plan.shared_rank) for s in kept_sites(plan.shared_sites, modules))


def embedding_parameters(plan):
    """Parameters of the embeddings' adapter."""
    return plan.embedding_site.entries(plan.embedding_rank) if plan.embedding_site else 0


def apportion(demands, costs, budget, limit):
    """Ranks in proportion to demand, by Webster's method, within a budget.

    Args:
        demands: of each group
        costs: parameters of each group at rank 1
        budget: parameters of all groups; at least ``sum(costs)``
        limit: the largest rank

    Returns:
        list of ranks, at least 1
    """
    ranks = [1] * len(demands)
    left = budget - sum(costs)
    waiting = [(-demand / 3, number) for number, demand in enumerate(demands) if demand > 0]
    heapq.heapify(waiting)
    while waiting:
        _, number = heapq.heappop(waiting)
        if ranks[number] == limit:
            continue
        left -= costs[number]
        if left < 0:
            break
        ranks[number] += 1
        heapq.heappush(waiting, (-demands[number] / (2 * ranks[number] + 1), number))
    return ranks


def suggest(demand, budget, per):
    """Ranks and modules, by the rule in :data:`EXAMPLES`.

    Args:
        demand: a :class:`~lslora_fairseq.analysis.survivors.Demand`
        budget: number of parameters
        per: ``tier`` or ``language``: what gets a rank of its own

    Returns:
        list of :class:`Module`, list of :class:`Group`

    Raises:
        ConfigError: the budget is too small for rank 1.
    """
    modules = judge_modules(demand)
    sites = kept_sites(demand.plan.sites, modules)
    shared = shared_parameters(demand.plan, modules) + embedding_parameters(demand.plan)
    shares = demand.shares(sites)
    groups = demand.tiers
    demands = [demand.mean(shares, tier) for tier in groups]
    if per == "language":
        groups, demands = {code: [code] for code in demand.plan.languages.codes}, shares.tolist()
    cost = sum(site.entries(1) for site in sites)
    costs = [cost * len(codes) for codes in groups.values()]
    if budget < shared + sum(costs):
        beside = f" beside the shared adapters' {shared:,}" if shared else ""
        raise ConfigError(
            f"--budget: {budget:,} parameters are too few for rank 1 everywhere{beside}: give at "
            f"least {shared + sum(costs)}, or adapt fewer languages or layers"
        )
    limit = min(min(site.in_features, site.out_features) for site in sites)
    ranks = apportion(demands, costs, budget - shared, limit)
    return modules, [
        Group(name, len(groups[name]), demand, rank, rank * cost)
        for name, demand, rank, cost in zip(groups, demands, ranks, costs)
    ]


def parse_budget(text):
    """``393000``, ``1.5M`` or ``2%`` -> a function of the base's parameters to the budget.

    Raises:
        ConfigError: it cannot be read.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([kKmM%]?)", text.replace(",", ""))
    if not match:
        raise ConfigError(
            f"--budget: cannot read {text!r}: write a number of parameters such as 393000 or "
            "1.5M, or a share of the base model such as 2%"
        )
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        return lambda base: int(number / 100 * base)
    return lambda base: round(number * {"": 1, "k": 1_000, "m": 1_000_000}[unit])


def add_arguments(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="trained with pruning")
    parser.add_argument(
        "--budget", required=True, metavar="N", help="parameters: 393000, 1.5M, or 2%% of the base"
    )
    parser.add_argument(
        "--per",
        choices=("tier", "language"),
        default="tier",
        help="what gets a rank of its own (default: tier)",
    )
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="table", help="(default: table)"
    )


def run(args):
    """Prints the suggestion; returns the exit status."""
    from lslora_fairseq.analysis import survivors, trained  # not for --help: torch takes seconds

    budget = parse_budget(args.budget)
    checkpoint = trained.read(args.checkpoint)
    if checkpoint.plan.weight_learning:
        raise ConfigError(
            f"{checkpoint.path} was trained with --lora-weight-learning, with adapters for both "
            "sides: take the sides from 'lslora sides', and train with them and --pruning-scope "
            "layer"
        )
    base = checkpoint.base_parameters()
    budget = budget(base)
    modules, groups = suggest(survivors.read_demand(checkpoint), budget, args.per)
    warning = alpha_warning(checkpoint)
    if warning:
        logger.warning(warning)
    of_all = shared_parameters(checkpoint.plan, modules), embedding_parameters(checkpoint.plan)
    kept = kept_options(checkpoint)
    print(FORMATS[args.format](Suggestion(modules, groups, budget, base, kept, *of_all)))
    return 0


def _table(suggestion):
    modules = [
        (
            f"{module.stack} {module.module}",
            tables.percent(module.share),
            f"{'kept' if module.kept else 'dropped'}, "
            f"{'at least' if module.kept else 'below'} half of {tables.percent(module.average)}",
        )
        for module in suggestion.modules
    ]
    groups = [
        (g.name, str(g.languages), tables.percent(g.demand), str(g.rank), f"{g.parameters:,}")
        for g in suggestion.groups
    ]
    if suggestion.shared:
        rank = suggestion.kept["--lora-shared-rank"]
        groups.append(("(shared)", "all", "-", rank, f"{suggestion.shared:,}"))
    if suggestion.embeddings:
        rank = suggestion.kept["--lora-embedding-rank"]
        groups.append(("(embeddings)", "all", "-", rank, f"{suggestion.embeddings:,}"))
    header = ("rank for", "languages", "demand", "rank", "parameters")
    used, base = suggestion.used, suggestion.base
    return "\n\n".join(
        [
            tables.aligned("<><", ("module", "survives", "choice"), modules),
            tables.aligned("<>>>>", header, groups),
            f"{used:,} of {suggestion.budget:,} parameters, {used / base:.2%} of the base model's "
            f"{base:,}",
            tables.shell_line(suggestion.flags),
        ]
    )


def _json(suggestion):
    return tables.json_text(
        {
            "modules": [{**vars(m), "kept": m.kept} for m in suggestion.modules],
            "groups": [vars(group) for group in suggestion.groups],
            "shared": suggestion.shared,
            "embeddings": suggestion.embeddings,
            "budget": suggestion.budget,
            "used": suggestion.used,
            "base_parameters": suggestion.base,
            "flags": suggestion.flags,
        }
    )


def _csv(suggestion):
    """A row for each group, with the flags that all rows rest on."""
    flags = {name: value for name, value in suggestion.flags.items() if name != "--lora-rank"}
    header = [f.name for f in fields(Group)] + list(flags)
    rows = [(*astuple(group), *flags.values()) for group in suggestion.groups]
    return tables.csv_text(header, rows)


FORMATS = {
    "table": _table,
    "json": _json,
    "csv": _csv,
    "flags": lambda suggestion: tables.flag_words(suggestion.flags),
}
