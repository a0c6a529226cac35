"""Options of a command: checked before anything is built, and taken from the checkpoint that the
command loads where they are left out."""

import logging
import os
import re
from argparse import Namespace

from fairseq.checkpoint_utils import get_maybe_sharded_checkpoint_filename
from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from lslora_fairseq.adapters.assembly import Assembly, rows_of
from lslora_fairseq.adapters.header import TOKENS
from lslora_fairseq.checkpoints import chosen_checkpoint, read_checkpoint
from lslora_fairseq.config import (
    LORA_FIELDS,
    NEW_ADAPTERS,
    LSLoConfig,
    PruningConfig,
    StartConfig,
)
from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.languages import Languages
from lslora_fairseq.models.base_dtype import BASE_DTYPES

logger = logging.getLogger(__name__)

# what decoding takes from the checkpoint unless the command line gives it
TASK_FIELDS = ("langs", "lang_dict", "lang_pairs", *TOKENS)
# what may change from one stage to the next on the same adapters
STAGE_FIELDS = ("lora_train_languages", "lora_train_tokens", "lora_init_from")  # of a stage alone
FREE_FIELDS = ("lora_dropout", *STAGE_FIELDS)
# fairseq's own, those that set another one first
PRECISIONS = ("memory_efficient_fp16", "memory_efficient_bf16", "fp16", "bf16", "amp")
DEFAULT_RESTORE_FILE = "checkpoint_last.pt"


def check_pairs(args):
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


def check_optimizer(args):
    """Pruning options are checked before the model is built."""
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


def chosen_start(args):
    """The checkpoint that training starts from.

    Returns:
        its path, or None without one; whether training starts afresh from it, with a new optimizer

    Raises:
        ConfigError: options that exclude each other, or a named file that is not there: without a
            file, fairseq would start from random weights.
    """
    base = getattr(args, "finetune_from_model", None)
    if base:
        names = ("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader")
        refused = [name for name in names if getattr(args, name, False)]
        if args.restore_file != DEFAULT_RESTORE_FILE:
            refused.append("restore_file")
        if refused:
            option = f"--{refused[0].replace('_', '-')}"
            raise ConfigError(
                f"--finetune-from-model and {option} exclude each other: leave out "
                f"--finetune-from-model to resume a run, or {option} to start from the base model"
            )
    try:
        path, is_fresh = chosen_checkpoint(args)
    except ValueError:
        raise ConfigError(
            f"--finetune-from-model {base}: no such file: name the base model's checkpoint"
        ) from None
    if os.path.isfile(path):
        return path, is_fresh
    is_default = args.restore_file == DEFAULT_RESTORE_FILE
    if not is_default or path == getattr(args, "continue_once", None):
        option = "--continue-once" if is_default else "--restore-file"
        raise ConfigError(
            f"{option} {path}: no such file, and nothing to train from: name a checkpoint of this "
            "package, or the base model with --finetune-from-model"
        )
    return None, True


def base_left_out(args):
    """The base model that checkpoints of a run leave out, or None if they hold all.

    Raises:
        ConfigError: it is not named, or ``--lora-save`` cannot be read.
    """
    start = StartConfig.from_namespace(args)
    if start.lora_save == "all":
        return None
    if start.lora_save != "adapters":
        raise ConfigError(f"--lora-save {start.lora_save} must be all or adapters")
    base = start.lora_base or getattr(args, "finetune_from_model", None)
    if base is None or not os.path.isfile(base):
        raise ConfigError(
            "--lora-save adapters leaves the base model out of checkpoints, and "
            + (f"{base}: no such file" if base else "no command tells where it is")
            + ": name it with --finetune-from-model or --lora-base"
        )
    return base


def base_dtype(args):
    """The torch dtype that the frozen base of a command's models is cast to, or None.

    Raises:
        ConfigError: there is no such dtype, or *args* exclude it.
    """
    name = StartConfig.from_namespace(args).lora_base_dtype
    option = f"--lora-base-dtype {name}"
    if name not in BASE_DTYPES:
        raise ConfigError(f"{option} must be fp32, bf16 or fp16")
    dtype = BASE_DTYPES[name]
    given = [other for other in PRECISIONS if getattr(args, other, False)]
    if dtype is not None and given:
        other = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{option} and {other} exclude each other: leave one of them out")
    if dtype is not None and getattr(args, "write_checkpoints_asynchronously", False):
        raise ConfigError(
            f"{option} does not work with --write-checkpoints-asynchronously, which writes into "
            "the file that a resumed run reads its base from: leave it out"
        )
    return dtype


def restore_task_options(args, adapters=None):
    """Takes languages and language tokens from the (first) checkpoint to decode with.

    What the command line says must agree; for a checkpoint of stock fairseq its word is taken.

    Args:
        args: the options of this run, changed in place
        adapters: :class:`~lslora_fairseq.adapters.collection.Collection` to load onto it, or None
    """
    path = (getattr(args, "path", None) or "").split(os.pathsep)[0]
    if not path or "://" in path:
        return
    suffix, shards = (getattr(args, f"checkpoint_{n}", None) for n in ("suffix", "shard_count"))
    path = get_maybe_sharded_checkpoint_filename(path, suffix or "", 0, shards or 1)
    if not os.path.isfile(path):
        raise ConfigError(f"--path {path}: no such file: name the checkpoint to decode with")
    saved, weights = read_checkpoint(path)
    if adapters is not None:
        assembly = Assembly.for_base(adapters, path, saved)
        saved = {**saved, **assembly.options(rows_of(path, weights))}
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


def check_continued(args, path, saved, langs):
    """A run that goes on keeps its optimizer and the order of its languages.

    Args:
        args: the options of this run
        path: the checkpoint
        saved: the options that it was trained with
        langs: the languages of this run, in the order of their tokens

    Raises:
        ConfigError: this run has another optimizer, or its languages in another order.
    """
    trained, ours = saved.get("optimizer"), getattr(args, "optimizer", None)
    if trained and ours and ours != trained:
        raise ConfigError(
            f"{path} was trained with --optimizer {trained}, this run has {ours}: resume with the "
            "old one, or add --reset-optimizer (and leave out --finetune-from-model)"
        )
    if saved.get("lora_tiers") is not None and list(saved.get("langs") or langs) != list(langs):
        there, here = _from_first_difference(saved["langs"], list(langs))
        raise ConfigError(
            f"{path} was trained with --langs {there}, this run has {here}: the order numbers the "
            "language tokens; resume with the old one"
        )


def begin_adapters(args, words):
    """Fills in the options of adapters that start anew, where neither the command line nor a
    checkpoint gave them; the architecture's options must be there.

    Args:
        words: number of rows of the embeddings
    """
    several = _has_several_matrices(args)
    for name, value in NEW_ADAPTERS.items():
        if getattr(args, name, None) is None:
            is_left_out = several and name == "lora_embedding_rank"
            setattr(args, name, 0 if is_left_out else min(value, args.encoder_embed_dim, words))


def _has_several_matrices(args):
    """Whether encoder, decoder and output projection do not share one matrix of embeddings."""
    several = getattr(args, "adaptive_softmax_cutoff", None) is not None
    return several or not getattr(args, "share_all_embeddings", False)


def begin_tokens(args, base, dictionary, saved):
    """Fills in whose tokens' rows a stage trains, if it is not told: those that are new to the base
    model, and those that the stage before trained.

    Args:
        base: :class:`~lslora_fairseq.identity.Identity` of what training starts from, or None
        dictionary: this run's
        saved: the options of what it starts from
    """
    config = LSLoConfig.from_namespace(args)
    if config.lora_tiers is None or config.lora_train_tokens is not None:
        return
    args.lora_train_tokens = "none"
    if _has_several_matrices(args) or base is None or base.langs is None:
        return
    languages = Languages.parse(config.lora_tiers)
    if not any(languages.per_language(config.lora_rank, "--lora-rank", int)):
        return
    chosen = languages.codes
    if config.lora_train_languages is not None:
        chosen = languages.subset(config.lora_train_languages, "--lora-train-languages")
    before = (saved.get("lora_train_tokens") or "").split(",")
    found = [
        code
        for code in chosen
        if (code not in base.langs or code in before)
        and dictionary.index(get_lang_tok(code, args.lang_tok_style)) >= dictionary.rows_in_file
    ]
    args.lora_train_tokens = ",".join(found) or "none"


def starts_of(args, added, has_adapters):
    """Which language another one starts as, by ``--lora-init-from``.

    Args:
        added: the languages that this stage adds
        has_adapters: training starts from a checkpoint or files with adapters

    Raises:
        ConfigError: it cannot be read, or names languages that do not start here.
    """
    option, found = "--lora-init-from", {}
    text = getattr(args, "lora_init_from", None) or ""
    for part in filter(None, text.replace(" ", "").split(",")):
        code, equals, source = part.partition("=")
        if not (code and equals and source):
            raise ConfigError(f"{option}: cannot read {part!r}: write wo=fr,sd=ur")
        languages = Languages.parse(args.lora_tiers)
        languages.subset(f"{code},{source}", option)
        if has_adapters and (code not in added or source in added):
            odd = f"{source} has no" if code in added else f"{code} has"
            raise ConfigError(
                f"{option} {part}: {odd} adapters where this run starts from: name a language that "
                "it adds, and one that is there"
            )
        found[code] = source
    return found


def restore_lora_options(args, path, saved, is_fresh=False):
    """Takes what defines the adapters from the checkpoint that training starts from, and refuses
    other values; a stock checkpoint defines none.

    Args:
        args: the options of this run, changed in place
        path: the checkpoint, None where training starts from nothing
        saved: the options that it was trained with
        is_fresh: training starts afresh from it, as a further stage, and does not go on

    Returns:
        the languages that a further stage adds

    Raises:
        ConfigError: this run has other options, or keeps adapters that are not there.
    """
    if saved.get("lora_tiers") is None:
        if getattr(args, "lora_train_languages", None) is not None:
            raise ConfigError(
                "--lora-train-languages keeps the other languages' adapters, and "
                f"{path or 'a new model'} has none: leave it out, or start from a checkpoint with "
                "adapters (--finetune-from-model)"
            )
        return ()
    languages = Languages.parse(saved["lora_tiers"])
    given = Namespace(**{n: getattr(args, n) for n in LORA_FIELDS if hasattr(args, n)})
    grown, tiers = languages, getattr(given, "lora_tiers", None)
    if is_fresh and tiers is not None:
        grown = languages.joined(Languages.parse(tiers))
    added = tuple(code for code in grown.codes if code not in languages)
    for name in LORA_FIELDS:
        trained = saved.get(name, getattr(LSLoConfig, name))  # older than the option
        value = getattr(given, name, None)
        is_given = value is not None and value is not False  # the doctor's parser: not given
        if is_fresh and name in FREE_FIELDS and (is_given or name in STAGE_FIELDS):
            continue
        if is_given and not _same(name, value, trained, languages, grown):
            here, there = _from_first_difference(value, trained)
            raise ConfigError(
                f"--{name.replace('_', '-')} {here} differs from {there} of {path}, which "
                f"this run {'starts from' if is_fresh else 'resumes'}: leave the option out, or "
                f"choose another {'checkpoint' if is_fresh else '--save-dir'}"
            )
        is_of_added = is_given and added and name in ("lora_rank", "lora_alpha")
        setattr(args, name, value if is_of_added else trained)
    if added:
        args.lora_tiers = grown.spec
    return added


def _same(name, value, saved, languages, grown):
    """Whether two texts of an option agree.

    Args:
        languages: those of the checkpoint
        grown: with those that are added
    """
    if name == "lora_tiers":  # those that it leaves out stay
        here = Languages.parse(value)
        return all(c in grown and here.tier(c) == grown.tier(c) for c in here.codes)
    if name in ("lora_rank", "lora_alpha") and saved is not None:
        option = f"--{name.replace('_', '-')}"
        here = dict(zip(grown.codes, grown.per_language(value, option, float)))
        there = languages.per_language(saved, option, float)
        return tuple(here[code] for code in languages.codes) == there
    lists = ("_target_modules", "_train_languages", "_train_tokens", "_init_from")
    if name.endswith(lists) and saved is not None:
        return {v.strip() for v in value.split(",")} == {v.strip() for v in saved.split(",")}
    return str(value) == str(saved)
