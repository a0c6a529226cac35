"""What the checks look at: the checkpoint, the data folder, the dictionary and the languages."""

import logging
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property

from fairseq import utils
from fairseq.data.multilingual import multilingual_data_manager
from fairseq.data.multilingual.multilingual_utils import augment_dictionary
from fairseq.utils import FileContentsAction

from lslora_fairseq.checkpoints import read_checkpoint
from lslora_fairseq.config import LORA_FIELDS
from lslora_fairseq.doctor import memory, model
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity
from lslora_fairseq.languages import Languages
from lslora_fairseq.tasks.translation_multi_lslora import TranslationMultiLSLoTask

DATA_FILE = re.compile(r"([^.]+)\.([^.-]+)-([^.-]+)\.([^.]+)\.idx")
EMBEDDING = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class DataFile:
    """One side of one direction of one split, as fairseq-preprocess wrote it.

    Attributes:
        split, pair, lang: the parts of its name, such as train, (en, de) and de
        prefix: its path without the ending
    """

    split: str
    pair: tuple
    lang: str
    prefix: str

    @property
    def name(self):
        return os.path.basename(self.prefix)


@dataclass(frozen=True)
class Checkpoint:
    """A stock base model, or a checkpoint of this package.

    Attributes:
        path: the file
        options: what it was trained with, by name
        weights: its state dict
        base: what loading it needs to know
    """

    path: str
    options: dict
    weights: dict
    base: Identity

    @property
    def has_adapters(self):
        return self.options.get("lora_tiers") is not None

    @property
    def rows(self):
        """Rows of its embeddings."""
        return self.weights[EMBEDDING].size(0)

    @property
    def size(self):
        return os.path.getsize(self.path)


class Inputs:
    """Reads what the options name, each once; what is not named is None.

    Args:
        args: the options of the command
    """

    def __init__(self, args):
        self.args = args
        self._own_size = memory.own_size()  # before anything is read

    @cached_property
    def checkpoint(self):
        path = self.args.checkpoint
        if path is None:
            return None
        if not os.path.isfile(path):
            raise ConfigError(f"--checkpoint {path}: no such file: name the checkpoint to check")
        options, weights = read_checkpoint(path)
        if EMBEDDING not in weights:
            raise ConfigError(
                f"--checkpoint {path} holds no {EMBEDDING}: name one of a fairseq transformer"
            )
        return Checkpoint(path, options, weights, Identity.from_options(path, options))

    @cached_property
    def folders(self):
        """The folders of the data (more than one where it comes in shards)."""
        folders = utils.split_paths(self.args.data) if self.args.data else []
        for folder in folders:
            if not os.path.isdir(folder):
                raise ConfigError(
                    f"--data {folder}: no such folder: name the one that fairseq-preprocess wrote"
                )
        return folders

    @cached_property
    def data_files(self):
        """Every binarised text of the data, in the directions of --lang-pairs if given."""
        if not self.folders:
            return None
        pairs = self.lang_pairs
        files = []
        for folder in self.folders:
            for name in sorted(os.listdir(folder)):
                match = DATA_FILE.fullmatch(name)
                if match:
                    split, source, target, lang = match.groups()
                    pair = (source, target)
                    if pairs is not None and not {pair, pair[::-1]} & set(pairs):
                        continue
                    prefix = os.path.join(folder, name[: -len(".idx")])
                    files.append(DataFile(split, pair, lang, prefix))
        if not files and pairs is None:
            raise ConfigError(
                f"--data {self.args.data} holds no file such as train.en-de.en.idx: name the "
                "folder that fairseq-preprocess wrote"
            )
        return files

    @cached_property
    def data_dictionaries(self):
        if not self.folders:
            return []
        first = self.folders[0]
        names = [n for n in sorted(os.listdir(first)) if re.fullmatch(r"dict\.[^.]+\.txt", n)]
        if not names:
            raise ConfigError(
                f"--data {first} holds no dict.*.txt: name the folder that fairseq-preprocess wrote"
            )
        return [os.path.join(first, name) for name in names]

    @cached_property
    def lang_pairs(self):
        """The directions of --lang-pairs: list of (source, target), or None."""
        if not self.args.lang_pairs:
            return None
        read = Namespace()
        FileContentsAction([], "lang_pairs")(None, read, self.args.lang_pairs)
        pairs = [tuple(pair.split("-")) for pair in read.lang_pairs.split(",")]
        for pair in pairs:
            if len(pair) != 2 or not all(pair):
                raise ConfigError(
                    f"--lang-pairs: cannot read {'-'.join(pair)!r}: write source-target, with "
                    "codes that hold no hyphen"
                )
        return pairs

    @property
    def are_langs_told(self):
        """Whether the command line tells the languages, as for fairseq-train."""
        return bool(self.args.langs or self.args.lang_dict or self.args.lang_pairs)

    def _told_langs(self):
        pairs = ["-".join(pair) for pair in self.lang_pairs or []]
        told = Namespace(langs=self.args.langs, lang_dict=self.args.lang_dict, lang_pairs=pairs)
        logging.getLogger(multilingual_data_manager.__name__).setLevel(logging.ERROR)
        try:
            return multilingual_data_manager.MultilingualDatasetManager.load_langs(told)
        except OSError as error:
            raise ConfigError(
                f"--lang-dict {self.args.lang_dict} ({error.strerror}): name a file of language "
                "codes, one a line"
            ) from None
        except ValueError:
            raise ConfigError("--langs and --lang-dict exclude each other: leave one out") from None

    @cached_property
    def langs(self):
        """Languages in the order of their tokens, or None if nothing tells them."""
        if self.are_langs_told:
            return self._told_langs()
        if self.checkpoint and self.checkpoint.base.langs:
            return list(self.checkpoint.base.langs)
        if self.data_files:  # as fairseq infers them
            return sorted({lang for file in self.data_files for lang in file.pair})
        return None

    @property
    def lang_tok_style(self):
        trained = self.checkpoint.base.lang_tok_style if self.checkpoint else None
        return self.args.lang_tok_style or trained or "multilingual"

    @cached_property
    def dictionary(self):
        """The dictionary of a run: the lines of the file, then the language tokens it lacks."""
        path = self.args.dict or next(iter(self.data_dictionaries), None)
        if path is None:
            return None
        try:
            dictionary = TranslationMultiLSLoTask.load_dictionary(path)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ConfigError(
                f"cannot read the dictionary {path} ({reason}): name a file of lines "
                "'piece count', as fairseq-preprocess writes it"
            ) from None
        augment_dictionary(dictionary, self.langs or [], self.lang_tok_style)
        return dictionary

    @cached_property
    def lora_options(self):
        """The LoRA options of the command line as fairseq-train would see them."""
        options = {name: getattr(self.args, name, None) for name in LORA_FIELDS}
        return Namespace(**{name: value for name, value in options.items() if value is not None})

    @cached_property
    def adapter_languages(self):
        """The inventory of --lora-tiers, or of the checkpoint; None without either."""
        saved = self.checkpoint.options.get("lora_tiers") if self.checkpoint else None
        tiers = getattr(self.lora_options, "lora_tiers", None) or saved
        return Languages.parse(tiers) if tiers else None

    @cached_property
    def model(self):
        """The model of the run on the meta device, or None if too little is known of it."""
        sized = self.checkpoint or (self.args.arch and self.dictionary)
        return model.build(self) if sized and self.adapter_languages else None

    @property
    def process(self):
        """Bytes that a run takes on the CPU beside its model: what it imports and starts, and the
        dictionaries, of which fairseq reads one for each language unless it is fixed."""
        pairs = self.lang_pairs or [file.pair for file in self.data_files or []]
        languages = len({lang for pair in pairs for lang in pair}) or len(self.langs or [1])
        lines = self.shape.rows * (1 if self.args.dict else languages)
        return self._own_size + memory.STARTED + memory.DICTIONARY_LINE * lines

    @cached_property
    def shape(self):
        return model.shape(self.model) if self.model else None
