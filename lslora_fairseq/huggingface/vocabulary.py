"""Which token has which row, from the files of a tokenizer.

M2M-100 and its relatives have ``vocab.json``, in the order of fairseq's dictionary. NLLB has the
pieces of its SentencePiece model, one row later than there. Languages come after that, in an order
that only their numbers tell.
"""

import os
import re
from dataclasses import dataclass, field

from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.huggingface.folder import read_json
from lslora_fairseq.huggingface.twin import SPECIALS

# the languages of M2M-100, which its tokenizer has in its code and not in its files
M2M_100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu "
    "ha he hi hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms "
    "my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur "
    "uz vi wo xh yi yo zh zu"
).split()
# a token that stands for a language: __en__, or en_XX, eng_Latn
_LANGUAGE = re.compile(r"__([A-Za-z]\w*?)__|([a-z]{2,3}_[A-Z][A-Za-z]{1,3})", re.ASCII)
# NLLB's Santali is written in Ol Chiki; its tokenizer names another script
RENAMED = {"sat_Beng": "sat_Olck"}
FILLER = "madeupword{:04d}"  # fairseq's own name of a row without a word


@dataclass
class Vocabulary:
    """The rows of a model's embeddings.

    Attributes:
        symbols: a name for each row after the first four
        langs: codes of the languages, in the order of their rows
        spm: path of the SentencePiece model
        renamed: code in the folder -> code here, where they differ
        prefix_is_target: whether the encoder is told the target language, and the decoder nothing
        unused: rows without a token
    """

    symbols: list
    langs: list
    spm: str
    renamed: dict = field(default_factory=dict)
    prefix_is_target: bool = False
    unused: int = 0


def read(folder, rows):
    """The vocabulary in a folder.

    Args:
        folder: path
        rows: of the model's embeddings

    Returns:
        :class:`Vocabulary`, or None; and why there is none: a list
    """
    spm = _spm(folder)
    words = spm and spm_pieces(spm)
    if spm is None:
        return None, [
            "it holds no SentencePiece model (sentencepiece.bpe.model): copy it from the model "
            "that it was made of"
        ]
    try:
        tokens, added, is_small = _tokens(folder, words)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return None, [f"its tokenizer's files are not as transformers writes them ({error!r})"]
    reasons, langs = [], {}
    for number, token, name in added:
        if tokens.setdefault(number, token) != token:
            reasons.append(f"row {number} is {tokens[number]} and, in {name}, {token}")
        match = _LANGUAGE.fullmatch(token)
        if match:
            langs[number] = match[1] or match[2]
    if [tokens.get(number) for number in range(4)] != list(SPECIALS):
        first = " ".join(str(tokens.get(number)) for number in range(4))
        reasons.append(f"its first tokens are {first} and not {' '.join(SPECIALS)}")
    beyond = [token for number, token in sorted(tokens.items()) if number >= rows]
    if beyond:
        reasons.append(f"it has {listed(beyond)} beyond the {rows:,} rows of its embeddings")
    if not langs:
        reasons.append("its files do not tell which rows are tokens of languages")
    renamed = {code: RENAMED[code] for code in langs.values() if code in RENAMED}
    langs = {number: renamed.get(code, code) for number, code in sorted(langs.items())}
    tokens.update({number: f"__{code}__" for number, code in langs.items()})
    symbols, unused = _symbols(tokens, rows)
    reasons += _odd(symbols)
    return Vocabulary(symbols, [*langs.values()], spm, renamed, is_small, unused), reasons


def _tokens(folder, words):
    """What the files tell: row -> piece; row, token and file of what was added; and whether it is
    the tokenizer of SMALL-100."""
    settings = read_json(folder, "tokenizer_config.json", {})
    tokens = _pieces(folder, words)
    is_small = os.path.isfile(os.path.join(folder, "tokenization_small100.py"))
    is_small |= str(settings.get("tokenizer_class")).startswith("SMALL100")
    return tokens, _added(folder, settings, len(tokens)), is_small


def _spm(folder):
    """The SentencePiece model, or None."""
    names = sorted(n for n in os.listdir(folder) if n.endswith((".model", ".spm")))
    names.sort(key=lambda name: name != "sentencepiece.bpe.model")
    return os.path.join(folder, names[0]) if names else None


def _pieces(folder, words):
    """Row -> token without what was added; *words* are the SentencePiece model's."""
    vocab = read_json(folder, "vocab.json", {})
    vocab = vocab or read_json(folder, "tokenizer.json", {}).get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # of pieces and scores
        vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
    if vocab:
        return {number: token for token, number in vocab.items()}
    return dict(enumerate([*SPECIALS, *words[3:]]))


def spm_pieces(path):
    """The pieces of a SentencePiece model, in order.

    Raises:
        ConfigError: it cannot be read.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError):
        raise ConfigError(f"{path} is no SentencePiece model: copy it again") from None
    return [model.id_to_piece(number) for number in range(model.get_piece_size())]


def _added(folder, settings, count):
    """Row, token, and the file that tells it, of what was added to the *count* pieces."""
    found = [
        (entry["id"], entry["content"], "tokenizer.json")
        for entry in read_json(folder, "tokenizer.json", {}).get("added_tokens", [])
    ]
    for number, entry in settings.get("added_tokens_decoder", {}).items():
        found.append((int(number), entry["content"], "tokenizer_config.json"))
    for token, number in read_json(folder, "added_tokens.json", {}).items():
        found.append((number, token, "added_tokens.json"))
    if any(_LANGUAGE.fullmatch(token) for _, token, _ in found):
        return found
    # no file has numbers of languages: they follow the pieces, in the order of a list
    name = "special_tokens_map.json"
    tokens = read_json(folder, name, {}).get("additional_special_tokens")
    tokens = tokens or settings.get("additional_special_tokens")
    is_m2m = settings.get("language_codes", "m2m100") == "m2m100"
    if not tokens and is_m2m and os.path.isfile(os.path.join(folder, "vocab.json")):
        tokens, name = [f"__{code}__" for code in M2M_100], "the class M2M100Tokenizer"
    for number, token in enumerate(tokens or [], count):
        found.append((number, token["content"] if isinstance(token, dict) else token, name))
    return found


def _symbols(tokens, rows):
    """A name for each row after the first four, and how many have no token."""
    taken, symbols, fillers = {*tokens.values()}, [], 0
    names = (name for name in map(FILLER.format, range(rows)) if name not in taken)
    for number in range(4, rows):
        if number not in tokens:
            fillers += 1
        symbols.append(tokens[number] if number in tokens else next(names))
    return symbols, fillers


def _odd(symbols):
    """Why fairseq could not read a dictionary file of these symbols: a list."""
    counts, reasons = {}, []
    for symbol in [*SPECIALS, *symbols]:
        counts[symbol] = counts.get(symbol, 0) + 1
    twice = [symbol for symbol, count in counts.items() if count > 1]
    if twice:
        reasons.append(f"several rows have the token {listed(twice)}")
    broken = [ascii(symbol) for symbol in symbols if "\n" in symbol or "\r" in symbol]
    if broken:
        reasons.append(f"{listed(broken)} break a line, and fairseq reads one token a line")
    return reasons
