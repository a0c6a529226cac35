"""Options of fairseq that adapters cannot work with, refused before a model is built."""

import torch

from lslora_fairseq.errors import ConfigError

# By the name of the attribute in fairseq's args: the value without effect.
MODEL = {
    # other layers than those that get the adapters
    "encoder_layers_to_keep": None,
    "decoder_layers_to_keep": None,
    "base_layers": 0,
    # attention that reads its weights past the adapters, or is absent
    "encoder_xformers_att_config": None,
    "decoder_xformers_att_config": None,
    "no_cross_attention": False,
}
TRAINING = {
    # layers that are skipped or split up, linears that are replaced
    "encoder_layerdrop": 0,
    "decoder_layerdrop": 0,
    "quant_noise_pq": 0,
    "quant_noise_scalar": 0,
    "quantization_config_path": None,
    "model_parallel_size": 1,
    "pipeline_model_parallel": False,
    # weights that change outside the pruned_* optimizer, pruned entries too
    "store_ema": False,
    "use_bmuf": False,
    "zero_sharding": "none",
}
BACKENDS = ("fully_sharded", "slowmo")  # cut parameters up, or let the processes drift apart
HOOKED_BACKENDS = ("c10d", "pytorch_ddp")  # two names of one


def refuse_unsupported(args):
    """Raises ConfigError for an option that adapters do not support."""
    if getattr(args, "tpu", False):
        option = "--bf16" if getattr(args, "bf16", False) else "--tpu"  # fairseq sets both
        raise ConfigError(
            f"{option} makes fairseq train on a TPU, where adapters were never tried: use --amp, "
            "--fp16 or --lora-base-dtype bf16 on a GPU"
        )
    given = [
        f"--{name.replace('_', '-')}"
        for name, without_effect in {**MODEL, **TRAINING}.items()
        if getattr(args, name, None) not in (None, without_effect)
    ]
    if getattr(args, "ddp_backend", None) in BACKENDS:
        given.append(f"--ddp-backend {args.ddp_backend}")
    if given:
        raise ConfigError(f"{given[0]} does not work with adapters: leave it out")


def refuse_processes(args, processes):
    """Raises ConfigError if gradients would not be reduced over this number of processes.

    A language has no gradient on a process without its sentences. torch's own backend has to be
    told to look for that, and cannot see what layers with checkpointed activations use.
    """
    if processes == 1 or args.ddp_backend not in HOOKED_BACKENDS:
        return
    several = f"--ddp-backend {args.ddp_backend} with {processes} processes"
    if getattr(args, "checkpoint_activations", False):
        raise ConfigError(
            f"{several} does not work with --checkpoint-activations or --offload-activations: use "
            "--ddp-backend legacy_ddp"
        )
    if max(args.update_freq) > 1 and torch.__version__ < (2, 4):
        # github.com/pytorch/pytorch/issues/69031
        raise ConfigError(
            f"{several} and --update-freq does not add up the gradients of a language that the "
            "last batch lacks in torch < 2.4: use --ddp-backend legacy_ddp, or a newer torch"
        )
    if not args.find_unused_parameters:
        raise ConfigError(
            f"{several} needs --find-unused-parameters, since a process may have no sentence of "
            "a language: add it, or use --ddp-backend legacy_ddp"
        )
