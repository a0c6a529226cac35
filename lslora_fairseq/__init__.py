"""Language-specific LoRA for multilingual machine translation: a fairseq ``--user-dir`` package.

Importing it registers the model, the task and the optimizers with fairseq. The core (``lora/``,
``pruning/``) also works where fairseq is not installed.
"""

from importlib.util import find_spec

if find_spec("fairseq") is not None:
    from lslora_fairseq import models, optim, tasks  # noqa: F401
    from lslora_fairseq.checkpoints import (
        allow_fairseq_checkpoints,
        copy_checkpoints_atomically,
    )

    allow_fairseq_checkpoints()
    copy_checkpoints_atomically()
