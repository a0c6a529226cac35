"""The model that a run would train, built without memory for its weights."""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY

from lslora_fairseq import unsupported
from lslora_fairseq.doctor.memory import Shape
from lslora_fairseq.errors import ConfigError, UserError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import EMBEDDINGS, RECORD, is_adapter_key
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel
from lslora_fairseq.tasks.options import begin_adapters, restore_lora_options

# What a base model was trained with need not be what it is fine-tuned with.
NOT_TAKEN_OVER = {
    **unsupported.TRAINING,
    "tpu": False,
    "ddp_backend": None,
    "encoder_embed_path": None,
    "decoder_embed_path": None,
}


class _Rows(Dictionary):
    """A dictionary of which only the length is known."""

    def __init__(self, rows):
        super().__init__()
        self.symbols += [f"row {i}" for i in range(len(self), rows)]


def build(inputs):
    """The model on torch's meta device.

    Args:
        inputs: an :class:`Inputs` with a checkpoint, or with an ``--arch`` and a dictionary

    Raises:
        ConfigError: an option is wrong; the message is that of fairseq-train.
    """
    dictionary = inputs.dictionary or _Rows(inputs.checkpoint.rows)
    args, added = _options(inputs, len(dictionary))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with _as_config_error(), torch.device("meta"):
        model = LSLoTransformerModel.build_model(args, task)
    model.added = added
    return model


def _options(inputs, words):
    arch, checkpoint = inputs.args.arch, inputs.checkpoint
    if arch and arch not in ARCH_CONFIG_REGISTRY:
        known = ", ".join(sorted(name for name in ARCH_CONFIG_REGISTRY if "lslora" in name))
        raise ConfigError(f"--arch {arch} is unknown: choose one of {known}")
    saved, added = checkpoint.options if checkpoint else {}, ()
    options = Namespace(**vars(inputs.lora_options))
    if checkpoint:
        added = restore_lora_options(options, checkpoint.path, saved, is_fresh=True)
    if not arch:
        sizes = {**saved, **NOT_TAKEN_OVER, **vars(options)}
        options = Namespace(**sizes)
    options.lora_train_tokens = None  # a row each, and of which tokens, the task knows
    options.checkpoint_activations = inputs.args.checkpoint_activations
    ARCH_CONFIG_REGISTRY[arch or "lslora_transformer"](options)
    begin_adapters(options, words)
    return options, added


@contextmanager
def _as_config_error():
    """The one line with which the model ends a command becomes an error to report."""
    try:
        yield
    except UserError as error:
        raise ConfigError(str(error).removeprefix("lslora: error: ")) from None


def check_fit(model, checkpoint):
    """Raises ConfigError unless every weight of the checkpoint has its place in the model.

    Embeddings are compared by their width alone; their rows, and the columns of their adapter, are
    matched by token.
    """
    own = model.state_dict()
    weights = dict(checkpoint.weights)
    if RECORD in weights:  # the order of its languages is another check's
        known = Identity.from_record(weights[RECORD], checkpoint.path)
        weights[RECORD] = replace(known, langs=None).record()
    for key in EMBEDDINGS:
        if key in own and key in weights and own[key].size(1) == weights[key].size(1):
            weights[key] = own[key]
    for key in own:
        found = weights.get(key)
        if key.startswith("embedding_adapters.") and found is not None:
            weights[key] = own[key] if len(found) == len(own[key]) else found
    with _as_config_error():
        model.upgrade_state_dict_named(weights, "")


def shape(model):
    """The :class:`Shape` of a model for the estimate of its memory."""
    encoder, decoder = model.encoder, model.decoder
    base, adapters, kept = 0, 0, 0
    for name, param in model.named_parameters():
        if not is_adapter_key(name):
            base += param.numel()
        elif param.requires_grad:
            adapters += param.numel()
        else:
            kept += param.numel()
    return Shape(
        base_parameters=base,
        adapter_entries=adapters,
        kept_entries=kept,
        encoder_layers=len(encoder.layers),
        decoder_layers=len(decoder.layers),
        dim=encoder.embed_tokens.embedding_dim,
        ffn_dim=encoder.layers[0].fc1.out_features,
        rows=encoder.embed_tokens.num_embeddings,
    )
