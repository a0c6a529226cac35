"""Which linear gets which adapters: sites, index sides, ranks and shapes (method, section 2)."""

import re
from dataclasses import dataclass
from typing import Optional

from lslora_fairseq.errors import ConfigError

SIDES = ("source", "target")
SHARED = "shared"  # the side of adapters that belong to no language: every sentence uses them
SELF_ATTENTION = tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
CROSS_ATTENTION = tuple(f"encoder_attn.{p}_proj" for p in ("q", "k", "v", "out"))
FEED_FORWARD = ("fc1", "fc2")
MODULES = {
    "encoder": SELF_ATTENTION + FEED_FORWARD,
    "decoder": SELF_ATTENTION + CROSS_ATTENTION + FEED_FORWARD,
}


@dataclass(frozen=True)
class Site:
    """One linear that carries the adapters of all languages.

    Attributes:
        name: module path in the model, such as ``encoder.layers.0.fc1``
        stack, layer, module: the parts of that path; no layer for the output projection
        side: which of a sentence's languages indexes it, ``source`` or ``target``; ``shared`` for
            the adapter of all languages
        in_features, out_features: the part of the linear that the adapters see; smaller than the
            linear itself in the square shape
    """

    stack: str
    layer: Optional[int]
    module: str
    side: str
    in_features: int
    out_features: int

    @property
    def name(self):
        where = "" if self.layer is None else f"layers.{self.layer}."
        return f"{self.stack}.{where}{self.module}"

    def entries(self, rank):
        """Trainable entries of one language's adapter of this rank."""
        return rank * (self.in_features + self.out_features)


def parse_layers(text, layers, option):
    """``'0-2,5'`` -> (0, 1, 2, 5); None means all of the *layers*."""
    if text is None:
        return tuple(range(layers))
    chosen = set()
    for part in str(text).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ConfigError(f"{option}: cannot read {part!r}: write for example 0-5,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= layers:
            raise ConfigError(
                f"{option}: {part} is not within the model's layers 0-{layers - 1}: name layers "
                "of that range, or leave the option out for all"
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def parse_index_sides(text, layers, option):
    """``'source*9,target*3'`` -> a side for each layer; a side alone holds for all layers."""
    counts = []
    for part in str(text).replace(" ", "").split(","):
        match = re.fullmatch(r"(source|target)(?:\*(\d+))?", part)
        if not match:
            raise ConfigError(
                f"{option}: cannot read {part!r}: write source, target, or source*9,target*3"
            )
        counts.append((match[1], int(match[2] or 1)))
    if len(counts) == 1 and "*" not in str(text):
        return (counts[0][0],) * layers
    named = sum(count for _, count in counts)
    if named != layers:
        raise ConfigError(
            f"{option}={text} names a side for {named} layers, the model has {layers}: "
            "make the counts add up"
        )
    return tuple(side for side, count in counts for _ in range(count))


def default_encoder_sides(layers):
    """The authors' 9 + 3 pattern for any depth: the last quarter is indexed by the target."""
    source = int(0.75 * layers + 0.5)
    return f"source*{source}" + (f",target*{layers - source}" if layers > source else "")


def parse_target_modules(text, stack, option):
    """``'self_attn.q_proj,fc1'`` -> module names of that stack, in the stack's own order."""
    names = [name.strip() for name in str(text).split(",") if name.strip()]
    for name in names or [""]:
        if name not in MODULES[stack]:
            raise ConfigError(
                f"{option}: unknown module {name!r}; valid: {', '.join(MODULES[stack])}, or none"
            )
    return tuple(name for name in MODULES[stack] if name in names)


def plan_sites(stack, layers, sides, modules, dims, shape):
    """The sites of one stack.

    Args:
        stack: ``encoder`` or ``decoder``
        layers: indices of the layers that get adapters
        sides: the index sides of every layer of the stack; both where weights are learned
        modules: module names that get adapters
        dims: module name -> (in_features, out_features) of the linear
        shape: ``full``, or ``square``: feed-forward adapters see only the first d of the inner
            dimension, as in the authors' code
    """
    sites = []
    for layer in layers:
        for module in modules:
            n_in, n_out = dims[module]
            if shape == "square":
                n_in = n_out = min(n_in, n_out)
            sites += [Site(stack, layer, module, side, n_in, n_out) for side in sides[layer]]
    return sites


def adapter_columns(sites):
    """Where the factors of a layer's sites lie in a language's matrix: A of all sites, then B.

    Args:
        sites: the sites of one layer that one side indexes, in the plan's order

    Returns:
        dict of module name -> (slice of A, slice of B), and the number of columns of A
    """
    a, b = 0, sum(site.in_features for site in sites)
    width_A, columns = b, {}
    for site in sites:
        columns[site.module] = (slice(a, a + site.in_features), slice(b, b + site.out_features))
        a, b = a + site.in_features, b + site.out_features
    return columns, width_A


def check_ranks(ranks, names, sites, option):
    """Raises ConfigError for a rank below 1 or above what a site's matrix can hold.

    Args:
        ranks: of the adapters at each of the sites
        names: whose they are, for messages
    """
    if not sites:
        raise ConfigError(
            "no linear is left to adapt: name some in --encoder-target-modules or "
            "--decoder-target-modules"
        )
    smallest = min(sites, key=lambda s: min(s.in_features, s.out_features))
    limit = min(smallest.in_features, smallest.out_features)
    for name, rank in zip(names, ranks):
        if not 1 <= rank <= limit:
            more = ""
            if rank == 0:
                more = "; 0 for every language is plain LoRA, and needs --lora-shared-rank"
            raise ConfigError(
                f"{option}: rank {rank} of {name} must lie between 1 and {limit}, "
                f"the smaller side of {smallest.name}{more}"
            )
