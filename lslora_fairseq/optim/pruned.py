"""``--optimizer pruned_<name>``: any of fairseq's usual optimizers, language by language."""

import logging

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.optim import (
    OPTIMIZER_DATACLASS_REGISTRY,
    OPTIMIZER_REGISTRY,
    FairseqOptimizer,
    register_optimizer,
)
from torch import nn, zeros

from lslora_fairseq.config import PruningConfig
from lslora_fairseq.errors import one_line_errors
from lslora_fairseq.optim.language_optimizer import LanguageOptimizer

logger = logging.getLogger(__name__)

INNER_OPTIMIZERS = ("adam", "adafactor", "adamax", "sgd", "nag", "adagrad", "adadelta")


class PrunedOptimizer(FairseqOptimizer):
    """A fairseq optimizer whose inner optimizer steps the languages on their own, with pruning.

    The task calls :meth:`prune_at` before the forward passes of every update.
    """

    inner = None  # the inner optimizer's name, set by register_pruned

    def __init__(self, args, params):
        super().__init__(args)
        pruning = PruningConfig.from_namespace(args)
        build = self._build_inner
        elementwise = build(args, [nn.Parameter(zeros(1))]).supports_flat_params
        with one_line_errors():
            self.schedule = pruning.validated()
            self.scope, self.target = pruning.pruning_scope, pruning.pruning_target
            self._optimizer = LanguageOptimizer(
                params,
                lambda masters: build(args, masters).optimizer,
                elementwise,
                vars(pruning),
            )
        self.sparsity = None  # share last applied

    @classmethod
    def _build_inner(cls, args, params):
        dataclass = OPTIMIZER_DATACLASS_REGISTRY.get(cls.inner)
        if dataclass is not None:
            args = dataclass.from_namespace(args)
            if isinstance(getattr(args, "adam_betas", None), tuple):
                args.adam_betas = str(args.adam_betas)  # what its own command line would give
        return OPTIMIZER_REGISTRY[cls.inner](args, params)

    @classmethod
    def add_args(cls, parser):
        """The inner optimizer's own options, and those of pruning."""
        dataclass = OPTIMIZER_DATACLASS_REGISTRY.get(cls.inner)
        if dataclass is not None:
            gen_parser_from_dataclass(parser, dataclass())
        else:
            OPTIMIZER_REGISTRY[cls.inner].add_args(parser)
        PruningConfig.add_options(parser)
        # flattened, the languages could not be told apart
        parser.set_defaults(fp16_no_flatten_grads=True)

    def prune_at(self, epoch, update):
        """Brings the masks to the schedule's share at this epoch (from 1) and update (from 0).

        Cheap where nothing changes. Running it again at the same step, as a resumed run does,
        changes nothing.

        Returns:
            the share of entries removed in every scope, in [0, 1)
        """
        step = epoch if self.schedule.unit == "epoch" else update
        target = self.schedule.sparsity(step)
        if target and target != self.sparsity and self.schedule.applies_at(step):
            self.optimizer.prune(target, self.scope, self.target)
            self.sparsity = target
            logger.info("pruned to sparsity %.4f at %s %d", target, self.schedule.unit, step)
        return self.sparsity or 0.0

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        with one_line_errors():
            super().load_state_dict(state_dict, optimizer_overrides)


def register_pruned(name):
    """Registers ``pruned_<name>`` around the fairseq optimizer *name*."""
    cls = type(f"Pruned{name.capitalize()}", (PrunedOptimizer,), {"inner": name})
    return register_optimizer(f"pruned_{name}")(cls)


for _name in INNER_OPTIMIZERS:
    register_pruned(_name)
