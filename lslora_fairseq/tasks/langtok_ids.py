"""From the language tokens of a batch to the language of each sentence."""

import torch
from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from lslora_fairseq.errors import ConfigError


def offered_sides(langtoks, replacing):
    """Which sides' languages the tokens of a training batch tell, and where.

    Args:
        langtoks: fairseq's ``args.langtoks``: data category -> (source spec, target spec)
        replacing: ``--lang-tok-replacing-bos-eos``

    Returns:
        dict of side -> (key of the tensor in ``net_input``, position): position counts from the
        first token of a sentence, -1 is its last
    """
    specs = list(langtoks.values())
    offered = {}
    if all(source for source, _ in specs):
        on_source = {"source" if s.startswith("src") else "target" for s, _ in specs}
        if len(on_source) == 1:
            offered[on_source.pop()] = ("src_tokens", -1 if replacing else 0)
    if all(target for _, target in specs):
        offered["target"] = ("prev_output_tokens", 0 if replacing else 1)
    return offered


class LangtokIds:
    """Looks up the language of each sentence by its language token.

    Args:
        dictionary: the dictionary that numbers the tokens
        languages: the model's inventory
        specs: fairseq's ``--langtoks-specs``, each with tokens of its own
        style: fairseq's ``--lang-tok-style``
        offered: result of :func:`offered_sides`, for the sides that the model needs
    """

    def __init__(self, dictionary, languages, specs, style, offered):
        self.dictionary, self.offered = dictionary, offered
        self.index_of = torch.full((len(dictionary),), -1)
        for spec in specs:
            for code in languages.codes:
                token = dictionary.index(get_lang_tok(code, style, spec))
                if token != dictionary.unk():
                    self.index_of[token] = languages.index(code)

    def __call__(self, net_input):
        """``{source_lang_ids: (batch,), target_lang_ids: (batch,)}`` for the sides offered.

        Raises:
            ConfigError: a sentence has no language token where it should have one.
        """
        ids = {}
        for side, (key, position) in self.offered.items():
            tokens = net_input[key]
            words = tokens.ne(self.dictionary.pad()).long()
            if position < 0:
                place = words.size(1) - 1 - words.flip(1).argmax(1)
            else:
                place = words.argmax(1) + position
            found = tokens.gather(1, place.unsqueeze(1)).squeeze(1)
            ids[f"{side}_lang_ids"] = self.index_of[found]
            if (ids[f"{side}_lang_ids"] < 0).any():
                wrong = self.dictionary[found[ids[f"{side}_lang_ids"] < 0][0]]
                raise ConfigError(
                    f"a sentence has {wrong!r} where the token of its {side} language should be: "
                    "the data was not prepared with --encoder-langtok / --decoder-langtok, or "
                    "the language has no adapter"
                )
        return ids
