"""What the checks look at: the checkpoint, the data folder, the dictionary and the languages."""

import os
import re
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property

from fairseq import utils
from fairseq.data.multilingual.multilingual_utils import augment_dictionary

from lslora_fairseq.checkpoints import read_checkpoint
from lslora_fairseq.config import LORA_FIELDS
from lslora_fairseq.doctor import model
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
        """Every binarised text of the data."""
        if not self.folders:
            return None
        files = []
        for folder in self.folders:
            for name in sorted(os.listdir(folder)):
                match = DATA_FILE.fullmatch(name)
                if match:
                    split, source, target, lang = match.groups()
                    prefix = os.path.join(folder, name[: -len(".idx")])
                    files.append(DataFile(split, (source, target), lang, prefix))
        if not files:
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
    def langs(self):
        """Languages in the order of their tokens, or None if nothing tells them."""
        if self.args.langs:
            return self.args.langs
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

    @cached_property
    def shape(self):
        return model.shape(self.model) if self.model else None
