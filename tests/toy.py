"""Small models and batches for tests that need no console."""

from argparse import Namespace
from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from torch.utils._python_dispatch import TorchDispatchMode

from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

CODES = ("de", "en", "fr", "ja")
ALL_CODES = ",".join(CODES)
OPTIONS = dict(
    encoder_layers=4,
    decoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_normalize_before=True,
    decoder_normalize_before=True,
    share_all_embeddings=True,
    dropout=0.0,
    lora_tiers="high=de,en;low=fr,ja",
    lora_rank="de=1,en=2,fr=3,ja=5",
)


def _half_on_cpu():
    try:
        torch.nn.functional.layer_norm(torch.ones(1, 2, dtype=torch.half), (2,))
    except RuntimeError:  # torch 2.2
        return False
    return True


HALF_ON_CPU = _half_on_cpu()


def dictionary(words=30):
    made = Dictionary()
    for number in range(words):
        made.add_symbol(f"w{number}")
    made.rows_in_file = len(made)
    for code in CODES:
        made.add_symbol(f"__{code}__")
    return made


def task(words=30):
    made = dictionary(words)
    return SimpleNamespace(source_dictionary=made, target_dictionary=made)


def build(seed=1, model=LSLoTransformerModel, **options):
    """A model of the options above; the same seed gives the same base weights."""
    torch.manual_seed(seed)
    args = Namespace(**{**OPTIONS, **options})
    return model.build_model(args, task())


def stock(adapted, **options):
    """fairseq's own transformer with the base weights of an adapted model, and its options."""
    made = build(model=TransformerModel, **options)
    state = {k: v for k, v in adapted.state_dict().items() if not is_adapter_key(k)}
    made.load_state_dict(state)
    return made


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


def set_adapters(model, scale=0.5, seed=2):
    """Gives every adapter weights of its own; B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in adapters(model):
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
    return model


def batch(pairs, length=7, seed=3):
    """Random sentences in these directions, of unequal lengths.

    Args:
        pairs: (source, target) language indices of each sentence

    Returns:
        net_input as the task makes it, batch-first
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(pairs)
    src = torch.randint(4, 34, (n, length), generator=generator)
    prev = torch.randint(4, 34, (n, length), generator=generator)
    for i in range(n):
        src[i, : i % 4] = 1  # padded on the left
        prev[i, length - i % 3 :] = 1  # and the target on the right
    source, target = zip(*pairs)
    return {
        "src_tokens": src,
        "src_lengths": src.ne(1).sum(1),
        "prev_output_tokens": prev,
        "source_lang_ids": torch.tensor(source),
        "target_lang_ids": torch.tensor(target),
    }


def rows(net_input, chosen):
    """The sentences *chosen* of a batch, with its padding."""
    return {key: value[chosen] for key, value in net_input.items()}


class Work(TorchDispatchMode):
    """Records every operation and the sizes of what it gives."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        tensors = given if isinstance(given, (tuple, list)) else [given]
        sizes = [tuple(t.shape) for t in tensors if torch.is_tensor(t)]
        self.done.append((str(function), sizes))
        return given
