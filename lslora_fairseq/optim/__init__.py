"""fairseq glue: optimizers that treat every language on its own and prune its adapters."""

from lslora_fairseq.optim import pruned  # noqa: F401
from lslora_fairseq.optim.reduction import reduce_what_is_trained  # noqa: F401
