"""fairseq glue: loads models once, and decodes sentences of many directions in one batch.

What a sentence becomes does not depend on the batch that it is in: it has its own adapters, its own
first token, and the longest length that ``fairseq-generate`` allows it when it decodes that
direction alone.
"""

import ast
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation.search import BeamSearch

COLLATED = 250  # sentences at a time where only their text is read


class Hypothesis(NamedTuple):
    """A translation.

    Attributes:
        score: as fairseq-generate prints it, in base 2
        text: detokenised
    """

    score: float
    text: str


@dataclass
class Direction:
    """The sentences of one direction.

    Attributes:
        pair: such as ``en-fr``
        task: set to this direction
        dataset: fairseq's, which collates sentences with their language tokens and ids
        lengths: (sentences,) tokens of the sources
        widths: (sentences,) tokens of source or reference, whichever is longer
        limits: (sentences,) position of the last token that a hypothesis may have; -1 for a
            sentence that is too long for the model
    """

    pair: str
    task: object
    dataset: object
    lengths: np.ndarray
    widths: np.ndarray
    limits: list

    @property
    def target(self):
        return self.pair.split("-")[1]


class Translator:
    """Loaded models that decode any of their directions.

    Args:
        cfg: fairseq's configuration of ``fairseq-generate``
        task: the task, set up from it
        text: a :class:`Text`

    Raises:
        ConfigError: a checkpoint cannot be read, or does not fit.
    """

    def __init__(self, cfg, task, text):
        self.cfg, self.task, self.text = cfg, task, text
        self.models, self._saved = checkpoint_utils.load_model_ensemble(
            utils.split_paths(cfg.common_eval.path),
            arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides),
            task=task,
            suffix=cfg.checkpoint.checkpoint_suffix,
            strict=cfg.checkpoint.checkpoint_shard_count == 1,
            num_shards=cfg.checkpoint.checkpoint_shard_count,
        )
        on_gpu = torch.cuda.is_available() and not cfg.common.cpu
        self.device = torch.device("cuda" if on_gpu else "cpu")
        direction = cfg.task.source_lang, cfg.task.target_lang
        cfg.task.source_lang = cfg.task.target_lang = None  # no direction is merged
        for model in self.models:
            if cfg.common.fp16:
                model.half()
            model.to(self.device)
            model.prepare_for_inference_(cfg)
            model.eval()
        cfg.task.source_lang, cfg.task.target_lang = direction
        self.beams = BeamSearch(self.models, task.target_dictionary, cfg.generation)

    def direction(self, pair):
        """Loads the sentences of a direction.

        Raises:
            ConfigError: a language is unknown to a model, there is no sentence, or one is too long.
        """
        cfg = self.cfg
        task = self.task.in_direction(*pair.split("-"), self.models)
        task.load_dataset(cfg.dataset.gen_subset, task_cfg=self._saved.task)
        dataset = task.dataset(cfg.dataset.gen_subset)
        if not len(dataset):
            raise ConfigError(f"{pair} has no sentence: leave it out with --pairs")
        positions = utils.resolve_max_positions(
            task.max_positions(), *[model.max_positions() for model in self.models]
        )
        batches = task.get_batch_iterator(
            dataset,
            max_tokens=cfg.dataset.max_tokens,
            max_sentences=cfg.dataset.batch_size,
            max_positions=positions,
            ignore_invalid_inputs=True,
            seed=cfg.common.seed,
        ).frozen_batches
        sizes = np.array([dataset.size(i) for i in range(len(dataset))]).reshape(len(dataset), -1)
        limits = [-1] * len(dataset)
        for batch in batches:
            limit = self.beams.limit(int(sizes[batch, 0].max()))
            for sentence in batch:
                limits[sentence] = limit
        too_long = limits.index(-1) if -1 in limits else None
        if too_long is not None and not cfg.dataset.skip_invalid_size_inputs_valid_test:
            raise ConfigError(
                f"{pair}: sentence {too_long + 1} has {sizes[too_long].max()} tokens, more than "
                f"the model takes {positions}: shorten it, or add "
                "--skip-invalid-size-inputs-valid-test, which leaves its line empty"
            )
        return Direction(pair, task, dataset, sizes[:, 0], sizes.max(1), limits)

    def translate(self, sentences):
        """Decodes a batch.

        Args:
            sentences: list of (:class:`Direction`, number of the sentence)

        Returns:
            for each sentence a list of its ``--nbest`` :class:`Hypothesis`, best first; whether a
            near tie decided; and the seconds that it took
        """
        began = time.perf_counter()
        batch, order = self._collated(sentences)
        if self.device.type == "cuda":
            batch = utils.move_to_cuda(batch)
        sentences = [sentences[number] for number in order]
        limits = [direction.limits[number] for direction, number in sentences]
        begin = self._beginnings(batch, sentences, limits)
        found = self.beams.search(batch["net_input"], limits, **begin)
        seconds = (time.perf_counter() - began) / len(sentences)
        results = [None] * len(sentences)
        for place, (direction, _), (hypotheses, is_tie) in zip(order, sentences, found):
            results[place] = (self._read(direction, hypotheses), is_tie, seconds)
        return results

    def _collated(self, sentences):
        """The batch of these sentences, each collated by its own direction, which gives it its
        language tokens and ids; and the sentence that each row of it is."""
        rows = {}
        for place, (direction, number) in enumerate(sentences):
            rows.setdefault(direction.pair, (direction, {}))[1][number] = place
        batches = [
            direction.dataset.collater([direction.dataset[number] for number in numbers])
            for direction, numbers in rows.values()
        ]
        order = [
            numbers[number]
            for batch, (_, numbers) in zip(batches, rows.values())
            for number in batch["id"].tolist()
        ]
        pad = self.task.source_dictionary.pad()
        net_input = {
            key: _joined([b["net_input"][key] for b in batches], pad, self._left(key))
            for key in batches[0]["net_input"]
            # a language without adapters has no ids, and none of the models needs that side
            if key != "prev_output_tokens" and all(key in b["net_input"] for b in batches)
        }
        target = _joined([b["target"] for b in batches], pad, self._left("target"))
        return {"net_input": net_input, "target": target}, order

    def _left(self, key):
        args = self.task.args
        return args.left_pad_source if key == "src_tokens" else args.left_pad_target

    def _beginnings(self, batch, sentences, limits):
        """What each sentence begins with: its language token, or the first tokens of the
        reference, no further than its limit."""
        codes = [direction.target for direction, _ in sentences]
        begin = self.task.forced(codes, batch["net_input"]["src_tokens"])
        bos, prefix = begin.get("bos_token"), begin.get("prefix_tokens")
        size = self.cfg.generation.prefix_size
        if size:
            prefix = batch["target"][:, :size]
        if prefix is not None:
            ends = torch.tensor(limits, device=prefix.device).unsqueeze(1)
            beyond = torch.arange(prefix.size(1), device=prefix.device) >= ends
            prefix = prefix.masked_fill(beyond, self.beams.pad)
        return {"bos": bos, "prefix": prefix}

    def _read(self, direction, found):
        """The n best as text."""
        _, strip = self.text.stripped(direction.task)
        return [
            Hypothesis(h.score / math.log(2), self.text.hypothesis(h.tokens, strip))
            for h in found[: self.cfg.generation.nbest]
        ]


def _joined(tensors, pad, left):
    """Rows of several batches below each other; tokens padded to one length."""
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    rows = [row for tensor in tensors for row in tensor]
    return data_utils.collate_tokens(rows, pad, left_pad=left)


class Text:
    """From tokens to plain text, as ``fairseq-generate`` does it.

    Args:
        cfg: fairseq's configuration
        task: the task, with its dictionaries
    """

    def __init__(self, cfg, task):
        self.symbol = cfg.common_eval.post_process
        self.source, self.target = task.source_dictionary, task.target_dictionary
        self.bpe, self.tokenizer = task.build_bpe(cfg.bpe), task.build_tokenizer(cfg.tokenizer)
        if self.symbol is None and self.bpe is None:
            self.symbol = _segmentation(self.target.symbols)

    def stripped(self, task):
        """The tokens that are no text in a direction, of the source and of the target: the end of
        a sentence, and its language's token."""
        source, target = task.args.langtoks["main"]
        manager, eos = task.data_manager, self.target.eos()
        languages = task.args.source_lang, task.args.target_lang
        return (
            {eos, manager.get_encoder_langtok(*languages, source)} - {None},
            {eos, manager.get_decoder_langtok(languages[1], target)} - {None},
        )

    def hypothesis(self, tokens, strip):
        """The text of a hypothesis; *strip* are its target's tokens that are no text."""
        return self._decoded(self.target.string(tokens, self.symbol, extra_symbols_to_ignore=strip))

    def sentences(self, dataset, task):
        """Sources and references of a direction's data: two lists in the order of its file."""
        of_source, of_target = self.stripped(task)
        pad, found = self.source.pad(), [None] * len(dataset)
        for start in range(0, len(dataset), COLLATED):
            numbers = range(start, min(start + COLLATED, len(dataset)))
            batch = dataset.collater([dataset[number] for number in numbers])
            rows = zip(batch["id"].tolist(), batch["net_input"]["src_tokens"], batch["target"])
            for number, source, target in rows:
                source, target = (utils.strip_pad(row, pad).tolist() for row in (source, target))
                found[number] = (
                    self.source.string(source, self.symbol, extra_symbols_to_ignore=of_source),
                    self.target.string(
                        target, self.symbol, escape_unk=True, extra_symbols_to_ignore=of_target
                    ),
                )
        return [list(map(self._decoded, side)) for side in zip(*found)]

    def _decoded(self, text):
        for tool in (self.bpe, self.tokenizer):
            if tool is not None:
                text = tool.decode(text)
        return text


def _segmentation(symbols):
    """How words are cut in a dictionary: the value for ``--remove-bpe``, or None."""
    if any(symbol.startswith("\N{LOWER ONE EIGHTH BLOCK}") for symbol in symbols):
        return "sentencepiece"
    return "subword_nmt" if any(symbol.endswith("@@") for symbol in symbols) else None


def batches(directions, max_tokens, max_sentences):
    """Cuts the sentences of several directions into batches of about the same length.

    Args:
        directions: list of :class:`Direction`
        max_tokens: the longest sentence of a batch times its sentences, or None
        max_sentences: sentences of a batch, or None

    Returns:
        list of batches, the longest sentences first; a batch is a list of (place of the direction
        in the list, number of the sentence)
    """
    places = np.concatenate([np.full(len(d.limits), i) for i, d in enumerate(directions)])
    numbers = np.concatenate([np.arange(len(d.limits)) for d in directions])
    lengths = np.concatenate([d.lengths for d in directions])
    widths = np.concatenate([d.widths for d in directions])
    decodable = np.concatenate([d.limits for d in directions]) >= 0
    order = np.lexsort((numbers, places, -widths, -lengths))
    cut, widest = [[]], 0
    for i in order[decodable[order]].tolist():
        widest = max(widest, widths[i])
        if cut[-1] and (
            len(cut[-1]) == (max_sentences or math.inf)
            or widest * (len(cut[-1]) + 1) > (max_tokens or math.inf)
        ):
            cut.append([])
            widest = widths[i]
        cut[-1].append((int(places[i]), int(numbers[i])))
    return [batch for batch in cut if batch]
