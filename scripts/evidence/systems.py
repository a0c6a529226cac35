"""What is compared in examples/evidence: systems, and single choices of the settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A way of fine-tuning.

    Attributes:
        options: of fairseq-train, beside those that all share
        rates: learning rates, of which the best one on the validation set is taken
        is_stock: fairseq's own model and task; all parameters are trained
    """

    options: tuple
    rates: tuple
    is_stock: bool = False


def adapters(options, *rates):
    """A system with adapters, unpruned unless its options say how."""
    options = tuple(options.split())
    if "--pruning-final-sparsity" not in options:
        options += ("--pruning-final-sparsity", "0")
    return System(options, rates)
