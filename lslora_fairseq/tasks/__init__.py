"""fairseq glue: the multilingual task."""

from lslora_fairseq.tasks import translation_multi_lslora  # noqa: F401
