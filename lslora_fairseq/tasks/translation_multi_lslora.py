"""The multilingual translation task: picks every sentence's adapters by its language tokens."""

import functools
import logging
import os
import re
from argparse import Namespace

from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import OmegaConf

from lslora_fairseq.checkpoints import read_args, resumed_checkpoint
from lslora_fairseq.config import LORA_FIELDS, LSLoConfig, PruningConfig
from lslora_fairseq.errors import ConfigError, listed, one_line_errors
from lslora_fairseq.languages import Languages
from lslora_fairseq.lora.plan import SIDES
from lslora_fairseq.models.loading import BaseModel
from lslora_fairseq.optim.pruned import PrunedOptimizer
from lslora_fairseq.tasks.langtok_ids import LangtokIds, offered_sides

logger = logging.getLogger(__name__)

# what generation takes from the checkpoint unless the command line gives it
TASK_FIELDS = (
    "langs",
    "lang_dict",
    "lang_pairs",
    "encoder_langtok",
    "decoder_langtok",
    "lang_tok_replacing_bos_eos",
    "lang_tok_style",
    "langtoks_specs",
    "langtoks",
)


@register_task("translation_multi_lslora")
class TranslationMultiLSLoTask(TranslationMultiSimpleEpochTask):
    """``translation_multi_simple_epoch`` for models with language-specific adapters.

    In training and validation the languages of a sentence are read from its language tokens,
    wherever ``--encoder-langtok``, ``--decoder-langtok`` and ``--lang-tok-replacing-bos-eos`` put
    them. In generation the source cannot show the target language, so the task passes on what
    ``-s`` and ``-t`` say.
    """

    languages = None  # the model's inventory, known once a model is built
    _epoch = 1

    @classmethod
    def load_dictionary(cls, filename):
        dictionary = super().load_dictionary(filename)
        dictionary.rows_in_file = len(dictionary)  # before language tokens are appended
        return dictionary

    @classmethod
    def setup_task(cls, args, **kwargs):
        with one_line_errors(ValueError):
            if args.source_lang is not None and args.target_lang is not None:
                _restore_task_options(args)
            elif getattr(args, "optimizer", None):
                _check_optimizer(args)
                _check_loading(args)
            elif getattr(args, "path", None):
                raise ConfigError("decoding needs both languages of a direction: give -s and -t")
            _check_pairs(args)
            try:
                return super().setup_task(args, **kwargs)
            except FileNotFoundError as error:
                raise ConfigError(
                    f"{error.filename}: no such file: name the folder that fairseq-preprocess "
                    "wrote, or the dictionary with --fixed-dictionary"
                ) from None

    def build_model(self, args, from_checkpoint=False):
        with one_line_errors():
            base = resumed = None
            if not from_checkpoint:
                resumed = resumed_checkpoint(args)
                if resumed:
                    restore_lora_options(args, resumed, read_args(resumed), self.langs)
                elif getattr(args, "finetune_from_model", None):
                    base = _read_base(args.finetune_from_model)
            model = super().build_model(args, from_checkpoint)
            if not hasattr(model, "plan"):  # a stock model: nothing to route
                return model
            if self.training and not (base or resumed):
                logger.warning(
                    "the frozen base has random weights: name a pretrained model with "
                    "--finetune-from-model"
                )
            model.base = base
            self._check_languages(model)
            self._prepare_ids(model)
        return model

    def _check_languages(self, model):
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
        for position, side in enumerate(SIDES):
            used = {pair.split("-")[position] for pair in pairs}
            lacking = sorted(c for c in used if c not in self.languages)
            if lacking and model.plan.needs(side):
                raise ConfigError(
                    f"no adapter for {listed(lacking)} of the data: add it to --lora-tiers "
                    f"(adapters: {listed(self.languages.codes)})"
                )
        absent = [c for c in self.languages.codes if c not in self.langs]
        if absent and self.training:
            raise ConfigError(
                f"--lora-tiers has {listed(absent)}, absent from --langs "
                f"({listed(self.langs, ',')}), and would have no language token: take it out of "
                "--lora-tiers, or add it to --langs"
            )

    def _prepare_ids(self, model):
        needed = [side for side in SIDES if model.plan.needs(side)]
        if not self.training:
            self._ids = {
                "source_lang_ids": _index(self.languages, self.args.source_lang),
                "target_lang_ids": _index(self.languages, self.args.target_lang),
            }
            return
        # fairseq adds no token to a category of --extra-data that --langtoks does not name
        langtoks = {c: (None, None) for c in self.args.extra_lang_pairs or ()}
        langtoks.update(self.args.langtoks)
        offered = offered_sides(langtoks, self.args.lang_tok_replacing_bos_eos)
        for side in needed:
            if side not in offered:
                flag = "--encoder-langtok src" if side == "source" else "--decoder-langtok"
                raise ConfigError(
                    f"layers indexed by the {side} language need its token in every sentence, "
                    f"and the data has none: add {flag} (for --extra-data: --langtoks), or index "
                    "those layers by the other side (--encoder-index-side, --decoder-index-side)"
                )
        self._read_ids = LangtokIds(
            self.source_dictionary,
            self.languages,
            self.args.langtoks_specs,
            self.args.lang_tok_style,
            {side: offered[side] for side in needed},
        )

    def load_dataset(self, split, *args, **kwargs):
        with one_line_errors():
            self._check_files(split)
        super().load_dataset(split, *args, **kwargs)
        dataset = self.datasets[split]
        if self.training and self.languages is not None and not hasattr(dataset, "_lslora"):
            dataset._lslora = True
            dataset.collater = functools.partial(self._collate, dataset.collater)

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

    def _collate(self, collater, samples):
        batch = collater(samples)
        if batch:
            with one_line_errors():
                batch["net_input"].update(self._read_ids(batch["net_input"]))
        return batch

    def inference_step(self, generator, models, sample, *args, **kwargs):
        net_input = sample["net_input"]
        if self.languages is not None:
            for key, index in self._ids.items():
                if index is not None and key not in net_input:
                    tokens = net_input["src_tokens"]
                    net_input[key] = tokens.new_full((tokens.size(0),), index)
        return super().inference_step(generator, models, sample, *args, **kwargs)

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

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        pruned = _pruned_optimizer(optimizer)
        if pruned is not None:
            sparsity = pruned.prune_at(self._epoch, update_num)
            metrics.log_scalar("sparsity", sparsity, weight=0, priority=650, round=4)
        if self.languages is not None:
            for layer, share in model.source_shares().items():
                name = f"p_source/{layer}"  # TensorBoard draws names with one prefix together
                metrics.log_scalar(name, share, weight=0, priority=700, round=4)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)


def _index(languages, code):
    return languages.index(code) if code in languages else None


def _pruned_optimizer(optimizer):
    """The pruned_* optimizer under fairseq's fp16 and AMP wrappers, or None."""
    for attribute in ("fp32_optimizer", "wrapped_optimizer"):
        optimizer = getattr(optimizer, attribute, optimizer)
    return optimizer if isinstance(optimizer, PrunedOptimizer) else None


def _check_optimizer(args):
    """Pruning options are checked before data and model are loaded."""
    if not args.optimizer.startswith("pruned_"):
        logger.warning(
            "--optimizer %s moves languages that have no sentence in an update, by momentum and "
            "weight decay, and does not prune: use pruned_%s (with --pruning-final-sparsity 0 "
            "for no pruning)",
            args.optimizer,
            args.optimizer,
        )
        return
    config = PruningConfig.from_namespace(args)
    config.validated()
    warning = config.warning(getattr(args, "max_epoch", 0), getattr(args, "max_update", 0))
    if warning:
        logger.warning(warning)


def _check_loading(args):
    """What fairseq refuses beside --finetune-from-model, or passes over, told before anything
    is built."""
    restored = getattr(args, "restore_file", "checkpoint_last.pt")
    if not getattr(args, "finetune_from_model", None):
        if restored != "checkpoint_last.pt" and resumed_checkpoint(args) is None:
            raise ConfigError(
                f"--restore-file {restored}: no such file, and nothing to train from: name a "
                "checkpoint of this package, or the base model with --finetune-from-model"
            )
        return
    names = ("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader")
    refused = [name for name in names if getattr(args, name, False)]
    if restored != "checkpoint_last.pt":
        refused.append("restore_file")
    if refused:
        option = f"--{refused[0].replace('_', '-')}"
        raise ConfigError(
            f"--finetune-from-model and {option} exclude each other: leave out "
            f"--finetune-from-model to resume a run, or {option} to start from the base model"
        )


def _read_base(path):
    if not os.path.isfile(path):
        raise ConfigError(
            f"--finetune-from-model {path}: no such file: name the base model's checkpoint"
        )
    return BaseModel.from_args(path, read_args(path))


def _check_pairs(args):
    """Every direction can be read, and consists of known languages."""
    if args.source_lang is not None and args.target_lang is not None:
        pairs = [(args.source_lang, args.target_lang)]
    else:
        pairs = args.lang_pairs or []
        pairs = [p.split("-") for p in (pairs.split(",") if isinstance(pairs, str) else pairs)]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ConfigError(
                f"--lang-pairs: cannot read {'-'.join(pair)!r}: write source-target, with codes "
                "that hold no hyphen"
            )
        unknown = [code for code in pair if args.langs and code not in args.langs]
        if unknown:
            raise ConfigError(
                f"{'-'.join(pair)}: {unknown[0]} is absent from --langs "
                f"({listed(args.langs, ',')}): choose one of these, or train with it in --langs"
            )


def _restore_task_options(args):
    """Takes languages and language tokens from the (first) checkpoint to decode with.

    What the command line says must agree; for a checkpoint of stock fairseq its word is taken.
    """
    path = (getattr(args, "path", None) or "").split(os.pathsep)[0]
    if not path or "://" in path:
        return
    if not os.path.isfile(path):
        raise ConfigError(f"--path {path}: no such file: name the checkpoint to decode with")
    saved = read_args(path)
    given = args.langs or args.lang_dict or args.encoder_langtok or args.decoder_langtok
    if saved.get("lora_tiers") is None and given:
        return
    for name in ("langs", "encoder_langtok"):
        value, trained = getattr(args, name), saved.get(name)
        if value and trained and value != trained:
            here, there = _from_first_difference(value, trained)
            raise ConfigError(
                f"--{name.replace('_', '-')} {here} differs from {there}, with which {path} was "
                "trained: leave the option out"
            )
    for name in TASK_FIELDS:
        if saved.get(name) is not None and not (name == "lang_dict" and args.lang_dict):
            setattr(args, name, saved[name])


def _from_first_difference(*values):
    """Two values of an option for a message, long lists from where they differ."""
    texts = [",".join(v) if isinstance(v, list) else str(v) for v in values]
    parts = [re.split("(?<=[,;])", text) for text in texts]
    start = len(os.path.commonprefix(parts))
    return [listed(part, "", start) for part in parts]


def restore_lora_options(args, path, saved, langs):
    """Takes the --lora-* options of the checkpoint that is resumed, and refuses other ones.

    Args:
        args: the options of this run, changed in place
        path: the checkpoint
        saved: the options that it was trained with
        langs: the languages of this run, in the order of their tokens

    Raises:
        ConfigError: this run has other options, or its languages in another order.
    """
    trained, ours = saved.get("optimizer"), getattr(args, "optimizer", None)
    if trained and ours and ours != trained and not getattr(args, "reset_optimizer", False):
        raise ConfigError(
            f"{path} was trained with --optimizer {trained}, this run has {ours}: resume with the "
            "old one, or add --reset-optimizer (and leave out --finetune-from-model)"
        )
    if saved.get("lora_tiers") is None:
        return
    if list(saved.get("langs") or langs) != list(langs):
        there, here = _from_first_difference(saved["langs"], list(langs))
        raise ConfigError(
            f"{path} was trained with --langs {there}, this run has {here}: the order numbers the "
            "language tokens; resume with the old one"
        )
    given = Namespace(**{n: getattr(args, n) for n in LORA_FIELDS if hasattr(args, n)})
    for name in LORA_FIELDS:
        trained = saved.get(name, getattr(LSLoConfig, name))  # older than the option
        value = getattr(given, name, None)
        is_given = value is not None and value is not False  # the doctor's parser: not given
        if is_given and not _same(name, value, trained):
            here, there = _from_first_difference(value, trained)
            raise ConfigError(
                f"--{name.replace('_', '-')} {here} differs from {there} of {path}, which "
                "this run resumes: leave the option out, or choose another --save-dir"
            )
        setattr(args, name, trained)


def _same(name, value, saved):
    if name == "lora_tiers":  # a file and its text may spell the same inventory
        value, saved = (Languages.parse(v) for v in (value, saved))
        return {c: value.tier(c) for c in value.codes} == {c: saved.tier(c) for c in saved.codes}
    return str(value) == str(saved)
