"""What a SentencePiece model is made of, as far as its file tells what its library does not."""

import base64
from dataclasses import dataclass

import sentencepiece

from lslora_fairseq.errors import ConfigError

UNIGRAM, BPE = 1, 2
# numbers of fields in the file, a protocol buffer
_TRAINER, _NORMALIZER, _MODEL_TYPE, _CHARACTERS, _ADDS_PREFIX = 2, 3, 3, 2, 3
_VARINT, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a file.

    Attributes:
        pieces: piece -> score, in order, without ``<unk>``, ``<s>`` and ``</s>``
        kind: :data:`UNIGRAM` or :data:`BPE`
        characters: its table of replaced characters, in base64, or an empty text
        adds_prefix: whether a text gets a space in front
        falls_back: whether bytes stand for unknown characters
    """

    pieces: dict
    kind: int
    characters: str
    adds_prefix: bool
    falls_back: bool


def read(path):
    """Reads a file.

    Returns:
        :class:`SentencePieceModel`

    Raises:
        ConfigError: it is no SentencePiece model, or one of words or characters.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        with open(path, "rb") as file:
            parts = _fields(file.read())
    except (OSError, RuntimeError):
        raise ConfigError(
            f"{path} is no SentencePiece model: name the one that made the data"
        ) from None
    kind = _fields(parts.get(_TRAINER, b"")).get(_MODEL_TYPE, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise ConfigError(
            f"{path} is a model of words or characters, and tokenizers of Hugging Face know those "
            "of unigrams and byte pairs: leave out --spm, and the folder has no tokenizer"
        )
    normalizer = _fields(parts.get(_NORMALIZER, b""))
    numbers = range(model.get_piece_size())
    usual = [n for n in numbers if not model.is_unknown(n) and not model.is_control(n)]
    return SentencePieceModel(
        {model.id_to_piece(n): model.get_score(n) for n in usual},
        kind,
        base64.b64encode(normalizer.get(_CHARACTERS, b"")).decode(),
        bool(normalizer.get(_ADDS_PREFIX, 1)),
        any(map(model.is_byte, numbers)),
    )


def _fields(content):
    """The last value of each field of a protocol buffer, by number."""
    place, found = 0, {}
    while place < len(content):
        tag, place = _varint(content, place)
        number, form = tag >> 3, tag & 7
        if form == _VARINT:
            found[number], place = _varint(content, place)
        else:
            length = _FIXED.get(form)
            if form == _BYTES:
                length, place = _varint(content, place)
            found[number] = content[place : place + length]
            place += length
    return found


def _varint(content, place):
    """A whole number at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
