"""Encoder and decoder, which turn the languages of a batch into routes for their layers.

Language ids travel with the tensors they index: in ``net_input`` to the encoder, in
``encoder_out`` to the decoder, and as an argument to every layer. Beam search reorders them with
the encoder output, and activation checkpointing hands each layer its own batch's again.
"""

import math

import torch
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn

from lslora_fairseq.lora.embedding import AdaptedProjection
from lslora_fairseq.lora.plan import SHARED, SIDES
from lslora_fairseq.lora.routing import Present, routed
from lslora_fairseq.models.layers import (
    LSLoTransformerDecoderLayer,
    LSLoTransformerEncoderLayer,
    keep_batch_first,
    name_dropouts,
)

LANG_IDS = tuple(f"{side}_lang_ids" for side in SIDES)
ON_HOST = "lang_ids_on_host"  # in encoder_out, until it is reordered


class _RoutedStack:
    """An encoder or decoder that turns language ids into routes once per batch.

    A full pass runs on sentences sorted by the side that indexes most of the stack's sites; what
    goes in and out keeps the caller's order.
    """

    def attach(self, layouts, sites):
        """Takes note of which languages the stack needs.

        Args:
            layouts: side -> :class:`AdapterLayout`, those of the model
            sites: the sites of this stack
        """
        self.__dict__["layouts"] = layouts  # the model owns them, as submodules
        sides = [site.side for site in sites]
        self.sides = [side for side in (*SIDES, SHARED) if side in sides]
        self.sorted_side = max(
            self.sides, key=lambda side: (side != SHARED, sides.count(side)), default=None
        )
        name_dropouts(self, self.stock_name)
        if self.layer_norm is not None:
            keep_batch_first(self.layer_norm)

    def order(self, ids):
        """The permutation that sorts a batch, and its inverse; None where nothing is to sort.

        Args:
            ids: side -> (batch,) language indices or None
        """
        lang_ids = ids.get(self.sorted_side)
        if lang_ids is None or self.sorted_side == SHARED:
            return None
        order = lang_ids.argsort(stable=True)
        return order, order.argsort()

    def everyone(self, ids, tokens):
        """*ids*, and index 0 of each sentence on the side that all share, if the stack has it.

        Args:
            ids: side -> (batch,) language indices or None
            tokens: (batch, time)
        """
        return {**ids, SHARED: tokens.new_zeros(tokens.size(0))} if SHARED in self.sides else ids

    def present(self, ids, values=None):
        """side -> the languages of the batch, for the sides that index any site of this stack.

        Args:
            ids: side -> (batch,) language indices or None
            values: what :func:`_on_host` returned for these ids, if it was asked before
        """
        values = {**(values or _on_host(ids)[0]), SHARED: None}
        if SHARED in self.sides:
            values[SHARED] = [0] * len(ids[SHARED])
        return {
            side: Present(self.layouts[side], ids[side], values[side])
            for side in self.sides
            if ids[side] is not None
        }

    def routes(self, ids, present, sorted_time=None):
        """The routes of some sentences: index side -> :class:`Route`.

        Args:
            ids: side -> (batch,) language indices or None
            present: side -> :class:`Present`, of which the ids are
            sorted_time: if the sentences are sorted by :meth:`order`, their number of tokens
        """
        routes = {
            side: languages.sorted(ids[side], sorted_time)
            if sorted_time and side == self.sorted_side
            else languages.unsorted(ids[side])
            for side, languages in present.items()
        }
        shared = routes.get(SHARED)
        if shared is None:
            return routes
        return {
            side: route if side == SHARED else route.join(shared) for side, route in routes.items()
        }

    def routed(self, *sentences):
        """A context in which the stack's layers find :meth:`routes` of these sentences."""
        return routed(self.routes(*sentences))


def ignore_languages(model):
    """Lets the encoder of a stock model take the languages of a batch, as it meets them beside a
    model with adapters in an ensemble."""
    if not hasattr(model, "encoder"):
        return
    stock = type(model.encoder)

    class Ignoring(stock):
        def forward(self, *args, source_lang_ids=None, target_lang_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    Ignoring.__name__, Ignoring.__qualname__ = stock.__name__, stock.__qualname__
    model.encoder.__class__ = Ignoring


def _maybe_checkpointed(layer, cfg):
    if cfg.checkpoint_activations:
        return checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return layer


class LSLoTransformerEncoder(_RoutedStack, TransformerEncoderBase):
    stock_name = "TransformerEncoder"
    merged = None  # side -> the language whose adapters were merged into the weights

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
            ValueError: not one index for each sentence, or an index of no language.
        """
        ids = dict(zip(SIDES, (source_lang_ids, target_lang_ids)))
        _check_ids(ids, src_tokens.size(0))
        padding = src_tokens.eq(self.padding_idx)
        values, has_padding = _on_host(ids, padding)
        padding = padding, has_padding
        for side, language in (self.merged or {}).items():
            if set(values.get(side, ())) - {language}:
                raise RuntimeError(
                    f"the adapters of one {side} language were merged into the weights, and the "
                    "batch has another: load the checkpoint anew for another direction"
                )
        order, sentences = self.order(ids), self.everyone(ids, src_tokens)
        if order is None:
            with self.routed(sentences, self.present(sentences, values)):
                out = self._encode(src_tokens, token_embeddings, return_all_hiddens, *padding)
        else:
            there, back = order
            src_tokens, padding = src_tokens[there], (padding[0][there], padding[1])
            if token_embeddings is not None:
                token_embeddings = token_embeddings[there]
            sentences = _reorder_ids(sentences, there)
            with self.routed(sentences, self.present(sentences, values), src_tokens.size(1)):
                out = self._encode(src_tokens, token_embeddings, return_all_hiddens, *padding)
            for key in ("encoder_padding_mask", "encoder_embedding", "src_lengths"):
                out[key] = [t.index_select(0, back) for t in out[key]]
            for key in ("encoder_out", "encoder_states"):
                out[key] = [_reorder(x, back) for x in out[key]]
        for key, side in zip(LANG_IDS, SIDES):
            out[key] = [] if ids[side] is None else [ids[side]]
        out[ON_HOST] = [values]
        return out

    def _encode(self, src_tokens, token_embeddings, return_all_hiddens, padding, has_padding):
        """fairseq's ``forward_scriptable``, but that the host asks the device for nothing: there
        it asks before each layer whether there is padding.

        Args:
            padding: (batch, time) True where there is padding
            has_padding: whether it is anywhere
        """
        x, embedding = self.forward_embedding(src_tokens, token_embeddings)
        if has_padding:
            x = x * (1 - padding.unsqueeze(-1).type_as(x))
        x = x.transpose(0, 1)
        states = [x]
        for layer in self.layers:
            x = layer(x, encoder_padding_mask=padding if has_padding else None)
            states.append(x)
        lengths = padding.logical_not().sum(1, keepdim=True, dtype=torch.int32)
        return {
            "encoder_out": [x if self.layer_norm is None else self.layer_norm(x)],
            "encoder_padding_mask": [padding],
            "encoder_embedding": [embedding],
            "encoder_states": states if return_all_hiddens else [],
            "fc_results": [],
            "src_tokens": [],
            "src_lengths": [lengths],
        }

    def reorder_encoder_out(self, encoder_out, new_order):
        reordered = super().reorder_encoder_out(encoder_out, new_order)
        for key in LANG_IDS:
            reordered[key] = [ids.index_select(0, new_order) for ids in encoder_out[key]]
        return reordered


class LSLoTransformerDecoder(_RoutedStack, TransformerDecoderBase):
    stock_name = "TransformerDecoder"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("own_words", None, persistent=False)

    def set_own_words(self, own):
        """Takes note of words that only sentences of one language may be given, step by step: for
        all others the vocabulary is what it was before that language came.

        Args:
            own: list of (row of the word, index of the language)
        """
        self.own_words = torch.tensor(own, device=self.embed_tokens.weight.device) if own else None

    def _hide(self, logits, encoder_out):
        """Gives the :attr:`own_words` of other languages than a sentence's two no probability.

        Args:
            logits: (batch, time, words), changed in place
        """
        rows, owners = self.own_words.unbind(1)
        known = [encoder_out[key][0].unsqueeze(1) for key in LANG_IDS if encoder_out[key]]
        if known:
            foreign = torch.stack([owners.ne(ids) for ids in known]).all(0).unsqueeze(1)
            logits[..., rows] = logits[..., rows].masked_fill(foreign, -math.inf)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return _maybe_checkpointed(LSLoTransformerDecoderLayer(cfg, no_encoder_attn), cfg)

    def forward(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        features_only=False,
        full_context_alignment=False,
        alignment_layer=None,
        alignment_heads=None,
        src_lengths=None,
        return_all_hiddens=False,
    ):
        """As fairseq's; the ``inner_states`` are there if *return_all_hiddens* asks for them. In
        search, step by step, words of other languages are hidden."""
        x, extra = self.extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
            return_all_hiddens=return_all_hiddens,
        )
        if features_only:
            return x, extra
        logits = self.output_layer(x)
        if incremental_state is not None and self.own_words is not None:
            self._hide(logits, encoder_out)
        return logits, extra

    def extract_features(
        self,
        prev_output_tokens,
        encoder_out,
        incremental_state=None,
        *args,
        return_all_hiddens=False,
        **kwargs,
    ):
        """As fairseq's, but with ``inner_states``, (time, batch, channel) each, only on demand:
        they are brought back into the caller's order."""
        ids = {
            side: encoder_out[key][0] if encoder_out[key] else None
            for key, side in zip(LANG_IDS, SIDES)
        }
        ids = self.everyone(ids, prev_output_tokens)
        if incremental_state is not None:
            with routed(self._kept_routes(ids, incremental_state)):
                return super().extract_features(
                    prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
                )
        order, (values,) = self.order(ids), encoder_out.get(ON_HOST, [None])
        if order is None:
            with self.routed(ids, self.present(ids, values)):
                return super().extract_features(
                    prev_output_tokens, encoder_out, None, *args, **kwargs
                )
        there, back = order
        encoder_out = {
            **encoder_out,
            "encoder_out": [_reorder(x, there) for x in encoder_out["encoder_out"]],
            "encoder_padding_mask": [t[there] for t in encoder_out["encoder_padding_mask"]],
        }
        ids = _reorder_ids(ids, there)
        with self.routed(ids, self.present(ids, values), prev_output_tokens.size(1)):
            features, extra = super().extract_features(
                prev_output_tokens[there], encoder_out, None, *args, **kwargs
            )
        states = extra["inner_states"] if return_all_hiddens else []
        return features.index_select(0, back), {
            "attn": [None if a is None else a[back] for a in extra["attn"]],
            "inner_states": [_reorder(x, back) for x in states],
        }

    def frozen_projection(self):
        """What :meth:`output_layer` makes logits of features h with: h Eᵀ + (h Aᵀ) B.

        Returns:
            E (words, d), without gradient; A (r, d) and B (r, words), or None and None without an
            adapter of the embeddings

        Raises:
            ValueError: it does something else, or E is trained; the message says which.
        """
        projection = self.output_projection
        if projection is None:
            raise ValueError("the model has an adaptive softmax")
        if type(projection) not in (nn.Linear, AdaptedProjection) or projection.bias is not None:
            raise ValueError("the output projection is more than a matrix")
        if projection.weight.requires_grad:
            raise ValueError("the output projection is trained")
        is_adapted = type(projection) is AdaptedProjection
        return projection.weight, *(projection.factors() if is_adapted else (None, None))

    def _kept_routes(self, ids, incremental_state):
        """The routes of a step. The languages of the batch's first step are those of all: what is
        stacked for them, or came from the device, is kept; and routes are, while the sentences
        are the same."""
        kept = incremental_state.get("lslora_kept")
        if kept is None:
            kept = incremental_state["lslora_kept"] = {"present": self.present(ids)}
            for languages in kept["present"].values():
                languages.stacks = {}
        if "ids" not in kept or not _are_same(kept["ids"], ids):
            kept["ids"] = ids
            kept["routes"] = self.routes(ids, kept["present"])
        return kept["routes"]


def _on_host(ids, padding=None):
    """What the host needs to know of a batch, in one transfer from its device.

    Args:
        ids: side -> (batch,) language indices or None
        padding: (batch, time) True where there is padding, or None

    Returns:
        side -> list of language indices, for the sides that have any, and whether there is padding
    """
    known = {side: ids[side] for side in SIDES if ids[side] is not None}
    parts = [*known.values(), *([] if padding is None else [padding.any().view(1)])]
    values = torch.cat([part.long() for part in parts]).tolist() if parts else []
    lists = {}
    for side, lang_ids in known.items():
        lists[side], values = values[: len(lang_ids)], values[len(lang_ids) :]
    return lists, bool(values and values[0])


def _check_ids(ids, batch):
    """Raises ValueError unless there is one index for each sentence, on the sides that have any."""
    for side, lang_ids in ids.items():
        if lang_ids is not None and (lang_ids.shape != (batch,) or lang_ids.is_floating_point()):
            raise ValueError(
                f"{side}_lang_ids must hold one whole number for each of the {batch} sentences, "
                f"found {lang_ids.dtype} of shape {tuple(lang_ids.shape)}"
            )


def _are_same(before, ids):
    """Whether sentences kept their languages: the tensors are the same ones, and of the side that
    all share there are as many."""
    if any(before[side] is not ids[side] for side in SIDES):
        return False
    return SHARED not in ids or len(before[SHARED]) == len(ids[SHARED])


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
