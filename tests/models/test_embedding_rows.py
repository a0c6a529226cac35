"""The rows of a base checkpoint, by its dictionary and languages."""

import re

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import augment_dictionary

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.models.embedding_rows import match_rows, take_rows

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


def dictionary(langs, lines=("a", "b"), style="multilingual"):
    """As the task makes it: lines of a file, then fairseq's own language tokens."""
    made = Dictionary()
    for line in lines:
        made.add_symbol(line)
    made.rows_in_file = len(made)
    augment_dictionary(made, langs, style)
    return made


def base(langs, style="multilingual"):
    return Identity("base.pt", "transformer", langs, style)


@pytest.mark.parametrize(
    "args, langs, style",
    [
        ({"langs": ["fr", "de"]}, ["fr", "de"], "multilingual"),
        ({"langs": "fr,de", "lang_tok_style": "mbart"}, ["fr", "de"], "mbart"),
        ({"langs": None, "lang_pairs": "fr-en,en-de"}, ["de", "en", "fr"], "multilingual"),
        ({"lang_pairs": ["fr-en", "en-de"]}, ["de", "en", "fr"], "multilingual"),
        ({"langs": [], "lang_pairs": "fr-en"}, [], "multilingual"),
        ({"lang_dict": "langs.txt", "lang_pairs": "fr-en"}, None, "multilingual"),
        ({"lang_tok_style": None}, None, "multilingual"),
    ],
)
def test_what_a_checkpoint_tells_of_its_languages(args, langs, style):
    found = Identity.from_options("base.pt", {"arch": "transformer", **args})
    assert found == Identity("base.pt", "transformer", langs, style)


def test_the_architecture_may_be_unknown():
    assert Identity.from_options("base.pt", {}) == Identity("base.pt")


@pytest.mark.parametrize("style", ["multilingual", "mbart"])
@pytest.mark.parametrize("lines", [("a", "b"), ("a", "__de__", "[de]", "<mask>", "b")])
def test_symbols_are_what_fairseq_appends(style, lines):
    made = dictionary(["fr", "de", "en"], lines, style)
    found = base(["fr", "de", "en"], style).symbols(made.symbols[: made.rows_in_file])
    assert found == made.symbols


def test_symbols_are_unknown_without_languages():
    assert base(None).symbols(["a"]) is None


def test_the_same_languages_need_no_matching():
    ours = dictionary(["de", "en", "fr"])
    assert match_rows(9, ours, base(["de", "en", "fr"])) is None


def test_reordered_languages_are_matched_by_token():
    ours = dictionary(["fr", "de", "en"])
    found = match_rows(9, ours, base(["de", "en", "fr"]))
    assert found.tolist() == [0, 1, 2, 3, 4, 5, 8, 6, 7]


def test_fewer_languages_than_the_base_has():
    assert match_rows(9, dictionary(["fr", "de"]), base(["de", "en", "fr"])).tolist() == [
        *range(6),
        8,
        6,
    ]


def test_a_language_new_to_the_base_has_no_row():
    ours = dictionary(["de", "ko", "en"])
    assert match_rows(8, ours, base(["en", "de"])).tolist() == [*range(6), 7, -1, 6]


def test_a_base_without_language_tokens():
    ours = dictionary(["de", "en"])
    assert match_rows(6, ours, base(None)).tolist() == [*range(6), -1, -1]
    assert match_rows(6, ours, base([])).tolist() == [*range(6), -1, -1]


def test_a_base_that_does_not_tell_its_languages_is_taken_as_it_is():
    assert match_rows(8, dictionary(["de", "en"]), base(None)) is None


def test_every_row_in_the_dictionary_file_as_for_nllb():
    """Tokens and extra rows of any kind stand in the file; fairseq appends none of them again."""
    lines = ("a", "__en__", "__de__", "b", "<mask>", "<MINED_DATA>")
    ours = dictionary(["de", "en"], lines)
    assert len(ours) == ours.rows_in_file == 10
    for langs in (["de", "en"], ["en", "de"], None):
        assert match_rows(10, ours, base(langs)) is None
    # a language that the file lacks is appended, and has no row in the base
    more = dictionary(["de", "ko"], lines)
    assert match_rows(10, more, base(["en", "de"])).tolist() == [*range(10), -1]


def test_mbart_style_tokens_are_matched_with_their_mask():
    ours = dictionary(["en", "de", "fr"], style="mbart")
    assert ours.symbols[-1] == "<mask>"
    assert match_rows(9, ours, base(["de", "en"], "mbart")).tolist() == [*range(6), 7, 6, -1, 8]
    reordered = dictionary(["en", "de"], style="mbart")
    assert match_rows(9, reordered, base(["de", "en"], "mbart")).tolist() == [*range(6), 7, 6, 8]


def test_rows_beyond_what_the_base_tells_are_kept_in_place():
    """The base had a token more (of --langtoks-specs, say), and this run has it at that place."""
    ours = dictionary(["de", "en"])
    ours.add_symbol("__de_mined__")
    assert match_rows(9, ours, base(["de", "en"])) is None


@pytest.mark.parametrize("rows, langs", [(9, 2), (5, 2), (9, None), (7, None)])
def test_another_number_of_rows_is_an_error_that_explains_the_number_expected(rows, langs):
    ours = dictionary(["de", "en"])
    told = ", trained with 2 languages," if langs else ""
    message = (
        f"base.pt{told} has {rows} embedding rows, this run expects 8: 2 dictionary lines + 4 "
        "specials + 2 language tokens that the dictionary lacks; use the dictionary of the base "
        "model and its --langs in its order, or, for rows beyond the language tokens such as "
        "NLLB's data-source tags, write every row in order into one file and pass it as "
        "--fixed-dictionary"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        match_rows(rows, ours, base(["de", "en"] if langs else None))


def test_numbers_in_the_message_have_separators():
    ours = dictionary(["de"], lines=[f"w{i}" for i in range(1200)])
    with pytest.raises(ConfigError, match="has 5,000 embedding rows, .* 1,205: 1,200 dictionary"):
        match_rows(5000, ours, base(None))


def test_the_right_number_of_other_rows_is_an_error():
    """Another dictionary and other languages that add up to the same number by chance."""
    ours = dictionary(["de", "en", "fr"])  # 2 lines and 3 languages; the base had 3 and 2
    message = "base.pt, trained with 2 languages, has 9 embedding rows, as many as this run but"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}.*--fixed-dictionary$"):
        match_rows(9, ours, base(["en", "fr"]))


def test_take_rows_keeps_fresh_rows_where_the_base_has_none():
    own = torch.tensor([[10.0, 10], [11, 11], [12, 12]])
    found = torch.tensor([[0.0, 0], [1, 1]])
    taken = take_rows(own, found, torch.tensor([1, -1, 0]))
    assert taken.tolist() == [[1, 1], [11, 11], [0, 0]]
    assert own[0, 0] == 10 and found[0, 0] == 0


def test_take_rows_keeps_the_precision_of_the_base():
    own, found = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.half)
    assert take_rows(own, found, torch.tensor([0, -1])).dtype == torch.half
