"""Which language each sentence of a batch uses, prepared once per batch for all layers.

All languages of a site are stacked along the rank dimension: language 0 owns the first
``ranks[0]`` rows of ``lora_A`` and ``lora_B``, language 1 the next ``ranks[1]``, and so on. The
stacking is the same at every site, so the rows a sentence needs are looked up once per batch.
"""

from typing import NamedTuple

import torch
from torch import nn


class Route(NamedTuple):
    """The adapter rows of every sentence of a batch, for one index side.

    Attributes:
        rows: (batch, max_rank) row numbers in the stacked factors; rows beyond a language's own
            rank repeat a row of its own
        scaling: (batch, max_rank) alpha / rank, and 0 beyond a language's own rank
    """

    rows: torch.Tensor
    scaling: torch.Tensor

    def reduced_to(self, batch):
        """The route of a batch from which the beam's copies of a sentence have been dropped.

        Cross-attention projects the encoder output once per sentence while the decoder sees
        ``batch * beam`` hypotheses, the beams of a sentence side by side.
        """
        step = self.rows.size(0) // batch
        return self if step == 1 else Route(self.rows[::step], self.scaling[::step])


class AdapterLayout(nn.Module):
    """How the adapters of all languages are stacked; shared by every site of a model.

    Args:
        ranks: rank of each language, in the inventory's order
        alphas: alpha of each language; the adapter is scaled by alpha / rank
    """

    def __init__(self, ranks, alphas):
        super().__init__()
        self.ranks = tuple(ranks)
        self.total_rank = sum(ranks)
        self.offsets = tuple(sum(ranks[:i]) for i in range(len(ranks)))
        rank = torch.tensor(ranks).unsqueeze(1)
        column = torch.arange(max(ranks)).unsqueeze(0)
        rows = torch.tensor(self.offsets).unsqueeze(1) + torch.minimum(column, rank - 1)
        scaling = torch.tensor(alphas, dtype=torch.float).unsqueeze(1) / rank
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("scaling", scaling * (column < rank), persistent=False)

    def language_rows(self, language):
        """The slice of rows that a language (its index) owns."""
        start = self.offsets[language]
        return slice(start, start + self.ranks[language])

    def route(self, lang_ids):
        """The route of a batch.

        Args:
            lang_ids: (batch,) language indices, or None where the model has no site of that side
        """
        return None if lang_ids is None else Route(self.rows[lang_ids], self.scaling[lang_ids])


class RouteSlot:
    """Where the linears of a layer find the routes of the batch that passes through it now.

    A layer fills its slot at the start of every forward pass from an argument, so a forward pass
    repeated by activation checkpointing sees the routes of its own batch.
    """

    def __init__(self):
        self.routes = {}
