"""What an adapter file says of itself: its fields, and what each may hold."""

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, Optional, get_args

from lslora_fairseq.adapters.packing import DTYPES
from lslora_fairseq.config import LSLoConfig
from lslora_fairseq.keys import EMBEDDINGS
from lslora_fairseq.lora.plan import MODULES, SHARED, SIDES

VERSION = 1
# options of a model that are the same for all its languages
COMMON = tuple(
    option.name
    for option in fields(LSLoConfig)
    if option.name.startswith(("encoder_", "decoder_", "lora_shared_", "lora_embedding_"))
) + ("lora_shape",)
# of the task: which sentence has which token where
TOKENS = (
    "encoder_langtok",
    "decoder_langtok",
    "lang_tok_replacing_bos_eos",
    "lang_tok_style",
    "langtoks_specs",
    "langtoks",
)
_CODE = re.compile(r"\w[\w-]{0,63}", re.ASCII)
_LAYERS = rf"({'|'.join(MODULES)})\.layers\.(0|[1-9]\d{{0,3}})\.([\w.]+)"
PROJECTION = "decoder.output_projection"  # the name of the embeddings' adapter
LARGEST = 1 << 31  # of a size
MANY, FEW = 10_000, 20  # languages, kinds of tokens that each of them has


class Module(NamedTuple):
    """The adapter of one linear.

    Attributes:
        name: module path, such as ``encoder.layers.0.fc1``
        side: which language of a sentence indexes it, ``source`` or ``target``; or ``shared``
        in_features, out_features: of the part of the linear that is adapted
        rank, alpha: it is scaled by alpha / rank
    """

    name: str
    side: str
    in_features: int
    out_features: int
    rank: int
    alpha: float


@dataclass(frozen=True)
class Header:
    """What a file is.

    Attributes:
        language, tier: None in the file of what all languages share
        token: the language's token, or None there
        modules: tuple of :class:`Module`, one for each adapter in the file
        options: those of :data:`COMMON`, as the model was trained
        tokens: those of :data:`TOKENS`
        langs: languages of the model, in the order of their tokens
        extra_data: categories of ``--extra-data``
        lines: symbols of the dictionary file, specials included
        appended: the symbols that the model has beyond these, in order
        base: :func:`~lslora_fairseq.adapters.fingerprint.of_base` of the base model
        shared: fingerprint of what the languages of the model share; None where they share nothing
        tiers: language -> tier, in the file of a model whose languages have nothing of their own
        rows: embedding matrices of which the file has the row of the language's token
        dtype: ``fp32``, ``fp16`` or ``bf16``
        entries, kept: of all A and of all B, and those of them that are not pruned
        plugin: version of the package that wrote the file
        version: of the format
    """

    language: Optional[str]
    tier: Optional[str]
    token: Optional[str]
    modules: tuple
    options: dict
    tokens: dict
    langs: list
    extra_data: list
    lines: int
    appended: list
    base: str
    shared: Optional[str]
    tiers: Optional[dict]
    rows: list
    dtype: str
    entries: list
    kept: list
    plugin: str
    version: int = VERSION

    @property
    def owner(self):
        """The language, or ``shared``: the stem of the file's name."""
        return self.language or SHARED

    def plain(self):
        """In values that JSON keeps."""
        return asdict(self)

    @classmethod
    def read(cls, found):
        """From what JSON gave.

        Raises:
            ValueError: a field is missing, unknown, or holds what it may not; in one line.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            odd = sorted(names ^ found.keys()) if isinstance(found, dict) else ["all fields"]
            raise ValueError(f"missing or unknown in its header: {ascii(odd)[1:-1][:100]}")
        for name, is_valid in _VALID.items():
            if not is_valid(found[name]):
                raise ValueError(f"{name} in its header is {_told(found[name])}")
        header = cls(**{**found, "modules": tuple(Module(*m) for m in found["modules"])})
        header._check()
        return header

    def _check(self):
        """Fields that depend on each other."""
        is_shared = self.language is None
        told = {name: getattr(self, name) is not None for name in ("tier", "token", "tiers")}
        if (told["tier"], told["token"]) != (not is_shared,) * 2 or told["tiers"] > is_shared:
            raise ValueError(f"its header tells {'no' if is_shared else 'a'} language, and {told}")
        names = [module.name for module in self.modules]
        if len(set(names)) < len(names):
            raise ValueError("a module has two adapters in its header")
        for module in self.modules:
            if (module.side == SHARED) != is_shared:
                raise ValueError(f"{module.name} in its header has the side {module.side}")
        if self.rows and (is_shared or self.token not in self.appended):
            raise ValueError("its header has rows of a token that the dictionary file holds")
        entries = [sum(m.rank * m[2 + i] for m in self.modules) for i in (0, 1)]
        if self.entries != entries or any(k > n for k, n in zip(self.kept, entries)):
            raise ValueError(f"its header counts {self.kept} of {self.entries} entries")
        words = [m.out_features for m in self.modules if m.name == PROJECTION]
        if words and words[0] != self.lines + len(self.appended):
            raise ValueError(f"its header has embeddings of {words[0]} words, and tells of others")
        if is_shared and self.shared is None:
            raise ValueError("its header lacks the fingerprint of what is shared")


def is_code(code):
    """Whether a language may name a file: letters, digits, ``_`` and ``-``."""
    return isinstance(code, str) and bool(_CODE.fullmatch(code)) and code.lower() != SHARED


def _told(value):
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_text(value):
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _is_texts(value, most=MANY):
    return isinstance(value, list) and len(value) <= most and all(map(_is_text, value))


def _is_size(value, least=1):
    return type(value) is int and least <= value < LARGEST


def _is_counts(value):
    return isinstance(value, list) and len(value) == 2 and all(_is_size(n, 0) for n in value)


def is_sum(value):
    """Whether it is a checksum: 64 hexadecimal digits."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _or_none(is_valid):
    return lambda value: value is None or is_valid(value)


def _is_module(value):
    if not isinstance(value, list) or len(value) != len(Module._fields):
        return False
    name, side, n_in, n_out, rank, alpha = value
    if not isinstance(name, str) or side not in (*SIDES, SHARED):
        return False
    match = re.fullmatch(_LAYERS, name, re.ASCII)
    if not (match[3] in MODULES[match[1]] if match else name == PROJECTION and side == SHARED):
        return False
    if not (_is_size(n_in) and _is_size(n_out) and _is_size(rank) and rank <= min(n_in, n_out)):
        return False
    return type(alpha) in (int, float) and 0 < alpha < math.inf


def _is_options(value):
    if not isinstance(value, dict) or not value.keys() <= {*COMMON}:
        return False
    kinds = {option.name: get_args(option.type) or (option.type,) for option in fields(LSLoConfig)}
    return all(
        isinstance(found, (*kinds[name], *([int] if float in kinds[name] else [])))
        and not isinstance(found, bool)
        and (not isinstance(found, str) or (len(found) < 2000 and found.isprintable()))
        for name, found in value.items()
    )


def _is_tokens(value):
    return (
        isinstance(value, dict)
        and value.keys() == {*TOKENS}
        and value["encoder_langtok"] in (None, "src", "tgt")
        and type(value["decoder_langtok"]) is bool
        and type(value["lang_tok_replacing_bos_eos"]) is bool
        and value["lang_tok_style"] in ("multilingual", "mbart")
        and _is_texts(value["langtoks_specs"], FEW)
        and _is_langtoks(value["langtoks"])
    )


def _is_langtoks(value):
    return isinstance(value, dict) and all(
        _is_text(category)
        and isinstance(specs, list)
        and len(specs) == 2
        and all(map(_or_none(_is_text), specs))
        for category, specs in value.items()
    )


def _some_of(names):
    """All lists of some names, in order."""
    found = [[]]
    for name in names:
        found += [[*some, name] for some in found]
    return found


def _is_tiers(value):
    return isinstance(value, dict) and all(map(_is_tier, (*value.keys(), *value.values())))


def _is_tier(value):
    return _is_text(value) and not re.search("[=;,]", value)


_VALID = {
    "version": lambda value: type(value) is int and value == VERSION,
    "plugin": _is_text,
    "language": _or_none(is_code),
    "tier": _or_none(_is_tier),
    "token": _or_none(_is_text),
    "modules": lambda value: isinstance(value, list) and all(map(_is_module, value)),
    "options": _is_options,
    "tokens": _is_tokens,
    "langs": _is_texts,
    "extra_data": _is_texts,
    "lines": _is_size,
    "appended": _is_texts,
    "base": is_sum,
    "shared": _or_none(is_sum),
    "tiers": _or_none(_is_tiers),
    "rows": lambda value: (
        isinstance(value, list) and value == [k for k in EMBEDDINGS if k in value]
    ),
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "entries": _is_counts,
    "kept": _is_counts,
}
