"""A torch optimizer that steps every language on its own.

A language has one parameter in each layer. A plain optimizer would still move a language that had
no sentence in the update, by momentum and weight decay, wherever fairseq turns a missing gradient
into zeros. Here an inner optimizer works on fp32 *masters*, one for each language and index side;
a language without a gradient is not shown to it at all. Its weights, its moments and its step
count stay as they are, bit for bit, and what one language does never touches the state of another.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.adapters import Adapter
from lslora_fairseq.pruning import masks


@dataclass
class Piece:
    """Columns of one language's parameter in one layer.

    Attributes:
        param: index of the parameter
        adapter: the parameter's :class:`Adapter`
        columns: a slice of the parameter's columns
        master: (rank, columns) fp32 view into the master it belongs to
    """

    param: int
    adapter: Adapter
    columns: slice
    master: torch.Tensor = None

    @property
    def mask(self):
        """(rank, columns) bool, a view; False marks a pruned entry."""
        return self.adapter.mask[:, self.columns]

    def part(self, factor):
        """Which of these columns belong to factor ``A`` or ``B``."""
        first = self.columns.start or 0
        width = self.master.size(1)
        border = min(max(self.adapter.layer.width_A - first, 0), width)
        return slice(0, border) if factor == "A" else slice(border, width)


class LanguageOptimizer(torch.optim.Optimizer):
    """Wraps an inner optimizer; see the module's text.

    Args:
        params: the parameters of :class:`LayerAdapters` and :class:`SideWeights`, or fp32 copies
            of them
        build_inner: builds the inner torch optimizer from a list of parameters
        elementwise: the inner optimizer treats every entry alike whatever its tensor; all pieces
            of a language and side are then flattened into one master. Otherwise (Adafactor's row
            and column statistics) each factor of each site is a matrix of its own.
        settings: the pruning options, saved with the state; plain values by name

    Raises:
        ConfigError: a parameter is not an adapter, or was flattened by fairseq's fp16 optimizer.
    """

    disable_mem_eff_fp16_loading_hack = True
    supports_memory_efficient_fp16 = True  # the inner optimizer sees fp32 masters only
    supports_flat_params = False

    def __init__(self, params, build_inner, elementwise, settings):
        params = list(params)
        self.adapters = [Adapter.of(p) for p in params]
        if None in self.adapters:
            raise ConfigError(
                "a pruned_* optimizer trains adapters, and was given another or a flattened "
                "parameter: the --arch must be one of lslora_*, and the option "
                "--fp16-no-flatten-grads on"
            )
        self.settings = dict(settings)
        self._group(params, elementwise)
        self.inner = build_inner([master for master, _, _ in self.masters])
        hyper = {k: v for k, v in self.inner.param_groups[0].items() if k != "params"}
        super().__init__(params, hyper)
        self.refresh_masks()

    def _group(self, params, elementwise):
        """Builds the masters: a list of (master, its pieces, its (side, language))."""
        groups = defaultdict(list)
        for number, adapter in enumerate(self.adapters):
            key = (adapter.side, adapter.language)
            if elementwise:
                groups[key].append(Piece(number, adapter, slice(None)))
                continue
            for factors in adapter.layer.columns.values():
                for columns in factors:
                    groups[(*key, number, columns.start)] = [Piece(number, adapter, columns)]
        self.masters = []
        for key, pieces in groups.items():
            weights = [params[p.param].detach()[:, p.columns].float() for p in pieces]
            if elementwise:
                master = nn.Parameter(torch.cat([w.flatten() for w in weights]))
                views = master.detach().split([w.numel() for w in weights])
            else:
                master = nn.Parameter(weights[0].clone())
                views = [master.detach()]
            for piece, weight, view in zip(pieces, weights, views):
                piece.master = view.view_as(weight)
                if elementwise and params[piece.param].dtype == torch.float:
                    params[piece.param].data = piece.master  # no second copy
            self.masters.append((master, pieces, key[:2]))

    @property
    def _params(self):
        return self.param_groups[0]["params"]

    def present(self):
        """The (side, language) pairs that have a gradient in this update.

        One transfer from the device for all of them. Gradients are the same on every process
        once reduced, and so is the answer.
        """
        given = [(p.grad, a) for p, a in zip(self._params, self.adapters) if p.grad is not None]
        if not given:
            return set()
        largest = torch._foreach_norm([grad for grad, _ in given], float("inf"))
        return {
            (adapter.side, adapter.language)
            for size, (_, adapter) in zip(torch.stack(largest).tolist(), given)
            if size != 0
        }

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the languages that have a gradient; *closure* is not supported."""
        for group in self.inner.param_groups:
            group.update({k: v for k, v in self.param_groups[0].items() if k != "params"})
        present = self.present()
        moved = [number for number, (_, _, key) in enumerate(self.masters) if key in present]
        for number in moved:
            master, pieces, _ = self.masters[number]
            grads = [self._gradient(piece).flatten() for piece in pieces]
            master.grad = torch.cat(grads).view_as(master)
        self.inner.step()
        for number in moved:
            master, pieces, _ = self.masters[number]
            master.grad = None
            self._clear_pruned(number)
            self._write_back(pieces)

    def _write_back(self, pieces):
        """Copies masters to the parameters that do not share their memory."""
        for piece in pieces:
            weight = self._params[piece.param][:, piece.columns]
            if weight.data_ptr() != piece.master.data_ptr():
                weight.copy_(piece.master)

    def _gradient(self, piece):
        """(rank, columns) fp32; zeros in a layer where the language got none."""
        grad = self._params[piece.param].grad
        return torch.zeros_like(piece.master) if grad is None else grad[:, piece.columns].float()

    def _clear_pruned(self, number):
        """Zeroes the pruned entries of a master and of its state."""
        pruned = self._pruned[number]
        if pruned is None:
            return
        master = self.masters[number][0]
        master.masked_fill_(pruned, 0)
        for value in self.inner.state.get(master, {}).values():
            if torch.is_tensor(value) and value.shape == master.shape:
                value.masked_fill_(pruned, 0)

    def refresh_masks(self):
        """Takes the model's masks over, after they changed or were loaded."""
        for layer in {adapter.layer for adapter in self.adapters}:
            layer.refresh_pruned()
        self._pruned = []
        for master, pieces, _ in self.masters:
            pruned = None
            if any(piece.adapter.layer.is_pruned for piece in pieces):
                pruned = torch.cat([~p.mask.flatten() for p in pieces]).view_as(master)
            self._pruned.append(pruned)

    def scopes(self, scope, target):
        """What shares one threshold (method, section 4); weights of sides are never pruned.

        Args:
            scope: ``language``: all entries of a language; ``layer``: all languages of a layer
            target: ``B`` or ``AB``; A and B never share a threshold, they start on other scales

        Returns:
            dict of scope key -> pairs of weights (fp32 master) and mask, (rank, columns) views
        """
        groups = defaultdict(list)
        for piece in (piece for _, pieces, _ in self.masters for piece in pieces):
            if not piece.adapter.layer.sites:
                continue
            site = piece.adapter.layer.sites[0]
            key = piece.adapter.language if scope == "language" else (site.stack, site.layer)
            for factor in target:
                part = piece.part(factor)
                groups[factor, key].append((piece.master[:, part], piece.mask[:, part]))
        return groups

    @torch.no_grad()
    def prune(self, sparsity, scope, target):
        """Removes the smallest entries of each scope until *sparsity* of it is gone."""
        for pairs in self.scopes(scope, target).values():
            masks.prune(*zip(*pairs), sparsity)
        self.refresh_masks()
        for number in range(len(self.masters)):
            self._clear_pruned(number)
        for param, adapter in zip(self._params, self.adapters):
            param.masked_fill_(~adapter.mask, 0)
            adapter.weight.masked_fill_(~adapter.mask, 0)

    def state_dict(self):
        """The inner optimizer's state, the fp32 masters and the settings, all in plain values."""
        state = self.inner.state_dict()
        state["masters"] = [master.detach() for master, _, _ in self.masters]
        state["settings"] = dict(self.settings)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Restores the state exactly, fp32 masters included.

        Raises:
            ConfigError: the state was made with other pruning settings, or for other adapters.
        """
        saved = state_dict.get("settings")
        if saved is None:
            raise ConfigError(
                "the checkpoint's optimizer state is not that of a pruned_* optimizer: add "
                "--reset-optimizer to start with a fresh one (and leave out --finetune-from-model)"
            )
        changed = [
            f"--{name.replace('_', '-')} was {saved.get(name)}, now {value}"
            for name, value in self.settings.items()
            if saved.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"the pruning schedule changed on resume ({'; '.join(changed)}): what is pruned "
                "already followed the old one; resume with the old options, or start a new run "
                "in another --save-dir"
            )
        shapes = [tuple(m.shape) for m in state_dict["masters"]]
        if shapes != [tuple(master.shape) for master, _, _ in self.masters]:
            raise ConfigError(
                "the checkpoint's optimizer state belongs to other adapters: resume with its "
                "tiers, ranks and sites, or add --reset-optimizer (and leave out "
                "--finetune-from-model)"
            )
        self.inner.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        hyper = {k: v for k, v in self.inner.param_groups[0].items() if k != "params"}
        self.param_groups[0].update(hyper)
        for (master, pieces, _), weights in zip(self.masters, state_dict["masters"]):
            master.copy_(weights)
            self._write_back(pieces)
        self.refresh_masks()
