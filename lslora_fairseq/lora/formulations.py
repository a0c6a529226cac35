"""The products of a frozen linear and the adapters of a mixed batch, forward and backward.

Three formulations of y = W x + b + (alpha_l / r_l) · B_l A_l x, l the language of the sentence:

- blocks: neighbouring sentences share one product with the factors of their few languages side by
  side, in which the columns of other languages are scaled by 0 (:class:`AdaptedLinears`);
- gathered: each sentence has rows of its own, in one batched product (the same class, where a
  block says so);
- a step of decoding, in which nothing is kept for a backward pass (:func:`decoding_step`).

What adapters add goes into the frozen product in place, and their gradients into one buffer.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class AdaptedLinears(torch.autograd.Function):
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
    @once_differentiable
    def backward(ctx, *dys):
        x, z, *tensors = ctx.saved_tensors
        stacks, weights = tensors[: len(ctx.blocks)], tensors[len(ctx.blocks) :]
        dys = [dy.contiguous() for dy in dys]
        dx = _frozen_backward(dys, weights) if ctx.needs_input_grad[0] else None
        dz = dx if z is None else torch.zeros_like(z)
        handed = []
        are_trained = ctx.needs_input_grad[5 : 5 + len(stacks)]
        for stack, gradient, blocks, is_trained in zip(
            stacks, ctx.gradients, ctx.blocks, are_trained
        ):
            adapted, columns = _adapted(gradient.adapters, ctx.modules)
            d_adapted = [dys[i] for i in adapted]
            if not is_trained:
                if dz is not None:
                    _frozen_adapted_backward(d_adapted, dz, stack, columns, blocks)
                handed.append(None)
                continue
            part = gradient.columns([ctx.modules[i] for i in adapted], stack)
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


def _frozen_adapted_backward(dys, dz, stack, columns, blocks):
    """The backward pass of :func:`_add_adapted` for adapters without a gradient of their own."""
    for block, As, Bs, dy_parts, dz_part in zip(
        blocks,
        zip(*(_rows(stack, a, blocks) for a, _ in columns)),
        zip(*(_rows(stack, b, blocks) for _, b in columns)),
        zip(*(_sentences(dy, b, blocks) for dy, (_, b) in zip(dys, columns))),
        _sentences(dz, columns[0][0], blocks),
    ):
        dh = _side_by_side([dy @ B.mT for dy, B in zip(dy_parts, Bs)], -1)
        _add_product(dz_part, _scaled(dh, block), _side_by_side(As, -2))


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
    return x.flatten(0, 1).split_with_sizes([(b.stop - b.start) * x.size(1) for b in blocks])


def _own_rows(stack, columns, blocks):
    """For each block, its rows of a factor, views; the whole stack for a block that gathers."""
    part = stack[:, columns]
    if blocks[0].gathers:
        return (part,)
    return part.split_with_sizes([b.rows.stop - b.rows.start for b in blocks])


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


def decoding_step(x, weight, bias, adapters):
    """A linear in a step in which all sentences share one block: the general formula without what
    a backward pass needs. Steps are short, and every operation counts.

    Args:
        x: (batch, time, in)
        weight, bias: the frozen linear's
        adapters: for each index side, the stacked adapters (rows, features), the columns of A and
            of B in them, and the block's scaling

    Returns:
        (batch, time, out)
    """
    y = F.linear(x, weight, bias)
    for stack, (a, b), scaling in adapters:
        h = F.linear(x[..., : a.stop - a.start], stack[:, a])
        part = y[..., : b.stop - b.start].flatten(0, 1)
        part.addmm_(h.mul_(scaling).flatten(0, 1), stack[:, b])
    return y
