"""The language of each sentence: read from its tokens, or known for all of one direction.

It goes into ``net_input`` where a batch is collated, in whatever process that happens, and stays
with the sentences from there on.
"""

import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from lslora_fairseq.errors import ConfigError, one_line_errors


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


class DirectionIds:
    """The languages of sentences that all belong to one direction.

    Args:
        ids: side -> language index, for the sides whose language has adapters
    """

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, net_input):
        """As :class:`LangtokIds`."""
        tokens = net_input["src_tokens"]
        return {
            f"{side}_lang_ids": tokens.new_full((tokens.size(0),), index)
            for side, index in self.ids.items()
        }


class RoutedCollater:
    """A dataset's collater that adds the language of each sentence to ``net_input``.

    It takes the place of the method ``collater`` of a *dataset*, and goes with it to processes
    that load data.

    Args:
        read_ids: a :class:`LangtokIds` or :class:`DirectionIds`
    """

    def __init__(self, dataset, read_ids):
        self.dataset, self.read_ids = dataset, read_ids

    def __call__(self, samples, **kwargs):
        batch = type(self.dataset).collater(self.dataset, samples, **kwargs)
        if batch:
            batch["net_input"].update(self.read_ids(batch["net_input"]))
        return batch


def route(dataset, read_ids):
    """Gives a dataset a :class:`RoutedCollater`; returns the dataset."""
    dataset.collater = RoutedCollater(dataset, read_ids)
    return dataset


class OneLineBatchIterator(EpochBatchIterator):
    """Ends the command with one line where collating a batch failed, in whatever thread or
    process: errors of these reach the main thread here."""

    def _get_iterator_for_epoch(self, *args, **kwargs):
        itr = super()._get_iterator_for_epoch(*args, **kwargs)
        if itr is not None:
            itr._itr = _OneLine(itr._itr)
        return itr


class _OneLine:
    def __init__(self, itr):
        self._itr = itr

    def __getattr__(self, name):  # such as take, which fairseq looks for
        return getattr(self._itr, name)

    def __iter__(self):
        return self

    def __next__(self):
        with one_line_errors():
            return next(self._itr)
