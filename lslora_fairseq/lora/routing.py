"""Which language each sentence of a batch uses, prepared once per batch for all layers.

All languages of a site are stacked along the rank dimension: language 0 owns the first
``ranks[0]`` rows of ``lora_A`` and ``lora_B``, language 1 the next ``ranks[1]``, and so on. The
stacking is the same at every site, so the rows that a batch needs are looked up once.
"""

from typing import NamedTuple

import torch
from torch import nn

# Rank columns of a shared block. A block costs a few small matrix products, a column of another
# language as much as one of the sentence's own; 8 to 32 columns were measured alike.
BLOCK_RANK = 16


class Block(NamedTuple):
    """Neighbouring sentences of a batch that are adapted by the same matrix products.

    Attributes:
        start, stop: the sentences
        rows: rows of the stacked factors: (columns,) shared by all sentences of the block, or
            (sentences, columns) for each its own
        scaling: (sentences, 1, columns) alpha / rank in the columns of a sentence's own language,
            0 in the others
    """

    start: int
    stop: int
    rows: torch.Tensor
    scaling: torch.Tensor


class AdapterLayout(nn.Module):
    """How the adapters of all languages are stacked; shared by every site of a model.

    A route is the tuple of a batch's :class:`Block`, for one index side.

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
        # beyond a language's own rank: a row of its own again, scaled by 0
        rows = torch.tensor(self.offsets).unsqueeze(1) + torch.minimum(column, rank - 1)
        scaling = torch.tensor(alphas, dtype=torch.float).unsqueeze(1) / rank
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("scaling", scaling * (column < rank), persistent=False)

    def language_rows(self, language):
        """The slice of rows that a language (its index) owns."""
        start = self.offsets[language]
        return slice(start, start + self.ranks[language])

    def gathered(self, lang_ids):
        """The route of sentences in any order: one block in which each has rows of its own.

        It needs no transfer from the device, and pays for the largest rank in every sentence.

        Args:
            lang_ids: (batch,) language indices
        """
        scaling = self.scaling[lang_ids].unsqueeze(1)
        return (Block(0, lang_ids.size(0), self.rows[lang_ids], scaling),)

    def sorted(self, lang_ids):
        """The route of sentences sorted by language: blocks of neighbouring languages.

        It makes one transfer from the device. Languages of unequal ranks pay for their own alone.

        Args:
            lang_ids: (batch,) language indices in ascending order
        """
        blocks, languages, start, columns = [], [], 0, 0
        ids = lang_ids.tolist()
        for stop, (language, following) in enumerate(zip(ids, [*ids[1:], None]), 1):
            if language == following:
                continue
            languages.append(language)
            columns += self.ranks[language]
            if following is None or columns + self.ranks[following] > BLOCK_RANK:
                blocks.append(self._shared_block(start, stop, languages, lang_ids))
                languages, start, columns = [], stop, 0
        return tuple(blocks)

    def _shared_block(self, start, stop, languages, lang_ids):
        rows, owners = [], []
        for language in languages:
            own = self.language_rows(language)
            rows += range(own.start, own.stop)
            owners += [language] * self.ranks[language]
        rows, owners = torch.tensor([rows, owners], device=lang_ids.device)
        mine = lang_ids[start:stop].unsqueeze(1) == owners
        return Block(start, stop, rows, (self.scaling[owners, 0] * mine).unsqueeze(1))


def without_beams(route, batch):
    """The route of a batch from which the beam's copies of a sentence have been dropped.

    Cross-attention projects the encoder output once per sentence while the decoder sees
    ``batch * beam`` hypotheses, the beams of a sentence side by side.

    Args:
        route: a gathered route of as many or more sentences
        batch: number of sentences left
    """
    step = route[-1].stop // batch
    if step == 1:
        return route
    (block,) = route
    return (Block(0, batch, block.rows[::step], block.scaling[::step]),)


class RouteSlot:
    """Where the linears of a layer find the routes of the batch that passes through it now.

    A layer fills its slot at the start of every forward pass from an argument, so a forward pass
    repeated by activation checkpointing sees the routes of its own batch.
    """

    def __init__(self):
        self.routes = {}
