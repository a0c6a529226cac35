"""Language-specific LoRA for multilingual machine translation: a fairseq ``--user-dir`` package.

Importing it registers the model, the task and the optimizers with fairseq. The core (``lora/``,
``pruning/``) and ``lslora doctor`` also work where fairseq is not installed or cannot be imported.
"""

try:
    import fairseq
except Exception:  # whatever ails it; lslora doctor tells
    fairseq = None

if fairseq is not None:
    from lslora_fairseq import checkpoints, models, optim, tasks  # noqa: F401

    checkpoints.allow_fairseq_checkpoints()
    checkpoints.receive_checkpoints_from_own_processes()
    checkpoints.copy_checkpoints_atomically()
    checkpoints.report_unwritable_save_dir()
    checkpoints.tell_what_is_loaded()
