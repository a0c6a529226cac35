"""What the keys of a state dict stand for; needs no fairseq."""

import torch

from lslora_fairseq.lora.adapters import PRUNED
from lslora_fairseq.lora.plan import SHARED, SIDES

# what has a row for each symbol; a model may share them
EMBEDDINGS = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.output_projection.weight",
)


ADAPTERS = [[f"{side}_adapters"] for side in (*SIDES, SHARED, "embedding")]
ADAPTERS += [["side_weights"], ["token_rows"]]
# Parameters of an encoder layer of fairseq 0.12.2 that repeat those of its linears, for a fused
# path in decoding that would go past any adapter.
FUSED_COPIES = (
    "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
)  # fmt: skip
RECORD = "lslora_record"  # what a checkpoint of this package is: see identity.py


def is_adapter_key(key):
    """Whether a state dict key is one that a stock model lacks: of adapters, of the weights of
    their sides (its last but one part is matched whole), or the record of what they are."""
    parts = key.split(".")[-2:-1]
    return key == RECORD or parts in ADAPTERS


def tidy(state_dict):
    """Brings a state dict to today's form, in place.

    Masks were saved before they could be averaged as ``mask`` (True = keep). fairseq 0.12.2 saves
    what nothing here reads: ``FUSED_COPIES``, which go, and a number that it never set, which
    becomes zero, as in our models.
    """
    for key in [key for key in state_dict if key.rpartition(".")[2] in FUSED_COPIES]:
        del state_dict[key]
    for key in [key for key in state_dict if key.endswith("._float_tensor")]:
        state_dict[key] = torch.zeros_like(state_dict[key])
    for key in [key for key in state_dict if is_adapter_key(key) and key.endswith(".mask")]:
        mask = state_dict.pop(key)
        state_dict[key.removesuffix("mask") + PRUNED] = mask.logical_not().to(torch.uint8)
