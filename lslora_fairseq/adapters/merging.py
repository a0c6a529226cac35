"""From a model with adapters to a checkpoint of fairseq's own transformer."""

from dataclasses import replace

import torch

from lslora_fairseq.adapters import stock
from lslora_fairseq.analysis.trained import by_adapters, shared_sites
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import EMBEDDINGS, RECORD, is_adapter_key
from lslora_fairseq.lora.adapters import share_of
from lslora_fairseq.lora.merge import delta_weight, folded, folded_embeddings
from lslora_fairseq.lora.plan import SHARED, SIDES, adapter_columns


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
        model, tokens = self.trained.options, self._tokens(pair)
        languages = pair.split("-") if pair else self.identity.langs[:2]
        return stock.content(self.weights(pair), stock.options(model, tokens, languages))

    @torch.no_grad()
    def weights(self, pair):
        """The state dict of the merged model; what is merged is fp32, the rest as it was. Of the
        embeddings it has the rows of :meth:`identity_of`.

        Args:
            pair: as for :meth:`checkpoint`
        """
        found = self.base_weights()
        owners = dict(zip(SIDES, pair.split("-"))) if pair else {}
        for name, sides in self.factors({**owners, SHARED: SHARED}).items():
            key = f"{name}.weight"
            if key in EMBEDDINGS:
                ((A, B, _, _),) = sides.values()
                found.update(dict.fromkeys(EMBEDDINGS, folded_embeddings(found[key], A, B)))
                continue
            deltas = []
            for side in sorted(sides):  # in the order in which the model has them
                A, B, alpha, share = sides[side]
                scaling = torch.tensor(alpha, dtype=torch.float) / len(A)
                deltas.append(delta_weight(found[key].shape, A, B, scaling, share))
            found[key] = folded(found[key], deltas)
        kept = self._kept_rows(pair)
        if kept is not None:
            taken = {}  # what is one matrix stays one
            for key in EMBEDDINGS:
                if key in found:
                    weight = found[key]
                    found[key] = taken.setdefault(weight.data_ptr(), weight[kept])
        return found

    def identity_of(self, pair):
        """What a merged model is: without the languages whose tokens are new to the base model and
        which other directions do not see (:meth:`LSLoTransformerDecoder.set_own_words`).

        Args:
            pair: as for :meth:`checkpoint`
        """
        identity, own = self.identity, pair.split("-") if pair else self.identity.langs
        hidden = [
            code
            for code in self.plan.languages.codes
            if code not in own and {*identity.tokens(code)} & {*identity.new}
        ]
        tokens = {token for code in hidden for token in identity.tokens(code)}
        return replace(
            identity,
            langs=[code for code in identity.langs if code not in hidden],
            appended=identity.appended and [s for s in identity.appended if s not in tokens],
            new=[symbol for symbol in identity.new if symbol not in tokens],
        )

    def _kept_rows(self, pair):
        """The rows of the embeddings that a merged model has, or None for all."""
        before, after = self.identity.appended, self.identity_of(pair).appended
        if before == after:
            return None
        lines = self.identity.lines
        return [*range(lines), *(lines + before.index(symbol) for symbol in after)]

    def base_weights(self):
        """The state dict of the model without its adapters."""
        return {
            key: weight for key, weight in self.trained.weights.items() if not is_adapter_key(key)
        }

    def factors(self, owners):
        """The adapters of some owners.

        Args:
            owners: side -> language; ``shared`` -> ``shared``. What others own is left out

        Returns:
            name of an adapted linear -> side -> A (r, in), B (r, out), alpha and share
        """
        plan, weights, found = self.plan, self.trained.weights, {}
        for key, sites in by_adapters([*plan.sites, *shared_sites(plan)]).items():
            side, share = sites[0].side, None
            owner = owners.get(side)
            if owner is None:
                continue
            weight = weights[f"{key}.lora_{owner}"]
            if side != SHARED:
                alpha = plan.alphas[plan.languages.index(owner)]
                if plan.weight_learning:
                    layer = key.rpartition(".")[0]
                    share = share_of(weights[f"{layer}.side_weights.logits"], side)
            else:  # that of the embeddings is not scaled
                alpha = len(weight) if sites[0].layer is None else plan.shared_alpha
            columns, _ = adapter_columns(sites)
            for site in sites:
                a, b = columns[site.module]
                found.setdefault(site.name, {})[side] = weight[:, a], weight[:, b], alpha, share
        return found

    def _tokens(self, pair):
        """The options that tell which sentence has which token, by name, in plain values."""
        options, identity = self.trained.options, self.identity_of(pair)
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

    def command(self, path, pair):
        """The command line with which stock fairseq decodes what was merged.

        Args:
            path: of the checkpoint
            pair: as for :meth:`checkpoint`
        """
        return stock.command(path, pair or "SOURCE-TARGET", self._tokens(pair))
