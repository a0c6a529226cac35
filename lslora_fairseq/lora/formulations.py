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

    The adapters' input is kept for the backward pass, unless it can be computed again there, and
    A x, which has few columns.
    """

    @staticmethod
    def forward(ctx, x, z, normed, sides, modules, weights, biases, *stacks):
        """
        Args:
            x: (batch, time, in), contiguous
            z: the adapters' input where it differs from x (dropout), or None
            normed: the :class:`~lslora_fairseq.lora.routing.Normed` whose output x is, or None
            sides: for each index side, the layer's
                :class:`~lslora_fairseq.lora.stacked.StackedAdapters` and the blocks of its route
            modules: the site's module name of each linear, None where it has no adapters
            weights, biases: of each linear, frozen
            stacks: for each index side, the tensor of the stacked adapters

        Returns:
            (batch, time, out) of every linear
        """
        ctx.sides, ctx.modules, ctx.eps = sides, modules, None
        ys, kept = _forward(x, x if z is None else z, sides, modules, weights, biases)
        source = (x, None, None) if z is None else (z, None, None)
        if z is None and normed is not None:
            source, ctx.eps = (normed.input, normed.weight, normed.bias), normed.eps
        ctx.has_dropout = z is not None
        ctx.save_for_backward(*source, *weights, *kept)
        # no views, which a caller could not change in place
        return tuple(y.resize_(*x.shape[:2], y.size(1)) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        z, weight, bias, *tensors = ctx.saved_tensors
        if ctx.eps is not None:
            z = F.layer_norm(z, z.shape[-1:], weight, bias, ctx.eps).to(tensors[0].dtype)
        weights, kept = tensors[: len(ctx.modules)], iter(tensors[len(ctx.modules) :])
        shape, z = z.shape, z.flatten(0, 1)
        dys = [dy.contiguous().flatten(0, 1) for dy in dys]
        dx = _frozen_backward(dys, weights) if ctx.needs_input_grad[0] else None
        dz = torch.zeros_like(z) if ctx.has_dropout else dx
        adapted = {m: dy for m, dy in zip(ctx.modules, dys) if m is not None}
        handed = []
        for (stacked, blocks), is_trained in zip(ctx.sides, ctx.needs_input_grad[7:]):
            handed.append(stacked.start_gradient(blocks) if is_trained else None)
            side_kept = [(next(kept), next(kept)) for _ in blocks]
            _adapted_backward(adapted, dz, z, side_kept, stacked, blocks, is_trained)
        dx, dz = (None if d is None else d.view(shape) for d in (dx, dz))
        return dx, dz if ctx.has_dropout else None, None, None, None, None, None, *handed


def adapted_linears(x, sides, modules, weights, biases):
    """As :class:`AdaptedLinears`, where nothing is kept for a backward pass."""
    ys, _ = _forward(x, x, sides, modules, weights, biases)
    return [y.view(*x.shape[:2], -1) for y in ys]


def _forward(x, z, sides, modules, weights, biases):
    """The frozen linears, and in their outputs the adapters of all sides.

    Returns:
        (batch · time, out) of every linear, and what :func:`_add_adapted` returns of one side
        after the other
    """
    flat = x.flatten(0, 1)
    ys = [F.linear(flat, weight, bias) for weight, bias in zip(weights, biases)]
    adapted, kept = {m: y for m, y in zip(modules, ys) if m is not None}, []
    z = flat if z is x else z.flatten(0, 1)
    for stacked, blocks in sides:
        kept += _add_adapted(adapted, z, stacked, blocks)
    return ys, kept


def _add_adapted(ys, z, stacked, blocks):
    """Adds one side's adapters to the outputs of the linears, in place.

    Args:
        ys: module name of a site -> (batch · time, out) of its linear
        z: (batch · time, in) the adapters' input

    Returns:
        of each block in turn, A of all linears side by side and its product with z, scaled
    """
    factors = [stacked.factors(module, blocks) for module in ys]
    z_parts = _sentences(z, factors[0][0], blocks)
    y_parts = [_sentences(y, B, blocks) for y, (_, B) in zip(ys.values(), factors)]
    kept = []
    for number, (block, A) in enumerate(zip(blocks, stacked.side_by_side(tuple(ys), blocks))):
        h = _scaled(_times_transposed(z_parts[number], A), block, len(ys))
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
    gradients = [stacked.gradients(module) for module in dys] if is_trained else ()
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
        _scaled(dh, block, len(Bs))
        for (dA, dB, beta), dh_part, h_part, dy in zip(
            gradients, dh_parts, _parts(h, len(Bs)), dy_of_block
        ):
            _add_product(dB[number], h_part.mT, dy, beta)
            _add_product(dA[number], dh_part.mT, z_parts[number], beta)
        if dz is not None:
            _add_product(dz_parts[number], dh, A)


def _frozen_backward(dys, weights):
    """Gradient (batch · time, in) of the shared input of several frozen linears."""
    dx = dys[0].mm(weights[0])
    for dy, weight in zip(dys[1:], weights[1:]):
        dx.addmm_(dy, weight)
    return dx


def _sentences(x, factors, blocks):
    """For each block, its sentences and the features that its factor of the adapters sees.

    Args:
        x: (batch · time, features)

    Returns:
        (sentences · time, features) views, or (sentences, time, features) for a block that gathers
    """
    features = factors[0].size(-1)
    if features < x.size(1):
        x = x[:, :features]
    if len(blocks) == 1:
        return (x.view(blocks[0].stop, -1, features) if blocks[0].gathers else x,)
    time = len(x) // blocks[-1].stop
    return x.split_with_sizes([(b.stop - b.start) * time for b in blocks])


def _parts(h, linears):
    """The columns of each linear."""
    return (h,) if linears == 1 else h.chunk(linears, -1)


def _scaled(h, block, linears):
    """Multiplies h, (…, linears · columns), by the block's scaling, in place."""
    if block.scaling is not None:
        h.view(len(block.scaling), -1, linears, h.size(-1) // linears).mul_(block.scaling)
    return h


def _times_transposed(a, b):
    """a bᵀ, batched where b is."""
    return F.linear(a, b) if b.dim() == 2 else torch.bmm(a, b.mT)


def _add_product(out, a, b, beta=1.0):
    """out = beta · out + a b, in place."""
    (out.baddbmm_ if b.dim() == 3 else out.addmm_)(a, b, beta=beta)
