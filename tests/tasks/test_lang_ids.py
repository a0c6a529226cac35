"""Which sides the language tokens tell, and the language of each sentence of a padded batch."""

import re

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import augment_dictionary

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.languages import Languages
from lslora_fairseq.tasks.lang_ids import LangtokIds, offered_sides

LANGUAGES = Languages.parse("high=en,de;low=fr")  # de 0, en 1, fr 2
PAD, EOS, WORD = 1, 2, 4


def dictionary(langs=("fr", "en", "de"), style="multilingual", specs=("main",)):
    made = Dictionary()
    made.add_symbol("word")
    augment_dictionary(made, langs, style, specs)
    return made


TOKENS = dictionary()
DE, EN, FR = (TOKENS.index(f"__{code}__") for code in ("de", "en", "fr"))


@pytest.mark.parametrize(
    "langtoks, replacing, expected",
    [
        # --encoder-langtok src --decoder-langtok
        (
            {"main": ("src", "tgt")},
            False,
            {"source": ("src_tokens", 0), "target": ("prev_output_tokens", 1)},
        ),
        # the same with --lang-tok-replacing-bos-eos
        (
            {"main": ("src", "tgt")},
            True,
            {"source": ("src_tokens", -1), "target": ("prev_output_tokens", 0)},
        ),
        ({"main": ("src", None)}, False, {"source": ("src_tokens", 0)}),
        ({"main": ("src", None)}, True, {"source": ("src_tokens", -1)}),
        ({"main": ("tgt", None)}, False, {"target": ("src_tokens", 0)}),
        ({"main": ("tgt", None)}, True, {"target": ("src_tokens", -1)}),
        ({"main": (None, "tgt")}, False, {"target": ("prev_output_tokens", 1)}),
        ({"main": (None, "tgt")}, True, {"target": ("prev_output_tokens", 0)}),
        ({"main": ("tgt", "tgt")}, False, {"target": ("prev_output_tokens", 1)}),
        ({"main": (None, None)}, False, {}),
        ({"main": (None, None)}, True, {}),
        # further categories of data must agree
        (
            {"main": ("src", "tgt"), "mined": ("src.mined", "tgt.mined")},
            False,
            {"source": ("src_tokens", 0), "target": ("prev_output_tokens", 1)},
        ),
        (
            {"main": ("src", "tgt"), "mined": ("tgt", "tgt")},
            False,
            {"target": ("prev_output_tokens", 1)},
        ),
        (
            {"main": ("src", "tgt"), "mined": (None, "tgt")},
            False,
            {"target": ("prev_output_tokens", 1)},
        ),
        ({"main": ("src", "tgt"), "mined": ("src", None)}, False, {"source": ("src_tokens", 0)}),
        ({"main": ("src", None), "mined": ("tgt", None)}, False, {}),
        ({"main": ("src", "tgt"), "mined": (None, None)}, False, {}),
    ],
)
def test_offered_sides(langtoks, replacing, expected):
    assert offered_sides(langtoks, replacing) == expected


def ids_of(offered, net_input, tokens=TOKENS, specs=("main",), style="multilingual"):
    reader = LangtokIds(tokens, LANGUAGES, specs, style, offered)
    found = reader({key: torch.tensor(value) for key, value in net_input.items()})
    assert all(ids.dtype == torch.long for ids in found.values())
    return {key: ids.tolist() for key, ids in found.items()}


def test_tokens_in_front_of_padded_batches():
    left = [[PAD, PAD, FR, WORD, EOS], [DE, WORD, WORD, WORD, EOS], [PAD, EN, WORD, WORD, EOS]]
    right = [[EOS, EN, WORD, PAD, PAD], [EOS, FR, WORD, WORD, WORD], [EOS, DE, PAD, PAD, PAD]]
    offered = {"source": ("src_tokens", 0), "target": ("prev_output_tokens", 1)}
    expected = {"source_lang_ids": [2, 0, 1], "target_lang_ids": [1, 2, 0]}
    assert ids_of(offered, {"src_tokens": left, "prev_output_tokens": right}) == expected
    # and padded on the other sides: --left-pad-source False --left-pad-target True
    left = [[FR, WORD, EOS, PAD, PAD], [DE, WORD, WORD, WORD, EOS], [EN, WORD, EOS, PAD, PAD]]
    right = [[PAD, PAD, EOS, EN, WORD], [EOS, FR, WORD, WORD, WORD], [PAD, PAD, PAD, EOS, DE]]
    assert ids_of(offered, {"src_tokens": left, "prev_output_tokens": right}) == expected


def test_tokens_that_replace_eos_and_bos():
    offered = {"source": ("src_tokens", -1), "target": ("prev_output_tokens", 0)}
    expected = {"source_lang_ids": [2, 0], "target_lang_ids": [1, 1]}
    net_input = {
        "src_tokens": [[PAD, PAD, WORD, FR], [WORD, WORD, WORD, DE]],
        "prev_output_tokens": [[EN, WORD, PAD], [EN, WORD, WORD]],
    }
    assert ids_of(offered, net_input) == expected
    net_input = {
        "src_tokens": [[WORD, FR, PAD, PAD], [WORD, WORD, WORD, DE]],
        "prev_output_tokens": [[PAD, EN, WORD], [EN, WORD, WORD]],
    }
    assert ids_of(offered, net_input) == expected


def test_the_target_token_on_the_source():
    offered = {"target": ("src_tokens", 0)}
    assert ids_of(offered, {"src_tokens": [[PAD, EN, EOS], [DE, WORD, EOS]]}) == {
        "target_lang_ids": [1, 0]
    }


def test_a_batch_of_one_sentence_and_no_side_at_all():
    offered = {"source": ("src_tokens", 0)}
    assert ids_of(offered, {"src_tokens": [[FR, EOS]]}) == {"source_lang_ids": [2]}
    assert ids_of({}, {"src_tokens": [[FR, EOS]]}) == {}


def test_tokens_of_every_style_and_spec():
    tokens = dictionary(style="mbart", specs=("main", "mono_dae"))
    first, second = tokens.index("[en]"), tokens.index("[en_dae]")
    assert tokens.unk() not in (first, second)
    found = ids_of(
        {"source": ("src_tokens", 0)},
        {"src_tokens": [[first, EOS], [second, EOS], [tokens.index("[de_dae]"), EOS]]},
        tokens,
        ("main", "mono_dae"),
        "mbart",
    )
    assert found == {"source_lang_ids": [1, 1, 0]}


@pytest.mark.parametrize(
    "offered, net_input, message",
    [
        (
            {"source": ("src_tokens", 0)},
            {"src_tokens": [[DE, WORD, EOS], [PAD, WORD, EOS]]},
            "a sentence has 'word' where the token of its source language should be: the data",
        ),
        (
            {"target": ("prev_output_tokens", 1)},
            {"prev_output_tokens": [[EOS, WORD, PAD], [EOS, DE, WORD]]},
            "a sentence has 'word' where the token of its target language should be: the data",
        ),
    ],
)
def test_a_sentence_without_its_token_is_an_error(offered, net_input, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}.*has no adapter$"):
        ids_of(offered, net_input)


def test_a_language_without_an_adapter_and_a_missing_token_are_no_language():
    """Another language's token is an error; a missing one never stands for <unk>."""
    tokens = dictionary(("de", "ko"))  # no token for en and fr, none of the adapters for ko
    offered = {"source": ("src_tokens", 0)}
    assert ids_of(offered, {"src_tokens": [[tokens.index("__de__"), EOS]]}, tokens) == {
        "source_lang_ids": [0]
    }
    for token, name in ((tokens.index("__ko__"), "__ko__"), (tokens.unk(), "<unk>")):
        with pytest.raises(ConfigError, match=f"^a sentence has '{name}' where"):
            ids_of(offered, {"src_tokens": [[token, EOS]]}, tokens)
