"""Label-smoothed cross-entropy over a frozen output projection, without the distribution.

Logits are z = h Eᵀ + (h Aᵀ) B, with features h (tokens, d), E (words, d) frozen, and A (r, d) and B
(r, words) the adapter of the embeddings, if there is one. E needs no gradient, and all others are
small:

    dh = dz E + (dz Bᵀ) A        dA = (dz Bᵀ)ᵀ h        dB = (h Aᵀ)ᵀ dz

So the forward pass takes the tokens piece by piece, turns the logits of each into dz in one buffer
and keeps these sums. The backward pass multiplies them by the gradient of the loss.
"""

import torch
from torch.autograd.function import once_differentiable

from lslora_fairseq.lora.linear import autocast_dtype

# Bytes of the buffer. They bound what the loss takes whatever the number of words, while the fewer
# these are, the more tokens a piece has, and the less often the weights are read. On a GPU what the
# host has to call for each piece counts, too.
BUFFER = {"cpu": 2**29, "cuda": 2**30}
MOST_TOKENS = {"cpu": 768}  # of a piece; products of more are no faster there
# Half precision: dz is multiplied by this before the products. The share of one smoothed word, 4e-7
# of 256,000 words, then keeps its digits in fp16, and what is summed stays far below its 65,504.
HALF_SCALE = 128


def pieces(tokens, words, dtype, device):
    """In how many pieces so many tokens are taken, and the bytes of one of them.

    Args:
        dtype: what products are computed in
        device: its type
    """
    of_token = words * (dtype.itemsize + (4 if dtype.itemsize < 4 else 0))  # the softmax is in fp32
    number = max(
        -(-tokens * of_token // BUFFER.get(device, BUFFER["cuda"])),
        -(-tokens // MOST_TOKENS.get(device, tokens)),
    )
    return number, -(-tokens // number) * of_token


def frozen_projection_loss(
    x, projection, target, smoothing, padding_idx, tokens, report_accuracy=False
):
    """fairseq's label-smoothed cross-entropy, summed over all targets but padding.

    Where gradients are enabled they are computed here, too, and kept in fp32: fp16 could hold them
    only once the loss is scaled. Nothing waits for the device.

    Args:
        x: (batch, time, d) features
        projection: E (words, d), and A (r, d) and B (r, words) of an adapter, or None and None
        target: (batch, time)
        smoothing: probability that is spread over all words but the target
        padding_idx: the target of positions that do not count
        tokens: number of targets that are not padding, or more
        report_accuracy: count the targets that are the likeliest word, too

    Returns:
        the loss, its part of the targets alone (nll), both in nats, and the count, or None: scalar
        tensors, of which the loss has a gradient
    """
    target = target.flatten()
    # the targets that count, first: how many there are, the host knows without the device
    rows = target.eq(padding_idx).byte().argsort(stable=True)[:tokens]
    loss, nll, hits = _FrozenProjectionLoss.apply(
        x.flatten(0, 1),
        *projection,
        rows,
        target[rows],
        (smoothing, padding_idx, report_accuracy),
        torch.is_grad_enabled(),
    )
    return loss, nll, hits if report_accuracy else None


class _FrozenProjectionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, E, A, B, rows, target, options, is_grad_enabled):
        dtype = autocast_dtype(x.device.type) or E.dtype
        wanted = [is_grad_enabled and ctx.needs_input_grad[place] for place in (0, 2)]
        weights = [None if w is None else w.to(dtype) for w in (E, A, B)]
        with torch.autocast(x.device.type, enabled=False):
            sums, gradients = _in_pieces(x, *weights, rows, target, *options, *wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, A, B)]
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        dx, dA, dB = (
            None if kept is None else (grad * kept).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return dx, None, dA, dB, None, None, None, None


def _in_pieces(
    x, E, A, B, rows, target, smoothing, padding_idx, report_accuracy, wants_x, wants_adapter
):
    """Loss, nll and hits, and the gradients of x, A and B, or None for those not wanted.

    Products are in the dtype of E, A and B, all else at least in fp32.
    """
    words, dtype = E.size(0), E.dtype
    wide = torch.promote_types(dtype, torch.float)
    scale = 1 if dtype == wide else HALF_SCALE
    rest = smoothing / (words - 1)  # of every word but the target
    nll, spread = (x.new_zeros((), dtype=wide) for _ in range(2))
    hits = rows.new_zeros(())
    dx = torch.zeros_like(x, dtype=wide) if wants_x else None
    dA, dB = (torch.zeros_like(w, dtype=wide) if wants_adapter else None for w in (A, B))
    number, _ = pieces(len(rows), words, dtype, x.device.type)
    buffer = None
    for piece, gold in zip(rows.tensor_split(number), target.unsqueeze(1).tensor_split(number)):
        counts = gold.ne(padding_idx)
        h = x[piece].mul_(counts).to(dtype)
        if buffer is None:  # the first piece is the largest
            buffer = h.new_empty(len(h), words)
        z = torch.mm(h, E.t(), out=buffer[: len(h)])
        if A is not None:
            inner = h @ A.t()
            z.addmm_(inner, B)
        p = z.to(wide)  # the same tensor, unless it is of half precision
        torch.log_softmax(p, 1, out=p)
        nll -= p.gather(1, gold).mul_(counts).sum()
        if smoothing:
            spread -= p.sum(1, keepdim=True).mul_(counts).sum()
        if report_accuracy:
            hits += (p.argmax(1, keepdim=True).eq(gold) & counts).sum()
        if not (wants_x or wants_adapter):
            continue
        dz = p.exp_()
        if smoothing:
            dz.sub_(rest)
        dz.scatter_add_(1, gold, dz.new_full(gold.shape, smoothing + rest - 1))
        if dtype != wide:
            dz = torch.mul(dz, scale, out=z)
        dh = (dz @ E).to(wide)
        if A is not None:
            inner_grad = (dz @ B.t()).to(wide)
            dh.addmm_(inner_grad, A.to(wide))
        if wants_x:
            dx[piece] = dh.mul_(counts).div_(scale)
        if wants_adapter:
            dA.addmm_(inner_grad.t(), h.to(wide), alpha=1 / scale)
            # the mean over the piece's tokens, times their number
            dB.add_((inner / len(h)).t() @ dz, alpha=len(h) / scale)
    loss = (1 - smoothing - rest) * nll + rest * spread
    return (loss, nll, hits), (dx, dA, dB)
