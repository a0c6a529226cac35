"""Checkpoints of fairseq's own transformer, in plain values."""

import json
import shlex
from argparse import ArgumentParser, Namespace
from collections import OrderedDict

ARCH, TASK = "transformer", "translation_multi_simple_epoch"


def options(model, tokens, pair):
    """Options of model and task, by name, in plain values.

    Args:
        model: those that the model is built with, by name; others are passed over
        tokens: those that tell which sentence has which token, by name
        pair: source and target language
    """
    # not for who reads or merges weights alone: fairseq takes seconds
    from fairseq.models.transformer import TransformerModel
    from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

    of_model, of_task = ArgumentParser(), ArgumentParser()
    TransformerModel.add_args(of_model)
    TranslationMultiSimpleEpochTask.add_args(of_task)
    names = [action.dest for action in of_model._actions]
    source, target = pair
    specs = tokens["encoder_langtok"] or None, "tgt" if tokens["decoder_langtok"] else None
    found = {
        **vars(of_task.parse_args([""])),
        **{name: model[name] for name in names if name in model},
        **tokens,
        "langtoks": tokens.get("langtoks") or {"main": specs},
        **dict.fromkeys(("encoder_embed_path", "decoder_embed_path")),  # weights are here
        "lang_pairs": f"{source}-{target}", "source_lang": source, "target_lang": target,
        "arch": ARCH, "_name": ARCH, "task": TASK,
        # the task reads them, too; 0.12.2 cannot add what is missing
        "seed": 1, "dataset_impl": None, "shuffle_instance": False,
    }  # fmt: skip
    return json.loads(json.dumps(found))


def completed(model):
    """Options of a model, and all others of fairseq's transformer at their defaults, by name."""
    from fairseq.models.transformer.transformer_legacy import base_architecture

    args = Namespace(**model)
    base_architecture(args)
    return vars(args)


def content(weights, found):
    """All that a checkpoint holds.

    Args:
        weights: the state dict
        found: what :func:`options` returns
    """
    last = {"optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    return {
        "args": None,
        "cfg": {"model": _both(found), "task": {**found, "_name": TASK}},
        "model": weights,
        "optimizer_history": [last],
        "last_optimizer_state": None,
        "extra_state": {},
    }


def flags(tokens):
    """The part of a command line that gives the options of tokens.

    Args:
        tokens: as for :func:`options`
    """
    usual, words = {"lang_tok_style": "multilingual", "langtoks_specs": ["main"]}, []
    for name, value in tokens.items():
        if value and value != usual.get(name):
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(",".join(value) if isinstance(value, list) else str(value))
    return words


def command(path, pair, tokens):
    """The command line with which stock fairseq decodes a checkpoint.

    Args:
        path: of the checkpoint
        pair: such as ``en-fr``
        tokens: as for :func:`options`
    """
    source, target = pair.split("-")
    words = ["fairseq-generate", "DATA", "--path", path, "--task", TASK]
    words += ["--lang-pairs", pair, "-s", source, "-t", target]
    return shlex.join([*words, *flags(tokens)])


def _both(found):
    """Options as a dict whose attributes they are, too.

    torch's safe loader takes it, since a state dict is one; fairseq and CTranslate2's converter
    read and set attributes.
    """
    both = OrderedDict(found)
    vars(both).update(found)
    return both
