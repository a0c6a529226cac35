"""fairseq glue: the transformer whose linears carry adapters, and its architectures."""

from lslora_fairseq.models import architectures, lslora_transformer  # noqa: F401
