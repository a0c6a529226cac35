"""LSLo: a frozen linear and the low-rank adapters of all languages (method, section 2).

y = W x + b + (alpha_l / r_l) · B_l A_l x        l = the sentence's language on this side
"""

import torch
import torch.nn.functional as F
from torch import nn

from lslora_fairseq.lora.formulations import AdaptedLinears, adapted_linears
from lslora_fairseq.lora.merge import delta_weight
from lslora_fairseq.lora.plan import SHARED
from lslora_fairseq.lora.routing import current_pass
from lslora_fairseq.lora.stacked import stack


def autocast_dtype(device_type):
    """The dtype that autocast asks for on this device, or None."""
    if hasattr(torch, "get_autocast_dtype"):  # torch ≥ 2.4
        enabled = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if enabled else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


class LSLoLinear(nn.Linear):
    """A frozen linear with one LoRA adapter per language.

    The keys ``weight`` and ``bias`` stay those of the linear it replaces. Its factors are columns
    of the layer's :class:`~lslora_fairseq.lora.adapters.LayerAdapters`.

    Args:
        linear: the pretrained linear; its parameters are shared and frozen
        site: where it sits and which part of it is adapted
        adapters: those of its layer: side -> :class:`~lslora_fairseq.lora.adapters.LayerAdapters`,
            for one side, for both where weights are learned, and the shared ones if there are any
        layouts: side -> the ranks and scaling of its adapters
        dropout: probability of dropping an entry of the adapters' input during training
    """

    def __init__(self, linear, site, adapters, layouts, dropout=0.0):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.site, self.dropout = site, dropout
        # the layer and the model own these, as submodules
        self.__dict__.update(adapters=adapters, layouts=layouts)

    def forward(self, x):
        """x: (time, batch, in) -> (time, batch, out); batch-first in memory.

        Raises:
            RuntimeError: the batch came without the languages of its sentences.
        """
        return apply_linears(x.transpose(0, 1), (self,))[0].transpose(0, 1)

    def factors(self, language, side=None):
        """A (rank, in) and B (rank, out) of a language (its index): views of its parameter.

        Args:
            side: which adapters, where the linear has those of several sides
        """
        adapters = self.adapters[self._side(side)]
        weight = adapters.weight(language)
        return tuple(weight[:, columns] for columns in adapters.columns[self.site.module])

    def masks(self, language, side=None):
        """The masks of A and B of a language, views; False marks a pruned entry."""
        adapters = self.adapters[self._side(side)]
        mask = adapters.mask[adapters.rows(language)]
        return tuple(mask[:, columns] for columns in adapters.columns[self.site.module])

    def delta_weight(self, language, side=None):
        """What one language (its index) adds to the weight: ΔW, or p · ΔW where weights are
        learned; (out, in) fp32, zero outside the adapted part."""
        side = self._side(side)
        A, B = self.factors(language, side)
        scaling, share = self.layouts[side].scaling[language], self.adapters[side].share()
        return delta_weight(self.weight.shape, A, B, scaling, share)

    def _side(self, side):
        if side is None:
            (side,) = self.adapters
        return side

    def extra_repr(self):
        ranks = {side: self.layouts[side].ranks for side in self.adapters}
        sizes = [f"{side}={min(r)}-{max(r)}" for side, r in ranks.items()]
        return f"{super().extra_repr()}, ranks: {', '.join(sizes)}"


def apply_linears(x, linears):
    """Applies linears that read the same input, each with its adapters if it has any.

    Args:
        x: (batch, time, in)
        linears: frozen ``nn.Linear``, of which those with adapters belong to the same layer

    Returns:
        (batch, time, out) of each, contiguous

    Raises:
        RuntimeError: the batch came without the languages of its sentences.
    """
    adapted = [linear for linear in linears if isinstance(linear, LSLoLinear)]
    if not adapted:
        return [linear(x) for linear in linears]
    first, dtype = adapted[0], autocast_dtype(x.device.type)
    found = _sides(first, x.size(0), dtype or first.weight.dtype)
    x = x.contiguous()
    normed = _normed(x)
    z = F.dropout(x, first.dropout) if first.training and first.dropout else None
    weights, biases = ([getattr(lin, name) for lin in linears] for name in ("weight", "bias"))
    if dtype is not None:
        x, z, *cast = (None if t is None else t.to(dtype) for t in (x, z, *weights, *biases))
        weights, biases = cast[: len(linears)], cast[len(linears) :]
    modules = tuple(lin.site.module if lin in adapted else None for lin in linears)
    sides = [side[1:] for side in found]
    if z is None and not torch.is_grad_enabled():
        return adapted_linears(x, sides, modules, weights, biases)
    stacks = [side[0] for side in found]
    return AdaptedLinears.apply(x, z, normed, sides, modules, weights, biases, *stacks)


def _normed(x):
    """The :class:`~lslora_fairseq.lora.routing.Normed` of this pass whose output x is, or None."""
    found = current_pass().norms.get(id(x._base))
    if found is None or x.shape != found.output.shape or not x.is_contiguous():
        return None
    # unless it was changed in place, or autocast computed it in another dtype
    return found if x._version == 0 and x.dtype == found.input.dtype else None


def _sides(linear, batch, dtype):
    """The stacks of a layer and the blocks of their routes: once per pass, for all linears that
    read as many sentences.

    Returns:
        of each stack its tensor, its :class:`~lslora_fairseq.lora.stacked.StackedAdapters` and the
        blocks
    """
    here = current_pass()
    key = id(linear.adapters), batch  # the linears of a layer have one dict of them
    if key not in here.stacks:
        found = []
        for adapters, route in _stacks(here, linear):
            route = route.without_beams(batch)
            found.append((*_stacked(here, adapters, route, dtype), route.blocks))
        here.stacks[key] = found
    return here.stacks[key]


def _stacks(here, linear):
    """What is stacked together: tuples of :class:`~lslora_fairseq.lora.adapters.LayerAdapters`,
    and the route of each."""
    shared, found = linear.adapters.get(SHARED), []
    for side, adapters in linear.adapters.items():
        route = _route(here, linear.site, side)
        if side == SHARED:
            continue
        if route.joined is not None and shared is not None and _can_join(adapters, shared):
            found.append(((adapters, shared), route.joined))
            shared = None
        else:
            found.append(((adapters,), route))
    return found if shared is None else [*found, ((shared,), here.routes[SHARED])]


def _can_join(adapters, shared):
    """Whether the adapters that all languages share have the same sites and part in training."""
    are_alike = adapters.share() is None and adapters.columns == shared.columns
    return are_alike and (shared.weight(0).requires_grad or not torch.is_grad_enabled())


def _route(here, site, side):
    route = here.routes.get(side)
    if route is None:
        raise RuntimeError(
            f"{site.name} needs the {side} language of each sentence: "
            f"pass {side}_lang_ids to the model"
        )
    return route


def _stacked(here, adapters, route, dtype):
    """Adapters of the languages present: stacked once per pass, or once per decoding, whose steps
    then only gather from them."""
    kept = None if torch.is_grad_enabled() else route.present.stacks
    if kept is not None:
        if adapters not in kept:
            kept[adapters] = stack(adapters, route, dtype)
        if not route.gathers:
            return kept[adapters]
    key = adapters, route.sentences if route.gathers else None
    if key not in here.stacks:
        here.stacks[key] = (
            stack(adapters, route, dtype, route.gathers)
            if kept is None
            else kept[adapters][1].gathered(route.blocks[0].rows)
        )
    return here.stacks[key]
