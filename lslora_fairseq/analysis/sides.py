"""``lslora sides``: which language should index each layer (method, section 3)."""

from dataclasses import astuple, dataclass, fields
from itertools import groupby
from typing import Optional

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.plan import MODULES, SIDES
from lslora_fairseq.rendering import tables

CLEAR, SLIGHT = 0.2, 0.05
ON_A_TIE = {"encoder": "source", "decoder": "target"}

EXAMPLES = f"""\
examples:
  lslora sides runs/weights/checkpoint_last.pt
      a table of the learned weights, and the flags for the next run
  mapfile -t SIDES < <(lslora sides runs/weights/checkpoint_last.pt --format flags)
  fairseq-train … "${{SIDES[@]}}"
      the flags as words of a shell array

The checkpoint is one of a run with --lora-weight-learning. Each layer is given the side of the
larger weight; a tie goes to the source in the encoder, to the target in the decoder. The margin is
the difference of the weights, the choice is clear from {CLEAR} on, slight from {SLIGHT} on, and
open below. A layer without adapters takes the side of the nearest one below it that has them, else
above. A stack without adapters gets no flag.
"""


@dataclass(frozen=True)
class LayerSide:
    """What a layer learned; without adapters only the side is known.

    Attributes:
        p_source, p_target: the weights, which add up to 1
        side: the recommended index side
        margin: |p_source - p_target|
        choice: ``clear``, ``slight`` or ``open``; ``none`` without adapters
    """

    stack: str
    layer: int
    p_source: Optional[float]
    p_target: Optional[float]
    side: str
    margin: Optional[float]
    choice: str


def weigh(stack, layer, logits):
    """The :class:`LayerSide` of one layer.

    Args:
        logits: (1, 2) tensor, w of (source, target)
    """
    p_source, p_target = logits.double().flatten().softmax(0).tolist()
    side = ON_A_TIE[stack] if p_source == p_target else SIDES[p_target > p_source]
    margin = abs(p_source - p_target)
    choice = "clear" if margin >= CLEAR else "slight" if margin >= SLIGHT else "open"
    return LayerSide(stack, layer, p_source, p_target, side, margin, choice)


def learned_sides(checkpoint):
    """The side of every layer of the stacks that have adapters.

    Args:
        checkpoint: a :class:`~lslora_fairseq.analysis.trained.Trained`

    Returns:
        list of :class:`LayerSide`, encoder first

    Raises:
        ConfigError: the run did not learn weights, or diverged.
    """
    if not checkpoint.plan.weight_learning:
        raise ConfigError(
            f"{checkpoint.path} was not trained with --lora-weight-learning: train with it (and "
            "without --encoder-index-side and --decoder-index-side), then name that checkpoint"
        )
    found = []
    for stack in MODULES:
        adapted = {s.layer: None for s in checkpoint.plan.sites if s.stack == stack}
        for layer in adapted:
            logits = checkpoint.weights[f"{stack}.layers.{layer}.side_weights.logits"]
            if not logits.isfinite().all():
                raise ConfigError(
                    f"{checkpoint.path}: the weights of {stack} layer {layer} are "
                    f"{logits.tolist()}: the run diverged, train again with a lower --lr"
                )
            adapted[layer] = weigh(stack, layer, logits)
        if adapted:
            layers = checkpoint.layers[stack]
            found += [adapted.get(n) or _as_neighbour(stack, n, adapted) for n in range(layers)]
    return found


def _as_neighbour(stack, layer, adapted):
    below = [number for number in adapted if number < layer]
    side = adapted[max(below) if below else min(adapted)].side
    return LayerSide(stack, layer, None, None, side, None, "none")


def side_flags(layers):
    """``--encoder-index-side`` and ``--decoder-index-side`` -> value, where the stack has any.

    Args:
        layers: list of :class:`LayerSide`
    """
    flags = {}
    for stack, group in groupby(layers, key=lambda layer: layer.stack):
        runs = groupby(layer.side for layer in group)
        flags[f"--{stack}-index-side"] = ",".join(f"{s}*{len(list(run))}" for s, run in runs)
    return flags


def add_arguments(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="trained with weight learning")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="table", help="(default: table)"
    )


def run(args):
    """Prints the sides; returns the exit status."""
    from lslora_fairseq.analysis import trained  # not for --help: torch takes seconds

    print(FORMATS[args.format](learned_sides(trained.read(args.checkpoint))))
    return 0


def _table(layers):
    rows = [
        (
            f"{layer.stack} {layer.layer}",
            *_numbers(layer.p_source, layer.p_target),
            layer.side,
            *_numbers(layer.margin),
            layer.choice if layer.margin is not None else "no adapters",
        )
        for layer in layers
    ]
    header = ("layer", "p_source", "p_target", "side", "margin", "choice")
    return f"{tables.aligned('<>><><', header, rows)}\n\n{tables.shell_line(side_flags(layers))}"


def _numbers(*values):
    return ("-" if value is None else f"{value:.3f}" for value in values)


def _csv(layers):
    return tables.csv_text([f.name for f in fields(LayerSide)], map(astuple, layers))


def _json(layers):
    return tables.json_text({"layers": [vars(x) for x in layers], "flags": side_flags(layers)})


FORMATS = {
    "table": _table,
    "json": _json,
    "csv": _csv,
    "flags": lambda layers: tables.flag_words(side_flags(layers)),
}
