"""From a model with adapters to a checkpoint of fairseq's own transformer."""

import json
import shlex
from argparse import ArgumentParser
from collections import OrderedDict

import torch

from lslora_fairseq.analysis.trained import by_adapters, shared_sites
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import EMBEDDINGS, FUSED_COPIES, RECORD, is_adapter_key
from lslora_fairseq.lora.adapters import share_of
from lslora_fairseq.lora.merge import delta_weight, folded, folded_embeddings
from lslora_fairseq.lora.plan import SHARED, SIDES, adapter_columns

ARCH, TASK = "transformer", "translation_multi_simple_epoch"


class Merging:
    """Stock checkpoints of a checkpoint with adapters.

    Args:
        trained: :class:`~lslora_fairseq.analysis.trained.Trained`

    Raises:
        ConfigError: it does not tell its languages.

    Attributes:
        directions: those that the model serves, such as ``en-fr``; None if one set of weights
            serves all, as where all languages share their adapters
    """

    def __init__(self, trained):
        self.trained, self.plan, path = trained, trained.plan, trained.path
        record = trained.weights.get(RECORD)
        if record is None:
            self.identity = Identity.from_options(path, trained.options)
        else:
            self.identity = Identity.from_record(record, path)
        if self.identity.langs is None:
            raise ConfigError(
                f"{path} does not tell its languages, as an earlier version wrote it: load it in "
                "one more run (fairseq-train --finetune-from-model … --lr 0 --max-update 1), and "
                "name what that saves"
            )
        self.directions = None
        if self.plan.sites:
            codes = self.plan.languages.codes
            source, target = (
                codes if self.plan.needs(side) else self.identity.langs for side in SIDES
            )
            self.directions = [f"{s}-{t}" for s in source for t in target if s != t]

    def checkpoint(self, pair):
        """All that a stock checkpoint holds, in plain values.

        Args:
            pair: one of :attr:`directions`; None if one set of weights serves all
        """
        options = self._options(pair)
        last = {"optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
        return {
            "args": None,
            "cfg": {"model": _both(options), "task": {**options, "_name": TASK}},
            "model": self.weights(pair),
            "optimizer_history": [last],
            "last_optimizer_state": None,
            "extra_state": {},
        }

    @torch.no_grad()
    def weights(self, pair):
        """The state dict of the merged model; what is merged is fp32, the rest as it was.

        Args:
            pair: as for :meth:`checkpoint`
        """
        found = {
            key: weight
            for key, weight in self.trained.weights.items()
            if not is_adapter_key(key) and key.rpartition(".")[2] not in FUSED_COPIES
        }
        for name, sides in self._factors(pair).items():
            key = f"{name}.weight"
            if key in EMBEDDINGS:
                ((A, B, _, _),) = sides.values()
                found.update(dict.fromkeys(EMBEDDINGS, folded_embeddings(found[key], A, B)))
            else:  # sides in the order in which the model has them
                shape = found[key].shape
                deltas = (delta_weight(shape, *sides[side]) for side in sorted(sides))
                found[key] = folded(found[key], deltas)
        return found

    def _factors(self, pair):
        """Name of an adapted linear -> side -> A, B, scaling and share of the direction."""
        plan, weights, found = self.plan, self.trained.weights, {}
        owners = dict(zip(SIDES, pair.split("-"))) if pair else {}
        for key, sites in by_adapters([*plan.sites, *shared_sites(plan)]).items():
            side, share = sites[0].side, None
            if side == SHARED:
                owner, alpha = SHARED, plan.shared_alpha
            else:
                owner = owners[side]
                alpha = plan.alphas[plan.languages.index(owner)]
                if plan.weight_learning:
                    layer = key.rpartition(".")[0]
                    share = share_of(weights[f"{layer}.side_weights.logits"], side)
            weight = weights[f"{key}.lora_{owner}"]
            scaling = torch.tensor(alpha, dtype=torch.float) / len(weight)
            columns, _ = adapter_columns(sites)
            for site in sites:
                a, b = columns[site.module]
                found.setdefault(site.name, {})[side] = weight[:, a], weight[:, b], scaling, share
        return found

    def _tokens(self):
        """The options that tell which sentence has which token, by name, in plain values."""
        options, identity = self.trained.options, self.identity
        source, target = options.get("encoder_langtok"), bool(options.get("decoder_langtok"))
        specs = source or None, "tgt" if target else None
        main = tuple((options.get("langtoks") or {}).get("main") or specs)
        return {
            "langs": list(identity.langs),
            "encoder_langtok": source,
            "decoder_langtok": target,
            "lang_tok_replacing_bos_eos": bool(options.get("lang_tok_replacing_bos_eos")),
            "lang_tok_style": identity.lang_tok_style,
            "langtoks_specs": list(identity.langtoks_specs),
            "langtoks": None if main == specs else {"main": main},
            # what it names has no part in decoding, but may have a token
            "extra_data": {name: "" for name in identity.extra_data} or None,
            "fixed_dictionary": options.get("fixed_dictionary"),
        }

    def _options(self, pair):
        """Options of model and task, by name, in plain values."""
        # not for who merges weights alone: fairseq takes seconds
        from fairseq.models.transformer import TransformerModel
        from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

        model, task = ArgumentParser(), ArgumentParser()
        TransformerModel.add_args(model)
        TranslationMultiSimpleEpochTask.add_args(task)
        names = [action.dest for action in model._actions]
        source, target = pair.split("-") if pair else self.identity.langs[:2]
        trained = self.trained.options
        found = {
            **vars(task.parse_args([""])),
            **{name: trained[name] for name in names if name in trained},
            **self._tokens(),
            **dict.fromkeys(("encoder_embed_path", "decoder_embed_path")),  # weights are here
            "lang_pairs": f"{source}-{target}", "source_lang": source, "target_lang": target,
            "arch": ARCH, "_name": ARCH, "task": TASK,
            "seed": 1, "dataset_impl": None,  # the task reads them, too
        }  # fmt: skip
        return json.loads(json.dumps(found))

    def command(self, path, pair):
        """The command line with which stock fairseq decodes what was merged.

        Args:
            path: of the checkpoint
            pair: as for :meth:`checkpoint`
        """
        pair = pair or "SOURCE-TARGET"
        source, target = pair.split("-")
        words = ["fairseq-generate", "DATA", "--path", path, "--task", TASK]
        words += ["--lang-pairs", pair, "-s", source, "-t", target]
        usual = {"lang_tok_style": "multilingual", "langtoks_specs": ["main"]}
        for name, value in self._tokens().items():
            if value and value != usual.get(name):
                words.append(f"--{name.replace('_', '-')}")
                if value is not True:
                    words.append(",".join(value) if isinstance(value, list) else str(value))
        return shlex.join(words)


def _both(options):
    """Options as a dict whose attributes they are, too.

    torch's safe loader takes it, since a state dict is one; fairseq and CTranslate2's converter
    read and set attributes.
    """
    found = OrderedDict(options)
    vars(found).update(options)
    return found
