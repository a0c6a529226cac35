"""The products of a frozen linear and the adapters of a mixed batch, forward and backward.

Two formulations of y = W x + b + (alpha_l / r_l) · B_l A_l x, l the language of the sentence:

- blocks: neighbouring sentences share one product with the factors of their few languages side by
  side, in which the columns of other languages are scaled by 0;
- gathered: each sentence has rows of its own, in one batched product, where a block says so.

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
    def forward(ctx, x, z, sides, modules, *tensors):
        """
        Args:
            x: (batch, time, in), contiguous
            z: the adapters' input where it differs from x (dropout), or None
            sides: for each index side, the layer's
                :class:`~lslora_fairseq.lora.stacked.StackedAdapters` and the blocks of its route
            modules: the site's module name of each linear, None where it has no adapters
            tensors: those of the stacked adapters; then the linears' weights, then their biases

        Returns:
            (batch, time, out) of every linear
        """
        ctx.sides, ctx.modules = sides, modules
        weights = tensors[len(sides) : len(sides) + len(modules)]
        biases = tensors[len(sides) + len(modules) :]
        outs = [_frozen_linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        kept = _add_sides(outs, x if z is None else z, sides, modules)
        ctx.save_for_backward(x, z, *weights, *kept)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, z, *tensors = ctx.saved_tensors
        weights, kept = tensors[: len(ctx.modules)], iter(tensors[len(ctx.modules) :])
        dys = [dy.contiguous() for dy in dys]
        dx = _frozen_backward(dys, weights) if ctx.needs_input_grad[0] else None
        dz = dx if z is None else torch.zeros_like(z)
        adapted = {m: dy for m, dy in zip(ctx.modules, dys) if m is not None}
        handed = []
        for (stacked, blocks), is_trained in zip(ctx.sides, ctx.needs_input_grad[4:]):
            handed.append(stacked.start_gradient() if is_trained else None)
            side_kept = [(next(kept), next(kept)) for _ in blocks]
            inputs = x if z is None else z
            _adapted_backward(adapted, dz, inputs, side_kept, stacked, blocks, is_trained)
        dz = None if dz is dx else dz
        return dx, dz, None, None, *handed, *[None] * (2 * len(weights))


def adapted_linears(x, sides, modules, weights, biases):
    """As :class:`AdaptedLinears`, where nothing is kept for a backward pass."""
    outs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    _add_sides(outs, x, sides, modules)
    return outs


def _add_sides(outs, z, sides, modules):
    """Adds the adapters of all sides to the outputs of the linears, in place.

    Returns:
        what :func:`_add_adapted` does, of one side after the other
    """
    adapted, kept = {m: y for m, y in zip(modules, outs) if m is not None}, []
    for stacked, blocks in sides:
        kept += _add_adapted(adapted, z, stacked, blocks)
    return kept


def _add_adapted(ys, z, stacked, blocks):
    """Adds one side's adapters to the outputs of the linears, in place.

    Args:
        ys: module name of a site -> (batch, time, out) of its linear
        z: (batch, time, in) the adapters' input

    Returns:
        of each block in turn, A of all linears side by side and its product with z, scaled
    """
    factors = [stacked.factors(module, blocks) for module in ys]
    z_parts = _sentences(z, factors[0][0], blocks)
    y_parts = [_sentences(y, B, blocks) for y, (_, B) in zip(ys.values(), factors)]
    kept = []
    for number, (block, A) in enumerate(zip(blocks, stacked.side_by_side(tuple(ys), blocks))):
        h = _scaled(_times_transposed(z_parts[number], A), block)
        for y, part, (_, B) in zip(y_parts, _parts(h, len(ys)), factors):
            _add_product(y[number], part, B[number])
        kept += A, h
    return kept


def _adapted_backward(dys, dz, z, kept, stacked, blocks, is_trained):
    """The backward pass of :func:`_add_adapted`; adds to *dz*, unless it is None, in place, and to
    the gradients of the adapters if they are trained.

    Args:
        kept: of each block, what :func:`_add_adapted` returned
    """
    factors = [stacked.factors(module, blocks) for module in dys]
    gradients = [stacked.gradients(module, blocks) for module in dys] if is_trained else ()
    dy_parts = [_sentences(dy, B, blocks) for dy, (_, B) in zip(dys.values(), factors)]
    z_parts = _sentences(z, factors[0][0], blocks)
    dz_parts = None if dz is None else _sentences(dz, factors[0][0], blocks)
    for number, (block, (A, h)) in enumerate(zip(blocks, kept)):
        Bs, dy_of_block = [B[number] for _, B in factors], [dy[number] for dy in dy_parts]
        if len(Bs) == 1:
            dh = _times_transposed(dy_of_block[0], Bs[0])
            dh_parts = (dh,)
        else:
            dh = torch.empty_like(h)
            dh_parts = _parts(dh, len(Bs))
            for part, dy, B in zip(dh_parts, dy_of_block, Bs):
                torch.matmul(dy, B.mT, out=part)
        _scaled(dh, block)
        for (dA, dB, beta), dh_part, h_part, dy in zip(
            gradients, dh_parts, _parts(h, len(Bs)), dy_of_block
        ):
            _add_product(dB[number], h_part.mT, dy, beta)
            _add_product(dA[number], dh_part.mT, z_parts[number], beta)
        if dz is not None:
            _add_product(dz_parts[number], dh, A)


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


def _sentences(x, factors, blocks):
    """For each block, its sentences and the features that its factor of the adapters sees.

    Returns:
        (sentences · time, features) views, or (sentences, time, features) for a block that gathers
    """
    features = factors[0].size(-1)
    if features < x.size(-1):
        x = x[..., :features]
    if blocks[0].gathers:
        return (x,)
    flat = x.flatten(0, 1)
    if len(blocks) == 1:
        return (flat,)
    return flat.split_with_sizes([(b.stop - b.start) * x.size(1) for b in blocks])


def _parts(h, linears):
    """The columns of each linear."""
    return (h,) if linears == 1 else h.chunk(linears, -1)


def _scaled(h, block):
    """Multiplies h, (…, linears · columns), by the block's scaling, in place."""
    if block.scaling is not None:
        sentences, _, columns = block.scaling.shape
        h.view(sentences, -1, h.size(-1) // columns, columns).mul_(block.scaling.unsqueeze(2))
    return h


def _times_transposed(a, b):
    """a bᵀ, batched where b is."""
    return F.linear(a, b) if b.dim() == 2 else torch.bmm(a, b.mT)


def _add_product(out, a, b, beta=1.0):
    """out = beta · out + a b, in place."""
    (out.baddbmm_ if b.dim() == 3 else out.addmm_)(a, b, beta=beta)
