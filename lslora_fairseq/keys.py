"""What the keys of a state dict stand for; needs no fairseq."""

# what has a row for each symbol; a model may share them
EMBEDDINGS = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.output_projection.weight",
)


def is_adapter_key(key):
    """Whether a state dict key belongs to adapters or to the weights of their sides (its last but
    one part is matched whole)."""
    return key.split(".")[-2:-1] in [["source_adapters"], ["target_adapters"], ["side_weights"]]
