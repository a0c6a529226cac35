"""What is compared in examples/evidence: corpora and ways of fine-tuning on them."""

from dataclasses import dataclass

# how long a fine-tuning lasts; the validation set is looked at several times
LENGTH = {
    "few": ("--max-epoch", "3"),
    "more": (
        *("--max-update", "400", "--validate-interval-updates", "100"),
        *("--save-interval-updates", "100", "--keep-interval-updates", "1"),
    ),
    "news": ("--max-epoch", "6"),
}
TRIED_ON, TRIED_FOR = "few", ("--max-epoch", "1")  # learning rates


@dataclass(frozen=True)
class System:
    """A way of fine-tuning.

    Attributes:
        options: of fairseq-train, beside those that all share
        rates: learning rates, of which the best one on the validation set is taken
        is_stock: fairseq's own model and task; all parameters are trained
        is_learned: index sides, ranks and modules are first found by this package's commands
    """

    options: tuple
    rates: tuple
    is_stock: bool = False
    is_learned: bool = False


def adapters(options, *rates, **more):
    """A system with adapters, unpruned unless its options say how."""
    options = tuple(options.split())
    if "--pruning-final-sparsity" not in options:
        options += ("--pruning-final-sparsity", "0")
    return System(options, rates, **more)


PAPER = "--lora-shared-rank 0 --lora-embedding-rank 0"
PRUNED = (
    "--pruning-final-sparsity 0.9 --pruning-unit update --pruning-begin 100 --pruning-duration 250"
)
SYSTEMS = {
    "full": System((), (3e-4, 1e-3, 3e-3), is_stock=True),
    "shared": adapters("--lora-rank 0 --lora-shared-rank 48", 2e-3, 4e-3, 8e-3),
    "lslo_8": adapters(f"--lora-rank 8 {PAPER}", 2e-3, 4e-3, 8e-3),
    "lslo_2_2_8": adapters(f"--lora-rank high=2,medium=2,low=8 {PAPER}", 4e-3, 8e-3, 1.6e-2),
    "learned": adapters(PAPER, 2e-3, 4e-3, 8e-3, is_learned=True),
    "ours": adapters("", 2e-3, 4e-3, 8e-3),
    "ours_pruned": adapters(PRUNED, 2e-3, 4e-3, 8e-3),
}
WEIGHT_LEARNING = adapters(f"--lora-rank 8 --lora-weight-learning {PAPER}", 4e-3)
ESTIMATION = adapters(f"--lora-rank 8 --pruning-scope layer {PAPER} {PRUNED}", 4e-3)

BEST = "ours"  # also asked for what becomes of other directions
ACROSS = ("full", BEST)  # decoded in directions that were never trained
ADDED = "oc"  # the language that is trained later
