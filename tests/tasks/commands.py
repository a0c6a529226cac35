"""Tasks and models from the words of a command line, for tests of what is refused."""

import re

import pytest
from console import LANGS, LANGTOKS, PAIRS, SIZES, TIERS
from fairseq import options

from lslora_fairseq.errors import UserError
from lslora_fairseq.tasks.translation_multi_lslora import TranslationMultiLSLoTask as Task


def training(data, *more):
    return [
        data, "--task", "translation_multi_lslora", "--arch", "lslora_transformer", "--langs",
        LANGS, "--lang-pairs", PAIRS, *LANGTOKS, "--optimizer", "pruned_adam", "--lora-tiers",
        TIERS, "--lora-rank", "high=2,low=4", "--save-dir", "/nonexistent", *SIZES, *more,
    ]  # fmt: skip


def decoding(data, *more):
    return [data, "--task", "translation_multi_lslora", "--path", "model.pt", *more]


def set_up(words, parser=options.get_training_parser):
    args = options.parse_args_and_arch(parser(), list(map(str, words)))
    return Task.setup_task(args), args


def build(words):
    task, args = set_up(words)
    return task, task.build_model(args)


def set_up_decoding(words):
    return set_up(words, options.get_generation_parser)


def refused(function, words, message):
    with pytest.raises(UserError, match=f"^lslora: error: {re.escape(message)}") as caught:
        function(words)
    assert "\n" not in str(caught.value)
