"""A checkpoint with adapters, read without building a model."""

import os
import re
from argparse import Namespace
from dataclasses import dataclass

import torch

from lslora_fairseq.checkpoints import allow_fairseq_checkpoints, read_checkpoint
from lslora_fairseq.config import AdapterPlan, LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.keys import EMBEDDINGS, RECORD, is_adapter_key, tidy
from lslora_fairseq.lora.adapters import PRUNED
from lslora_fairseq.lora.plan import MODULES, SHARED


@dataclass(frozen=True)
class Trained:
    """A checkpoint with adapters.

    Attributes:
        path: the file
        options: what it was trained with, by name
        weights: its state dict, memory-mapped
        layers: stack -> number of layers
        config: the :class:`LSLoConfig` among the options, defaults filled in
        plan: its :class:`AdapterPlan`
    """

    path: str
    options: dict
    weights: dict
    layers: dict
    config: LSLoConfig
    plan: AdapterPlan

    def adapters(self):
        """Key of a layer's adapters of languages, such as ``encoder.layers.0.source_adapters`` ->
        the sites they serve, in the order of their columns."""
        return by_adapters(self.plan.sites)

    def kept(self, key):
        """Which entries of a layer's adapters pruning has left.

        Args:
            key: one of :meth:`adapters`

        Returns:
            (ranks of all languages, columns) bool
        """
        return self.weights[f"{key}.{PRUNED}"] < 1

    def base_parameters(self):
        """Parameters of the frozen base model; shared embeddings count once."""
        base = {
            key: weight
            for key, weight in self.weights.items()
            if weight.is_floating_point() and not is_adapter_key(key)
        }
        embeddings = []
        for key in EMBEDDINGS:
            # a checkpoint from a GPU holds a copy of what the model shares
            if key in base and not any(torch.equal(base[key], e) for e in embeddings):
                embeddings.append(base[key])
        others = [w.numel() for key, w in base.items() if key not in EMBEDDINGS]
        # fairseq's buffers (version, _float_tensor) have one entry, no parameter has
        return sum(n for n in others if n > 1) + sum(e.numel() for e in embeddings)


def read(path):
    """Reads a checkpoint of this package.

    Returns:
        :class:`Trained`

    Raises:
        ConfigError: no such file, damaged, a base model without adapters, or adapters that do
            not fit the options in it.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such file: name a checkpoint that fairseq-train wrote")
    allow_fairseq_checkpoints()
    return of(path, *read_checkpoint(path))


def of(path, options, weights):
    """What :func:`read` returns, of a checkpoint's content.

    Args:
        path: what stands for it in messages
        options: those in it, by name
        weights: its state dict
    """
    if options.get("lora_tiers") is None or not any(map(is_adapter_key, weights)):
        raise ConfigError(
            f"{path} has no adapters: name a checkpoint that was trained with --arch lslora_…"
        )
    tidy(weights)
    layers, dims = sizes(path, weights)
    config = LSLoConfig.from_namespace(Namespace(**options))
    try:
        plan = resolve(config, layers, dims)
    except ConfigError as error:
        raise ConfigError(f"{path} holds options that do not fit its weights: {error}") from None
    _check_fit(path, weights, plan)
    return Trained(path, options, weights, layers, config, plan)


def sizes(path, weights):
    """The sizes of a transformer, from its state dict.

    Returns:
        stack -> number of layers, and stack -> module -> (in_features, out_features); under
        ``embeddings`` (d, words) if these are one matrix

    Raises:
        ConfigError: it is another kind of model.
    """
    layers, dims = {}, {}
    for stack in MODULES:
        numbers = [re.match(rf"{stack}\.layers\.(\d+)\.", key) for key in weights]
        layers[stack] = 1 + max((int(match[1]) for match in numbers if match), default=-1)
        dims[stack] = {}
        for module in MODULES[stack]:
            key = f"{stack}.layers.0.{module}.weight"
            if key not in weights:
                raise ConfigError(
                    f"{path} holds no {key}: name a checkpoint of fairseq's transformer"
                )
            n_out, n_in = weights[key].shape
            dims[stack][module] = n_in, n_out
    embeddings = [weights[key] for key in EMBEDDINGS if key in weights]
    if len(embeddings) == 3 and all(torch.equal(embeddings[0], e) for e in embeddings[1:]):
        dims["embeddings"] = embeddings[0].size(1), embeddings[0].size(0)
    return layers, dims


def shared_sites(plan):
    """The sites of the adapters that all languages share; the last one may be the embeddings'."""
    return [*plan.shared_sites, *([plan.embedding_site] if plan.embedding_site else [])]


def by_adapters(sites):
    """Key of a layer's adapters in a state dict -> those of the *sites* that they serve, in the
    order of their columns."""
    found = {}
    for site in sites:
        key = f"{site.stack}.layers.{site.layer}.{site.side}_adapters"
        if site.layer is None:
            key = "embedding_adapters"
        found.setdefault(key, []).append(site)
    return found


def owners(plan, site):
    """Whose adapters are at a site: languages, or ``shared`` -> their rank."""
    if site.side != SHARED:
        return dict(zip(plan.languages.codes, plan.ranks))
    return {SHARED: plan.embedding_rank if site.layer is None else plan.shared_rank}


def _check_fit(path, weights, plan):
    """Raises ConfigError unless the adapters are those of the plan, shape by shape."""
    expected = {}
    for key, sites in by_adapters([*plan.sites, *shared_sites(plan)]).items():
        features = sum(site.in_features + site.out_features for site in sites)
        ranks = owners(plan, sites[0])
        expected[f"{key}.{PRUNED}"] = sum(ranks.values()), features
        for code, rank in ranks.items():
            expected[f"{key}.lora_{code}"] = rank, features
        if plan.weight_learning and sites[0].layer is not None:
            layer = key.rpartition(".")[0]
            expected[f"{layer}.side_weights.logits"] = 1, 2
    found = {
        key: tuple(weight.shape)
        for key, weight in weights.items()
        if is_adapter_key(key) and key != RECORD
    }
    wrong = [
        f"{key}: {found.get(key, 'missing')} instead of {expected.get(key, 'none')}"
        for key in {**expected, **found}
        if expected.get(key) != found.get(key)
    ]
    if wrong:
        raise ConfigError(
            f"{path} holds adapters that do not fit its own options ({listed(wrong, '; ')}): "
            "name the file that fairseq-train wrote, unchanged"
        )
