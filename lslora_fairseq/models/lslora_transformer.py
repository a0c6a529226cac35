"""The transformer whose linears carry language-specific adapters.

Language ids travel with the tensors they index: in ``net_input`` to the encoder, in
``encoder_out`` to the decoder, and as an argument to every layer. Beam search reorders them with
the encoder output, and activation checkpointing hands each layer its own batch's again.
"""

import logging
from contextlib import contextmanager

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
)
from fairseq.modules import MultiheadAttention
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from fairseq.tasks import FairseqTask

from lslora_fairseq.config import LORA_FIELDS, LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError, one_line_errors
from lslora_fairseq.lora.linear import LSLoLinear
from lslora_fairseq.lora.plan import MODULES, SIDES
from lslora_fairseq.lora.routing import AdapterLayout, RouteSlot
from lslora_fairseq.models.loading import check_keys, is_adapter_key, match_rows, take_rows

logger = logging.getLogger(__name__)

LANG_IDS = tuple(f"{side}_lang_ids" for side in SIDES)


class _RoutedLayer:
    """A transformer layer that receives its batch's routes as an argument.

    The stack's loop calls its layers without them, so ``__call__`` adds them; from there on they
    are an argument like any other.
    """

    can_use_fastpath = False  # fairseq 0.12.2's fused eval path reads the raw weights

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.slot = RouteSlot()
        self.stack_slot = None
        for module in self.children():
            if isinstance(module, MultiheadAttention):
                # the functional path reads the weights and never calls the projections
                module.skip_embed_dim_check = True

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, routes=self.stack_slot.routes, **kwargs)

    def forward(self, *args, routes, **kwargs):
        self.slot.routes = routes
        return super().forward(*args, **kwargs)


class LSLoTransformerEncoderLayer(_RoutedLayer, TransformerEncoderLayerBase):
    pass


class LSLoTransformerDecoderLayer(_RoutedLayer, TransformerDecoderLayerBase):
    pass


class _RoutedStack:
    """An encoder or decoder that turns language ids into routes once per batch."""

    def attach(self, layout):
        """Shares the model's stacking of languages and one route slot with all layers."""
        self.__dict__["layout"] = layout  # the model owns it, as a submodule
        self.slot = RouteSlot()
        for layer in self.layers:
            layer.stack_slot = self.slot

    @contextmanager
    def routed(self, source_lang_ids, target_lang_ids):
        """Layers called inside find the routes of these sentences; ids are (batch,) or None."""
        ids = dict(zip(SIDES, (source_lang_ids, target_lang_ids)))
        self.slot.routes = {side: self.layout.route(ids[side]) for side in SIDES}
        try:
            yield
        finally:
            self.slot.routes = {}


def _maybe_checkpointed(layer, cfg):
    if cfg.checkpoint_activations:
        return checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return layer


class LSLoTransformerEncoder(_RoutedStack, TransformerEncoderBase):
    def build_encoder_layer(self, cfg):
        return _maybe_checkpointed(LSLoTransformerEncoderLayer(cfg, return_fc=self.return_fc), cfg)

    def forward_embedding(self, *args, **kwargs):
        x, embedding = super().forward_embedding(*args, **kwargs)
        return _differentiable(x, self.cfg), embedding

    def forward(
        self,
        src_tokens,
        src_lengths=None,
        return_all_hiddens=False,
        token_embeddings=None,
        source_lang_ids=None,
        target_lang_ids=None,
    ):
        """As fairseq's, with the language of each sentence.

        Args:
            source_lang_ids, target_lang_ids: (batch,) language indices; None where no layer of
                the model is indexed by that side

        Returns:
            fairseq's encoder_out with the ids beside it, each in a list (empty for None)
        """
        with self.routed(source_lang_ids, target_lang_ids):
            out = super().forward(src_tokens, src_lengths, return_all_hiddens, token_embeddings)
        for key, ids in zip(LANG_IDS, (source_lang_ids, target_lang_ids)):
            out[key] = [] if ids is None else [ids]
        return out

    def reorder_encoder_out(self, encoder_out, new_order):
        reordered = super().reorder_encoder_out(encoder_out, new_order)
        for key in LANG_IDS:
            reordered[key] = [ids.index_select(0, new_order) for ids in encoder_out[key]]
        return reordered


class LSLoTransformerDecoder(_RoutedStack, TransformerDecoderBase):
    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return _maybe_checkpointed(LSLoTransformerDecoderLayer(cfg, no_encoder_attn), cfg)

    def extract_features(self, prev_output_tokens, encoder_out, *args, **kwargs):
        ids = (encoder_out[key][0] if encoder_out[key] else None for key in LANG_IDS)
        with self.routed(*ids):
            return super().extract_features(prev_output_tokens, encoder_out, *args, **kwargs)


def _differentiable(x, cfg):
    """Frozen embeddings give a first layer whose input needs no gradient; a checkpointed layer
    would then be cut off from the graph, adapters and all."""
    if cfg.checkpoint_activations and not x.requires_grad:
        x.requires_grad_()
    return x


@register_model("lslora_transformer")
class LSLoTransformerModel(TransformerModel):
    """fairseq's transformer, frozen, with one LoRA per language in its linears."""

    base = None  # what is known of the checkpoint to fine-tune from; set by the task

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        gen_parser_from_dataclass(parser, LSLoConfig(), delete_default=True)

    @classmethod
    def build_model(cls, args, task):
        with one_line_errors():
            if isinstance(task, FairseqTask) and not hasattr(task, "languages"):
                raise ConfigError(
                    "adapters need the language of each sentence, which this task does not tell: "
                    "add --task translation_multi_lslora"
                )
            _refuse(args)
            model = super().build_model(args, task)
            model.add_adapters(args)
        return model

    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        cfg = TransformerConfig.from_namespace(args)
        return LSLoTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        cfg = TransformerConfig.from_namespace(args)
        return LSLoTransformerDecoder(
            cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention
        )

    def add_adapters(self, args):
        """Freezes the model and gives every planned linear its adapters.

        The resolved options are written back to *args*, which fairseq saves in checkpoints.

        Raises:
            ConfigError: an option does not fit the model.
        """
        config = LSLoConfig.from_namespace(args)
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        dims = {
            stack: {
                name: (linear.in_features, linear.out_features)
                for name in MODULES[stack]
                for linear in (stacks[stack].layers[0].get_submodule(name),)
            }
            for stack in stacks
        }
        layers = {stack: len(stacks[stack].layers) for stack in stacks}
        self.plan = resolve(config, layers, dims)
        for name in LORA_FIELDS:
            setattr(args, name, getattr(config, name))
        self.requires_grad_(False)
        base_parameters = sum(p.numel() for p in self.parameters())
        layout = AdapterLayout(self.plan.ranks, self.plan.alphas)
        self.adapter_layout = layout
        for stack in stacks.values():
            stack.attach(layout)
        for site in self.plan.sites:
            layer = stacks[site.stack].layers[site.layer]
            parent_name, _, name = site.module.rpartition(".")
            parent = layer.get_submodule(parent_name)
            linear = LSLoLinear(getattr(parent, name), site, layout, layer.slot, self.plan.dropout)
            setattr(parent, name, linear)
        logger.info(
            "adapters of %d languages\n%s", len(self.languages), self.plan.table(base_parameters)
        )

    @property
    def languages(self):
        return self.plan.languages

    def adapted_linears(self):
        """Every :class:`LSLoLinear`, in the plan's order."""
        return [m for m in self.modules() if isinstance(m, LSLoLinear)]

    def forward(
        self,
        src_tokens,
        src_lengths,
        prev_output_tokens,
        return_all_hiddens=True,
        features_only=False,
        alignment_layer=None,
        alignment_heads=None,
        source_lang_ids=None,
        target_lang_ids=None,
    ):
        """As fairseq's, with the language of each sentence, (batch,) indices."""
        encoder_out = self.encoder(
            src_tokens,
            src_lengths=src_lengths,
            return_all_hiddens=return_all_hiddens,
            source_lang_ids=source_lang_ids,
            target_lang_ids=target_lang_ids,
        )
        return self.decoder(
            prev_output_tokens,
            encoder_out=encoder_out,
            features_only=features_only,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
            src_lengths=src_lengths,
            return_all_hiddens=return_all_hiddens,
        )

    def upgrade_state_dict_named(self, state_dict, name):
        """Fits a checkpoint: fills in adapters that a base model lacks, matches embedding rows.

        Only adapters may be missing, and only all of them together.
        """
        super().upgrade_state_dict_named(state_dict, name)
        own = self.state_dict()
        source, arch = "the checkpoint", None
        with one_line_errors():
            if self.base is not None:
                source, arch = self.base.path, self.base.arch
                self._match_embeddings(own, state_dict)
                self.base = None
            if not any(is_adapter_key(key) for key in state_dict):
                state_dict.update({k: v for k, v in own.items() if is_adapter_key(k)})
            check_keys(own, state_dict, source, arch)

    def _match_embeddings(self, own, state_dict):
        for stack, dictionary, key in (
            ("encoder", self.encoder.dictionary, "encoder.embed_tokens.weight"),
            ("decoder", self.decoder.dictionary, "decoder.embed_tokens.weight"),
            ("decoder", self.decoder.dictionary, "decoder.output_projection.weight"),
        ):
            found = state_dict.get(key)
            if found is None or key not in own or found.size(1) != own[key].size(1):
                continue
            matched = match_rows(found.size(0), dictionary, self.base)
            if matched is not None:
                state_dict[key] = take_rows(own[key], found, matched)
                if stack == "encoder":
                    _warn_of_new_rows(matched, dictionary.symbols)


def _warn_of_new_rows(matched, symbols):
    new = [symbols[row] for row in (matched < 0).nonzero().flatten().tolist()]
    if new:
        logger.warning(
            "%d embedding rows are new to the base model and stay untrained, since the base is "
            "frozen: %s%s",
            len(new),
            " ".join(new[:20]),
            " …" if len(new) > 20 else "",
        )


def _refuse(args):
    """Options of fairseq's transformer that adapters do not support."""
    for option, given in (
        ("--encoder-layerdrop", getattr(args, "encoder_layerdrop", 0)),
        ("--decoder-layerdrop", getattr(args, "decoder_layerdrop", 0)),
        ("--quant-noise-pq", getattr(args, "quant_noise_pq", 0)),
        ("--quant-noise-scalar", getattr(args, "quant_noise_scalar", 0)),
        ("--ddp-backend fully_sharded", getattr(args, "ddp_backend", "") == "fully_sharded"),
        ("--no-cross-attention", getattr(args, "no_cross_attention", False)),
    ):
        if given:
            raise ConfigError(f"{option} does not work with adapters: leave it out")
