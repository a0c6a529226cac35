"""LSLo: a frozen linear and the low-rank adapters of all languages (method, section 2).

y = W x + b + (alpha_l / r_l) · B_l A_l x        l = the sentence's language on this side
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class AdapterFactor:
    """What an optimizer needs to know about one stacked factor.

    It is kept on the parameter under the attribute ``optim_overrides``: fairseq's fp16 optimizer
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
        return (getattr(param, "optim_overrides", None) or {}).get("lslora")


class _LSLo(torch.autograd.Function):
    """Frozen linear plus the adapter of each sentence's language.

    Only x is kept for the backward pass; gathered factors and A x are computed again.
    """

    @staticmethod
    def forward(ctx, x, z, weight, bias, A, B, mask_A, mask_B, rows, scaling):
        """x: (time, batch, in); z: the adapters' input if it differs from x (dropout), or None."""
        ctx.save_for_backward(x, z, weight, A, B, mask_A, mask_B, rows, scaling)
        y = _frozen_linear(x, weight, bias)
        _, _, h = _project(x if z is None else z, A, rows, scaling)
        delta = torch.bmm(h, F.embedding(rows, B))
        y[..., : B.size(1)] += delta.transpose(0, 1)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, A, B, mask_A, mask_B, rows, scaling = ctx.saved_tensors
        dy_b = dy[..., : B.size(1)].transpose(0, 1)
        z_b, A_b, h = _project(x if z is None else z, A, rows, scaling)
        dh = torch.bmm(dy_b, F.embedding(rows, B).transpose(1, 2)) * scaling.unsqueeze(1)
        dA = dB = dx = dz = None
        if ctx.needs_input_grad[4]:
            dA = _scatter(torch.bmm(dh.transpose(1, 2), z_b), rows, A, mask_A)
        if ctx.needs_input_grad[5]:
            dB = _scatter(torch.bmm(h.transpose(1, 2), dy_b), rows, B, mask_B)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
        if ctx.needs_input_grad[0 if z is None else 1]:
            adapter_grad = torch.bmm(dh, A_b).transpose(0, 1)
            if z is None:
                dx[..., : A.size(1)] += adapter_grad
            else:
                dz = torch.zeros_like(z)
                dz[..., : A.size(1)] = adapter_grad
        return dx, dz, None, None, dA, dB, None, None, None, None


def _frozen_linear(x, weight, bias):
    """``F.linear`` in one matrix product whatever the layout of x, and never a view (attention
    scales its queries in place)."""
    y = x.new_empty(*x.shape[:-1], weight.size(0))
    flat = y.view(-1, weight.size(0))
    if bias is None:
        torch.mm(x.reshape(-1, x.size(-1)), weight.t(), out=flat)
    else:
        torch.addmm(bias, x.reshape(-1, x.size(-1)), weight.t(), out=flat)
    return y


def _project(z, A, rows, scaling):
    """z batch-first, A of each sentence, and h = scaling · A z of shape (batch, time, rank)."""
    z = z[..., : A.size(1)].transpose(0, 1)
    A = F.embedding(rows, A)
    return z, A, torch.bmm(z, A.transpose(1, 2)) * scaling.unsqueeze(1)


def _scatter(grad, rows, factor, mask):
    """Sums per-sentence gradients into the stacked factor; a pruned entry gets none."""
    total = torch.zeros_like(factor).index_add_(0, rows.flatten(), grad.flatten(0, 1))
    return total.masked_fill_(~mask, 0)


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
            param.optim_overrides = {"lslora": AdapterFactor(self, factor)}
            self.register_parameter(f"lora_{factor}", param)
            self.register_buffer(f"lora_{factor}_mask", torch.ones_like(param, dtype=torch.bool))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        """x: (time, batch, in) -> (time, batch, out).

        Raises:
            RuntimeError: the batch came without the languages of its sentences.
        """
        route = self.slot.routes.get(self.site.side)
        if route is None:
            raise RuntimeError(
                f"{self.site.name} needs the {self.site.side} language of each sentence: "
                f"pass {self.site.side}_lang_ids to the model"
            )
        route = route.reduced_to(x.size(1))
        z = F.dropout(x, self.dropout) if self.training and self.dropout else None
        tensors = (x, z, self.weight, self.bias, self.lora_A, self.lora_B)
        dtype = _autocast_dtype(x.device.type)
        if dtype is not None:
            tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
        masks = (self.lora_A_mask, self.lora_B_mask)
        return _LSLo.apply(*tensors, *masks, route.rows, route.scaling.to(tensors[0].dtype))

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
