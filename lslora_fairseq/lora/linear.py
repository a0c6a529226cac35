"""LSLo: a frozen linear and the low-rank adapters of all languages (method, section 2).

y = W x + b + (alpha_l / r_l) · B_l A_l x        l = the sentence's language on this side
"""

import torch
import torch.nn.functional as F
from torch import nn


class _LSLo(torch.autograd.Function):
    """Frozen linears that read the same input, and the adapters of each sentence's language.

    Of the adapters only the input is kept for the backward pass; A x is computed again.
    """

    @staticmethod
    def forward(ctx, x, z, gradients, blocks, modules, *tensors):
        """
        Args:
            x: (batch, time, in), contiguous
            z: the adapters' input where it differs from x (dropout), or None
            gradients: for each index side, the
                :class:`~lslora_fairseq.lora.adapters.StackGradient` of the layer's adapters
            blocks: for each index side, the blocks of its route
            modules: the site's module name of each linear, None where it has no adapters
            tensors: for each index side (rows, features), the layer's adapters of the languages
                present; then the linears' weights, then their biases

        Returns:
            (batch, time, out) of every linear
        """
        ctx.gradients, ctx.blocks, ctx.modules = gradients, blocks, modules
        stacks, tensors = tensors[: len(blocks)], tensors[len(blocks) :]
        weights, biases = tensors[: len(modules)], tensors[len(modules) :]
        ctx.save_for_backward(x, z, *stacks, *weights)
        outs = [_frozen_linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        for stack, gradient, side_blocks in zip(stacks, gradients, blocks):
            adapted, columns = _adapted(gradient.adapters, modules)
            ys = [outs[i] for i in adapted]
            _add_adapted(ys, x if z is None else z, stack, columns, side_blocks)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *dys):
        x, z, *tensors = ctx.saved_tensors
        stacks, weights = tensors[: len(ctx.blocks)], tensors[len(ctx.blocks) :]
        dys = [dy.contiguous() for dy in dys]
        dx = _frozen_backward(dys, weights) if ctx.needs_input_grad[0] else None
        dz = dx if z is None else torch.zeros_like(z)
        handed = []
        for stack, gradient, blocks in zip(stacks, ctx.gradients, ctx.blocks):
            adapted, columns = _adapted(gradient.adapters, ctx.modules)
            part = gradient.columns([ctx.modules[i] for i in adapted], stack)
            d_adapted = [dys[i] for i in adapted]
            _adapted_backward(d_adapted, dz, x if z is None else z, stack, part, columns, blocks)
            handed.append(part.handed)
        dz = None if dz is dx else dz
        return dx, dz, None, None, None, *handed, *[None] * (2 * len(weights))


def _add_adapted(ys, z, stack, columns, blocks):
    """Adds one side's adapters to the outputs of the linears, in place.

    Args:
        ys: (batch, time, out) of each linear
        z: (batch, time, in) the adapters' input
        stack: (rows, features) the adapters of the languages present
        columns: those of A and of B of each linear
        blocks: the blocks of the route
    """
    for block, z_part, As, Bs, y_parts in zip(
        blocks,
        _sentences(z, columns[0][0], blocks),
        zip(*(_rows(stack, a, blocks) for a, _ in columns)),
        zip(*(_rows(stack, b, blocks) for _, b in columns)),
        zip(*(_sentences(y, b, blocks) for y, (_, b) in zip(ys, columns))),
    ):
        h = _scaled(z_part @ _side_by_side(As, -2).mT, block)
        for y, part, B in zip(y_parts, h.chunk(len(y_parts), -1), Bs):
            _add_product(y, part, B)


def _adapted_backward(dys, dz, z, stack, gradient, columns, blocks):
    """The backward pass of :func:`_add_adapted`; adds to *dz*, unless it is None, in place.

    Args:
        gradient: the :class:`~lslora_fairseq.lora.adapters.ColumnGradient` to fill in
    """
    if blocks[0].gathers:
        gradient.start_from_zero()
    for block, z_part, As, Bs, dy_parts, dz_part, dAs, dBs in zip(
        blocks,
        _sentences(z, columns[0][0], blocks),
        zip(*(_rows(stack, a, blocks) for a, _ in columns)),
        zip(*(_rows(stack, b, blocks) for _, b in columns)),
        zip(*(_sentences(dy, b, blocks) for dy, (_, b) in zip(dys, columns))),
        blocks if dz is None else _sentences(dz, columns[0][0], blocks),
        zip(*(_own_rows(gradient.buffer, a, blocks) for a, _ in columns)),
        zip(*(_own_rows(gradient.buffer, b, blocks) for _, b in columns)),
    ):
        A = _side_by_side(As, -2)
        h = _scaled(z_part @ A.mT, block)
        dh = _side_by_side([dy @ B.mT for dy, B in zip(dy_parts, Bs)], -1)
        _scaled(dh, block)
        for dB, part, dy in zip(dBs, h.chunk(len(dBs), -1), dy_parts):
            _add_gradient(dB, part, dy, block, gradient.beta)
        for dA, part in zip(dAs, dh.chunk(len(dAs), -1)):
            _add_gradient(dA, part, z_part, block, gradient.beta)
        if dz is not None:
            _add_product(dz_part, dh, A)


def _adapted(adapters, modules):
    """The numbers of the linears that have adapters, and their columns of the layer's."""
    adapted = [i for i, module in enumerate(modules) if module is not None]
    return adapted, [adapters.columns[modules[i]] for i in adapted]


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


def _sentences(x, columns, blocks):
    """For each block, its sentences and the features that a factor of the adapters sees.

    Returns:
        (sentences · time, features) views, or (sentences, time, features) for a block that gathers
    """
    x = x[..., : columns.stop - columns.start]
    if blocks[0].gathers:
        return (x,)
    return x.flatten(0, 1).split([(b.stop - b.start) * x.size(1) for b in blocks])


def _own_rows(stack, columns, blocks):
    """For each block, its rows of a factor, views; the whole stack for a block that gathers."""
    part = stack[:, columns]
    if blocks[0].gathers:
        return (part,)
    return part.split([b.rows.stop - b.rows.start for b in blocks])


def _rows(stack, columns, blocks):
    """For each block, a factor: (columns, features), or (sentences, columns, features) for a
    block that gathers."""
    parts = _own_rows(stack, columns, blocks)
    if blocks[0].gathers:
        return (F.embedding(blocks[0].rows, parts[0]),)
    return parts


def _side_by_side(tensors, dim):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _scaled(h, block):
    """Multiplies h, (…, linears · columns), by the block's scaling, in place."""
    scaling = block.scaling.to(h.dtype).unsqueeze(2)
    h.view(scaling.size(0), -1, h.size(-1) // scaling.size(-1), scaling.size(-1)).mul_(scaling)
    return h


def _add_product(out, a, b):
    """out += a b, in place."""
    if b.dim() == 3:
        out.baddbmm_(a, b)
    else:
        out.addmm_(a, b)


def _add_gradient(total, a, b, block, beta):
    """total = beta · total + aᵀ b, in place; summed by row where each sentence has its own."""
    if block.gathers:
        total.index_add_(0, block.rows.flatten(), (a.mT @ b).flatten(0, -2))
    else:
        total.addmm_(a.t(), b, beta=beta)


def _autocast_dtype(device_type):
    """The dtype that autocast asks for on this device, or None."""
    if hasattr(torch, "get_autocast_dtype"):  # torch ≥ 2.4
        enabled = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if enabled else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


class LSLoLinear(nn.Linear):
    """A frozen linear with one LoRA adapter per language.

    The keys ``weight`` and ``bias`` stay those of the linear it replaces. Its factors are columns
    of the layer's :class:`~lslora_fairseq.lora.adapters.LayerAdapters`.

    Args:
        linear: the pretrained linear; its parameters are shared and frozen
        site: where it sits and which part of it is adapted
        adapters: those of its layer: side -> :class:`~lslora_fairseq.lora.adapters.LayerAdapters`,
            for one side, or for both where weights are learned
        layout: the model's ranks and scaling
        slot: where the current batch's routes are found
        dropout: probability of dropping an entry of the adapters' input during training
    """

    def __init__(self, linear, site, adapters, layout, slot, dropout=0.0):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.site, self.slot, self.dropout = site, slot, dropout
        # the layer and the model own these, as submodules
        self.__dict__.update(adapters=adapters, layout=layout)

    def forward(self, x):
        """x: (time, batch, in) -> (time, batch, out); batch-first in memory.

        Raises:
            RuntimeError: the batch came without the languages of its sentences.
        """
        return apply_linears(x.transpose(0, 1), (self,))[0].transpose(0, 1)

    def factors(self, language, side=None):
        """A (rank, in) and B (rank, out) of a language (its index): views of its parameter.

        Args:
            side: which adapters, where the linear has those of both sides
        """
        adapters = self._adapters_of(side)
        weight = adapters.weight(language)
        return tuple(weight[:, columns] for columns in adapters.columns[self.site.module])

    def masks(self, language, side=None):
        """The masks of A and B of a language, views; False marks a pruned entry."""
        adapters = self._adapters_of(side)
        mask = adapters.mask[adapters.rows(language)]
        return tuple(mask[:, columns] for columns in adapters.columns[self.site.module])

    def delta_weight(self, language, side=None):
        """What one language (its index) adds to the weight: ΔW, or p · ΔW where weights are
        learned; (out, in) fp32, zero outside the adapted part."""
        A, B = (factor.float() for factor in self.factors(language, side))
        delta = torch.zeros_like(self.weight, dtype=torch.float)
        delta[: self.site.out_features, : self.site.in_features] = (
            self.layout.scaling[language].float() * B.T @ A
        )
        share = self._adapters_of(side).share()
        return delta if share is None else delta * share.float()

    def _adapters_of(self, side):
        if side is None:
            (side,) = self.adapters
        return self.adapters[side]

    def extra_repr(self):
        ranks = self.layout.ranks
        return (
            f"{super().extra_repr()}, sides={'+'.join(self.adapters)}, languages={len(ranks)}, "
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
    routes = {side: _route(first, side).without_beams(x.size(0)) for side in first.adapters}
    x = x.contiguous()
    dtype = _autocast_dtype(x.device.type)
    if dtype is None and not torch.is_grad_enabled() and _is_short(routes.values()):
        return [_decoded(x, linear, routes) for linear in linears]
    z = F.dropout(x, first.dropout) if first.training and first.dropout else None
    tensors = [x, z, *(linear.weight for linear in linears), *(linear.bias for linear in linears)]
    if dtype is not None:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    x, z, *tensors = tensors
    stacks, gradients = zip(
        *(_stack(first, side, route.present, dtype) for side, route in routes.items())
    )
    blocks = [route.blocks for route in routes.values()]
    modules = tuple(lin.site.module if lin in adapted else None for lin in linears)
    return _LSLo.apply(x, z, gradients, blocks, modules, *stacks, *tensors)


def _route(linear, side):
    route = linear.slot.routes.get(side)
    if route is None:
        raise RuntimeError(
            f"{linear.site.name} needs the {side} language of each sentence: "
            f"pass {side}_lang_ids to the model"
        )
    return route


def _is_short(routes):
    """Whether this is a decoding step in which all sentences share one block."""
    return all(route.present.stacks is not None and not route.blocks[0].gathers for route in routes)


def _decoded(x, linear, routes):
    """A linear in such a step: the general formula without what a backward pass needs. Steps are
    short, and every operation counts."""
    y = F.linear(x, linear.weight, linear.bias)
    if isinstance(linear, LSLoLinear):
        part = y[..., : linear.site.out_features].flatten(0, 1)
        for side, route in routes.items():
            stack, _ = _stack(linear, side, route.present, None)
            a, b = linear.adapters[side].columns[linear.site.module]
            h = F.linear(x[..., : linear.site.in_features], stack[:, a])
            part.addmm_(h.mul_(route.blocks[0].scaling).flatten(0, 1), stack[:, b])
    return y


def _stack(linear, side, present, dtype):
    """The stacked adapters of the linear's layer, made once per pass, or once per decoding."""
    adapters, stacks = linear.adapters[side], present.stacks
    if stacks is None or torch.is_grad_enabled():
        stacks = linear.slot.stacks
    if adapters not in stacks:
        stacks[adapters] = adapters.stack(present, dtype)
    return stacks[adapters]
