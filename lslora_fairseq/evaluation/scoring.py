"""Scores of plain text by sacrebleu: spBLEU, BLEU and chrF++, each with its signature."""

import os
import re
from functools import cache
from hashlib import sha256
from http.client import HTTPException

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers import BaseTokenizer, tokenizer_spm

from lslora_fairseq.errors import ConfigError

AUTO = "auto"
CHRF_NAME = "chrF++"
# `spm` is sacrebleu's old name of flores101
TOKENIZERS = (AUTO, *(name for name in BLEU.TOKENIZERS if name != "spm"))
# BLEU over the pieces of a published SentencePiece model is called spBLEU
PUBLISHED_PIECES = tuple(name for name in tokenizer_spm.SPM_MODELS if name != "spm")
BASE_MODELS = {"flores101": "M2M-124", "flores200": "NLLB-200"}  # which come with that very model
WITHOUT_SPACES = {
    "zh": ("zh", "zho", "chi", "cmn", "yue"),
    "ja-mecab": ("ja", "jpn"),
    "ko-mecab": ("ko", "kor"),
}


class Pieces(BaseTokenizer):
    """The pieces of a SentencePiece model of one's own.

    Args:
        path: the model's file

    Raises:
        ConfigError: the file cannot be read, or is not a SentencePiece model.
    """

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor

        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise ConfigError(
                f"--spm {path} cannot be read ({error.strerror}): name a SentencePiece model"
            ) from None
        self.sha256 = sha256(content).hexdigest()
        self.model = SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(content)
            if not content:  # is taken for a model
                raise RuntimeError
        except RuntimeError:
            raise ConfigError(
                f"--spm {path} is not a SentencePiece model: name the .model file that spm_train "
                "wrote or that comes with the base model"
            ) from None

    def __call__(self, line):
        return " ".join(self.model.EncodeAsPieces(line))

    def signature(self):
        return f"spm-{self.sha256[:8]}"


def metrics(target, tokenizers, spm=None):
    """The metrics of one target language: BLEU over the pieces of *spm*, BLEU with each tokenizer
    in the order given, and chrF++.

    BLEU over SentencePiece pieces is called spBLEU. Where several share a name, the tokenizers are
    part of theirs, such as ``spBLEU (flores200)``.

    Args:
        target: language code
        tokenizers: sacrebleu's names, or ``auto``: zh, ja-mecab and ko-mecab for Chinese, Japanese
            and Korean, 13a for all others
        spm: path of a SentencePiece model

    Returns:
        dict of name -> sacrebleu metric

    Raises:
        ConfigError: a tokenizer is unknown, lacks a package, or cannot be downloaded; *spm* is no
            SentencePiece model.
    """
    return {name: make(target) for name, make in _makers(tokenizers, spm).items()}


def metric(name, target, tokenizers, spm=None):
    """One of :func:`metrics`, without what the others need."""
    return _makers(tokenizers, spm)[name](target)


def _makers(tokenizers, spm):
    """Name of each metric -> function of the target language that makes it."""
    made = [("spBLEU", "own", lambda _: _piece_bleu(spm))] if spm else []
    for tokenizer in dict.fromkeys(tokenizers):
        name = "spBLEU" if tokenizer in PUBLISHED_PIECES else "BLEU"
        made.append((name, tokenizer, lambda target, t=tokenizer: _bleu(for_language(t, target))))
    names = [name for name, _, _ in made]
    makers = {
        name if names.count(name) == 1 else f"{name} ({tokenizer})": make
        for name, tokenizer, make in made
    }
    return {**makers, CHRF_NAME: lambda _: CHRF(word_order=2)}


def for_language(tokenizer, target):
    """The tokenizer that ``auto`` stands for; any other is itself."""
    if tokenizer != AUTO:
        return tokenizer
    code = re.split("[_-]", target.lower())[0]
    return next((name for name, codes in WITHOUT_SPACES.items() if code in codes), "13a")


# of one process; a SentencePiece model takes a while to load. `force` leaves out a warning for
# text that looks tokenised, for each direction and metric again; scores are the same.
@cache
def _piece_bleu(path):
    bleu = BLEU(tokenize="none", force=True)
    bleu.tokenizer = Pieces(path)
    bleu.tokenizer_signature = bleu.tokenizer.signature()
    return bleu


@cache
def _bleu(tokenizer):
    if tokenizer not in TOKENIZERS:
        raise ConfigError(
            f"--bleu-tokenizer: sacrebleu has no tokenizer {tokenizer}: choose one of "
            f"{', '.join(TOKENIZERS)}"
        )
    if tokenizer in PUBLISHED_PIECES:
        return _published_bleu(tokenizer)
    try:
        return BLEU(tokenize=tokenizer, force=True)
    except (ImportError, RuntimeError):
        raise ConfigError(
            f"--bleu-tokenizer: {tokenizer} needs packages that are not installed: pip install "
            f"'sacrebleu[{tokenizer[:2]}]', or choose another tokenizer, such as flores200"
        ) from None


def _published_bleu(tokenizer):
    """BLEU over the pieces of a model that sacrebleu downloads, once."""
    url = tokenizer_spm.SPM_MODELS[tokenizer]["url"]
    path = os.path.join(tokenizer_spm.SACREBLEU_DIR, "models", os.path.basename(url))
    if os.path.isfile(path) and not os.path.getsize(path):
        os.remove(path)  # of a download that failed: sacrebleu would not try again
    was_there = os.path.isfile(path)
    try:
        return BLEU(tokenize=tokenizer, force=True)
    except (OSError, HTTPException, RuntimeError, SystemExit) as error:
        if was_there:
            raise ConfigError(
                f"{path} is not the SentencePiece model of {tokenizer}: delete it, so that it is "
                "downloaded again"
            ) from None
        if os.path.isfile(path):  # a part of it, or a page of a proxy
            os.remove(path)
        base = BASE_MODELS.get(tokenizer)
        hint = f" (the one that comes with {base} is probably the same file)" if base else ""
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise ConfigError(
            f"--bleu-tokenizer: sacrebleu cannot download its SentencePiece model of {tokenizer} "
            f"({reason}): put the file of {url} at {path}, or score with a SentencePiece model "
            f"that you have: --spm FILE{hint}"
        ) from None


def score(hypotheses, references, metrics):
    """Scores one direction.

    Args:
        hypotheses, references: plain text, one sentence each
        metrics: what :func:`metrics` returns

    Returns:
        name -> ``score`` (0 to 100, unrounded) and ``signature``
    """
    found = {}
    for name, metric in metrics.items():
        value = metric.corpus_score(hypotheses, [references]).score
        found[name] = {"score": float(value), "signature": str(metric.get_signature())}
    return found


def score_direction(hypotheses, references, target, tokenizers, spm=None):
    """:func:`score` with :func:`metrics`, for a process of its own: takes and returns plain values.

    chrF++ takes about one second for 1,000 sentences, spBLEU and BLEU a third of that.
    """
    return score(hypotheses, references, metrics(target, tokenizers, spm))
