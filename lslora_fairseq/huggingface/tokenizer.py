"""A tokenizer of Hugging Face that gives the numbers of fairseq's dictionary.

The tokenizer classes of M2M-100 and NLLB number the languages by lists in their code. This one is
of the generic class, and all that it does stands in ``tokenizer.json``.
"""

import re

from lslora_fairseq.errors import listed
from lslora_fairseq.huggingface import sentencepiece_model
from lslora_fairseq.huggingface.twin import SPECIALS

_NLLB = re.compile("[a-z]{3}_[A-Z][a-z]{3}")  # a code that is its own token there
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_SPACE = "▁"


def spelled(code, token):
    """The token of a language, as users of Hugging Face know it."""
    return code if _NLLB.fullmatch(code) else token


class Tokenizer:
    """The files of a tokenizer.

    Args:
        symbols: of fairseq's dictionary, in order
        tokens: code of each language -> its token among them
        model: :class:`~lslora_fairseq.huggingface.sentencepiece_model.SentencePieceModel`
    """

    def __init__(self, symbols, tokens, model):
        self.model = model
        names = {token: spelled(code, token) for code, token in tokens.items()}
        self.langs = {code: names[token] for code, token in tokens.items()}
        self.vocab = {names.get(symbol, symbol): n for n, symbol in enumerate(symbols)}

    def warning(self):
        """One line if it gives other pieces than fairseq, else None."""
        lacking = [piece for piece in self.model.pieces if piece not in self.vocab]
        if not lacking:
            return None
        return (
            f"the dictionary lacks {len(lacking):,} pieces of the SentencePiece model "
            f"({listed(lacking)}): fairseq reads them as <unk>, this tokenizer splits them further"
        )

    def files(self, prefix=None):
        """Name -> content, for JSON.

        Args:
            prefix: the language whose token is put in front of every text; None for none
        """
        langs = [*self.langs.values()]
        single = [_special("</s>")]
        ids = ["</s>"]
        if prefix is not None:
            single.insert(0, _special(self.langs[prefix]))
            ids.append(self.langs[prefix])
        single.insert(len(single) - 1, {"Sequence": {"id": "A", "type_id": 0}})
        template = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single[:-1], {"Sequence": {"id": "B", "type_id": 0}}, single[-1]],
            "special_tokens": {
                token: {"id": token, "ids": [self.vocab[token]], "tokens": [token]} for token in ids
            },
        }
        scheme = "always" if self.model.adds_prefix else "never"
        space = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme}
        added = [
            {"id": self.vocab[token], "content": token, **_FLAGS, "special": True}
            for token in (*SPECIALS, *langs)
        ]
        whole = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": self._normalizer(),
            "pre_tokenizer": {**space, "split": True},
            "post_processor": template,
            "decoder": {**space, "split": True},
            "model": self._model(),
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 1024,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{f"{n}_token": t for n, t in zip(("bos", "pad", "eos", "unk"), SPECIALS)},
            "additional_special_tokens": langs,
        }
        return {"tokenizer.json": whole, "tokenizer_config.json": settings}

    def _normalizer(self):
        steps = [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
        if self.model.characters:
            table = {"type": "Precompiled", "precompiled_charsmap": self.model.characters}
            steps.insert(0, table)
        return {"type": "Sequence", "normalizers": steps}

    def _model(self):
        if self.model.kind == sentencepiece_model.BPE:
            return {
                "type": "BPE", "dropout": None, "unk_token": "<unk>",
                "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                "byte_fallback": self.model.falls_back, "ignore_merges": False,
                "vocab": self.vocab, "merges": self._merges(),
            }  # fmt: skip
        least = min(self.model.pieces.values())  # a lower one would make unknown characters dearer
        scores = {**dict.fromkeys(SPECIALS, 0.0), **self.model.pieces}
        vocab = [[token, scores.get(token, least)] for token in self.vocab]
        return {
            "type": "Unigram", "unk_id": 3, "vocab": vocab,
            "byte_fallback": self.model.falls_back,
        }  # fmt: skip

    def _merges(self):
        """Pairs of pieces that make a piece, those of the best score first."""
        scores = {p: s for p, s in self.model.pieces.items() if p in self.vocab}
        found = [
            (-scores[piece], self.vocab[piece[:cut]], self.vocab[piece[cut:]])
            for piece in scores
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
        names = [*self.vocab]
        return [[names[first], names[second]] for _, first, second in sorted(found)]


def _special(token):
    return {"SpecialToken": {"id": token, "type_id": 0}}
