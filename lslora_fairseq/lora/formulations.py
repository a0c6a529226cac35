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

    The input is kept for the backward pass, and A x, which has few columns.
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
            tensors: for each index side, the layer's adapters: those of the languages present
                (rows, features), or each sentence's own (batch, columns, features); then the
                linears' weights, then their biases

        Returns:
            (batch, time, out) of every linear
        """
        ctx.gradients, ctx.blocks, ctx.modules = gradients, blocks, modules
        stacks, tensors = tensors[: len(blocks)], tensors[len(blocks) :]
        weights, biases = tensors[: len(modules)], tensors[len(modules) :]
        outs = [_frozen_linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        kept = []  # of each block, A and A x
        for stack, gradient, side_blocks in zip(stacks, gradients, blocks):
            adapted, columns = _adapted(gradient.adapters, modules)
            ys = [outs[i] for i in adapted]
            kept += _add_adapted(ys, x if z is None else z, stack, columns, side_blocks)
        ctx.save_for_backward(x, z, *stacks, *weights, *kept)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, z, *tensors = ctx.saved_tensors
        stacks, tensors = tensors[: len(ctx.blocks)], tensors[len(ctx.blocks) :]
        weights, kept = tensors[: len(ctx.modules)], iter(tensors[len(ctx.modules) :])
        dys = [dy.contiguous() for dy in dys]
        dx = _frozen_backward(dys, weights) if ctx.needs_input_grad[0] else None
        dz = dx if z is None else torch.zeros_like(z)
        inputs, handed = x if z is None else z, []
        are_trained = ctx.needs_input_grad[5 : 5 + len(stacks)]
        for stack, gradient, blocks, is_trained in zip(
            stacks, ctx.gradients, ctx.blocks, are_trained
        ):
            adapted, columns = _adapted(gradient.adapters, ctx.modules)
            part = None
            if is_trained:
                part = gradient.columns([ctx.modules[i] for i in adapted], stack)
            side_kept = [(next(kept), next(kept)) for _ in blocks]
            d_adapted = [dys[i] for i in adapted]
            _adapted_backward(d_adapted, dz, inputs, side_kept, stack, part, columns, blocks)
            handed.append(part and part.handed)
        dz = None if dz is dx else dz
        return dx, dz, None, None, None, *handed, *[None] * (2 * len(weights))


def _add_adapted(ys, z, stack, columns, blocks):
    """Adds one side's adapters to the outputs of the linears, in place.

    Args:
        ys: (batch, time, out) of each linear
        z: (batch, time, in) the adapters' input
        stack: the adapters, as :class:`AdaptedLinears` takes them
        columns: those of A and of B of each linear
        blocks: the blocks of the route

    Returns:
        of each block in turn, A of all linears side by side and its product with z, scaled
    """
    kept = []
    for block, z_part, As, Bs, y_parts in zip(
        blocks,
        _sentences(z, columns[0][0], blocks),
        zip(*(_factors(stack, a, blocks) for a, _ in columns)),
        zip(*(_factors(stack, b, blocks) for _, b in columns)),
        zip(*(_sentences(y, b, blocks) for y, (_, b) in zip(ys, columns))),
    ):
        A = As[0] if len(As) == 1 else torch.cat(As, -2)
        h = _scaled(z_part @ A.mT, block)
        for y, part, B in zip(y_parts, h.chunk(len(y_parts), -1), Bs):
            _add_product(y, part, B)
        kept += A, h
    return kept


def _adapted_backward(dys, dz, z, kept, stack, gradient, columns, blocks):
    """The backward pass of :func:`_add_adapted`; adds to *dz*, unless it is None, in place.

    Args:
        kept: of each block, what :func:`_add_adapted` returned
        gradient: the :class:`~lslora_fairseq.lora.adapters.ColumnGradient` to fill in, or None
            for adapters that are not trained
    """
    if gradient is None:
        dAs = dBs = [()] * len(blocks)
    else:
        dAs = zip(*(_factors(gradient.buffer, a, blocks) for a, _ in columns))
        dBs = zip(*(_factors(gradient.buffer, b, blocks) for _, b in columns))
    for block, (A, h), z_part, Bs, dy_parts, dz_part, block_dAs, block_dBs in zip(
        blocks,
        kept,
        _sentences(z, columns[0][0], blocks),
        zip(*(_factors(stack, b, blocks) for _, b in columns)),
        zip(*(_sentences(dy, b, blocks) for dy, (_, b) in zip(dys, columns))),
        blocks if dz is None else _sentences(dz, columns[0][0], blocks),
        dAs,
        dBs,
    ):
        dh = torch.empty_like(h)
        for part, dy, B in zip(dh.chunk(len(Bs), -1), dy_parts, Bs):
            torch.matmul(dy, B.mT, out=part)
        _scaled(dh, block)
        for dB, part, dy in zip(block_dBs, h.chunk(len(Bs), -1), dy_parts):
            _add_product(dB, part.mT, dy, gradient.beta)
        for dA, part in zip(block_dAs, dh.chunk(len(Bs), -1)):
            _add_product(dA, part.mT, z_part, gradient.beta)
        if dz is not None:
            _add_product(dz_part, dh, A)


def _adapted(adapters, modules):
    """The numbers of the linears that have adapters, and their columns of the layer's."""
    adapted = [i for i, module in enumerate(modules) if module is not None]
    return adapted, [adapters.columns[modules[i]] for i in adapted]


def _frozen_linear(x, weight, bias):
    """As ``F.linear``, whose result would be a view, which a caller could not change in place."""
    flat = x.flatten(0, 1)
    y = flat.mm(weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], -1))


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


def _factors(stack, columns, blocks):
    """For each block, a factor: (columns, features), or (sentences, columns, features) for a
    block that gathers; views but where it gathers only here."""
    part = stack[..., columns]
    if blocks[0].gathers:
        return (part if part.dim() == 3 else F.embedding(blocks[0].rows, part),)
    return part.split_with_sizes([b.rows.stop - b.rows.start for b in blocks])


def _scaled(h, block):
    """Multiplies h, (…, linears · columns), by the block's scaling, in place."""
    if block.scaling is not None:
        scaling = block.scaling.to(h.dtype).unsqueeze(2)
        linears = h.size(-1) // scaling.size(-1)
        h.view(scaling.size(0), -1, linears, scaling.size(-1)).mul_(scaling)
    return h


def _add_product(out, a, b, beta=1.0):
    """out = beta · out + a b, in place."""
    (out.baddbmm_ if b.dim() == 3 else out.addmm_)(a, b, beta=beta)


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
        h = h if scaling is None else h.mul_(scaling)
        y[..., : b.stop - b.start].flatten(0, 1).addmm_(h.flatten(0, 1), stack[:, b])
    return y
