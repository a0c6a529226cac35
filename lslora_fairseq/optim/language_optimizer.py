"""A torch optimizer that steps every language on its own.

A language has one parameter in each layer. A plain optimizer would still move a language that had
no sentence in the update, by momentum and weight decay, wherever fairseq turns a missing gradient
into zeros. Here an inner optimizer works on fp32 *masters*, one for each language and index side,
each in a parameter group of its own; a language without a gradient is not shown to it at all. Its
weights, its moments and what the inner optimizer keeps in its group stay as they are, bit for bit,
and what one language does never touches the state of another.
"""

import logging
from contextlib import contextmanager

import torch

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.lora.adapters import Adapter
from lslora_fairseq.optim.few_calls import in_few_calls
from lslora_fairseq.optim.masters import build_masters, write_back
from lslora_fairseq.optim.pruner import Pruner

logger = logging.getLogger(__name__)

RESET = "add --reset-optimizer to start with a fresh one (and leave out --finetune-from-model)"


class LanguageOptimizer(torch.optim.Optimizer):
    """Wraps an inner optimizer; see the module's text.

    The one group of this optimizer holds the settings that fairseq reads and writes. The inner
    optimizer never writes there: what it keeps in its groups (the last learning rate of nag, the
    scaled one of Adafactor) is state, and its languages' own.

    Args:
        params: the parameters of :class:`LayerAdapters` and :class:`SideWeights`, or fp32 copies
            of them
        build_inner: builds the inner torch optimizer from a list of parameter groups
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
        self.masters = build_masters(params, self.adapters, elementwise)
        self.inner = in_few_calls(
            build_inner([{"params": [master.weight]} for master in self.masters])
        )
        self._groups = list(self.inner.param_groups)
        super().__init__(params, _hyper(self._groups[0]))
        self._passed_on = self._hyper
        self.pruner = Pruner(self.masters, settings["pruning_scope"], settings["pruning_target"])

    @property
    def _params(self):
        return self.param_groups[0]["params"]

    @property
    def _hyper(self):
        return _hyper(self.param_groups[0])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the languages that have a gradient; *closure* is not supported."""
        gradients = [master.gradient() for master in self.masters]
        present = self._present(gradients)
        moved = []
        for master, group, gradient in zip(self.masters, self._groups, gradients):
            if master.key in present:
                moved.append((master, group))
                if gradient is None:  # of a layer that was left out
                    gradient = torch.zeros_like(master.weight)
                master.weight.grad = gradient
        masters, groups = [master for master, _ in moved], [group for _, group in moved]
        self._pass_settings_on(groups)
        with self._shown(groups):
            self.inner.step()
        for master in masters:
            master.weight.grad = None
            self._clear_pruned(master)
        write_back(masters)
        self.pruner.note(present)

    def _present(self, gradients):
        """The (side, language) pairs that have a gradient in this update.

        One transfer from the device for all of them. Gradients are the same on every process
        once reduced, and so is the answer.

        Args:
            gradients: of each master, or None
        """
        given = [(grad, m.key) for grad, m in zip(gradients, self.masters) if grad is not None]
        if not given:
            return set()
        largest = torch._foreach_norm([grad for grad, _ in given], float("inf"))
        return {key for size, (_, key) in zip(torch.stack(largest).tolist(), given) if size != 0}

    def _pass_settings_on(self, moved):
        """Tells the inner groups what was changed from outside since the last step.

        The learning rate is a setting at every step, though Adafactor writes its own there; any
        other key only when it changed, as by ``--optimizer-overrides``.
        """
        hyper = self._hyper
        changed = dict(item for item in hyper.items() if item not in self._passed_on.items())
        for group in self._groups if changed.keys() - {"lr"} else ():
            group.update(changed)
        for group in moved:
            group["lr"] = hyper["lr"]
        self._passed_on = hyper

    @contextmanager
    def _shown(self, groups):
        """The inner optimizer sees these groups only: nag writes into one without a gradient too,
        and apex's FusedAdam counts its steps."""
        self.inner.param_groups = groups
        try:
            yield
        finally:
            self.inner.param_groups = self._groups

    def _clear_pruned(self, master):
        master.clear_pruned(self.inner.state.get(master.weight, {}))

    @torch.no_grad()
    def prune(self, sparsity):
        """Removes the smallest entries of each scope until *sparsity* of it is gone."""
        self.pruner.prune(sparsity)
        for master in self.masters:
            self._clear_pruned(master)
        for param, adapter in zip(self._params, self.adapters):
            param.masked_fill_(~adapter.mask, 0)
            adapter.weight.masked_fill_(~adapter.mask, 0)

    def state_dict(self):
        """The inner optimizer's state, our group's settings, those of pruning and the fp32
        masters, all in plain values; no masters where the model's weights are the same."""
        dtype = self.adapters[0].weight.dtype
        weights = [master.weight.detach() for master in self.masters]
        return {
            **self.inner.state_dict(),
            "hyper": self._hyper,
            "settings": dict(self.settings),
            "shapes": [tuple(weight.shape) for weight in weights],
            "dtype": str(dtype).removeprefix("torch."),
            "masters": None if dtype == torch.float else weights,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Restores the state exactly, into a model whose weights are loaded.

        A master that does not round to the weight in the model belongs to other weights, as in a
        file of averaged ones: the weight is taken.

        Raises:
            ConfigError: the state was made with other pruning settings, for other adapters, or by
                another or an earlier optimizer.
        """
        self._check_loadable(state_dict)
        self.inner.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._groups = list(self.inner.param_groups)
        self.param_groups[0].update(state_dict["hyper"])
        self._passed_on = self._hyper
        self._load_masters(state_dict["masters"], getattr(torch, state_dict["dtype"]))
        self.pruner.refresh()
        for master in self.masters:
            self._clear_pruned(master)

    def _load_masters(self, saved, dtype):
        """Masters from the model's weights, with the digits that these lost in a *dtype* file."""
        strangers = []
        for number, master in enumerate(self.masters):
            weights = master.joined([piece.weight for piece in master.pieces])
            wanted = weights.float()
            if saved is not None:
                precise = saved[number].to(wanted)
                same = precise.to(dtype).to(weights.dtype) == weights
                wanted = torch.where(same, precise, wanted)
                strangers.append(~same.all())
            master.weight.copy_(wanted)
        write_back(self.masters)
        if strangers and torch.stack(strangers).any():
            logger.warning(
                "the optimizer state belongs to other weights than those loaded, as in a file that "
                "average_checkpoints.py made: the weights are taken, and the moments of the state; "
                "--reset-optimizer starts with fresh moments"
            )

    def _check_loadable(self, state_dict):
        saved = state_dict.get("settings")
        if saved is None:
            raise ConfigError(
                f"the checkpoint's optimizer state is not that of a pruned_* optimizer: {RESET}"
            )
        if "hyper" not in state_dict:
            raise ConfigError(
                "the checkpoint's optimizer state was saved by an earlier version of this "
                f"package, which kept one group for all languages: {RESET}"
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
        shapes = [tuple(shape) for shape in state_dict["shapes"]]
        if shapes != [tuple(master.weight.shape) for master in self.masters]:
            raise ConfigError(
                "the checkpoint's optimizer state belongs to other adapters: resume with its "
                "tiers, ranks and sites, or add --reset-optimizer (and leave out "
                "--finetune-from-model)"
            )


def _hyper(group):
    return {key: value for key, value in group.items() if key != "params"}
