"""A torch optimizer that steps every language on its own.

The adapters of all languages are stacked in one tensor per site, so a plain optimizer would move
a language that had no sentence in the update, by momentum and weight decay. Here an inner
optimizer works on fp32 *masters*, one for each language and index side; a language without a
gradient is not shown to it at all. Its weights, its moments and its step count stay as they are,
bit for bit, and what one language does never touches the state of another.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.linear import AdapterFactor
from lslora_fairseq.lora.plan import SIDES
from lslora_fairseq.pruning import masks


@dataclass
class Piece:
    """One language's rows of one stacked factor.

    Attributes:
        param: index of the stacked parameter
        language: index of the language
        factor: the parameter's :class:`AdapterFactor`
        rows: its rows in the stacked parameter
        master: (rank, features) fp32 view into the master it belongs to
    """

    param: int
    language: int
    factor: AdapterFactor
    rows: slice
    master: torch.Tensor = None


class LanguageOptimizer(torch.optim.Optimizer):
    """Wraps an inner optimizer; see the module's text.

    Args:
        params: stacked factors ``lora_A`` and ``lora_B``, or fp32 copies of them
        build_inner: builds the inner torch optimizer from a list of parameters
        elementwise: the inner optimizer treats every entry alike whatever its tensor; all pieces
            of a language and side are then flattened into one master. Otherwise (Adafactor's row
            and column statistics) each piece is a matrix of its own.
        settings: the pruning options, saved with the state; plain values by name

    Raises:
        ConfigError: a parameter is not an adapter, or was flattened by fairseq's fp16 optimizer.
    """

    disable_mem_eff_fp16_loading_hack = True
    supports_memory_efficient_fp16 = True  # the inner optimizer sees fp32 masters only
    supports_flat_params = False

    def __init__(self, params, build_inner, elementwise, settings):
        params = list(params)
        factors = [AdapterFactor.of(p) for p in params]
        if None in factors:
            raise ConfigError(
                "a pruned_* optimizer trains adapters, and was given another or a flattened "
                "parameter: with --fp16 add --fp16-no-flatten-grads; the --arch must be one of "
                "lslora_*"
            )
        self.settings = dict(settings)
        self.layout = factors[0].linear.layout
        self.pieces = [
            Piece(i, language, factor, self.layout.language_rows(language))
            for i, factor in enumerate(factors)
            for language in range(len(self.layout.ranks))
        ]
        self._group(params, elementwise)
        self.inner = build_inner([master for master, _, _ in self.masters])
        hyper = {k: v for k, v in self.inner.param_groups[0].items() if k != "params"}
        super().__init__(params, hyper)
        self.refresh_masks()

    def _group(self, params, elementwise):
        """Builds the masters: a list of (master, its pieces, its (side, language))."""
        groups = defaultdict(list)
        for number, piece in enumerate(self.pieces):
            key = (piece.factor.linear.site.side, piece.language)
            groups[key if elementwise else (*key, number)].append(piece)
        self.masters = []
        for key, pieces in groups.items():
            weights = [params[p.param].detach()[p.rows].float() for p in pieces]
            if elementwise:
                master = nn.Parameter(torch.cat([w.flatten() for w in weights]))
                views = master.detach().split([w.numel() for w in weights])
            else:
                master = nn.Parameter(weights[0].clone())
                views = [master.detach()]
            for piece, weight, view in zip(pieces, weights, views):
                piece.master = view.view_as(weight)
            self.masters.append((master, pieces, key[:2]))

    @property
    def _params(self):
        return self.param_groups[0]["params"]

    def present(self):
        """The (side, language) pairs that have a gradient in this update.

        One transfer from the device for all of them. Gradients are the same on every process
        once reduced, and so is the answer.
        """
        params, layout = self._params, self.layout
        device = params[0].device
        language_of_row = torch.repeat_interleave(
            torch.arange(len(layout.ranks)), torch.tensor(layout.ranks)
        ).to(device)
        touched = torch.zeros(len(SIDES), layout.total_rank, dtype=torch.bool, device=device)
        for param, factor in zip(params, map(AdapterFactor.of, params)):
            if param.grad is not None:
                side = SIDES.index(factor.linear.site.side)
                touched[side] |= (param.grad != 0).any(dim=1)
        counts = torch.zeros(len(SIDES), len(layout.ranks), dtype=torch.long, device=device)
        counts.index_add_(1, language_of_row, touched.long())
        return {
            (side, language)
            for side, row in zip(SIDES, counts.tolist())
            for language, count in enumerate(row)
            if count
        }

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the languages that have a gradient; *closure* is not supported."""
        for group in self.inner.param_groups:
            group.update({k: v for k, v in self.param_groups[0].items() if k != "params"})
        present = self.present()
        moved = []
        for number, (master, pieces, key) in enumerate(self.masters):
            master.grad = None
            if key in present:
                grads = [self._params[p.param].grad[p.rows].flatten() for p in pieces]
                master.grad = torch.cat(grads).float().view_as(master)
                moved.append(number)
        self.inner.step()
        for number in moved:
            master, pieces, _ = self.masters[number]
            master.grad = None
            self._clear_pruned(number)
            for piece in pieces:
                self._params[piece.param][piece.rows].copy_(piece.master)

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
        self._pruned = []
        for master, pieces, _ in self.masters:
            pruned = torch.cat([~p.factor.mask[p.rows].flatten() for p in pieces])
            self._pruned.append(pruned.view_as(master) if bool(pruned.any()) else None)

    def scopes(self, scope, target):
        """The pieces that share one threshold (method, section 4).

        Args:
            scope: ``language``: all entries of a language; ``layer``: all languages of a layer
            target: ``B`` or ``AB``; A and B never share a threshold, they start on other scales

        Returns:
            dict of scope key -> pieces
        """
        groups = defaultdict(list)
        for piece in self.pieces:
            if piece.factor.factor in target:
                site = piece.factor.linear.site
                key = piece.language if scope == "language" else (site.stack, site.layer)
                groups[piece.factor.factor, key].append(piece)
        return groups

    @torch.no_grad()
    def prune(self, sparsity, scope, target):
        """Removes the smallest entries of each scope until *sparsity* of it is gone."""
        for pieces in self.scopes(scope, target).values():
            masks.prune(
                [p.master for p in pieces], [p.factor.mask[p.rows] for p in pieces], sparsity
            )
        self.refresh_masks()
        for number in range(len(self.masters)):
            self._clear_pruned(number)
        for param in self._params:
            factor = AdapterFactor.of(param)
            param.masked_fill_(~factor.mask, 0)
            factor.weight.masked_fill_(~factor.mask, 0)

    def state_dict(self):
        """The inner optimizer's state, the fp32 masters and the settings; no views of weights."""
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
            for piece in pieces:
                self._params[piece.param][piece.rows].copy_(piece.master)
        self.refresh_masks()
