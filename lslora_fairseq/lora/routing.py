"""Which language each sentence of a batch uses, prepared once per batch for all layers.

The adapters of the languages present are stacked along the rank dimension, in ascending order of
the languages. The stacking is the same in every layer, so that the rows of a sentence are looked
up once; languages absent from the batch take no part.
"""

import math
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import NamedTuple, Union

import torch
from torch import nn

from lslora_fairseq.errors import listed

# A sorted batch is cut into blocks of neighbouring languages. A block costs a few small matrix
# products, and every token pays for the columns of the block's other languages too. So a language
# joins a block up to this many rank columns (8 to 32 were measured alike), and on a CPU, where
# products cost more than calls, while what that adds of tokens · other languages' columns is small.
BLOCK_RANK = 16
BLOCK_WASTE = {"cpu": 1500}
# Rank columns up to which unsorted sentences share one block; beyond, each gathers its own rows.
UNSORTED_RANK = 64


class Block(NamedTuple):
    """Neighbouring sentences of a batch that are adapted by the same matrix products.

    Attributes:
        start, stop: the sentences
        rows: rows of the stacked adapters: a slice shared by all sentences of the block, or
            (sentences, columns) indices, for each its own
        scaling: (sentences, 1, columns) alpha / rank in the columns of a sentence's own language,
            0 in the others
    """

    start: int
    stop: int
    rows: Union[slice, torch.Tensor]
    scaling: torch.Tensor

    @property
    def gathers(self):
        """Whether each sentence has rows of its own."""
        return not isinstance(self.rows, slice)


class AdapterLayout(nn.Module):
    """Ranks and scaling of all languages; the same in every layer of a model.

    The adapters that all languages share are those of one language that every sentence has.

    Args:
        ranks: rank of each language, in the inventory's order
        alphas: alpha of each language; the adapter is scaled by alpha / rank
    """

    def __init__(self, ranks, alphas):
        super().__init__()
        self.ranks = tuple(ranks)
        scaling = torch.tensor(alphas, dtype=torch.float) / torch.tensor(ranks)
        self.register_buffer("scaling", scaling, persistent=False)


class Present:
    """The languages of a batch on one index side, and how their adapters are stacked.

    Args:
        layout: the :class:`AdapterLayout` of the side
        lang_ids: (batch,) language indices
        values: the same as a list where the host knows them; otherwise they cost the batch's only
            transfer from the device

    Raises:
        ValueError: an index of no language.

    Attributes:
        languages: the languages (indices), ascending
        owners: (rows,) the language that owns each row of the stack
        stacks: None, or a dict in which every layer keeps its stack for later passes
    """

    def __init__(self, layout, lang_ids, values=None):
        self.layout = layout
        self._ids = lang_ids.tolist() if values is None else values
        self.languages = tuple(sorted(set(self._ids)))
        if self.languages and not 0 <= self.languages[0] <= self.languages[-1] < len(layout.ranks):
            raise ValueError(
                f"language indices {listed(map(str, self.languages))}: the model has adapters of "
                f"{len(layout.ranks)} languages, 0 to {len(layout.ranks) - 1}"
            )
        self.ranks = [layout.ranks[language] for language in self.languages]
        if len(self.languages) == 1:  # a tensor of one value needs no transfer to the device
            self.owners = lang_ids.new_full(self.ranks, self.languages[0], dtype=torch.long)
        else:
            owners = [la for la, rank in zip(self.languages, self.ranks) for _ in range(rank)]
            self.owners = torch.tensor(owners, device=lang_ids.device)
        self.row_scaling = layout.scaling[self.owners]
        self.stacks = None

    def _shared(self, lang_ids, start, stop, rows):
        mine = lang_ids[start:stop].unsqueeze(1) == self.owners[rows]
        return Block(start, stop, rows, (self.row_scaling[rows] * mine).unsqueeze(1))

    def sorted(self, lang_ids, time):
        """The route of the sentences, sorted by language: blocks of neighbouring languages.

        Args:
            lang_ids: (batch,) the batch's language indices in ascending order
            time: tokens of a sentence, padding included
        """
        allowed = BLOCK_WASTE.get(lang_ids.device.type, math.inf)
        count = Counter(self._ids)
        spans = []  # sentences and rank columns of each block
        for language, rank in zip(self.languages, self.ranks):
            sentences, columns = spans[-1] if spans else (0, BLOCK_RANK)
            waste = time * (sentences * rank + count[language] * columns)
            if columns + rank > BLOCK_RANK or waste > allowed:
                spans.append((count[language], rank))
            else:
                spans[-1] = (sentences + count[language], columns + rank)
        blocks, start, first = [], 0, 0
        for sentences, columns in spans:
            rows = slice(first, first + columns)
            blocks.append(self._shared(lang_ids, start, start + sentences, rows))
            start, first = start + sentences, rows.stop
        return Route(self, tuple(blocks))

    def unsorted(self, lang_ids):
        """The route of sentences in any order: one block.

        They share the rows of all languages while these are few, or those of the only one.
        Otherwise each has rows of its own and pays for the largest rank.

        Args:
            lang_ids: (batch,) language indices, all of which are present here
        """
        total, batch = len(self.owners), lang_ids.size(0)
        if total <= UNSORTED_RANK or len(self.languages) == 1:
            return Route(self, (self._shared(lang_ids, 0, batch, slice(0, total)),))
        first, rank = self._table
        column = torch.arange(max(self.ranks), device=lang_ids.device)
        own = rank[lang_ids].unsqueeze(1)
        # beyond a language's own rank: a row of its own again, scaled by 0
        rows = first[lang_ids].unsqueeze(1) + torch.minimum(column, own - 1)
        scaling = self.layout.scaling[lang_ids].unsqueeze(1) * (column < own)
        return Route(self, (Block(0, batch, rows, scaling.unsqueeze(1)),))

    @cached_property
    def _table(self):
        """First row in the stack and rank of every language, 0 for an absent one."""
        first, rank = torch.zeros(2, len(self.layout.ranks), dtype=torch.long)
        languages, ranks = torch.tensor(self.languages), torch.tensor(self.ranks)
        first[languages], rank[languages] = ranks.cumsum(0) - ranks, ranks
        return first.to(self.owners.device), rank.to(self.owners.device)


class Route(NamedTuple):
    """Which adapters each sentence of a batch uses, on one index side."""

    present: Present
    blocks: tuple

    def without_beams(self, batch):
        """The route of a batch from which the beam's copies of a sentence have been dropped.

        Cross-attention projects the encoder output once per sentence while the decoder sees
        ``batch * beam`` hypotheses, the beams of a sentence side by side.

        Args:
            batch: number of sentences left
        """
        step = self.blocks[-1].stop // batch
        if step == 1:
            return self
        (block,) = self.blocks
        rows = block.rows[::step] if block.gathers else block.rows
        return Route(self.present, (Block(0, batch, rows, block.scaling[::step]),))


class LayerPass(NamedTuple):
    """What the linears of a layer find while one forward pass runs through it.

    Attributes:
        routes: index side -> :class:`Route`
        stacks: the layer's adapters -> those of the languages present, and their gradient
    """

    routes: dict
    stacks: dict


NO_PASS = LayerPass({}, {})
_pass = ContextVar("lslora_pass", default=NO_PASS)


@contextmanager
def routed(routes):
    """Linears called inside, from this thread, find these routes: index side -> :class:`Route`.

    Nothing of a batch is kept on a module, so that passes of several threads do not meet, and
    nothing outlives a pass, whether it ends well or not.
    """
    token = _pass.set(LayerPass(routes, {}))
    try:
        yield
    finally:
        _pass.reset(token)


def current_pass():
    """The :class:`LayerPass` of the innermost :func:`routed` in this thread."""
    return _pass.get()
