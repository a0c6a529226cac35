"""Which entries of the masters are pruned, and what takes part (method, section 4)."""

from collections import defaultdict

import torch

from lslora_fairseq.lora.plan import SIDES
from lslora_fairseq.pruning import masks


class Pruner:
    """Keeps the masks of all adapters, in the model and in the masters.

    Magnitudes of what was never updated say nothing: all of B is zero there. A language's side is
    *untouched* as long as its B is zero in every layer and none of its entries is pruned. It takes
    no part in any scope until its first update. Weights and masks alone tell, so that a resumed
    run, a second stage and a run on averaged weights see the same as one that never stopped.
    Only adapters of languages are pruned: not what all languages share, which is there once, and
    neither weights of sides.

    Args:
        masters: list of :class:`~lslora_fairseq.optim.masters.Master`
        scope: ``language``: all entries of a language share one threshold; ``layer``: those of
            all languages in a layer
        target: ``B`` or ``AB``; A and B never share a threshold, they start on other scales

    Attributes:
        untouched: set of the (side, language) never updated
        has_newcomers: some were updated for the first time since the last :meth:`prune`
        sparsity: share of the entries of *target* that are pruned, in [0, 1], counted in the masks
            of all that is touched; 0 as long as nothing is
    """

    def __init__(self, masters, scope, target):
        self.masters, self.scope, self.target = masters, scope, target
        self._pieces = defaultdict(list)  # of what can be pruned
        for master in masters:
            for piece in master.pieces:
                if piece.adapter.side in SIDES:
                    self._pieces[master.key].append(piece)
        self.has_newcomers = False
        self.refresh()

    def refresh(self):
        """Takes over masks and weights that were changed or loaded."""
        self._refresh_layers()
        self.untouched = self._find_untouched(self._pieces)
        self._take_masks()

    def note(self, updated):
        """Takes note of an update; transfers from the device only at a side's first one.

        Args:
            updated: set of (side, language)
        """
        first = self.untouched & updated
        if first:
            touched = first - self._find_untouched(first)
            self.untouched -= touched
            self.has_newcomers |= bool(touched)
            self._sum_up()

    @torch.no_grad()
    def prune(self, sparsity):
        """Removes the smallest entries of each scope until *sparsity* of it is gone."""
        self.untouched = self._find_untouched(self._pieces)
        for pieces in self._scopes().values():
            masks.prune(*zip(*pieces), sparsity)
        self._refresh_layers()
        self._take_masks()
        self.has_newcomers = False

    def untouched_codes(self):
        """dict of side -> codes of the languages that are untouched there."""
        found = defaultdict(list)
        for key, pieces in self._pieces.items():
            if key in self.untouched:
                adapter = pieces[0].adapter
                named = adapter.layer.named_parameters(recurse=False)
                code = next(name for name, param in named if param is adapter.weight)
                found[key[0]].append(code.removeprefix("lora_"))
        return dict(found)

    def _scopes(self):
        """factor and scope -> pairs of fp32 weights and masks, (rank, columns) views."""
        groups = defaultdict(list)
        for key, pieces in self._pieces.items():
            if key in self.untouched:
                continue
            for piece in pieces:
                site = piece.adapter.layer.sites[0]
                where = key[1] if self.scope == "language" else (site.stack, site.layer)
                for factor in self.target:
                    part = piece.part(factor)
                    groups[factor, where].append((piece.master[:, part], piece.mask[:, part]))
        return groups

    def _find_untouched(self, keys):
        """Those of *keys* that are untouched."""
        owners, marks = [], []
        for key in keys:
            for piece in self._pieces[key]:
                owners.append(key)
                marks.append(piece.master[:, piece.part("B")].any())
                if piece.adapter.layer.is_pruned:
                    owners.append(key)
                    marks.append(~piece.mask.all())
        return set(keys) - {key for key, mark in zip(owners, _read(marks)) if mark}

    def _refresh_layers(self):
        for layer in {piece.adapter.layer for pieces in self._pieces.values() for piece in pieces}:
            layer.refresh_pruned()

    def _take_masks(self):
        """Hands the masks to the masters and counts what is pruned of each language's side."""
        for master in self.masters:
            master.refresh_pruned()
        self._removed, self._entries = defaultdict(int), defaultdict(int)
        counts, owners = [], []
        for key, pieces in self._pieces.items():
            for piece in pieces:
                for factor in self.target:
                    mask = piece.mask[:, piece.part(factor)]
                    self._entries[key] += mask.numel()
                    if piece.adapter.layer.is_pruned:
                        counts.append((~mask).sum())
                        owners.append(key)
        for key, count in zip(owners, _read(counts)):
            self._removed[key] += count
        self._sum_up()

    def _sum_up(self):
        touched = [key for key in self._pieces if key not in self.untouched]
        entries = sum(self._entries[key] for key in touched)
        self.sparsity = sum(self._removed[key] for key in touched) / max(entries, 1)


def _read(scalars):
    """Values of scalar tensors, in one transfer from the device."""
    return torch.stack(scalars).tolist() if scalars else []
