"""The adapters of all languages in one layer.

A language owns one matrix per layer and index side: the factors A and B of all sites side by side,
so that an optimizer meets few tensors, and none of a language that is absent from the update.
"""

import math

import torch
from torch import nn

from lslora_fairseq.lora.plan import SIDES, adapter_columns

PRUNED = "pruned"  # what a state dict calls the entries that a mask removes


class LayerAdapters(nn.Module):
    """One parameter ``lora_<code>`` (rank, features) per language, for the sites of one layer.

    Its first columns are A (rank, in) of every site, the others B (rank, out). A is
    Kaiming-uniform (a = √5) and B zero: a fresh adapter changes nothing. The buffer ``mask``
    (rows of all languages, features) is False where an entry is pruned; call
    :meth:`refresh_pruned` after changing it. A state dict holds it as ``pruned``, 1 where an entry
    is pruned: the mean of several, rounded down as in fairseq's averaging of checkpoints, is what
    is pruned in all of them.

    Args:
        sites: the sites of one layer that one side indexes
        codes: the languages, in the inventory's order
        ranks: rank of each language
        like: a tensor that sets dtype and device
        side_weights: the layer's :class:`SideWeights` if it learns how much of them it wants

    Attributes:
        columns: module name of a site -> (slice of A, slice of B)
        width_A: number of columns that belong to A
    """

    def __init__(self, sites, codes, ranks, like, side_weights=None):
        super().__init__()
        self.__dict__["side_weights"] = side_weights  # the layer owns it, as a submodule
        self.sites, self.ranks = tuple(sites), tuple(ranks)
        self.side = sites[0].side
        self.columns, self.width_A = adapter_columns(sites)
        features = self.width_A + sum(site.out_features for site in sites)
        self.offsets = tuple(sum(ranks[:i]) for i in range(len(ranks)))
        self.names = tuple(f"lora_{code}" for code in codes)
        for name, rank in zip(self.names, ranks):
            weight = like.new_zeros(rank, features)
            for columns, _ in self.columns.values():
                nn.init.kaiming_uniform_(weight[:, columns], a=math.sqrt(5))
            self.register_parameter(name, nn.Parameter(weight))
        self._tag()
        mask = torch.ones(sum(ranks), features, dtype=torch.bool, device=like.device)
        self.register_buffer("mask", mask, persistent=False)
        self.is_pruned = False

    def _tag(self):
        for language, name in enumerate(self.names):
            getattr(self, name).param_group = Adapter(self, language)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tag()  # copies of parameters lose their attributes

    def weight(self, language):
        """The parameter of a language (its index): (rank, features)."""
        return getattr(self, self.names[language])

    def rows(self, language):
        """The rows of :attr:`mask` that a language owns."""
        start = self.offsets[language]
        return slice(start, start + self.ranks[language])

    def share(self):
        """How much of these adapters the layer wants: p of method, section 3, or None."""
        return None if self.side_weights is None else self.side_weights.share(self.side)

    def refresh_pruned(self):
        """Takes note of whether any entry is pruned, after the mask changed."""
        self.is_pruned = not bool(self.mask.all())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + PRUNED] = self.mask.logical_not().to(torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *args):
        own = {key: w for key, w in state_dict.items() if key != prefix + PRUNED}
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, *args)
        pruned = state_dict.get(prefix + PRUNED)
        if pruned is not None:
            self.mask.copy_(pruned < 1)  # a mean of several is 1 where all are
        elif strict:
            missing.append(prefix + PRUNED)
        self.refresh_pruned()

    def pruned_rows(self, languages):
        """(rows, features) of their stack; True marks a pruned entry."""
        rows = self.mask.split(self.ranks)
        return torch.cat([rows[language] for language in languages]).logical_not_()


class SideWeights(nn.Module):
    """How much a layer wants of its source- and of its target-indexed adapters (method, section 3).

    The parameter ``logits`` (1, 2) is the w of (p_src, p_tgt) = softmax(w) and starts at 0. To an
    optimizer it looks like an adapter that belongs to no language and has no site to prune.
    """

    side, sites, is_pruned = None, (), False
    columns, width_A = {"": (slice(None),)}, 2

    def __init__(self, like):
        super().__init__()
        self.logits = nn.Parameter(like.new_zeros(1, 2))
        self._tag()
        mask = torch.ones(1, 2, dtype=torch.bool, device=like.device)
        self.register_buffer("mask", mask, persistent=False)

    def _tag(self):
        self.logits.param_group = Adapter(self, None)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tag()

    def share(self, side):
        """p of one side, a scalar tensor."""
        return share_of(self.logits, side)

    def weight(self, _):
        return self.logits

    def rows(self, _):
        return slice(None)

    def refresh_pruned(self):
        pass


def share_of(logits, side):
    """p of one side, a scalar tensor, of a layer's w (1, 2)."""
    return logits.softmax(-1)[0, SIDES.index(side)]


class Adapter:
    """One language's adapter in one layer, as an optimizer sees it.

    It is kept on the parameter under the attribute ``param_group``: fairseq's fp16 optimizer
    replaces parameters by fp32 copies, and this is one of the few attributes that it carries over.
    """

    def __init__(self, layer, language):
        self.layer, self.language = layer, language

    @property
    def side(self):
        return self.layer.side

    @property
    def mask(self):
        """(rank, features) bool; False marks a pruned entry."""
        return self.layer.mask[self.layer.rows(self.language)]

    @property
    def weight(self):
        """The parameter inside the model (fp16 where the optimizer holds an fp32 copy)."""
        return self.layer.weight(self.language)

    @classmethod
    def of(cls, param):
        """The adapter of a parameter or of its fp32 copy; None for any other parameter."""
        adapter = getattr(param, "param_group", None)
        return adapter if isinstance(adapter, cls) else None
