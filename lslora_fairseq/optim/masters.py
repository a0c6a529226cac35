"""fp32 masters: what an inner optimizer steps of the adapters, each of one language and side."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from lslora_fairseq.lora.adapters import Adapter


@dataclass(eq=False)
class Piece:
    """Columns of one language's parameter in one layer.

    Attributes:
        param: what the outer optimizer was given: the model's parameter or its fp32 copy
        adapter: the parameter's :class:`Adapter`
        columns: a slice of the parameter's columns
        master: (rank, columns) fp32 view into the master it belongs to
    """

    param: torch.Tensor
    adapter: Adapter
    columns: slice
    master: torch.Tensor = None

    @property
    def mask(self):
        """(rank, columns) bool, a view; False marks a pruned entry."""
        return self.adapter.mask[:, self.columns]

    @property
    def weight(self):
        """(rank, columns) of the parameter inside the model, in the model's dtype."""
        return self.adapter.weight.detach()[:, self.columns]

    @property
    def gradient(self):
        """(rank, columns); zeros in a layer where the language got none."""
        grad = self.param.grad
        return torch.zeros_like(self.master) if grad is None else grad[:, self.columns]

    @property
    def shares_memory(self):
        """Whether the parameter is where the master is, and needs no copy of it."""
        return self.param.data_ptr() == self.master.data_ptr()

    def part(self, factor):
        """Which of these columns belong to factor ``A`` or ``B``."""
        first = self.columns.start or 0
        width = self.master.size(1)
        border = min(max(self.adapter.layer.width_A - first, 0), width)
        return slice(0, border) if factor == "A" else slice(border, width)


@dataclass(eq=False)
class Master:
    """An fp32 parameter of the inner optimizer.

    Attributes:
        key: the (side, language) whose entries it holds; (None, None) for the weights of sides
        pieces: where they come from
        weight: the parameter; flat if it has several pieces, else (rank, columns)
        pruned: bool, of the weight's shape, True for a pruned entry; None if none is
    """

    key: tuple
    pieces: list
    weight: nn.Parameter
    pruned: torch.Tensor = None

    def refresh_pruned(self):
        """Takes the masks of the layers over."""
        self.pruned = None
        if any(piece.adapter.layer.is_pruned for piece in self.pieces):
            self.pruned = self.joined([~piece.mask for piece in self.pieces])

    def joined(self, parts):
        """What there is for each piece, in the weight's shape; always a copy."""
        return torch.cat([part.flatten() for part in parts]).view_as(self.weight)

    def gradient(self):
        """fp32, in the weight's shape; None where no piece has one."""
        if all(piece.param.grad is None for piece in self.pieces):
            return None
        return self.joined([piece.gradient for piece in self.pieces]).float()

    def clear_pruned(self, state):
        """Zeroes the pruned entries here and in the inner optimizer's state of the weight."""
        if self.pruned is None:
            return
        self.weight.detach().masked_fill_(self.pruned, 0)
        for value in state.values():
            if torch.is_tensor(value) and value.shape == self.weight.shape:
                value.masked_fill_(self.pruned, 0)


def build_masters(params, adapters, elementwise):
    """The masters of all parameters; with one flat master an fp32 parameter shares its memory.

    Args:
        params: the parameters or their fp32 copies
        adapters: their :class:`Adapter`
        elementwise: one flat master for each language and side; else a matrix for each factor of
            each site

    Returns:
        list of :class:`Master`
    """
    groups = defaultdict(list)
    for number, (param, adapter) in enumerate(zip(params, adapters)):
        key = (adapter.side, adapter.language)
        if elementwise:
            groups[key, None].append(Piece(param, adapter, slice(None)))
            continue
        for factors in adapter.layer.columns.values():
            for columns in factors:
                groups[key, (number, columns.start)] = [Piece(param, adapter, columns)]
    masters = []
    for (key, _), pieces in groups.items():
        weights = [piece.param.detach()[:, piece.columns].float() for piece in pieces]
        if elementwise:
            weight = nn.Parameter(torch.cat([w.flatten() for w in weights]))
            views = weight.detach().split([w.numel() for w in weights])
        else:
            weight = nn.Parameter(weights[0].clone())
            views = [weight.detach()]
        for piece, own, view in zip(pieces, weights, views):
            piece.master = view.view_as(own)
            if elementwise and piece.param.dtype == torch.float:
                piece.param.data = piece.master  # no second copy
        masters.append(Master(key, pieces, weight))
    return masters


def write_back(masters):
    """Copies masters to the parameters, but where they share their memory."""
    pieces = [piece for master in masters for piece in master.pieces if not piece.shares_memory]
    if pieces:
        weights = [piece.param.detach()[:, piece.columns] for piece in pieces]
        torch._foreach_copy_(weights, [piece.master for piece in pieces])
