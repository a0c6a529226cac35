"""The multilingual translation task: picks every sentence's adapters by its language tokens."""

import filecmp
import logging
import os
from argparse import Namespace

import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.multilingual.multilingual_utils import get_lang_tok
from fairseq.distributed.utils import get_global_world_size
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from fairseq.utils import split_paths
from omegaconf import OmegaConf

from lslora_fairseq.adapters.assembly import Assembly
from lslora_fairseq.adapters.collection import Collection
from lslora_fairseq.checkpoints import read_args
from lslora_fairseq.config import StartConfig
from lslora_fairseq.errors import ConfigError, listed, one_line_errors
from lslora_fairseq.identity import Identity
from lslora_fairseq.light import Light, given_base
from lslora_fairseq.lora.plan import SIDES
from lslora_fairseq.models.stacks import LANG_IDS, ignore_languages
from lslora_fairseq.optim.pruned import PrunedOptimizer
from lslora_fairseq.stopping import StopRequest
from lslora_fairseq.tasks import dictionaries, options
from lslora_fairseq.tasks.lang_ids import (
    DirectionIds,
    LangtokIds,
    OneLineBatchIterator,
    offered_sides,
    route,
)
from lslora_fairseq.unsupported import refuse_processes

logger = logging.getLogger(__name__)
ONE_DICTIONARY = (
    "the languages of a multilingual model share one dictionary; give fairseq-preprocess the same "
    "--srcdict and --tgtdict for all"
)


@register_task("translation_multi_lslora")
class TranslationMultiLSLoTask(TranslationMultiSimpleEpochTask):
    """``translation_multi_simple_epoch`` for models with language-specific adapters.

    The languages of a sentence are read from its language tokens, wherever ``--encoder-langtok``,
    ``--decoder-langtok`` and ``--lang-tok-replacing-bos-eos`` put them. Where there is one
    direction, ``-s`` and ``-t`` (in Python ``args.source_lang`` and ``args.target_lang``) tell it:
    in decoding, the source cannot show the target language.
    """

    languages = None  # the inventory of the model with adapters, known once it is built
    places = ()  # of adapter files that training begins with
    light = None  # Light, where checkpoints leave the base model out
    adapters = None  # a Collection of adapter files that stock models are decoded with, or None
    base_dtype = None  # what the frozen base is cast to, or None
    _read_ids = None
    _epoch = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()

    @staticmethod
    def add_args(parser):
        TranslationMultiSimpleEpochTask.add_args(parser)
        StartConfig.add_options(parser)

    @classmethod
    def load_dictionary(cls, filename):
        return dictionaries.load(super().load_dictionary, filename)

    @classmethod
    def setup_task(cls, args, **kwargs):
        with one_line_errors(ValueError):
            has_direction = args.source_lang is not None and args.target_lang is not None
            # validation has the options of the training run, and takes all of its directions
            decodes = getattr(args, "path", None) and not getattr(args, "optimizer", None)
            if decodes and not has_direction:
                raise ConfigError("decoding needs both languages of a direction: give -s and -t")
            start = StartConfig.from_namespace(args)
            given_base.set(start.lora_base)
            places, base_dtype = start.places, options.base_dtype(args)
            args.lora_adapters = None  # a checkpoint that is trained from them knows all
            args.lora_base_dtype = StartConfig.lora_base_dtype  # of this run alone
            adapters = None
            if places and getattr(args, "path", None):
                adapters = Collection(places)
            options.restore_task_options(args, adapters)
            options.check_pairs(args)
            try:
                with dictionaries.shared_dictionaries():
                    task = super().setup_task(args, **kwargs)
                task.places, task.adapters, task.base_dtype = places, adapters, base_dtype
                return task
            except FileNotFoundError as error:
                raise ConfigError(
                    f"{error.filename}: no such file: name the folder that fairseq-preprocess "
                    "wrote, or the dictionary with --fixed-dictionary"
                ) from None
            except AssertionError as error:  # fairseq's
                if "dictionary" not in str(error):
                    raise
                raise ConfigError(
                    f"the files dict.CODE.txt in {split_paths(args.data)[0]} differ from language "
                    f"to language: {ONE_DICTIONARY}"
                ) from None

    def build_model(self, args, from_checkpoint=False):
        with one_line_errors():
            begun = {}
            if not from_checkpoint and hasattr(args, "restore_file"):
                begun = self._prepare_training(args)
            elif from_checkpoint and self.adapters is not None:
                path = getattr(self.args, "path", None) or "the base model"
                assembly = Assembly.for_base(self.adapters, path, vars(args))
                begun = {"begun_with": assembly}
                args = Namespace(**{**vars(args), **assembly.model_options()})
            model = super().build_model(args, from_checkpoint)
            if hasattr(model, "plan"):
                for name, value in begun.items():
                    setattr(model, name, value)
                if self.base_dtype is not None:
                    model.cast_base(self.base_dtype)
                self._check_languages(model, from_checkpoint)
                self._read_ids = self._id_reader(model)
            else:  # a stock model: nothing to route
                if from_checkpoint:
                    self._check_tokens(args)
                ignore_languages(model)
        return model

    def _check_tokens(self, args):
        """A stock model decodes with this run's numbers of the language tokens, so it must have
        been trained with them; one with adapters is matched when its weights come."""
        trained = Identity.from_options("", vars(args)).langs
        if trained is not None and trained != list(self.langs):
            raise ConfigError(
                f"a stock model was trained with --langs {listed(trained, ',')}, here they are "
                f"{listed(self.langs, ',')}: the order numbers the language tokens; give it as the "
                "model has it, and do not join it to models of another order"
            )

    def _prepare_training(self, args):
        """Checks what training needs; the options of the adapters follow the checkpoint.

        Returns:
            what the model needs to know of a checkpoint that training starts afresh from, by name
            of its attributes
        """
        if getattr(args, "optimizer", None):
            options.check_optimizer(args)
        refuse_processes(args, get_global_world_size())
        args.lora_adapters = assembly = None
        path, is_fresh = options.chosen_start(args)
        left_out = options.base_left_out(args)
        if left_out is not None:
            self.light = Light(left_out)
        if path is None:
            if self.places:
                raise ConfigError(
                    "--lora-adapters needs the base model that the files were trained on: name it "
                    "with --finetune-from-model"
                )
            logger.warning(
                "the frozen base has random weights: name a pretrained model with "
                "--finetune-from-model"
            )
        saved = {} if path is None else read_args(path)
        if not is_fresh:
            options.check_continued(args, path, saved, self.langs)
        if self.places and (is_fresh or saved.get("lora_tiers") is None):
            assembly = Assembly.for_base(Collection(self.places), path, saved)
            path, saved = assembly.adapters.path, assembly.model_options()
        added = options.restore_lora_options(args, path, saved, is_fresh)
        options.begin_adapters(args, len(self.source_dictionary))
        if not is_fresh:
            return {"begun_with": assembly}
        base = None
        if path is not None:
            base = Identity.from_options(path, saved) if assembly is None else assembly.known()
        options.begin_tokens(args, base, self.source_dictionary, saved)
        has_adapters = saved.get("lora_tiers") is not None
        starts = options.starts_of(args, added, has_adapters)
        return {"begun_with": assembly, "added": added, "init_from": starts}

    def _check_languages(self, model, from_checkpoint):
        """Every language of the data has an adapter, every adapter a language token."""
        if self.languages is not None and self.languages.codes != model.languages.codes:
            raise ConfigError(
                "the models of the ensemble have adapters for different languages: "
                f"{listed(self.languages.codes)} and {listed(model.languages.codes)}"
            )
        self.languages = model.languages
        pairs = list(self.lang_pairs)
        if self.training:
            pairs += self.data_manager.extra_lang_pairs
        self._check_pairs(pairs, model)
        if self.training and not from_checkpoint:
            self._check_trained(pairs, model.plan)
        absent = [c for c in self.languages.codes if c not in self.langs]
        if absent and not from_checkpoint:
            raise ConfigError(
                f"--lora-tiers has {listed(absent)}, absent from --langs "
                f"({listed(self.langs, ',')}), and would have no language token: take it out of "
                "--lora-tiers, or add it to --langs"
            )

    def _check_pairs(self, pairs, model):
        """Every language of these directions has the adapters that a model needs."""
        for position, side in enumerate(SIDES):
            used = {pair.split("-")[position] for pair in pairs}
            lacking = sorted(c for c in used if c not in self.languages)
            if lacking and model.plan.needs(side):
                raise ConfigError(
                    f"no adapter for {listed(lacking)} of the data: add it to --lora-tiers "
                    f"(adapters: {listed(self.languages.codes)})"
                )

    def _check_trained(self, pairs, plan):
        """Every direction of the data trains something, as fairseq wants of every batch."""
        if plan.trained is None:
            return
        idle = [
            pair
            for pair in pairs
            if not any(
                plan.needs(side) and plan.trains(code) for side, code in zip(SIDES, pair.split("-"))
            )
        ]
        if idle:
            raise ConfigError(
                f"--lora-train-languages {listed(plan.trained, ',')}: {listed(idle)} would train "
                "nothing: leave these directions out of the data (--lang-pairs)"
            )

    def _id_reader(self, model):
        """What tells the languages of a batch of the data."""
        if not self.training:
            return self._direction()
        # fairseq adds no token to a category of --extra-data that --langtoks does not name
        langtoks = {c: (None, None) for c in self.args.extra_lang_pairs or ()}
        langtoks.update(self.args.langtoks)
        offered = offered_sides(langtoks, self.args.lang_tok_replacing_bos_eos)
        needed = [side for side in SIDES if model.plan.needs(side)]
        for side in needed:
            if side not in offered:
                flag = "--encoder-langtok src" if side == "source" else "--decoder-langtok"
                raise ConfigError(
                    f"layers indexed by the {side} language need its token in every sentence, "
                    f"and the data has none: add {flag} (for --extra-data: --langtoks), or index "
                    "those layers by the other side (--encoder-index-side, --decoder-index-side)"
                )
        return LangtokIds(
            self.source_dictionary,
            self.languages,
            self.args.langtoks_specs,
            self.args.lang_tok_style,
            {side: offered[side] for side in needed},
        )

    def _direction(self):
        """The languages of the direction that the options name now, as :class:`DirectionIds`."""
        codes = {side: getattr(self.args, f"{side}_lang") for side in SIDES}
        return DirectionIds(
            {side: self.languages.index(c) for side, c in codes.items() if c in self.languages}
        )

    def in_direction(self, source, target, models):
        """This task for another direction of the same models, with its dictionary and languages.

        Raises:
            ConfigError: a language has no token, none of the adapters that a model needs, or a
                dictionary of its own.
        """
        args = Namespace(**{**vars(self.args), "source_lang": source, "target_lang": target})
        options.check_pairs(args)
        for model in models:
            if hasattr(model, "plan"):
                self._check_pairs([f"{source}-{target}"], model)
        dicts = dict(self.dicts)
        for lang in {source, target} - self.dicts.keys():
            self._check_dictionary(lang)
            dicts[lang] = self.source_dictionary
        other = type(self)(args, self.langs, dicts, training=False)
        if self.languages is not None:
            other.languages = self.languages
            other._read_ids = other._direction()
        return other

    def _check_dictionary(self, lang):
        """The dictionary of a language is the one that is loaded."""
        if self.args.fixed_dictionary or self.args.source_dict or self.args.target_dict:
            return
        folder = split_paths(self.args.data)[0]
        ours, its = (os.path.join(folder, f"dict.{c}.txt") for c in (self.source_langs[0], lang))
        if not os.path.isfile(its):
            raise ConfigError(f"{its}: no such file: name the folder that fairseq-preprocess wrote")
        if not filecmp.cmp(ours, its, shallow=False):
            raise ConfigError(f"{its} differs from {ours}: {ONE_DICTIONARY}")

    def load_dataset(self, split, *args, **kwargs):
        with one_line_errors():
            self._check_files(split)
        super().load_dataset(split, *args, **kwargs)
        if self._read_ids is not None:
            route(self.datasets[split], self._read_ids)

    def _check_files(self, split):
        """Every direction of the data has been prepared."""
        try:
            found = self.data_manager.get_split_num_data_shards(split)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename}: no such folder: name the one that fairseq-preprocess wrote"
            ) from None
        lacking = [pair for pair in self.lang_pairs if f"main:{pair}" not in found]
        if lacking:
            raise ConfigError(
                f"{self.args.data} has no {split} data of {listed(lacking)}: prepare it with "
                "fairseq-preprocess, or leave the direction out"
            )

    def get_batch_iterator(self, *args, **kwargs):
        itr = super().get_batch_iterator(*args, **kwargs)
        if type(itr) is EpochBatchIterator:
            itr.__class__ = OneLineBatchIterator
        return itr

    def build_dataset_for_inference(self, *args, **kwargs):
        dataset = super().build_dataset_for_inference(*args, **kwargs)
        return dataset if self.languages is None else route(dataset, self._direction())

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """As fairseq's; sentences that carry their languages are decoded with these, others with
        those of the direction that the options name.

        Raises:
            ConfigError: neither tells a language that the models need.
        """
        if self.languages is None:
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        net_input = sample["net_input"]
        for key, ids in self._direction()(net_input).items():
            net_input.setdefault(key, ids)
        for key, side in zip(LANG_IDS, SIDES):
            needed = any(hasattr(m, "plan") and m.plan.needs(side) for m in models)
            if needed and key not in net_input:
                raise ConfigError(
                    f"the {side} language of the sentences is not known: set "
                    f"task.args.{side}_lang to a language with adapters "
                    f"({listed(self.languages.codes)}), or net_input['{key}']"
                )
        _, spec = self.args.langtoks["main"]
        if not spec or "target_lang_ids" not in net_input or prefix_tokens is not None:
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        codes = [self.languages.codes[i] for i in net_input["target_lang_ids"].tolist()]
        first = self.forced(codes, net_input["src_tokens"])
        if "bos_token" in first:
            beams = getattr(generator, "beam_size", 1)  # a scorer of references has none
            first["bos_token"] = first["bos_token"].repeat_interleave(beams)
        with torch.no_grad():
            return generator.generate(models, sample, constraints=constraints, **first)

    def forced(self, codes, like):
        """What makes a generator begin each sentence with its own target language's token.

        Args:
            codes: (batch,) target languages
            like: a tensor on the device of the batch

        Returns:
            ``prefix_tokens``, (batch, 1), or ``bos_token``, (batch,); neither if there are none
        """
        _, spec = self.args.langtoks["main"]
        if not spec:
            return {}
        dictionary, style = self.target_dictionary, self.args.lang_tok_style
        token = {
            code: self.data_manager.get_langtok_index(get_lang_tok(code, style, spec), dictionary)
            for code in set(codes)
        }
        tokens = like.new_tensor([token[code] for code in codes])
        if self.args.lang_tok_replacing_bos_eos:
            return {"bos_token": tokens}
        return {"prefix_tokens": tokens.unsqueeze(1)}

    def build_bpe(self, args):
        if getattr(args, "_name", None) != "sentencepiece":
            return super().build_bpe(args)
        remedy = "name the model that made the training data"
        with one_line_errors():
            if OmegaConf.is_missing(args, "sentencepiece_model"):
                raise ConfigError(f"--sentencepiece-model is missing: {remedy}")
            path = args.sentencepiece_model
            if "://" not in path and not os.path.isfile(path):
                raise ConfigError(f"--sentencepiece-model {path}: no such file: {remedy}")
            try:
                return super().build_bpe(args)
            except RuntimeError:
                raise ConfigError(
                    f"--sentencepiece-model {path} is no SentencePiece model: {remedy}"
                ) from None

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)
        self._epoch = epoch
        if self.light is not None and not self.light.is_checked:
            with one_line_errors():
                self.light.check(model.state_dict())

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        pruned = _pruned_optimizer(optimizer)
        if pruned is not None:
            sparsity = pruned.prune_at(self._epoch, update_num)
            metrics.log_scalar("sparsity", sparsity, weight=0, priority=650, round=4)
        if self.languages is not None:
            for layer, share in model.source_shares().items():
                name = f"p_source/{layer}"  # TensorBoard draws names with one prefix together
                metrics.log_scalar(name, share, weight=0, priority=700, round=4)
        loss, sample_size, logging_output = super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad
        )
        self.stop.tell(logging_output)
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        self.stop.hear(logging_outputs)

    def optimizer_step(self, optimizer, model, update_num):
        super().optimizer_step(optimizer, model, update_num)
        if self.languages is not None:
            model.write_token_rows()

    def starts_afresh(self, model, path):
        """Called once training has loaded the checkpoint that it starts from with a new optimizer:
        says what a further stage on the same adapters keeps."""
        begun_with = getattr(model, "begun_with", None)
        if begun_with is not None:
            path = begun_with.adapters.path
        elif self.languages is None or read_args(path).get("lora_tiers") is None:
            return
        if getattr(self.args, "pruning_masks", "keep") == "reset":
            model.reset_masks()
        pruned, entries = model.count_pruned()
        trained, kept = model.plan.trained, ""
        if trained is not None:
            kept = f"only the adapters of {listed(trained)} are trained, all others stay; of them, "
        logger.info(
            "adapters continue from %s: languages, ranks, alpha, sides, modules and shape are its "
            "own%s; optimizer, learning rate, pruning schedule and dropout are this run's; %s%s of "
            "%s entries are pruned%s",
            path,
            f", and {listed(model.added)} new" if model.added else "",
            kept,
            f"{pruned:,}",
            f"{entries:,}",
            " and stay so (--pruning-masks reset frees them)" if pruned else "",
        )


def _pruned_optimizer(optimizer):
    """The pruned_* optimizer under fairseq's fp16 and AMP wrappers, or None."""
    for attribute in ("fp32_optimizer", "wrapped_optimizer"):
        optimizer = getattr(optimizer, attribute, optimizer)
    return optimizer if isinstance(optimizer, PrunedOptimizer) else None
