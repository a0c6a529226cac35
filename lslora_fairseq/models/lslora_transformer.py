"""The model: a frozen transformer whose linears carry language-specific adapters."""

import itertools
import logging

import torch
from fairseq.models import register_model
from fairseq.models.transformer import TransformerConfig, TransformerModel
from fairseq.tasks import FairseqTask
from torch import nn

from lslora_fairseq.adapters import fingerprint
from lslora_fairseq.checkpoints import being_loaded, read_args
from lslora_fairseq.config import LORA_FIELDS, LSLoConfig, resolve
from lslora_fairseq.errors import ConfigError, one_line_errors
from lslora_fairseq.identity import Identity, describe
from lslora_fairseq.keys import EMBEDDINGS, RECORD, is_adapter_key, tidy
from lslora_fairseq.lora.adapters import Adapter, LayerAdapters, SideWeights
from lslora_fairseq.lora.embedding import AdaptedEmbedding, AdaptedProjection, merge_embeddings
from lslora_fairseq.lora.linear import LSLoLinear
from lslora_fairseq.lora.merge import merged
from lslora_fairseq.lora.plan import MODULES, SHARED, SIDES
from lslora_fairseq.lora.routing import AdapterLayout
from lslora_fairseq.lora.tokens import TokenRows
from lslora_fairseq.models.base_dtype import Originals, cast_base, frozen_base, restore_base
from lslora_fairseq.models.embedding_rows import match_embeddings
from lslora_fairseq.models.loading import add_languages, check_keys
from lslora_fairseq.models.stacks import LSLoTransformerDecoder, LSLoTransformerEncoder
from lslora_fairseq.unsupported import refuse_unsupported

logger = logging.getLogger(__name__)


@register_model("lslora_transformer")
class LSLoTransformerModel(TransformerModel):
    """fairseq's transformer, frozen, with one LoRA per language in its linears."""

    begun_with = None  # the Assembly of adapter files for the base model that is loaded, or None
    added = ()  # languages that training adds to those of the checkpoint that is loaded
    init_from = {}  # language that starts afresh -> the one whose adapters and row it starts with
    is_cast = False  # whether the base computes in another dtype than it has in checkpoints
    originals = None  # then the Originals of the base, if it was loaded from a file to be trained

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        LSLoConfig.add_options(parser, defaults=False)

    @classmethod
    def build_model(cls, args, task):
        with one_line_errors():
            if isinstance(task, FairseqTask) and not hasattr(task, "languages"):
                raise ConfigError(
                    "adapters need the language of each sentence, which this task does not tell: "
                    "add --task translation_multi_lslora"
                )
            refuse_unsupported(args)
            model = super().build_model(args, task)
            model.add_adapters(args)
            model.identify(args, getattr(task, "langs", None))
            model.add_token_rows()
        return model

    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        cfg = TransformerConfig.from_namespace(args)
        return LSLoTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        cfg = TransformerConfig.from_namespace(args)
        return LSLoTransformerDecoder(
            cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention
        )

    def add_adapters(self, args):
        """Freezes the model and gives every planned linear its adapters.

        The resolved options are written back to *args*, which fairseq saves in checkpoints.

        Raises:
            ConfigError: an option does not fit the model.
        """
        config = LSLoConfig.from_namespace(args)
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        dims = {
            stack: {
                name: (linear.in_features, linear.out_features)
                for name in MODULES[stack]
                for linear in (stacks[stack].layers[0].get_submodule(name),)
            }
            for stack in stacks
        }
        layers = {stack: len(stacks[stack].layers) for stack in stacks}
        words = self._shared_embeddings()
        if words is not None:
            dims["embeddings"] = words.size(1), words.size(0)
        self.plan = resolve(config, layers, dims)
        for name in LORA_FIELDS:
            setattr(args, name, getattr(config, name))
        for name, buffer in self.named_buffers():
            if name.endswith("._float_tensor"):
                buffer.zero_()  # fairseq 0.12.2 leaves and saves what was in memory
        self.requires_grad_(False)
        base_parameters = sum(p.numel() for p in self.parameters())
        self._layouts = {}
        if self.plan.sites:
            self.adapter_layout = AdapterLayout(self.plan.ranks, self.plan.alphas)
            self._layouts.update(dict.fromkeys(SIDES, self.adapter_layout))
        if self.plan.shared_sites:
            self.shared_layout = AdapterLayout([self.plan.shared_rank], [self.plan.shared_alpha])
            self._layouts[SHARED] = self.shared_layout
        for name, stack in stacks.items():
            sites = [site for site in self.plan.all_sites if site.stack == name]
            stack.attach(self._layouts, sites)
            for number, layer in enumerate(stack.layers):
                self._adapt(layer, [site for site in sites if site.layer == number])
        if self.plan.embedding_site:
            self._adapt_embeddings(words)
        logger.info(
            "adapters %s %d languages\n%s",
            "of" if self.plan.sites else "shared by",
            len(self.languages),
            self.plan.table(base_parameters),
        )

    def _shared_embeddings(self):
        """The weight (words, d) of the embeddings, if all parts of the model share it."""
        embeddings = [self.encoder.embed_tokens, self.decoder.embed_tokens]
        projection = self.decoder.output_projection  # None with an adaptive softmax
        if [*map(type, [*embeddings, projection])] != [nn.Embedding, nn.Embedding, nn.Linear]:
            return None
        weight = projection.weight
        return weight if all(module.weight is weight for module in embeddings) else None

    def _adapt_embeddings(self, weight):
        """Gives the embeddings and the output projection their adapter."""
        plan = self.plan
        self.embedding_adapters = LayerAdapters(
            [plan.embedding_site], [SHARED], [plan.embedding_rank], weight
        )
        self.embedding_adapters.requires_grad_(plan.trains(SHARED))
        for module in {self.encoder.embed_tokens, self.decoder.embed_tokens}:  # one, as a rule
            AdaptedEmbedding.adapt(module, self.embedding_adapters)
        AdaptedProjection.adapt(self.decoder.output_projection, self.embedding_adapters)

    def identify(self, args, langs):
        """Records what the model is, for every checkpoint of it.

        Args:
            langs: the languages in the order of their tokens, or None
        """
        options = {**vars(args), "langs": langs, "lang_pairs": None}
        self.identity = Identity.from_options("this model", options)
        self.identity.adapters = describe(self.plan)
        dictionary = self.encoder.dictionary
        lines = self.identity.lines = getattr(dictionary, "rows_in_file", None)
        self.identity.appended = None if lines is None else dictionary.symbols[lines:]
        self._write_record()

    def add_token_rows(self):
        """Gives the languages whose token is trained a parameter for its row.

        Raises:
            ConfigError: the token has no row of its own beyond the dictionary file.
        """
        dictionary, rows = self.encoder.dictionary, {}
        for code in self.plan.tokens:
            row = dictionary.index(self.identity.token(code))
            if row < getattr(dictionary, "rows_in_file", 0) or row == dictionary.unk():
                raise ConfigError(
                    f"--lora-train-tokens: {self.identity.token(code)} is no token beyond the "
                    "dictionary file, whose rows stay those of the base model: leave it out"
                )
            rows[code] = self.languages.index(code), row
        if rows:
            self.token_rows = TokenRows(rows, self.decoder.output_projection.weight)
            for module in {self.encoder.embed_tokens, self.decoder.embed_tokens}:
                module.register_forward_hook(self.token_rows.pass_gradient)

    def write_token_rows(self):
        """Brings trained rows of tokens into the embeddings, as after every update."""
        if hasattr(self, "token_rows"):
            self.token_rows.write(self.decoder.output_projection.weight)

    def cast_base(self, dtype):
        """Lets the frozen base compute in this dtype, with half the memory for its weights. What is
        trained stays in fp32."""
        if hasattr(self, "token_rows"):
            self.token_rows.read(self.decoder.output_projection.weight)
        cast_base(self, dtype)
        self.is_cast = True

    def load_state_dict(self, state_dict, *args, **kwargs):
        found = super().load_state_dict(state_dict, *args, **kwargs)
        if hasattr(self, "token_rows"):
            self.token_rows.read(state_dict[EMBEDDINGS[0]])  # before it was cast
        path, self.originals = being_loaded.get(), None
        if self.is_cast and path is not None:
            weights = {name: state_dict[name] for name in frozen_base(self)}
            with one_line_errors():
                self.originals = Originals(weights, path, self.identity.lines)
        return found

    def state_dict(self, *args, **kwargs):
        """As torch's; in training, a base that was cast is as its checkpoint has it."""
        state = super().state_dict(*args, **kwargs)
        if self.is_cast:
            restore_base(self, state, kwargs.get("prefix", ""))
        return state

    def _write_record(self):
        device = self.encoder.embed_tokens.weight.device
        self.register_buffer(RECORD, self.identity.record().to(device))

    def _adapt(self, layer, sites):
        """Gives the linears of a layer their adapters."""
        plan, like, weights, adapters = self.plan, next(layer.parameters()), None, {}
        if plan.weight_learning and sites:
            weights = layer.side_weights = SideWeights(like)
            weights.requires_grad_(plan.trains(SHARED))
        for side in sorted({site.side for site in sites}):
            ours = [site for site in sites if site.side == side]
            if side == SHARED:
                owners, ranks = [SHARED], [plan.shared_rank]
            else:
                owners, ranks = plan.languages.codes, plan.ranks
            adapters[side] = LayerAdapters(
                ours, owners, ranks, like, None if side == SHARED else weights
            )
            for number, owner in enumerate(owners):
                adapters[side].weight(number).requires_grad_(plan.trains(owner))
            layer.add_module(f"{side}_adapters", adapters[side])
        for site in {site.module: site for site in sites}.values():
            parent_name, _, name = site.module.rpartition(".")
            parent = layer.get_submodule(parent_name)
            linear = LSLoLinear(getattr(parent, name), site, adapters, self._layouts, plan.dropout)
            setattr(parent, name, linear)

    @property
    def languages(self):
        return self.plan.languages

    def prepare_for_inference_(self, cfg):
        """As fairseq's; adapters are merged where the direction to decode is known, that of the
        embeddings always."""
        super().prepare_for_inference_(cfg)
        self.merge_embeddings()
        direction = {
            side: self.languages.index(code)
            for side in SIDES
            for code in (getattr(cfg.task, f"{side}_lang", None),)
            if code in self.languages
        }
        if all(side in direction for side in SIDES if self.plan.needs(side)):
            self.merge(*map(direction.get, SIDES))

    def merge_embeddings(self):
        """Folds the adapter of the embeddings into them, if there is one left; it is the same for
        all languages."""
        if not hasattr(self, "embedding_adapters"):
            return
        self.originals = None  # the weights become others
        projection = self.decoder.output_projection
        merge_embeddings(projection)
        for module in {self.encoder.embed_tokens, self.decoder.embed_tokens, projection}:
            module.restore()
        del self.embedding_adapters
        del self.identity.adapters["embeddings"]
        self._write_record()

    def merge(self, source, target):
        """Folds the adapters of one direction into the weights, for decoding at the base model's
        speed; those of all languages are gone afterwards.

        Args:
            source, target: language indices; not looked at where no layer is indexed by that side

        Raises:
            RuntimeError: another direction was merged before.
            ValueError: an index of no language.
        """
        direction = dict(zip(SIDES, (source, target)))
        needed = {side: direction[side] for side in SIDES if self.plan.needs(side)}
        if self.encoder.merged is not None:
            if self.encoder.merged == needed:
                return
            raise RuntimeError(
                f"the adapters of {self._named(self.encoder.merged)} were merged into the weights "
                f"before those of {self._named(needed)}: load the checkpoint anew for another "
                "direction"
            )
        for side, language in needed.items():
            if not 0 <= language < len(self.languages):
                raise ValueError(
                    f"{side} language {language}: the model has adapters of languages 0 to "
                    f"{len(self.languages) - 1}"
                )
        self.merge_embeddings()
        self.originals = None
        for linear in self.adapted_linears():
            parent_name, _, name = linear.site.name.rpartition(".")
            setattr(self.get_submodule(parent_name), name, merged(linear, {**direction, SHARED: 0}))
        for stack in (self.encoder, self.decoder):
            stack.sides = []
            names = [*(f"{side}_adapters" for side in (*SIDES, SHARED)), "side_weights"]
            for layer, name in itertools.product(stack.layers, names):
                layer._modules.pop(name, None)
        self._modules.pop("token_rows", None)
        del self._buffers[RECORD]  # from here on a plain transformer
        self.encoder.merged = needed

    def _named(self, direction):
        return " and ".join(f"{side} {self.languages.codes[i]}" for side, i in direction.items())

    def adapted_linears(self):
        """Every :class:`LSLoLinear`, in the plan's order."""
        return [m for m in self.modules() if isinstance(m, LSLoLinear)]

    def reset_masks(self):
        """Frees every pruned entry of the languages that are trained; it is zero and may grow
        again."""
        for adapter in self._trained_adapters():
            adapter.mask.fill_(True)
            adapter.layer.refresh_pruned()

    def count_pruned(self):
        """How many entries of the languages that are trained are pruned, and how many there are."""
        masks = [adapter.mask for adapter in self._trained_adapters()]
        return sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)

    def _trained_adapters(self):
        """The :class:`Adapter` of every language that is trained, in every layer."""
        return [
            Adapter.of(param)
            for layer in self._layers()
            for adapters in layer.children()
            if isinstance(adapters, LayerAdapters) and adapters.side in SIDES
            for param in adapters.parameters(recurse=False)
            if param.requires_grad
        ]

    def _layers(self):
        return itertools.chain(self.encoder.layers, self.decoder.layers)

    def source_shares(self):
        """p_src of every layer with learned weights (method, section 3); p_tgt is 1 − p_src.

        Returns:
            dict of ``encoder.0``, … -> scalar tensor, without a graph
        """
        logits = {
            f"{name}.{number}": layer.side_weights.logits.detach()
            for name, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            for number, layer in enumerate(stack.layers)
            if hasattr(layer, "side_weights")
        }
        if not logits:
            return {}
        return dict(zip(logits, torch.cat([*logits.values()]).softmax(-1)[:, 0]))

    def forward(
        self,
        src_tokens,
        src_lengths,
        prev_output_tokens,
        return_all_hiddens=False,
        features_only=False,
        alignment_layer=None,
        alignment_heads=None,
        source_lang_ids=None,
        target_lang_ids=None,
    ):
        """As fairseq's, with the language of each sentence, (batch,) indices."""
        encoder_out = self.encoder(
            src_tokens,
            src_lengths=src_lengths,
            return_all_hiddens=return_all_hiddens,
            source_lang_ids=source_lang_ids,
            target_lang_ids=target_lang_ids,
        )
        return self.decoder(
            prev_output_tokens,
            encoder_out=encoder_out,
            features_only=features_only,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
            src_lengths=src_lengths,
            return_all_hiddens=return_all_hiddens,
        )

    def upgrade_state_dict_named(self, state_dict, name):
        """Fits a checkpoint: fills in adapters that a base model lacks, matches embedding rows.

        Only adapters may be missing, and only all of them together. What the checkpoint is, its
        record tells, else its options where fairseq's trainer loads it from a file.
        """
        super().upgrade_state_dict_named(state_dict, name)
        own = self.state_dict()
        tidy(state_dict)
        with one_line_errors():
            if self.begun_with is not None and not any(map(is_adapter_key, state_dict)):
                self.begun_with.assemble(state_dict)
            found = self._identity_of(state_dict)
            self._know_base(found, state_dict)
            has_adapters = any(map(is_adapter_key, state_dict))
            if self.added and has_adapters:
                starts = {code: self.init_from.get(code) for code in self.added}
                add_languages(own, state_dict, found, self.plan, starts)
            if found.adapters is not None:
                found.check_adapters(self.identity.adapters, self.added)
            if found.langs is not None or being_loaded.get() is not None:
                match_embeddings(self, own, state_dict, found)
            if not has_adapters:
                state_dict.update({k: v for k, v in own.items() if is_adapter_key(k)})
            state_dict[RECORD] = own[RECORD] = getattr(self, RECORD)
            check_keys(own, state_dict, found)

    def _know_base(self, found, state_dict):
        """The record tells which base model the adapters were begun on, and what is new to it."""
        lines, is_base = self.identity.lines, not any(map(is_adapter_key, state_dict))
        has_values = not any(weight.is_meta for weight in state_dict.values())  # not the doctor's
        if is_base and lines is not None and has_values:
            self.identity.base = fingerprint.of_base(state_dict, lines)
        else:
            self.identity.base = found.base
        known = found.symbols([])
        if known is not None and self.identity.appended is not None:
            added = {*self.identity.appended}.difference(known)
            self.identity.new = [s for s in self.identity.appended if s in added or s in found.new]
            self._give_own_words()
        self._write_record()

    def _give_own_words(self):
        """Lets the decoder know which words belong to one language each: tokens that are new to
        the base model. An adaptive softmax has no logit of a word to hide."""
        if self.decoder.adaptive_softmax is not None:
            return
        index, new = self.encoder.dictionary.index, self.identity.new
        self.decoder.set_own_words([
            (index(token), language)
            for language, code in enumerate(self.languages.codes)
            for token in self.identity.tokens(code)
            if token in new
        ])  # fmt: skip

    def _identity_of(self, state_dict):
        path, source = being_loaded.get(), "the checkpoint"
        record = state_dict.get(RECORD)
        if record is not None:
            return Identity.from_record(record, path or source)
        return Identity.from_options(path, read_args(path)) if path else Identity(source)
