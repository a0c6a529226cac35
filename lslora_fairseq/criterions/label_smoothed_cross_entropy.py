"""fairseq's label-smoothed cross-entropy for models whose output projection is frozen."""

import logging
from functools import lru_cache

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from lslora_fairseq.criterions.frozen_projection import frozen_projection_loss

logger = logging.getLogger(__name__)
NAME = "lslora_label_smoothed_cross_entropy"


@register_criterion(NAME, dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class LSLoLabelSmoothedCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """The same loss, gradients and logged values as ``label_smoothed_cross_entropy``, of which it
    has the options, but no tensor of all tokens and words.

    A model without a frozen output projection is left to fairseq's own computation, and the log
    says why; so are losses by token (``reduce=False``), of which fairseq's training has no use.
    """

    def forward(self, model, sample, reduce=True):
        if _projection(model, reduce) is not None:
            net_input = {**sample["net_input"], "features_only": True}
            sample = {**sample, "net_input": net_input}
        return super().forward(model, sample, reduce)

    def compute_loss(self, model, net_output, sample, reduce=True):
        projection = _projection(model, reduce)
        if projection is None:
            return super().compute_loss(model, net_output, sample, reduce)
        features, extra = net_output
        target = self._counted(model.get_targets(sample, net_output))
        loss, nll, extra["hits"] = frozen_projection_loss(
            self._counted(features),
            projection,
            target,
            self.eps,
            self.padding_idx,
            sample["ntokens"],
            self.report_accuracy,
        )
        return loss, nll

    def compute_accuracy(self, model, net_output, sample):
        extra = net_output[1] or {}
        if "hits" not in extra:
            return super().compute_accuracy(model, net_output, sample)
        target = self._counted(model.get_targets(sample, net_output))
        return extra["hits"], target.ne(self.padding_idx).sum()

    def _counted(self, batch_first):
        return batch_first[:, self.ignore_prefix_size :]


# fairseq resumes a run only under a criterion of this name: one that began with either goes on with
# the other.
LSLoLabelSmoothedCrossEntropyCriterion.__name__ = LabelSmoothedCrossEntropyCriterion.__name__


def _projection(model, reduce):
    """E, A and B of the model's frozen output projection, or None where the loss is fairseq's."""
    if not reduce:
        return None
    try:
        if not hasattr(getattr(model, "decoder", None), "frozen_projection"):
            raise ValueError("the model has no adapters")
        return model.decoder.frozen_projection()
    except ValueError as reason:
        _say_once(str(reason))
        return None


@lru_cache
def _say_once(reason):
    logger.warning(
        "the loss is computed over the whole output distribution, as by "
        "label_smoothed_cross_entropy: %s",
        reason,
    )
