"""Transformer layers that receive the routes of their batch, and keep it batch-first in memory.

fairseq's layers see tensors as (time, batch, channel). Here these are views of batch-first
memory, in which the sentences of neighbouring languages are neighbouring rows, as the adapters
need them; element-wise operations keep that layout, and attention and layer norms are taught to.
"""

import torch
import torch.nn.functional as F
from fairseq.modules import FairseqDropout, MultiheadAttention
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn

from lslora_fairseq.keys import FUSED_COPIES
from lslora_fairseq.lora.linear import apply_linears
from lslora_fairseq.lora.routing import NO_PASS, Normed, current_pass, routed

MASK = "lslora_mask"  # of the padding among encoder states, beside what fairseq keeps of a step


class BatchFirstLayerNorm(nn.LayerNorm):
    """A layer norm of (time, batch, channel) that leaves batch-first memory batch-first.

    In the pass of a layer it tells linears how its output is computed again.
    """

    def forward(self, x):
        x = x.transpose(0, 1)
        y, here = super().forward(x), current_pass()
        if here is not NO_PASS and torch.is_grad_enabled():
            here.norms[id(y)] = Normed(y, x, self.weight, self.bias, self.eps)
        return y.transpose(0, 1)


class LSLoAttention(MultiheadAttention):
    """fairseq's attention, with its projections called as modules.

    Stock attention hands their weights to a function in training, past any adapter. Full
    sequences go through ``scaled_dot_product_attention`` here, and so do the steps of decoding but
    the first one. The first, and where attention weights are wanted, goes through fairseq's own
    path.
    """

    skip_embed_dim_check = True  # fairseq's own path then calls the projections

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        incremental_state=None,
        need_weights=True,
        attn_mask=None,
        need_head_weights=False,
        **kwargs,
    ):
        """As fairseq's: (time, batch, channel) -> (time, batch, channel), weights or None."""
        wants_weights = need_weights or need_head_weights
        if incremental_state is not None and not wants_weights:
            out = self._step(query, key_padding_mask, incremental_state)
            if out is not None:
                return out, None
        if incremental_state is not None or wants_weights:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                incremental_state=incremental_state,
                need_weights=need_weights,
                attn_mask=attn_mask,
                need_head_weights=need_head_weights,
                **kwargs,
            )
        query = query.transpose(0, 1)
        if self.self_attention:
            q, k, v = apply_linears(query, (self.q_proj, self.k_proj, self.v_proj))
        else:
            (q,) = apply_linears(query, (self.q_proj,))
            k, v = apply_linears(key.transpose(0, 1), (self.k_proj, self.v_proj))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)
            attn_mask = padding if attn_mask is None else padding + attn_mask
        return self._attend(q, k, v, attn_mask), None

    def _step(self, query, key_padding_mask, incremental_state):
        """The next token of every hypothesis, whose earlier keys and values fairseq has kept.

        Args:
            query: (1, batch, channel)

        Returns:
            the same shape; None where nothing is kept, or there is padding among the tokens
        """
        state = self._get_input_buffer(incremental_state)
        if "prev_key" not in state or not (self.self_attention or self.encoder_decoder_attention):
            return None
        k, v, padding = (state[f"prev_{name}"] for name in ("key", "value", "key_padding_mask"))
        query, heads = query.transpose(0, 1), (self.num_heads, -1)
        if self.self_attention:
            if key_padding_mask is not None or padding is not None:
                return None
            new = apply_linears(query, (self.q_proj, self.k_proj, self.v_proj))
            q, *new = (t.unflatten(-1, heads).transpose(1, 2) for t in new)
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), new))
            state["prev_key"], state["prev_value"] = k, v
            self._set_input_buffer(incremental_state, state)
            return self._attend(q, k, v, None)
        (q,) = apply_linears(query, (self.q_proj,))
        # the hypotheses of a sentence look into it side by side
        q = q.view(len(k), -1, *k.shape[1::2]).transpose(1, 2)
        mask = state.get(MASK)
        if mask is None and padding is not None:  # once: fairseq keeps and reorders it, too
            mask = state[MASK] = _additive(padding, q)
            self._set_input_buffer(incremental_state, state)
        return self._attend(q, k, v, mask).transpose(0, 1).view(query.transpose(0, 1).shape)

    def _attend(self, q, k, v, attn_mask):
        """(batch, heads, time, channel / heads) each -> (time, batch, channel)."""
        dropout = self.dropout_module
        p = dropout.p if dropout.training or dropout.apply_during_inference else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p)
        (out,) = apply_linears(heads.transpose(1, 2).flatten(2), (self.out_proj,))
        return out.transpose(0, 1)


def _additive(padding, like):
    """(batch, time), true where there is padding -> (batch, 1, 1, time), -inf there."""
    mask = like.new_zeros(padding.shape).masked_fill_(padding.bool(), float("-inf"))
    return mask[:, None, None]


class ByteDropout(FairseqDropout):
    """Dropout that remembers one byte an entry; on a CPU, ``F.dropout`` keeps four.

    The entries it drops are the same to the last one.
    """

    def forward(self, x, inplace=False):
        if self.p > 0 and (self.training or self.apply_during_inference):
            return torch.native_dropout(x, self.p, True)[0]
        return x


def keep_batch_first(module):
    """Teaches attention and layer norms of fairseq's the layout, and dropout to be small;
    parameters and their names stay as they are."""
    for child in module.modules():
        if type(child) is MultiheadAttention:
            child.__class__ = LSLoAttention
            child.skip_embed_dim_check = True
        elif type(child) is nn.LayerNorm:
            child.__class__ = BatchFirstLayerNorm
        elif type(child) is FairseqDropout:
            child.__class__ = ByteDropout


def name_dropouts(module, name):
    """Names a module's dropouts as in stock fairseq, for ``--retain-dropout-modules``.

    Args:
        name: of the stock class whose place the module's class takes
    """
    for child in module.modules():
        if isinstance(child, FairseqDropout) and child.module_name == type(module).__name__:
            child.module_name = name


class _RoutedLayer:
    """A transformer layer that receives its batch's routes as an argument.

    The stack's loop calls its layers without them, so ``__call__`` adds them; from there on they
    are an argument like any other, which activation checkpointing keeps for the pass that it
    repeats.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in FUSED_COPIES:
            self._parameters.pop(name, None)
        name_dropouts(self, self.stock_name)
        keep_batch_first(self)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, routes=current_pass().routes, **kwargs)

    def forward(self, *args, routes, **kwargs):
        with routed(routes):
            return super().forward(*args, **kwargs)


class LSLoTransformerEncoderLayer(_RoutedLayer, TransformerEncoderLayerBase):
    stock_name = TransformerEncoderLayerBase.__name__
    # fairseq 0.12.2's own fills in FUSED_COPIES and so turns its fused path on
    _load_from_state_dict = nn.Module._load_from_state_dict


class LSLoTransformerDecoderLayer(_RoutedLayer, TransformerDecoderLayerBase):
    stock_name = TransformerDecoderLayerBase.__name__
