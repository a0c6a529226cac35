"""What fairseq's transformer and M2M100ForConditionalGeneration call the same.

Parameters have the same names in both, after one prefix. One matrix is all three embeddings, and
stands in a folder once. Both stacks are pre-norm and end in a layer norm, positions are sinusoids.
"""

from argparse import Namespace

from lslora_fairseq.keys import EMBEDDINGS
from lslora_fairseq.lora.plan import MODULES

CLASS, MODEL_TYPE = "M2M100ForConditionalGeneration", "m2m_100"
PREFIX, SHARED_KEY = "model.", "model.shared.weight"
# parts of a stack's layer beside its linears
NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
# a stack of a lower version, or of none, loses its last layer norm in fairseq, without a word
VERSION = 3.0
VERSIONS = ("encoder.version", "decoder.version")
# names that both use for the dictionary's first symbols, in order
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# of these tokens, and of the one that decoding starts with
TOKEN_IDS = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# field of config.json -> the option of fairseq, and what the class has where the field is missing
FIELDS = {
    "d_model": ("encoder_embed_dim", 1024),
    "encoder_layers": ("encoder_layers", 12),
    "decoder_layers": ("decoder_layers", 12),
    "encoder_ffn_dim": ("encoder_ffn_embed_dim", 4096),
    "decoder_ffn_dim": ("decoder_ffn_embed_dim", 4096),
    "encoder_attention_heads": ("encoder_attention_heads", 16),
    "decoder_attention_heads": ("decoder_attention_heads", 16),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "activation_function": ("activation_fn", "relu"),
    "max_position_embeddings": ("max_source_positions", 1024),
}
ACTIVATIONS = ("relu", "gelu")  # that both have under these names
# options of fairseq that the class has no counterpart of -> the value without effect
ABSENT = {
    "encoder_learned_pos": False,
    "decoder_learned_pos": False,
    "no_token_positional_embeddings": False,
    "layernorm_embedding": False,
    "no_decoder_final_norm": False,
    "no_cross_attention": False,
    "cross_self_attention": False,
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "quant_noise_pq": 0,
    "char_inputs": False,
    "base_layers": 0,
    "encoder_layers_to_keep": None,
    "decoder_layers_to_keep": None,
}
# options that it has to have
PRESENT = ("encoder_normalize_before", "decoder_normalize_before", "share_all_embeddings")


def shapes(options, rows):
    """Key of each parameter in fairseq -> its shape, without the embeddings but for one.

    Args:
        options: of fairseq, by name
        rows: of the embeddings
    """
    dim, found = options["encoder_embed_dim"], {EMBEDDINGS[0]: (rows, options["encoder_embed_dim"])}
    for stack, modules in MODULES.items():
        inner = options[f"{stack}_ffn_embed_dim"]
        sizes = {"fc1": (inner, dim), "fc2": (dim, inner)}
        norms = [f"{stack}.layer_norm"]
        for layer in range(options[f"{stack}_layers"]):
            for module in modules:
                n_out, n_in = sizes.get(module, (dim, dim))
                found[f"{stack}.layers.{layer}.{module}.weight"] = n_out, n_in
                found[f"{stack}.layers.{layer}.{module}.bias"] = (n_out,)
            norms += [f"{stack}.layers.{layer}.{norm}" for norm in NORMS[stack]]
        for name in norms:
            found[f"{name}.weight"] = found[f"{name}.bias"] = (dim,)
    return found


def misfits(expected, found):
    """What is wrong with the parameters of a model, a line each.

    Args:
        expected: what :func:`shapes` returns
        found: key -> shape
    """
    wrong = [f"it lacks {key}" for key in expected if key not in found]
    wrong += [
        f"it has {key}, which the other model has not" for key in found if key not in expected
    ]
    wrong += [
        f"{key} is {' × '.join(map(str, found[key]))} and not {' × '.join(map(str, shape))}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    return wrong


def options_of(config):
    """The options of fairseq's transformer, by name, and why there is no such model: a list.

    Args:
        config: the content of config.json
    """
    reasons = []
    classes = config.get("architectures") or [f"a {config.get('model_type')} model"]
    if classes != [CLASS] or config.get("model_type") != MODEL_TYPE:
        reasons.append(f"it is {', '.join(map(str, classes))} and not {CLASS}")
    if not config.get("tie_word_embeddings", True):
        reasons.append("its embeddings are not shared (tie_word_embeddings is false)")
    if config.get("quantization_config"):
        reasons.append("it is quantized (quantization_config)")
    for name, value in TOKEN_IDS.items():
        if config.get(name, value) != value:
            reasons.append(f"{name} is {config[name]} and not {value}")
    options = {}
    for field, (name, usual) in FIELDS.items():
        options[name] = config.get(field, usual)
        kind = (int, float) if isinstance(usual, float) else type(usual)
        if not isinstance(options[name], kind) or (kind is int and options[name] < 1):
            reasons.append(f"{field} is {options[name]!r}")
            options[name] = usual
    if options["activation_fn"] not in ACTIVATIONS:
        reasons.append(
            f"activation_function is {options['activation_fn']}, which fairseq does not have"
        )
    dim = options["encoder_embed_dim"]
    for stack in MODULES:
        heads = options[f"{stack}_attention_heads"]
        if dim % heads:
            reasons.append(f"{dim} numbers do not divide among {heads} heads")
    made = Namespace(
        **options,
        **dict.fromkeys(PRESENT, True),
        decoder_embed_dim=dim,
        max_target_positions=options["max_source_positions"],
        no_scale_embedding=not config.get("scale_embedding", True),
    )
    return vars(made), reasons


def config_of(options, rows, dtype):
    """The content of config.json, and why there is no such model: a list.

    Args:
        options: of fairseq's transformer, by name
        rows: of the embeddings
        dtype: such as ``float32``
    """
    reasons = []
    for name in PRESENT:
        if not options.get(name):
            reasons.append(f"it was trained without --{name.replace('_', '-')}")
    for name, without_effect in ABSENT.items():
        if options.get(name) not in (None, without_effect):
            reasons.append(f"it was trained with --{name.replace('_', '-')}")
    dims = {
        options.get(name) or options["encoder_embed_dim"]
        for name in ("encoder_embed_dim", "decoder_embed_dim", "decoder_input_dim",
                     "decoder_output_dim")
    }  # fmt: skip
    if len(dims) > 1:
        reasons.append(f"its stacks and embeddings have several widths, {sorted(dims)}")
    if options.get("lang_tok_replacing_bos_eos"):
        reasons.append("it was trained with --lang-tok-replacing-bos-eos")
    if options.get("activation_fn", "relu") not in ACTIVATIONS:
        reasons.append(f"it was trained with --activation-fn {options['activation_fn']}")
    fields = {field: options.get(name, usual) for field, (name, usual) in FIELDS.items()}
    config = {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        "vocab_size": rows,
        **fields,
        # the class has 0.05 where they are missing; layers with adapters are never dropped
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "scale_embedding": not options.get("no_scale_embedding"),
        "tie_word_embeddings": True,
        **TOKEN_IDS,
        "torch_dtype": dtype,
    }
    return config, reasons
