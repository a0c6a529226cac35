"""The adapters of one layer as one pass over a batch uses them, and their gradient.

Those of the languages present are stacked, one below the other, where the layer first needs them;
its linears then take their columns of the stack, and in the backward pass fill in those of one
buffer. Autograd would add up a full-size gradient from each linear.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def stack(adapters, route, dtype=None, gathers=False):
    """Stacks the adapters of the languages present; B is multiplied by the layer's share of it.

    Args:
        adapters: the layer's :class:`~lslora_fairseq.lora.adapters.LayerAdapters` that the route
            indexes, and those that all languages share where the route has joined them
        route: the batch's :class:`~lslora_fairseq.lora.routing.Route`
        dtype: what is computed in; None for that of the parameters
        gathers: looks up each sentence's own rows here, for all linears of the layer at once

    Returns:
        (rows, features), where zeros come last if sentences have rows of their own, or, gathered,
        (batch, columns, features); and its :class:`StackedAdapters`
    """
    languages = [route.present.languages, *((0,) for _ in adapters[1:])]
    weights = [own.weight(la) for own, of in zip(adapters, languages) for la in of]
    stacked = StackedAdapters(adapters, languages)
    rows = route.blocks[0].rows if gathers else None
    options = (dtype or weights[0].dtype, adapters[0].share(), route.gathers, rows)
    tensor = _Stacked.apply(stacked, *options, *weights)
    stacked.tensor = tensor.detach()  # without its graph, which refers to this object
    return tensor, stacked


class StackedAdapters:
    """What the linears of a layer find in a stack, and where they write its gradient.

    Args:
        adapters: whose rows are stacked, one or two
        languages: of each, the languages that are
    """

    tensor = None

    def __init__(self, adapters, languages):
        self.adapters, self._languages = adapters, languages
        self.columns, self.width_A = adapters[0].columns, adapters[0].width_A
        self._factors, self._side_by_side = None, {}
        # of the backward pass
        self._task = self._buffer = self._gradients = None
        self._written = set()

    def factors(self, module, blocks):
        """A and B of one linear, for each block: (columns, features), or (sentences, columns,
        features) where each sentence has its own.

        Args:
            module: name of the site's module
            blocks: those of the route
        """
        if self._factors is None:
            self._factors = self._views(self.tensor, blocks)
        return self._factors[module]

    def side_by_side(self, modules, blocks):
        """A of linears that read the same input, for each block: (linears · columns, features), or
        (sentences, linears · columns, features)."""
        if modules not in self._side_by_side:
            As = [self.factors(module, blocks)[0] for module in modules]
            self._side_by_side[modules] = As[0] if len(As) == 1 else [*map(_joined, zip(*As))]
        return self._side_by_side[modules]

    def gathered(self, rows):
        """The same adapters with each sentence's own rows, without a gradient.

        Args:
            rows: (sentences, columns) indices of the stack

        Returns:
            as :func:`stack`
        """
        found = StackedAdapters(self.adapters, self._languages)
        found.tensor = F.embedding(rows, self.tensor)
        return found.tensor, found

    def _views(self, tensor, blocks):
        """module -> A and B of a stack, or of its gradient, for each block."""
        As, Bs = zip(*self.columns.values())
        parts = tensor.split_with_sizes([c.stop - c.start for c in (*As, *Bs)], -1)
        if len(blocks) == 1:
            parts = [(part,) for part in parts]
        else:
            rows = [block.rows.stop - block.rows.start for block in blocks]
            parts = [part.split_with_sizes(rows) for part in parts]
        return dict(zip(self.columns, zip(parts, parts[len(As) :])))

    def start_gradient(self, blocks):
        """Begins the backward pass of a group of linears.

        Args:
            blocks: those of the route

        Returns:
            what it hands to autograd as its part of the gradient: the buffer of all, or None if
            another group did
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return None
        # another backward pass starts afresh
        self._task, self._written = task, set()
        self._buffer = torch.empty_like(self.tensor)
        self._gradients = self._views(self._buffer, blocks)
        return self._buffer

    def gradients(self, module):
        """Where a linear adds its gradients.

        Returns:
            of A and of B, for each block, views; and 1.0 if they hold something to add to, or 0.0
        """
        beta = float(module in self._written)
        self._written.add(module)
        return (*self._gradients[module], beta)

    def finish(self, grad):
        """Zeroes what no linear wrote; lets go of the buffer."""
        for module, columns in self.columns.items():
            if module not in self._written:
                for part in columns:
                    grad[..., part].zero_()
        self._task = self._buffer = self._gradients = None

    def mask(self, grad):
        """Zeroes the gradient of what is pruned.

        Args:
            grad: (rows, features), without the row of zeros
        """
        start = 0
        for adapters, languages in zip(self.adapters, self._languages):
            stop = start + sum(adapters.ranks[language] for language in languages)
            if adapters.is_pruned:
                grad[start:stop].masked_fill_(adapters.pruned_rows(languages), 0)
            start = stop


def _joined(parts):
    return torch.cat(parts, -2)


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stacked, dtype, share, ends_with_zeros, rows, *weights):
        ctx.stacked, ctx.dtype, ctx.rows = stacked, weights[0].dtype, rows
        ctx.ranks = [w.size(0) for w in weights]
        zeros = [weights[0].new_zeros(1, weights[0].size(1))] if ends_with_zeros else []
        stack = torch.cat([*weights, *zeros])
        ctx.is_shared = share is not None
        if ctx.is_shared:
            ctx.save_for_backward(share, *weights)
            stack[:, stacked.width_A :] *= share
        stack = stack.to(dtype)
        return stack if rows is None else F.embedding(rows, stack)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.stacked.finish(grad)
        total, d_share = sum(ctx.ranks), None
        if ctx.rows is not None:  # sums by row; those of the zeros are left out
            grad = torch.ops.aten.embedding_dense_backward(grad, ctx.rows, total + 1, total, False)
        grad = grad[:total].to(ctx.dtype)
        ctx.stacked.mask(grad)
        if ctx.is_shared:
            share, *weights = ctx.saved_tensors
            B = slice(ctx.stacked.width_A, None)
            d_share = (grad[:, B] * torch.cat([w[:, B] for w in weights])).sum()
            grad[:, B] *= share
        return None, None, d_share, None, None, *grad.split(ctx.ranks)
