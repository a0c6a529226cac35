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
from typing import NamedTuple, Optional, Union

import torch
from torch import nn

from lslora_fairseq.errors import listed


class Costs(NamedTuple):
    """What decides how a batch is adapted on a device.

    A block costs a few small matrix products, each a call, and each of its tokens pays for the
    columns of the block's other languages too. A sentence that gathers its own rows pays for a copy
    of them, which is kept for the backward pass.

    Attributes:
        columns: rank columns up to which neighbouring languages of a sorted batch share a block
        waste: what another language may add to a block, in tokens · columns of other languages
        unsorted_columns: rank columns up to which sentences in any order share one block; beyond,
            each gathers
        gathers_below: a sorted batch of more columns than one block gathers, instead of being cut,
            if the largest rank is at most this share of a sentence's tokens; what it keeps is then
            about as much as half of what a layer keeps anyway
    """

    columns: int
    waste: float
    unsorted_columns: int
    gathers_below: float


COSTS = {
    # products cost more than calls (8 to 32 columns were measured alike)
    "cpu": Costs(columns=16, waste=1500, unsorted_columns=64, gathers_below=0),
    # calls cost more than products
    "cuda": Costs(columns=128, waste=math.inf, unsorted_columns=128, gathers_below=0.5),
}


class Block(NamedTuple):
    """Neighbouring sentences of a batch that are adapted by the same matrix products.

    Attributes:
        start, stop: the sentences
        rows: rows of the stacked adapters: a slice shared by all sentences of the block, or
            (sentences, columns) indices, for each its own
        scaling: alpha / rank, for (sentences, time, linears, columns): (sentences, 1, 1, columns)
            with 0 in the columns of languages that are not a sentence's own, or (sentences, 1, 1,
            1); None where it is 1 for all
    """

    start: int
    stop: int
    rows: Union[slice, torch.Tensor]
    scaling: Optional[torch.Tensor]

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
        self.are_scaled = tuple(alpha != rank for alpha, rank in zip(alphas, ranks))
        scaling = torch.tensor(alphas, dtype=torch.float) / torch.tensor(ranks)
        self.register_buffer("scaling", scaling, persistent=False)


class Present:
    """The languages of a batch on one index side, and how their adapters are stacked.

    Args:
        layout: the :class:`AdapterLayout` of the side
        lang_ids: (batch,) language indices
        values: the same as a list where the host knows them; otherwise they cost a transfer from
            the device

    Raises:
        ValueError: an index of no language.

    Attributes:
        languages: the languages (indices), ascending
        owners: (rows,) the language that owns each row of the stack
        stacks: None, or a dict in which every layer keeps its stack for later passes
    """

    def __init__(self, layout, lang_ids, values=None):
        self.layout, self.device = layout, lang_ids.device
        self._ids = lang_ids.tolist() if values is None else values
        self.languages = tuple(sorted(set(self._ids)))
        if self.languages and not 0 <= self.languages[0] <= self.languages[-1] < len(layout.ranks):
            raise ValueError(
                f"language indices {listed(map(str, self.languages))}: the model has adapters of "
                f"{len(layout.ranks)} languages, 0 to {len(layout.ranks) - 1}"
            )
        self.ranks = [layout.ranks[language] for language in self.languages]
        self.is_scaled = any(layout.are_scaled[language] for language in self.languages)
        self.costs = COSTS.get(self.device.type, COSTS["cuda"])
        self.stacks = None

    @cached_property
    def owners(self):
        return self._placed([la for la, r in zip(self.languages, self.ranks) for _ in range(r)])

    @cached_property
    def _row_scaling(self):
        return self.layout.scaling[self.owners]

    def _placed(self, values):
        """A list on the device; the host does not wait."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    def _shared(self, lang_ids, start, stop, rows):
        if len(self.languages) == 1:
            return Block(start, stop, rows, self._own_scaling(lang_ids[start:stop]))
        mine = lang_ids[start:stop].unsqueeze(1) == self.owners[rows]
        return Block(start, stop, rows, (self._row_scaling[rows] * mine)[:, None, None])

    def sorted(self, lang_ids, time):
        """The route of the sentences, sorted by language: blocks of neighbouring languages, or
        rows of its own for each sentence, as :class:`Costs` tells.

        Args:
            lang_ids: (batch,) the batch's language indices in ascending order
            time: tokens of a sentence, padding included
        """
        costs = self.costs
        if sum(self.ranks) > costs.columns and max(self.ranks) <= time * costs.gathers_below:
            return self._gathered(lang_ids)
        count = Counter(self._ids)
        spans = []  # sentences and rank columns of each block
        for language, rank in zip(self.languages, self.ranks):
            sentences, columns = spans[-1] if spans else (0, costs.columns)
            waste = time * (sentences * rank + count[language] * columns)
            if columns + rank > costs.columns or waste > costs.waste:
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
        total = sum(self.ranks)
        if total <= self.costs.unsorted_columns or len(self.languages) == 1:
            block = self._shared(lang_ids, 0, lang_ids.size(0), slice(0, total))
            return Route(self, (block,))
        return self._gathered(lang_ids)

    def _gathered(self, lang_ids):
        rows, scaling = self._table[lang_ids], self._own_scaling(lang_ids)
        return Route(self, (Block(0, lang_ids.size(0), rows, scaling),))

    def _own_scaling(self, lang_ids):
        return self.layout.scaling[lang_ids][:, None, None, None] if self.is_scaled else None

    @cached_property
    def _table(self):
        """(languages, largest rank) the rows of every language in the stack; beyond its own rank,
        and for one that is absent, the row of zeros at the end."""
        total, rows, first = sum(self.ranks), {}, 0
        for language, rank in zip(self.languages, self.ranks):
            rows[language], first = list(range(first, first + rank)), first + rank
        width = max(self.ranks)
        padded = [rows.get(la, []) for la in range(len(self.layout.ranks))]
        return self._placed([row + [total] * (width - len(row)) for row in padded])


class Route(NamedTuple):
    """Which adapters each sentence of a batch uses, on one index side.

    Attributes:
        present: the languages of the batch
        blocks: one :class:`Block` or several
        joined: None, or the route of stacks that end with the adapters that all languages share
    """

    present: Present
    blocks: tuple
    joined: Optional["Route"] = None

    @property
    def gathers(self):
        """Whether each sentence has rows of its own in the stack, which then ends with zeros."""
        return self.blocks[0].gathers

    @property
    def sentences(self):
        """Their number."""
        return self.blocks[-1].stop

    def join(self, shared):
        """Takes the adapters that all languages share, which every token needs, into the one block
        of this route, where it has one: the same products then serve both.

        Args:
            shared: the route of these adapters

        Returns:
            the route with :attr:`joined`
        """
        if len(self.blocks) > 1 or self.gathers:
            return self
        total = sum(self.present.ranks)
        columns = total + sum(shared.present.ranks)
        (block,), (theirs,) = self.blocks, shared.blocks
        scaling = None
        if block.scaling is not None or theirs.scaling is not None:
            parts = [
                _columns(block.scaling, self.present, block.stop, total),
                _columns(theirs.scaling, shared.present, block.stop, columns - total),
            ]
            scaling = torch.cat(parts, -1)
        joined = block._replace(rows=slice(0, columns), scaling=scaling)
        return self._replace(joined=Route(self.present, (joined,)))

    def without_beams(self, batch):
        """The route of a batch from which the beam's copies of a sentence have been dropped.

        Cross-attention projects the encoder output once per sentence while the decoder sees
        ``batch * beam`` hypotheses, the beams of a sentence side by side.

        Args:
            batch: number of sentences left
        """
        step = self.sentences // batch
        if step == 1:
            return self
        (block,) = self.blocks
        rows = block.rows[::step] if block.gathers else block.rows
        scaling = None if block.scaling is None else block.scaling[::step]
        joined = self.joined and self.joined.without_beams(batch)
        return Route(self.present, (Block(0, batch, rows, scaling),), joined)


def _columns(scaling, present, sentences, columns):
    """(sentences, 1, 1, columns) of a block's scaling."""
    if scaling is None:
        scaling = present.layout.scaling.new_ones(1, 1, 1, 1)
    return scaling.expand(sentences, 1, 1, columns)


class LayerPass(NamedTuple):
    """What the linears of a layer find while one forward pass runs through it.

    Attributes:
        routes: index side -> :class:`Route`
        stacks: the layer's adapters -> those of the languages present, and their gradient
        norms: id of an output of a layer norm -> :class:`Normed`, which holds on to it
    """

    routes: dict
    stacks: dict
    norms: dict


class Normed(NamedTuple):
    """An output of a layer norm, and what it is computed from.

    The layer norm keeps its input for the backward pass anyway. Linears that read its output can
    compute that again there, instead of keeping it, too.
    """

    output: torch.Tensor
    input: torch.Tensor
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    eps: float


NO_PASS = LayerPass({}, {}, {})
_pass = ContextVar("lslora_pass", default=NO_PASS)


@contextmanager
def routed(routes):
    """Linears called inside, from this thread, find these routes: index side -> :class:`Route`.

    Nothing of a batch is kept on a module, so that passes of several threads do not meet, and
    nothing outlives a pass, whether it ends well or not.
    """
    token = _pass.set(LayerPass(routes, {}, {}))
    try:
        yield
    finally:
        _pass.reset(token)


def current_pass():
    """The :class:`LayerPass` of the innermost :func:`routed` in this thread."""
    return _pass.get()
