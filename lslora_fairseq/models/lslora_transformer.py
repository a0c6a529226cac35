"""The transformer whose linears carry language-specific adapters.

Language ids travel with the tensors they index: in ``net_input`` to the encoder, in
``encoder_out`` to the decoder, and as an argument to every layer. Beam search reorders them with
the encoder output, and activation checkpointing hands each layer its own batch's again.
"""

import itertools
import logging
from contextlib import contextmanager

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed.utils import get_global_world_size
from fairseq.models import register_model
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
)
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.tasks import FairseqTask

from lslora_fairseq.config import LORA_FIELDS, LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError, listed, one_line_errors
from lslora_fairseq.lora.adapters import LayerAdapters, SideWeights
from lslora_fairseq.lora.linear import LSLoLinear
from lslora_fairseq.lora.merge import merged
from lslora_fairseq.lora.plan import MODULES, SIDES
from lslora_fairseq.lora.routing import AdapterLayout, Present, RouteSlot
from lslora_fairseq.models.layers import (
    FUSED_COPIES,
    LSLoTransformerDecoderLayer,
    LSLoTransformerEncoderLayer,
    keep_batch_first,
)
from lslora_fairseq.models.loading import check_keys, is_adapter_key, match_rows, take_rows
from lslora_fairseq.unsupported import refuse_processes, refuse_unsupported

logger = logging.getLogger(__name__)

LANG_IDS = tuple(f"{side}_lang_ids" for side in SIDES)


class _RoutedStack:
    """An encoder or decoder that turns language ids into routes once per batch.

    A full pass runs on sentences sorted by the side that indexes most of the stack's sites; what
    goes in and out keeps the caller's order.
    """

    def attach(self, layout, sites):
        """Shares the model's stacking of languages and one route slot with all layers.

        Args:
            layout: the model's :class:`AdapterLayout`
            sites: the sites of this stack
        """
        self.__dict__["layout"] = layout  # the model owns it, as a submodule
        sides = [site.side for site in sites]
        self.sides = [side for side in SIDES if side in sides]
        self.sorted_side = max(SIDES, key=sides.count)
        self.slot = RouteSlot()
        for layer in self.layers:
            layer.stack_slot = self.slot
        if self.layer_norm is not None:
            keep_batch_first(self.layer_norm)

    def order(self, ids):
        """The permutation that sorts a batch, and its inverse; None where nothing is to sort.

        Args:
            ids: side -> (batch,) language indices or None
        """
        lang_ids = ids[self.sorted_side] if self.sides else None
        if lang_ids is None:
            return None
        order = lang_ids.argsort(stable=True)
        return order, order.argsort()

    def present(self, ids):
        """side -> the languages of the batch, for the sides that index any site of this stack.

        Args:
            ids: side -> (batch,) language indices or None
        """
        return {
            side: Present(self.layout, ids[side]) for side in self.sides if ids[side] is not None
        }

    @contextmanager
    def routed(self, ids, present, sorted_time=None):
        """Layers called inside find the routes of these sentences.

        Args:
            ids: side -> (batch,) language indices or None
            present: side -> :class:`Present`, of which the ids are
            sorted_time: if the sentences are sorted by :meth:`order`, their number of tokens
        """
        self.slot.routes = {
            side: languages.sorted(ids[side], sorted_time)
            if sorted_time and side == self.sorted_side
            else languages.unsorted(ids[side])
            for side, languages in present.items()
        }
        try:
            yield
        finally:
            self.slot.routes = {}


def _maybe_checkpointed(layer, cfg):
    if cfg.checkpoint_activations:
        return checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return layer


class LSLoTransformerEncoder(_RoutedStack, TransformerEncoderBase):
    merged = {}  # side -> the language whose adapters were merged into the weights

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

        Raises:
            RuntimeError: other languages than those merged into the weights.
        """
        ids = dict(zip(SIDES, (source_lang_ids, target_lang_ids)))
        for side, language in self.merged.items():
            if ids[side] is not None and (ids[side] != language).any():
                raise RuntimeError(
                    f"the adapters of one {side} language were merged into the weights, and the "
                    "batch has another: load the checkpoint anew for another direction"
                )
        order = self.order(ids)
        if order is None:
            out = super().forward(src_tokens, src_lengths, return_all_hiddens, token_embeddings)
        else:
            there, back = order
            args = [None if t is None else t[there] for t in (src_tokens, src_lengths)]
            if token_embeddings is not None:
                token_embeddings = token_embeddings[there]
            ids_there = _reorder_ids(ids, there)
            with self.routed(ids_there, self.present(ids_there), src_tokens.size(1)):
                out = super().forward(*args, return_all_hiddens, token_embeddings)
            for key in ("encoder_padding_mask", "encoder_embedding", "src_lengths"):
                out[key] = [t.index_select(0, back) for t in out[key]]
            for key in ("encoder_out", "encoder_states"):
                out[key] = [_reorder(x, back) for x in out[key]]
        for key, side in zip(LANG_IDS, SIDES):
            out[key] = [] if ids[side] is None else [ids[side]]
        return out

    def reorder_encoder_out(self, encoder_out, new_order):
        reordered = super().reorder_encoder_out(encoder_out, new_order)
        for key in LANG_IDS:
            reordered[key] = [ids.index_select(0, new_order) for ids in encoder_out[key]]
        return reordered


class LSLoTransformerDecoder(_RoutedStack, TransformerDecoderBase):
    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return _maybe_checkpointed(LSLoTransformerDecoderLayer(cfg, no_encoder_attn), cfg)

    def extract_features(
        self, prev_output_tokens, encoder_out, incremental_state=None, *args, **kwargs
    ):
        """As fairseq's, but without the ``inner_states``."""
        ids = {
            side: encoder_out[key][0] if encoder_out[key] else None
            for key, side in zip(LANG_IDS, SIDES)
        }
        if incremental_state is not None:
            with self.routed(ids, self._kept_present(ids, incremental_state)):
                return super().extract_features(
                    prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
                )
        order = self.order(ids)
        if order is None:
            return super().extract_features(prev_output_tokens, encoder_out, None, *args, **kwargs)
        there, back = order
        encoder_out = {
            **encoder_out,
            "encoder_out": [_reorder(x, there) for x in encoder_out["encoder_out"]],
            "encoder_padding_mask": [t[there] for t in encoder_out["encoder_padding_mask"]],
        }
        ids = _reorder_ids(ids, there)
        with self.routed(ids, self.present(ids), prev_output_tokens.size(1)):
            features, extra = super().extract_features(
                prev_output_tokens[there], encoder_out, None, *args, **kwargs
            )
        attention = [None if a is None else a[back] for a in extra["attn"]]
        return features.index_select(0, back), {"attn": attention, "inner_states": []}

    def _kept_present(self, ids, incremental_state):
        """The languages of the batch's first step: later steps have no others, and what is
        stacked for them, or came from the device, serves all steps."""
        present = incremental_state.get("lslora_present")
        if present is None:
            present = incremental_state["lslora_present"] = self.present(ids)
            for languages in present.values():
                languages.stacks = {}
        return present


def _reorder(x, order):
    """Sentences of (time, batch, channel) in another order, batch-first in memory."""
    return x.transpose(0, 1).index_select(0, order).transpose(0, 1)


def _reorder_ids(ids, order):
    return {side: None if t is None else t[order] for side, t in ids.items()}


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
            refuse_unsupported(args)
            if getattr(task, "training", False):
                refuse_processes(args, get_global_world_size())
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
        for name, buffer in self.named_buffers():
            if name.endswith("._float_tensor"):
                buffer.zero_()  # fairseq 0.12.2 leaves and saves what was in memory
        self.requires_grad_(False)
        base_parameters = sum(p.numel() for p in self.parameters())
        layout = AdapterLayout(self.plan.ranks, self.plan.alphas)
        self.adapter_layout = layout
        for name, stack in stacks.items():
            sites = [site for site in self.plan.sites if site.stack == name]
            stack.attach(layout, sites)
            for number, layer in enumerate(stack.layers):
                self._adapt(layer, [site for site in sites if site.layer == number])
        logger.info(
            "adapters of %d languages\n%s", len(self.languages), self.plan.table(base_parameters)
        )

    def _adapt(self, layer, sites):
        """Gives the linears of a layer their adapters."""
        plan, like, weights, adapters = self.plan, next(layer.parameters()), None, {}
        if plan.weight_learning and sites:
            weights = layer.side_weights = SideWeights(like)
        for side in sorted({site.side for site in sites}):
            ours = [site for site in sites if site.side == side]
            adapters[side] = LayerAdapters(ours, plan.languages.codes, plan.ranks, like, weights)
            layer.add_module(f"{side}_adapters", adapters[side])
        for site in {site.module: site for site in sites}.values():
            parent_name, _, name = site.module.rpartition(".")
            parent = layer.get_submodule(parent_name)
            linear = LSLoLinear(
                getattr(parent, name), site, adapters, self.adapter_layout, layer.slot, plan.dropout
            )
            setattr(parent, name, linear)

    @property
    def languages(self):
        return self.plan.languages

    def prepare_for_inference_(self, cfg):
        """As fairseq's; adapters are merged where the direction to decode is known."""
        super().prepare_for_inference_(cfg)
        direction = [getattr(cfg.task, f"{side}_lang", None) for side in SIDES]
        if all(code in self.languages for code in direction):
            self.merge(*map(self.languages.index, direction))

    def merge(self, source, target):
        """Folds the adapters of one direction into the weights, for decoding at the base model's
        speed; those of all languages are gone afterwards.

        Args:
            source, target: language indices
        """
        direction = dict(zip(SIDES, (source, target)))
        for linear in self.adapted_linears():
            parent_name, _, name = linear.site.name.rpartition(".")
            setattr(self.get_submodule(parent_name), name, merged(linear, direction))
        for stack in (self.encoder, self.decoder):
            stack.sides = []
            names = ("source_adapters", "target_adapters", "side_weights")
            for layer, name in itertools.product(stack.layers, names):
                layer._modules.pop(name, None)
        needed = {site.side for site in self.plan.sites}
        self.encoder.merged = {side: direction[side] for side in SIDES if side in needed}

    def adapted_linears(self):
        """Every :class:`LSLoLinear`, in the plan's order."""
        return [m for m in self.modules() if isinstance(m, LSLoLinear)]

    def source_shares(self):
        """p_src of every layer with learned weights (method, section 3); p_tgt is 1 − p_src.

        Returns:
            dict of ``encoder.0``, … -> scalar tensor, without a graph
        """
        logits = {
            f"{name}.{number}": layer.side_weights.logits.detach()
            for name, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            for number, layer in enumerate(stack.layers)
            if hasattr(layer, "side_weights")
        }
        if not logits:
            return {}
        return dict(zip(logits, torch.cat([*logits.values()]).softmax(-1)[:, 0]))

    def forward(
        self,
        src_tokens,
        src_lengths,
        prev_output_tokens,
        return_all_hiddens=False,
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
        for key in [k for k in state_dict if k.rpartition(".")[2] in FUSED_COPIES]:
            del state_dict[key]
        state_dict.update({k: v for k, v in own.items() if k.endswith("._float_tensor")})
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
            "frozen: %s",
            len(new),
            listed(new, " "),
        )
