"""What is compared: each way of training.

Every :class:`Contender` starts from the same random base weights. All have dropout, the loss
(label-smoothed cross-entropy over all words) and the adapted linears in common. This package
computes its loss in pieces, the others as fairseq's criterion does.
"""

import math
from argparse import ArgumentParser, Namespace

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.models.transformer import TransformerModel
from fairseq.modules import MultiheadAttention
from fairseq.optim import OPTIMIZER_REGISTRY
from torch import nn

from benchmark.shapes import (
    LOW_RANK,
    PAD,
    SIDES,
    SITES,
    adapter_options,
    code,
    codes,
    per_stack,
    ranks,
)
from lslora_fairseq.criterions.frozen_projection import frozen_projection_loss
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel


def optimizer(name, params, **options):
    """One of fairseq's optimizers, with the defaults of its command line."""
    parser = ArgumentParser()
    OPTIMIZER_REGISTRY[name].add_args(parser)
    defaults = vars(parser.parse_args([]))
    options = {"adam_betas": "(0.9, 0.98)", "lr": [1e-4], "tpu": False, **options}
    return OPTIMIZER_REGISTRY[name](Namespace(**{**defaults, **options}), params)


class Contender:
    """One way of training: a model in training mode, and its optimizer once it is started."""

    optimizer_name = "adam"
    optimizer = None

    def __init__(self, setting, languages):
        self.model = self.build(setting, languages).train()

    def build(self, setting, languages):
        """The model, with the parameters that are not trained frozen."""
        raise NotImplementedError

    def net_input(self, batch):
        """What the model is called with."""
        return batch.tokens

    def logits(self, batch):
        """(batch, time, words)"""
        return self.model(**self.net_input(batch))[0]

    def loss(self, batch):
        log_probs = F.log_softmax(self.logits(batch), dim=-1, dtype=torch.float)
        return label_smoothed_nll_loss(log_probs, batch.target, 0.1, ignore_index=PAD)[0]

    def trainable(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def start_optimizer(self, **options):
        self.optimizer = optimizer(self.optimizer_name, self.trainable(), **options)

    def forward_backward(self, batch):
        (self.loss(batch) / batch.target_tokens).backward()

    def update(self):
        """Clips the gradients, moves the parameters and drops the gradients."""
        self.optimizer.clip_grad_norm(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def add_noise(self):
        """Moves what is trained, so that no adapter is zero."""
        for param in self.trainable():
            param.add_(torch.randn_like(param), alpha=0.01)


class FrozenBase(Contender):
    """The limit: no adapter, no optimizer, and a backward pass as far down as adapters need it.

    It reaches the outputs of the lowest projections, where their biases receive a gradient.
    """

    def build(self, setting, languages):
        model = setting.build(TransformerModel)
        train_lowest_biases(model, model.encoder, model.decoder)
        return model

    def start_optimizer(self):
        pass

    def update(self):
        self.model.zero_grad(set_to_none=True)


class ContiguousFrozenBase(FrozenBase):
    """The same without the slow path that ``F.linear`` takes for a frozen weight and a transposed
    input: the output projection of fairseq's decoder is one. This package's layers are not on it.
    """

    def logits(self, batch):
        features, _ = self.model(**batch.tokens, features_only=True)
        return self.model.decoder.output_layer(features.contiguous())


def train_lowest_biases(model, *stacks):
    """Freezes all but the biases of the first query, key and value projections of each stack."""
    model.requires_grad_(False)
    for stack in stacks:
        attention = stack.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.bias.requires_grad_(True)


class FullFineTuning(Contender):
    def build(self, setting, languages):
        return setting.build(TransformerModel)


class Ours(Contender):
    """This package."""

    optimizer_name = "pruned_adam"

    def build(self, setting, languages):
        return setting.build(LSLoTransformerModel, **adapter_options(languages))

    def net_input(self, batch):
        return {**batch.tokens, **batch.lang_ids}

    def loss(self, batch):
        features, _ = self.model(**self.net_input(batch), features_only=True)
        projection = self.model.decoder.frozen_projection()
        tokens = batch.target_tokens
        return frozen_projection_loss(features, projection, batch.target, 0.1, PAD, tokens)[0]


class StockLoss(Ours):
    """This package with the loss of fairseq's criterion."""

    loss = Contender.loss


class WeightLearning(Ours):
    """This package with the adapters of both sides in every layer (``--lora-weight-learning``)."""

    def build(self, setting, languages):
        options = adapter_options(languages)
        for stack in SIDES:
            del options[f"{stack}_index_side"]
        return setting.build(LSLoTransformerModel, lora_weight_learning=True, **options)


def new_factors(linear, rank):
    """A and B of a fresh adapter, (rank, in) and (out, rank)."""
    A = linear.weight.new_empty(rank, linear.in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return nn.Parameter(A), nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))


class SharedLoRALinear(nn.Module):
    """A linear with one adapter for all languages."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.lora_A, self.lora_B = new_factors(linear, rank)

    def forward(self, x):
        return self.linear(x) + (x @ self.lora_A.T) @ self.lora_B.T


class LoopLinear(nn.Module):
    """A linear with one adapter per language, each applied to the sentences of its language.

    Args:
        linear: the frozen linear
        ranks: the rank of each language
        lang_ids: dict in which the forward pass finds the batch's language indices
        key: their key
    """

    def __init__(self, linear, ranks, lang_ids, key):
        super().__init__()
        self.linear, self.lang_ids, self.key = linear, lang_ids, key
        factors = [new_factors(linear, rank) for rank in ranks]
        self.lora_A = nn.ParameterList(A for A, _ in factors)
        self.lora_B = nn.ParameterList(B for _, B in factors)

    def forward(self, x):
        """(time, batch, in) -> (time, batch, out)"""
        y = self.linear(x)
        lang_ids = self.lang_ids[self.key]
        if x.size(1) != len(lang_ids):  # the beams of a sentence lie side by side
            lang_ids = lang_ids.repeat_interleave(x.size(1) // len(lang_ids))
        for language, (A, B) in enumerate(zip(self.lora_A, self.lora_B)):
            mask = lang_ids == language
            if mask.any():
                y[:, mask] += (x[:, mask] @ A.T) @ B.T
        return y.view_as(y)  # y itself passes for a leaf in torch 2.2 until it is read again


def adapt(model, make):
    """Freezes fairseq's own transformer and replaces every linear that is to be adapted.

    Args:
        make: takes a linear and its index side, returns the module in its place
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.skip_embed_dim_check = True  # it then calls its projections as modules
    for stack, side in SIDES.items():
        for layer in getattr(model, stack).layers:
            for site in SITES[stack]:
                parent, _, name = site.rpartition(".")
                parent = layer.get_submodule(parent)
                setattr(parent, name, make(getattr(parent, name), side))
    return model


class SharedLoRA(Contender):
    """A language-agnostic LoRA."""

    def build(self, setting, languages):
        model = setting.build(TransformerModel)
        return adapt(model, lambda linear, side: SharedLoRALinear(linear, LOW_RANK))


class LanguageLoop(Contender):
    """The obvious implementation: a loop over the languages, with boolean masks."""

    def build(self, setting, languages):
        self.lang_ids = {}
        return adapt(
            setting.build(TransformerModel),
            lambda linear, side: LoopLinear(
                linear, ranks(languages), self.lang_ids, f"{side}_lang_ids"
            ),
        )

    def net_input(self, batch):
        self.lang_ids.update(batch.lang_ids)
        return batch.tokens


class HuggingFaceFrozenBase(FrozenBase):
    """The same shape in transformers, frozen: what PEFT adds its adapters to."""

    def build(self, setting, languages):
        model = hugging_face_twin(setting)
        train_lowest_biases(model, model.model.encoder, model.model.decoder)
        return model

    def logits(self, batch):
        return hugging_face_logits(self.model, batch)


class PEFT(Contender):
    """A language-agnostic LoRA by peft, on the Hugging Face twin."""

    def build(self, setting, languages):
        import peft

        return peft.get_peft_model(hugging_face_twin(setting), peft_config(LOW_RANK))

    def logits(self, batch):
        return hugging_face_logits(self.model, batch)


class MixedPEFT(Contender):
    """PEFT with an adapter for each language and its mixed batches, on the Hugging Face twin.

    A sentence has one adapter in both stacks, that of its target language. PEFT refuses mixed
    batches in training mode: this one is in evaluation mode, without dropout.
    """

    def __init__(self, setting, languages):
        super().__init__(setting, languages)
        self.model.eval()

    def build(self, setting, languages):
        import peft

        (name, config), *others = zip(codes(languages), map(peft_config, ranks(languages)))
        model = peft.get_peft_model(hugging_face_twin(setting), config, adapter_name=name)
        for name, config in others:
            model.add_adapter(name, config)
        for name, param in model.named_parameters():
            param.requires_grad_("lora_" in name)  # peft trains one adapter at a time
        return model

    def logits(self, batch):
        names = [code(language) for language in batch.lang_ids["target_lang_ids"].tolist()]
        return hugging_face_logits(self.model, batch, adapter_names=names)


def peft_config(rank):
    """LoRA of a rank at the sites that this package adapts."""
    import peft

    sites = {site.rpartition(".")[2] for sites in SITES.values() for site in sites}
    return peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=sorted(sites))


def hugging_face_twin(setting):
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    stacks = per_stack(
        layers=setting.layers, ffn_dim=setting.ffn, attention_heads=setting.heads, layerdrop=0.0
    )
    config = M2M100Config(
        vocab_size=setting.words,
        d_model=setting.dim,
        dropout=setting.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        use_cache=False,
        **stacks,
    )
    with torch.device(setting.device):
        made = M2M100ForConditionalGeneration(config)
    return setting.place(made)


def hugging_face_logits(model, batch, **options):
    src = batch.tokens["src_tokens"]
    return model(
        input_ids=src,
        attention_mask=src.ne(PAD).long(),
        decoder_input_ids=batch.tokens["prev_output_tokens"],
        **options,
    ).logits


FROZEN, FULL, SHARED = "frozen base", "full fine-tuning", f"shared LoRA (rank {LOW_RANK})"
CONTIGUOUS = "frozen base, contiguous"
LOOP, OURS = "per-language loop", "lslora_fairseq"
BOTH_SIDES = f"{OURS}, weight learning"
STOCK_LOSS = f"{OURS}, fairseq's loss"
HF_FROZEN, HF_PEFT = "frozen Hugging Face twin", f"PEFT on it (rank {LOW_RANK})"
HF_MIXED = "PEFT on it, mixed batch"
LOOPS = (LOOP, HF_MIXED)  # in Python, over the languages
HUGGING_FACE = (HF_FROZEN, HF_PEFT, HF_MIXED)

CONTENDERS = {
    FROZEN: FrozenBase,
    CONTIGUOUS: ContiguousFrozenBase,
    FULL: FullFineTuning,
    SHARED: SharedLoRA,
    OURS: Ours,
    BOTH_SIDES: WeightLearning,
    STOCK_LOSS: StockLoss,
    LOOP: LanguageLoop,
    HF_FROZEN: HuggingFaceFrozenBase,
    HF_PEFT: PEFT,
    HF_MIXED: MixedPEFT,
}


def measurable():
    """The contenders that can be measured here.

    Returns:
        their labels, and a note where PEFT is not among them
    """
    try:
        import peft  # noqa: F401
        from transformers import M2M100ForConditionalGeneration  # noqa: F401
    except ModuleNotFoundError as error:
        note = f"{error.name} is not installed (pip install peft transformers)"
    except (ImportError, OSError, RuntimeError) as error:  # installed, but for another torch
        note = f"it cannot be imported ({error})"
    else:
        return list(CONTENDERS), []
    labels = [label for label in CONTENDERS if label not in HUGGING_FACE]
    return labels, [f"PEFT was left out: {note}"]


def at(languages, labels, options):
    """Those of the labels that are measured at a number of languages: loops are up to a limit."""
    return [label for label in labels if label not in LOOPS or languages <= options.loop_up_to]


def loop_note(options):
    """A list with a note on where loops are left out, if they are."""
    left_out = [str(n) for n in options.languages if n > options.loop_up_to]
    if not left_out:
        return []
    return [f"loops left out at {', '.join(left_out)} languages (--loop-up-to)"]
