"""Changes adapter files in many ways and reads them: nothing but a refusal in one line, or the
values that were written, may come of it.

    python scripts/fuzz_adapters.py                    # 100,000 files
    python scripts/fuzz_adapters.py --files 1000 --seed 7

It starts from the files in tests/data/adapters_v1. Half of the changes are those of accidents:
bits, bytes, pieces. The other half are made by someone who knows the format: fields of the header
and tensors are changed, and the file is sealed again with a checksum that is right; such a file may
be read if it still is a valid one, which then holds what was put into it.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lslora_fairseq.adapters import files  # noqa: E402
from lslora_fairseq.errors import ConfigError  # noqa: E402

SOURCE = ROOT / "tests" / "data" / "adapters_v1"
STRANGE = (
    None, True, 0, -1, 1 << 31, 1 << 70, 0.5, -0.0, 1e308, "", "../x", "/etc/passwd", "shared",
    "de", "\x1b[2J", "a\nb", "x" * 5000, [], {}, [[]], ["fr"] * 20_000, {"main": ["src", "tgt"]},
)  # fmt: skip
REFUSED = "refused in one line"
REWRITTEN = "accepted, a valid file with the values put into it"
AS_WRITTEN = "accepted with the values written: the change changed nothing"
BAD = "accepted with other values than written"


def flip(content, rng):
    """Some bits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(content, rng):
    """Some bytes, at random or all the same."""
    start, length = rng.randrange(len(content)), rng.randrange(1, 64)
    new = rng.choice((rng.randbytes(length), bytes([rng.randrange(256)]) * length))
    return content[:start] + new + content[start + length :]


def cut(content, rng):
    """Its end."""
    return content[: rng.randrange(len(content))]


def splice(content, rng):
    """A piece left out, put in twice, or moved."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return (
        content[:a] + rng.choice((b"", content[a:b] * 2, content[b:c] + content[a:b])) + content[c:]
    )


def length(content, rng):
    """The size of the table of contents."""
    return rng.randrange(1 << rng.choice((8, 16, 32, 63))).to_bytes(8, "little") + content[8:]


def characters(content, rng):
    """Digits, quotes and brackets of the table of contents, exchanged for each other."""
    size, changed = int.from_bytes(content[:8], "little"), bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        changed[8 + rng.randrange(size)] = rng.choice(b'0123456789abcdef"\\[]{},: ')
    return bytes(changed)


def header(fields, tensors, rng):
    """A field of the header, or something in it."""
    place, name = fields, rng.choice([*fields])
    while isinstance(place[name], (dict, list)) and place[name] and rng.random() < 0.7:
        place = place[name]
        name = rng.choice([*place]) if isinstance(place, dict) else rng.randrange(len(place))
    what = rng.random()
    if what < 0.1 and isinstance(place, dict):
        del place[name]
    elif what < 0.2 and type(place[name]) is int:
        place[name] += rng.choice((-1, 1, 8))
    else:
        place[name] = rng.choice(STRANGE)


def numbers(fields, tensors, rng):
    """Values of a tensor, of its dtype."""
    name = rng.choice([*tensors])
    flat = tensors[name].clone().flatten()
    if flat.numel():
        values = (torch.nan, torch.inf, 0.0, -0.0, 1.0) if flat.is_floating_point() else (0, 255, 3)
        flat[rng.randrange(flat.numel())] = rng.choice(values)
    tensors[name] = flat.view(tensors[name].shape)


def shapes(fields, tensors, rng):
    """A tensor is gone, has another name, size or dtype, or is one too many."""
    name = rng.choice([*tensors])
    tensor = tensors.pop(name)
    if rng.random() < 0.2:
        return
    change = rng.choice(
        (
            lambda: {name + rng.choice((".mask", ".values", ".signed", "x")): tensor},
            lambda: {name: tensor, name + "2": tensor.clone()},
            lambda: {name: tensor[:-1].clone()} if tensor.dim() else {},
            lambda: {name: torch.cat([tensor, tensor])} if tensor.dim() else {},
            lambda: {name: tensor.flatten()},
            lambda: {name: tensor.to(rng.choice((torch.float64, torch.float16, torch.uint8)))},
            lambda: {name: tensor.new_zeros((0, 1 << 30))},
        )
    )
    tensors.update(change())


ACCIDENTS = (flip, flip, overwrite, cut, splice, length, characters)
INTENT = (header, header, header, numbers, shapes)


def sealed_again(file, change, rng):
    """A file's bytes with a change of someone who knows the format."""
    fields, tensors = file.header.plain(), dict(file.tensors)
    fields["modules"] = [list(module) for module in fields["modules"]]
    change(fields, tensors, rng)
    return files.encode(SimpleNamespace(plain=lambda: fields), tensors)


def outcome(path, content, original, is_intent):
    """What comes of reading changed content, of a file that was *original*."""
    path.write_bytes(content)
    try:
        found = files.read(path)
    except ConfigError as error:
        text = str(error)
        is_line = text.startswith(str(path)) and text.isprintable() and len(text) < 1000
        return REFUSED if is_line else f"refused otherwise: {text[:200]!r}"
    except BaseException as error:
        return f"failed with {type(error).__name__}: {str(error)[:200]!r}"
    written = content if is_intent else original
    if files.encode(found.header, found.tensors) != written:
        return BAD
    return REWRITTEN if is_intent else AS_WRITTEN


def fuzz(count, seed, source=SOURCE):
    """Counts of outcomes by kind of change: dict of (change, outcome) -> number."""
    rng, found = random.Random(seed), Counter()
    originals = [
        (p.name, p.read_bytes(), files.read(p)) for p in sorted(source.rglob("*.safetensors"))
    ]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            name, content, file = rng.choice(originals)
            is_intent = number % 2 == 1
            change = rng.choice(INTENT if is_intent else ACCIDENTS)
            changed = sealed_again(file, change, rng) if is_intent else change(content, rng)
            path = Path(folder) / name
            found[change.__name__, outcome(path, changed, content, is_intent)] += 1
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000, help="how many (default: 100,000)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    found = fuzz(args.files, args.seed)
    total = Counter()
    for (change, what), count in sorted(found.items()):
        print(f"{change:<12}{count:>9,}  {what}")
        total[what] += count
    print()
    for what in dict.fromkeys([REFUSED, REWRITTEN, AS_WRITTEN, BAD, *total]):
        print(f"{total[what]:>9,}  {what}")
    return int(any(what not in (REFUSED, REWRITTEN, AS_WRITTEN) for what in total))


if __name__ == "__main__":
    sys.exit(main())
