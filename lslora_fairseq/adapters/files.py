"""Reading and writing adapter files: safetensors, of which nothing is believed that is not checked.

Beside its tensors a file has one entry of metadata, ``lslora``: the :class:`Header` as JSON, with a
checksum of the whole file in which the 64 digits of the checksum itself count as zeros. Nothing in
it is ever unpickled, and sizes that a file claims are compared with its true size first.
"""

import hashlib
import json
import math
import os

import torch

from lslora_fairseq.adapters.header import VERSION, Header, is_sum
from lslora_fairseq.adapters.packing import DTYPES, check, forms
from lslora_fairseq.errors import ConfigError

SUFFIX = ".safetensors"
KEY, SUM, BLANK = "lslora", "sha256", "0" * 64
LONGEST = 2 << 20  # bytes of a file's table of contents
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_CHUNK = 1 << 20


class AdapterFile:
    """The content of a file.

    Attributes:
        path: where it was read from
        header: :class:`Header`
        tensors: name -> tensor, packed
        size: bytes of the file
    """

    def __init__(self, path, header, tensors, size):
        self.path, self.header, self.tensors, self.size = path, header, tensors, size


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:  # the rest of this package works without it
        raise ConfigError(
            "adapter files need the package safetensors: pip install safetensors"
        ) from None
    return safetensors


def row_name(key):
    """The tensor of a token's row in an embedding matrix, given the matrix's key."""
    return f"{key.removesuffix('weight')}row"


def encode(header, tensors):
    """A file's bytes: the same for the same content.

    Args:
        header: :class:`Header`
        tensors: name -> tensor
    """
    plain = json.dumps({**header.plain(), SUM: BLANK}, sort_keys=True, separators=(",", ":"))
    content = _safetensors().torch.save(tensors, {KEY: plain})
    start = content.index(BLANK.encode())
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:start] + digest + content[start + len(digest) :]


def read(path):
    """Reads a file, and checks all that can be known without its base model.

    Returns:
        :class:`AdapterFile`

    Raises:
        ConfigError: there is no such file, or anything in it is not as it should be.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such file: name one that lslora extract wrote")
    try:
        with open(path, "rb") as file:
            return _read(path, file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): copy it again") from None
    except ConfigError:
        raise
    except ValueError as error:
        remedy = "get it again from where it came from, and do not use it as it is"
        raise ConfigError(f"{path} is refused: {error}: {remedy}") from None


def _read(path, file):
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError("it is cut short, or no safetensors file")
    if length > LONGEST:
        raise ValueError(f"its table of contents has {length:,} bytes, more than any adapters need")
    table = _parsed(file.read(length))
    found = _metadata(path, table)
    shapes = _shapes(table, size - 8 - length)
    _check_sum(file, found.pop(SUM, None), 8 + length)
    header = Header.read(found)
    if os.path.basename(path) != header.owner + SUFFIX:
        raise ValueError(f"it holds the adapters of {header.owner}, which its name does not say")
    _check_names(header, shapes)
    file.seek(0)
    library = _safetensors()
    try:
        tensors = library.torch.load(file.read(size))
    except library.SafetensorError:
        raise ValueError("safetensors cannot read it") from None
    _check_values(header, tensors)
    return AdapterFile(path, header, tensors, size)


def _parsed(text):
    """JSON, strictly: no name twice, no NaN."""

    def once(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name stands twice in its table of contents")
        return dict(pairs)

    def refuse(constant):
        raise ValueError(f"its table of contents holds {constant}")

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        found = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("its table of contents cannot be read") from None
    if not isinstance(found, dict):
        raise ValueError("its table of contents cannot be read")
    return found


def _metadata(path, table):
    """The header in a file's metadata, as JSON gave it; of a version that is known."""
    metadata = table.pop("__metadata__", None)
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{path} was not written by lslora extract: name a file that was")
    found = _parsed(text)
    if type(found.get("version")) is int and found["version"] != VERSION:
        raise ConfigError(
            f"{path} is of version {found['version']} of the format, this package reads {VERSION}: "
            "update lslora_fairseq"
        )
    if len(metadata) > 1:
        raise ValueError("it has metadata beside its header")
    return found


def _shapes(table, size):
    """name -> (dtype, shape); the tensors lie one behind the other and fill *size* bytes."""
    found, spans = {}, []
    for name, entry in table.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError("its table of contents has an entry that is no tensor")
        dtype, shape, span = (entry[key] for key in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or len(span) != 2:
            raise ValueError("its table of contents has a tensor without shape or place")
        if not isinstance(dtype, str) or dtype not in _TYPES:
            raise ValueError("its table of contents has a tensor of a type that adapters never are")
        if math.prod(shape) * _TYPES[dtype].itemsize != span[1] - span[0]:
            raise ValueError("its table of contents has a tensor larger or smaller than its place")
        found[name] = _TYPES[dtype], shape
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its tensors overlap, or leave room between them")
        end = stop
    if end != size:
        raise ValueError(f"its tensors take {end:,} bytes, and it has {size:,}: it is cut short?")
    return found


def _check_sum(file, digest, start):
    """The checksum of the whole file, read piece by piece."""
    file.seek(0)
    head = file.read(start)
    if not is_sum(digest) or head.count(digest.encode()) != 1:
        raise ValueError("its checksum is missing")
    found = hashlib.sha256(head.replace(digest.encode(), BLANK.encode()))
    while chunk := file.read(_CHUNK):
        found.update(chunk)
    if found.hexdigest() != digest:
        raise ValueError("it is damaged, its content does not have its checksum")


def _check_names(header, shapes):
    """Every tensor that the header tells of is there, in the shape that it tells, and no other."""
    dtype, left = DTYPES[header.dtype], dict(shapes)
    for key in header.rows:
        kind, shape = left.pop(row_name(key), (None, []))
        if kind != torch.float32 or len(shape) != 1:
            raise ValueError(f"it lacks {row_name(key)}")
    for module in header.modules:
        for possible in forms(module.name, module.in_features, module.out_features, module.rank):
            names = [form for form in possible if form.keys() <= left.keys()]
            if len(names) != 1:
                (dense,) = possible[0]
                raise ValueError(f"it lacks {dense}, or has it twice")
            for name, shape in names[0].items():
                kind = torch.uint8 if name.endswith(".mask") else dtype
                if not _fits(left.pop(name), kind, shape):
                    raise ValueError(f"{name} has another type or shape than its header tells")
    if left:
        raise ValueError(f"it holds {ascii(min(left))[:60]}, of which its header does not tell")


def _fits(found, dtype, shape):
    return (
        found[0] == dtype
        and len(found[1]) == len(shape)
        and all(expected in (None, size) for size, expected in zip(found[1], shape))
    )


def _check_values(header, tensors):
    """Values are finite, masks and values belong together, and as many are kept as the header
    tells."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are no numbers (nan or inf)")
    kept = [0, 0]
    for name, _, n_in, n_out, rank, _ in header.modules:
        keep_A, keep_B = check(name, tensors, n_in, n_out, rank)
        kept[0] += rank * n_in if keep_A is None else int(keep_A.sum())
        kept[1] += int(keep_B.sum())
    if kept != header.kept:
        raise ValueError(f"{kept} of its entries are kept, and its header tells {header.kept}")
