"""The shapes of the models, their languages, and the batches they are given."""

import random
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import torch
from fairseq.data import Dictionary

from lslora_fairseq.config import LSLoConfig
from lslora_fairseq.models.base_dtype import cast_base
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

LOW_RANK, HIGH_RANK = 8, 2  # of low-resource languages, and of all others
PAD = 1
SIDES = {"encoder": "source", "decoder": "target"}  # which language indexes each stack
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LANGUAGES = 12  # of the sections that do not vary their number
MANY_LANGUAGES = 200
SITES = {stack: getattr(LSLoConfig, f"{stack}_target_modules").split(",") for stack in SIDES}


def per_stack(**options):
    """The same options for the encoder and for the decoder, by name."""
    return {f"{stack}_{name}": value for stack in SIDES for name, value in options.items()}


@dataclass
class Batch:
    """Sentences in random directions, batch-first; the source padded on the left.

    Attributes:
        tokens: src_tokens, src_lengths and prev_output_tokens, as fairseq's models take them
        lang_ids: source_lang_ids and target_lang_ids, (batch,) language indices
        target: (batch, time)
    """

    tokens: dict
    lang_ids: dict
    target: torch.Tensor

    @cached_property
    def target_tokens(self):
        """Number of targets that are not padding; fairseq counts them where it collates."""
        return int(self.target.ne(PAD).sum())

    def in_one_direction(self):
        """The same sentences, all from language 0 to language 1."""
        ids = {
            key: torch.full_like(ids, language)
            for language, (key, ids) in enumerate(self.lang_ids.items())
        }
        return Batch(self.tokens, ids, self.target)

    def into_one_language(self, sources):
        """The same sentences, from some languages into language 0, one after the other."""
        source, target = self.lang_ids
        numbers = torch.arange(len(self.lang_ids[source]), device=self.target.device)
        ids = {source: 1 + numbers % sources, target: torch.zeros_like(numbers)}
        return Batch(self.tokens, ids, self.target)

    def present(self):
        """Number of source languages and of target languages in the batch."""
        return [ids.unique().numel() for ids in self.lang_ids.values()]


@dataclass(frozen=True)
class Setting:
    """The shape of a model and of a batch; pre-norm, all embeddings shared."""

    layers: int  # of the encoder, and of the decoder
    dim: int
    ffn: int
    heads: int
    words: int
    sentences: int = 75
    tokens: int = 27  # of an average sentence
    device: str = "cpu"
    dropout: float = 0.1
    precision: str = "fp32"  # of weights and activations, a key of DTYPES

    def __str__(self):
        return (
            f"d {self.dim}, feed-forward {self.ffn}, {self.layers} + {self.layers} layers, "
            f"{self.heads} heads, {self.words:,} words, {self.sentences} sentences on {self.device}"
        )

    @cached_property
    def dictionary(self):
        made = Dictionary()
        for number in range(self.words - len(made)):
            made.add_symbol(f"w{number}")
        return made

    @property
    def base_parameters(self):
        """Number of weights in the matrices of the base model."""
        linears = 12 * self.dim**2 + 4 * self.dim * self.ffn  # of one encoder and decoder layer
        return self.words * self.dim + self.layers * linears

    def options(self):
        """fairseq's options for the shape."""
        stacks = per_stack(
            layers=self.layers,
            embed_dim=self.dim,
            ffn_embed_dim=self.ffn,
            attention_heads=self.heads,
            normalize_before=True,
        )
        return {**stacks, "share_all_embeddings": True, "dropout": self.dropout}

    def build(self, model_class, **options):
        """A model on the device; whatever the class, its base weights are the same."""
        torch.manual_seed(0)
        task = SimpleNamespace(source_dictionary=self.dictionary, target_dictionary=self.dictionary)
        with torch.device(self.device):  # where drawing weights takes no time
            made = model_class.build_model(Namespace(**self.options(), **options), task)
        return self.place(made)

    def place(self, model):
        """The model on the device, in the precision: all of it, or of this package's models the
        base, as ``--lora-base-dtype`` has it."""
        if not isinstance(model, LSLoTransformerModel):
            return model.to(self.device, DTYPES[self.precision])
        model.to(self.device)
        cast_base(model, DTYPES[self.precision])
        return model

    def batch(self, languages, sentences=None, tokens=None):
        """A random batch in the directions between that many languages."""
        rng = random.Random(0)
        generator = torch.Generator().manual_seed(0)
        sentences, tokens = sentences or self.sentences, tokens or self.tokens
        longest = tokens + 2
        lengths = torch.tensor([rng.randint(tokens - 2, longest) for _ in range(sentences)])
        size = (3, sentences, longest)
        src, prev, target = torch.randint(4, self.words, size, generator=generator)
        padding = torch.arange(longest) >= lengths.unsqueeze(1)
        src[padding.flip(1)] = prev[padding] = target[padding] = PAD
        net_input = {"src_tokens": src, "src_lengths": lengths, "prev_output_tokens": prev}
        lang_ids = {
            f"{side}_lang_ids": torch.tensor([rng.randrange(languages) for _ in range(sentences)])
            for side in SIDES.values()
        }
        return Batch(self._placed(net_input), self._placed(lang_ids), target.to(self.device))

    def _placed(self, tensors):
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}


PRESETS = {
    "cpu-small": Setting(layers=6, dim=512, ffn=2048, heads=8, words=16_000),
    "cpu-m2m": Setting(layers=3, dim=1024, ffn=4096, heads=16, words=16_000),
    "gpu": Setting(12, 1024, 4096, 16, words=256_000, sentences=150, device="cuda"),
}
M2M_615M = Setting(layers=12, dim=1024, ffn=4096, heads=16, words=256_125)


def ranks(languages):
    """The rank of each language: every third one is low-resource."""
    return [LOW_RANK if number % 3 == 0 else HIGH_RANK for number in range(languages)]


def code(language):
    """The code of a language's index."""
    return f"l{language:03d}"


def codes(languages):
    """Language codes, in the order of their indices."""
    return [code(number) for number in range(languages)]


def adapter_options(languages):
    """The package's options for that many languages, by name."""
    tiers = {"low": [], "high": []}
    for code, rank in zip(codes(languages), ranks(languages)):
        tiers["low" if rank == LOW_RANK else "high"].append(code)
    tier_ranks = {"low": LOW_RANK, "high": HIGH_RANK}
    return {
        "lora_tiers": ";".join(f"{name}={','.join(has)}" for name, has in tiers.items() if has),
        "lora_rank": ",".join(f"{name}={tier_ranks[name]}" for name, has in tiers.items() if has),
        "encoder_index_side": SIDES["encoder"],
        "decoder_index_side": SIDES["decoder"],
    }
