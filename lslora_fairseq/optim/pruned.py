"""``--optimizer pruned_<name>``: any of fairseq's usual optimizers, language by language."""

import logging

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.optim import (
    OPTIMIZER_DATACLASS_REGISTRY,
    OPTIMIZER_REGISTRY,
    FairseqOptimizer,
    register_optimizer,
)

from lslora_fairseq.config import PruningConfig
from lslora_fairseq.errors import listed, one_line_errors
from lslora_fairseq.optim.few_calls import clip_gradient_norm
from lslora_fairseq.optim.language_optimizer import LanguageOptimizer
from lslora_fairseq.optim.reduction import only_present

logger = logging.getLogger(__name__)

INNER_OPTIMIZERS = ("adam", "adafactor", "adamax", "sgd", "nag", "adagrad", "adadelta")
MATRIX_OPTIMIZERS = ("adafactor",)  # with statistics of rows and columns


class PrunedOptimizer(FairseqOptimizer):
    """A fairseq optimizer whose inner optimizer steps the languages on their own, with pruning.

    The task calls :meth:`prune_at` before the forward passes of every update.
    """

    inner = None  # the inner optimizer's name, set by register_pruned

    def __init__(self, args, params):
        super().__init__(args)
        pruning = PruningConfig.from_namespace(args)
        build = self._build_inner
        with one_line_errors():
            self.schedule = pruning.validated()
            self._optimizer = LanguageOptimizer(
                params,
                lambda groups: build(args, groups).optimizer,
                self.inner not in MATRIX_OPTIMIZERS,
                vars(pruning),
            )
        self._step = None  # of the schedule, last seen
        self._share = None  # applied by this object; masks may have another

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

        Masks change when a new step of the schedule begins, and only then: a resumed run prunes
        where the run that never stopped does. Cheap where nothing changes. What was never updated
        is left alone; once it was, it is pruned at the next step.

        Returns:
            the share of entries that are pruned by the masks, in [0, 1), of all that was updated
        """
        optimizer = self.optimizer
        step = epoch if self.schedule.unit == "epoch" else update
        if step != self._step and self.schedule.applies_at(step):
            self._step = step
            share = self.schedule.sparsity(step)
            if share and (share != self._share or optimizer.pruner.has_newcomers):
                optimizer.prune(share)
                self._share = share
                self._log()
        return optimizer.pruner.sparsity

    def clip_grad_norm(self, max_norm, aggregate_norm_fn=None):
        gradients = [p.grad.detach() for p in self.params if p.grad is not None]
        if not gradients or aggregate_norm_fn is not None:
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        return clip_gradient_norm(gradients, max_norm)

    def all_reduce_grads(self, module):
        with only_present(module):
            super().all_reduce_grads(module)

    def _log(self):
        pruner = self.optimizer.pruner
        untouched = "; ".join(
            f"as {side} {listed(codes)}" for side, codes in pruner.untouched_codes().items()
        )
        logger.info(
            "pruned to sparsity %.4f at %s %d%s",
            pruner.sparsity,
            self.schedule.unit,
            self._step,
            untouched and f" (never updated and left alone: {untouched})",
        )

    def state_dict(self):
        return {**super().state_dict(), "schedule_step": self._step}

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        with one_line_errors():
            super().load_state_dict(state_dict, optimizer_overrides)
        self._step = state_dict["schedule_step"]
        self._share = None  # averaged masks may have less than it


def register_pruned(name):
    """Registers ``pruned_<name>`` around the fairseq optimizer *name*."""
    cls = type(f"Pruned{name.capitalize()}", (PrunedOptimizer,), {"inner": name})
    return register_optimizer(f"pruned_{name}")(cls)


for _name in INNER_OPTIMIZERS:
    register_pruned(_name)
