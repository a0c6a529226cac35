"""Language-specific LoRA for multilingual machine translation: a fairseq ``--user-dir`` package.

Importing it registers model, task, criterion and optimizers with fairseq; only the console command
``lslora`` leaves that to those of its subcommands that need it. The core (``lora/``, ``pruning/``)
and ``lslora doctor`` also work where fairseq is not installed or cannot be imported.
"""

import sys
from contextlib import nullcontext

_IS_CONSOLE_COMMAND = getattr(sys.modules.get("lslora"), "IS_CONSOLE_COMMAND", False)


def register():
    """Registers model, task, criterion and optimizers, and mends fairseq's checkpoint files."""
    from lslora_fairseq.startup import without_unused

    with without_unused() if _IS_CONSOLE_COMMAND else nullcontext():
        from lslora_fairseq import (  # noqa: F401
            checkpoints,
            criterions,
            light,
            models,
            optim,
            stopping,
            tasks,
        )

    checkpoints.allow_fairseq_checkpoints()
    checkpoints.receive_checkpoints_from_own_processes()
    checkpoints.copy_checkpoints_atomically()
    checkpoints.report_unwritable_save_dir()
    checkpoints.tell_what_is_loaded()
    light.complete_what_is_loaded()
    optim.reduce_what_is_trained()
    stopping.end_early()


if not _IS_CONSOLE_COMMAND:
    try:
        import fairseq  # noqa: F401
    except Exception:  # whatever ails it; lslora doctor tells
        pass
    else:
        register()
