"""LSLo: a frozen linear and the low-rank adapters of all languages (method, section 2).

y = W x + b + (alpha_l / r_l) · B_l A_l x        l = the sentence's language on this side
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lslora_fairseq.lora.routing import without_beams


class AdapterFactor:
    """What an optimizer needs to know about one stacked factor.

    It is kept on the parameter under the attribute ``param_group``: fairseq's fp16 optimizer
    replaces parameters by fp32 copies, and this is one of the few attributes that it carries over.
    """

    def __init__(self, linear, factor):
        self.linear = linear
        self.factor = factor

    @property
    def mask(self):
        """(total_rank, features) bool; False marks a pruned entry."""
        return getattr(self.linear, f"lora_{self.factor}_mask")

    @property
    def weight(self):
        """The parameter inside the model (fp16 where the optimizer holds an fp32 copy)."""
        return getattr(self.linear, f"lora_{self.factor}")

    @classmethod
    def of(cls, param):
        """The factor of a parameter or of its fp32 copy; None for any other parameter."""
        factor = getattr(param, "param_group", None)
        return factor if isinstance(factor, cls) else None


class _LSLo(torch.autograd.Function):
    """Frozen linears that read the same input, and the adapters of each sentence's language.

    Of the adapters only the input is kept for the backward pass; A x is computed again.
    """

    @staticmethod
    def forward(ctx, x, z, route, count, *tensors):
        """
        Args:
            x: (batch, time, in), contiguous
            z: the adapters' input where it differs from x (dropout), or None
            route: the route of the sentences
            count: number of linears
            tensors: their weights, biases, A, B, masks of A and masks of B; A and what follows
                are None for a linear without adapters

        Returns:
            (batch, time, out) of every linear
        """
        ctx.route, ctx.count = route, count
        ctx.save_for_backward(x, z, *tensors)
        weights, biases, As, Bs, _, _ = _kinds(tensors, count)
        outs = [_frozen_linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        adapted = [i for i in range(count) if As[i] is not None]
        z = x if z is None else z
        for block in route:
            _, _, h = _project(z, [As[i] for i in adapted], block)
            for i, part in zip(adapted, h.chunk(len(adapted), -1)):
                _add_product(_part(outs[i], Bs[i], block), part, F.embedding(block.rows, Bs[i]))
        return tuple(outs)

    @staticmethod
    def backward(ctx, *dys):
        x, z, *tensors = ctx.saved_tensors
        weights, _, As, Bs, A_masks, B_masks = _kinds(tensors, ctx.count)
        dys = [dy.contiguous() for dy in dys]
        dx = _frozen_backward(dys, weights) if ctx.needs_input_grad[0] else None
        dz = dx if z is None else torch.zeros_like(z)
        z = x if z is None else z
        adapted = [i for i in range(ctx.count) if As[i] is not None]
        dAs = [None if A is None else torch.zeros_like(A) for A in As]
        dBs = [None if B is None else torch.zeros_like(B) for B in Bs]
        for block in ctx.route:
            z_part, A, h = _project(z, [As[i] for i in adapted], block)
            dhs = []
            for i, part in zip(adapted, h.chunk(len(adapted), -1)):
                dy = _part(dys[i], Bs[i], block)
                dhs.append(dy @ F.embedding(block.rows, Bs[i]).mT)
                _add_gradient(dBs[i], part, dy, B_masks[i], block)
            dh = _scaled(torch.cat(dhs, -1), block)
            for i, part in zip(adapted, dh.chunk(len(adapted), -1)):
                _add_gradient(dAs[i], part, z_part, A_masks[i], block)
            if dz is not None:
                _add_product(_part(dz, As[adapted[0]], block), dh, A)
        dz = None if dz is dx else dz
        nothing = [None] * (2 * ctx.count)
        return dx, dz, None, None, *nothing, *dAs, *dBs, *nothing


def _kinds(tensors, count):
    return [tensors[i : i + count] for i in range(0, len(tensors), count)]


def _frozen_linear(x, weight, bias):
    y = x.new_empty(*x.shape[:-1], weight.size(0))
    flat_x, flat_y = x.flatten(0, 1), y.flatten(0, 1)
    if bias is None:
        torch.mm(flat_x, weight.t(), out=flat_y)
    else:
        torch.addmm(bias, flat_x, weight.t(), out=flat_y)
    return y


def _frozen_backward(dys, weights):
    """Gradient of the shared input of several frozen linears."""
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:]):
        dx.flatten(0, 1).addmm_(dy.flatten(0, 1), weight)
    return dx


def _part(x, factor, block):
    """The sentences of a block, and the features that a factor of the adapters sees."""
    return x[block.start : block.stop, :, : factor.size(1)]


def _project(z, As, block):
    """A z of several linears side by side.

    Returns:
        z of the block's sentences; their A, (linears · columns, in), with a dimension of sentences
        in front where each has rows of its own; scaling · A z, (sentences, time, linears · columns)
    """
    z = _part(z, As[0], block)
    A = torch.cat([F.embedding(block.rows, A) for A in As], -2)
    return z, A, _scaled(z @ A.mT, block)


def _scaled(h, block):
    """Multiplies (sentences, time, linears · columns) by the block's scaling, in place."""
    columns = block.scaling.size(-1)
    h.unflatten(-1, (-1, columns)).mul_(block.scaling.unsqueeze(2).to(h.dtype))
    return h


def _add_product(out, a, b):
    """out += a b, in place; a is (sentences, time, k), b (k, n) or (sentences, k, n)."""
    if b.dim() == 3:
        out.baddbmm_(a, b)
    else:
        out.flatten(0, 1).addmm_(a.flatten(0, 1), b)


def _add_gradient(total, a, b, mask, block):
    """Adds aᵀ b, of each sentence or summed over a block, to the block's rows of a factor's
    gradient; a pruned entry gets none."""
    if block.rows.dim() == 2:
        grad = a.mT @ b
    else:
        grad = a.flatten(0, 1).t() @ b.flatten(0, 1)
    grad.masked_fill_(~mask[block.rows], 0)
    total.index_add_(0, block.rows.flatten(), grad.flatten(0, -2))


def _autocast_dtype(device_type):
    """The dtype that autocast asks for on this device, or None."""
    if hasattr(torch, "get_autocast_dtype"):  # torch ≥ 2.4
        enabled = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if enabled else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


class LSLoLinear(nn.Linear):
    """A frozen linear with one LoRA adapter per language, stacked along the rank dimension.

    The keys ``weight`` and ``bias`` stay those of the linear it replaces. ``lora_A``
    (total_rank, in) and ``lora_B`` (total_rank, out) hold all languages; a language owns the
    rows ``layout.language_rows(index)``, and its ΔW is ``scaling · lora_B[rows].T @ lora_A[rows]``.
    A is Kaiming-uniform (a = √5) and B zero: a fresh adapter changes nothing.

    Args:
        linear: the pretrained linear; its parameters are shared and frozen
        site: where it sits and which part of it is adapted
        layout: the model's stacking of languages
        slot: where the current batch's routes are found
        dropout: probability of dropping an entry of the adapters' input during training
    """

    def __init__(self, linear, site, layout, slot, dropout=0.0):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.site, self.slot, self.dropout = site, slot, dropout
        self.__dict__["layout"] = layout  # the model owns it, as a submodule
        for factor, features in (("A", site.in_features), ("B", site.out_features)):
            param = nn.Parameter(self.weight.new_zeros(layout.total_rank, features))
            param.param_group = AdapterFactor(self, factor)
            self.register_parameter(f"lora_{factor}", param)
            self.register_buffer(f"lora_{factor}_mask", torch.ones_like(param, dtype=torch.bool))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        """x: (time, batch, in) -> (time, batch, out); batch-first in memory.

        Raises:
            RuntimeError: the batch came without the languages of its sentences.
        """
        return apply_linears(x.transpose(0, 1), (self,))[0].transpose(0, 1)

    def delta_weight(self, language):
        """ΔW of one language (its index): (out, in), zero outside the adapted part."""
        rows = self.layout.language_rows(language)
        scaling = self.layout.scaling[language, 0]
        delta = torch.zeros_like(self.weight)
        delta[: self.site.out_features, : self.site.in_features] = (
            scaling * self.lora_B[rows].T @ self.lora_A[rows]
        )
        return delta

    def extra_repr(self):
        ranks = self.layout.ranks
        return (
            f"{super().extra_repr()}, side={self.site.side}, languages={len(ranks)}, "
            f"ranks={min(ranks)}-{max(ranks)}"
        )


def apply_linears(x, linears):
    """Applies linears that read the same input, each with its adapters if it has any.

    Args:
        x: (batch, time, in)
        linears: frozen ``nn.Linear``, of which those with adapters belong to the same layer

    Returns:
        (batch, time, out) of each, contiguous

    Raises:
        RuntimeError: the batch came without the languages of its sentences.
    """
    adapted = [linear for linear in linears if isinstance(linear, LSLoLinear)]
    if not adapted:
        return [linear(x) for linear in linears]
    first = adapted[0]
    route = first.slot.routes.get(first.site.side)
    if route is None:
        raise RuntimeError(
            f"{first.site.name} needs the {first.site.side} language of each sentence: "
            f"pass {first.site.side}_lang_ids to the model"
        )
    x = x.contiguous()
    z = F.dropout(x, first.dropout) if first.training and first.dropout else None
    names = ("weight", "bias", "lora_A", "lora_B")
    tensors = [x, z, *(getattr(linear, name, None) for name in names for linear in linears)]
    dtype = _autocast_dtype(x.device.type)
    if dtype is not None:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    masks = [getattr(lin, f"lora_{f}_mask", None) for f in "AB" for lin in linears]
    x, z, *tensors = tensors
    route = without_beams(route, x.size(0))
    return _LSLo.apply(x, z, route, len(linears), *tensors, *masks)
