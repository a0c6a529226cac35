"""Importing this registers the criterion ``lslora_label_smoothed_cross_entropy``."""

from lslora_fairseq.criterions import label_smoothed_cross_entropy  # noqa: F401
