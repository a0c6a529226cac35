"""Reading and writing files: the same bytes, nothing lost, nothing believed."""

import json
import os
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

import adapter_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lslora_fairseq.adapters import files, packing
from lslora_fairseq.errors import ConfigError

few = settings(max_examples=300, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of four languages and of what they share."""
    options = {"lora_shared_rank": 2, "lora_embedding_rank": 2}
    made = adapter_files.model(**options)
    return adapter_files.write(tmp_path_factory.mktemp("written"), made, **options)


@pytest.fixture(scope="module")
def written(folder):
    return (folder / "fr.safetensors").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("changed") / "fr.safetensors"


def refusal(path, content=None):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        files.read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and text.isprintable() and len(text) < 500
    return text.removeprefix(f"{path} ")


def same(first, second):
    return (
        first.header == second.header
        and first.tensors.keys() == second.tensors.keys()
        and all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    )


def test_a_file_written_again_has_the_same_bytes(folder):
    for path in folder.glob("*.safetensors"):
        file = files.read(path)
        assert files.encode(file.header, file.tensors) == path.read_bytes()
        assert file.size == path.stat().st_size


def test_any_reader_of_safetensors_sees_the_names_of_the_linears(folder):
    from safetensors import safe_open

    with safe_open(folder / "fr.safetensors", "pt") as file:
        names = {*file.keys()}
        assert set(file.metadata()) == {"lslora"}
    assert {"encoder.layers.0.fc1.lora_A", "encoder.layers.0.fc1.lora_B.values"} <= names
    assert "encoder.embed_tokens.row" in names


@few
@given(st.data())
def test_a_flipped_bit_is_found(written, place, data):
    number = data.draw(st.integers(0, len(written) * 8 - 1))
    changed = bytearray(written)
    changed[number // 8] ^= 1 << number % 8
    refusal(place, bytes(changed))


@few
@given(st.data())
def test_a_file_that_was_cut_or_grew_is_found(written, place, data):
    start = data.draw(st.integers(0, len(written)))
    length = data.draw(st.integers(0, 100))
    changed = data.draw(
        st.sampled_from(
            [
                written[:start],
                written[start:],
                written[:start] + written[start + length :],
                written[:start] + b"\0" * length + written[start:],
                written[:start] + b"\0" * length + written[start + length :],
            ]
        )
    )
    if changed != written:
        refusal(place, changed)


@few
@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_refused(place, content, length):
    refusal(place, content)
    refusal(place, length.to_bytes(8, "little") + content)


# JSON values of every kind, strange ones among them
STRANGE = ["../x", "fr/../de", "shared", "F32", "\x1b[31m", "a" * 9999]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(STRANGE),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(few, max_examples=150)
@given(st.data(), VALUES)
def test_any_value_in_a_header_that_is_sealed_again(folder, place, data, value):
    """It is refused in one line, or is a value that the field may have."""

    def change(header, tensors):
        name = data.draw(st.sampled_from([*header]))
        found = header[name]
        if isinstance(found, (list, dict)) and found and data.draw(st.booleans()):
            keys = [*found] if isinstance(found, dict) else range(len(found))
            found[data.draw(st.sampled_from(keys))] = value
        else:
            header[name] = value

    content = adapter_files.rewritten(folder / "fr.safetensors", change)
    place.write_bytes(content)
    try:
        file = files.read(place)
    except ConfigError:
        refusal(place)
    else:
        assert files.encode(file.header, file.tensors) == content


def changed(**fields):
    return lambda header, tensors: header.update(fields)


def module(**fields):
    """A change of the first module of a header, by the number of the field."""

    def change(header, tensors):
        for place, value in fields.items():
            header["modules"][0][int(place[1:])] = value

    return change


def tensor(name, new):
    """A change of a tensor; None takes it out."""

    def change(header, tensors):
        found = new(tensors.pop(name, None))
        if found is not None:
            tensors[name] = found

    return change


Q = "encoder.layers.0.self_attn.q_proj"
A, B, BITS = f"{Q}.lora_A", f"{Q}.lora_B.values", f"{Q}.lora_B.mask"
HUGE = 1 << 30


@pytest.mark.parametrize(
    "change, told",
    [
        (changed(language="../x"), "language in its header is '../x'"),
        (changed(language="de"), "it holds the adapters of de, which its name does not say"),
        (changed(language="Shared"), "language in its header is 'Shared'"),
        (changed(language="fr\n"), "language in its header is 'fr\\\\n'"),
        (changed(language=None), "its header tells no language"),
        (changed(tier="a=b"), "tier in its header is 'a=b'"),
        (changed(token=None), "its header tells a language"),
        (changed(version=True), "version in its header is True"),
        (changed(base="x"), "base in its header is 'x'"),
        (changed(dtype="fp16"), f"{re.escape(A)} has another type or shape"),
        (changed(surprise=1), "missing or unknown in its header: 'surprise'"),
        (lambda header, _: header.pop("tier"), "missing or unknown in its header: 'tier'"),
        (changed(options={"lora_tiers": "x"}), "options in its header is {'lora_tiers': 'x'}"),
        (changed(options={"lora_shape": "a\nb"}), "options in its header is"),
        (changed(appended=["__fr__"] * 20_000), "appended in its header is"),
        (changed(rows=["decoder.embed_tokens.weight"]), "it lacks decoder.embed_tokens.row"),
        (changed(token="__xx__"), "its header has rows of a token that the dictionary file holds"),
        (changed(kept=[1, 1]), r"\[\d+, \d+\] of its entries are kept, and its header tells"),
        (changed(entries=[1, 1]), "its header counts"),
        (module(_0="encoder.layers.0.fc3"), "modules in its header is"),
        (module(_0="../fc1"), "modules in its header is"),
        (module(_0="encoder.layers.0.fc1"), "a module has two adapters in its header"),
        (module(_1="shared"), "has the side shared"),
        (module(_2=HUGE, _3=HUGE, _4=HUGE), "its header counts"),
        (module(_4=17), "modules in its header is"),
        (module(_5=0), "modules in its header is"),
        (module(_5=True), "modules in its header is"),
        (tensor(A, lambda w: None), f"it lacks {A}, or has it twice"),
        (tensor(f"{A}.signed", lambda w: torch.ones(3, 16)), f"it lacks {A}, or has it twice"),
        (tensor("encoder.layers.0.fc1.weight", lambda w: torch.ones(1)), "of which its header"),
        (tensor(A, lambda w: w.half()), f"{re.escape(A)} has another type or shape"),
        (tensor(A, lambda w: w.t().contiguous()), f"{re.escape(A)} has another type or shape"),
        (tensor(A, lambda w: w[:1]), f"{re.escape(A)} has 1 entries, and the masks 2"),
        (tensor(A, lambda w: w / 0), f"{re.escape(A)} holds values that are no numbers"),
        (tensor(B, lambda w: w * torch.nan), f"{re.escape(B)} holds values that are no numbers"),
        (tensor(B, lambda w: w[1:]), f"{re.escape(B)} has .* entries, and the masks"),
        (tensor(BITS, lambda w: w[1:]), f"{re.escape(BITS)} has another type or shape"),
        (tensor(BITS, lambda w: w.bool()), "a type that adapters never are"),
    ],
)  # fmt: skip
def test_what_is_refused_though_its_checksum_is_right(folder, place, change, told):
    content = adapter_files.rewritten(folder / "fr.safetensors", change)
    assert re.match(f"is refused: .*{told}", refusal(place, content))


@pytest.mark.skipif(sys.platform != "linux", reason="its way to tell what is taken")
def test_a_claim_of_huge_sizes_takes_no_memory(folder, place):
    """Nothing of A is there where all of B is pruned, whatever its width."""
    width = 1 << 28

    def change(header, tensors):
        first = header["modules"][0]
        n_in, n_out, rank = first[2:5]
        for count in (header["entries"], header["kept"]):
            count[0] += rank * (width - n_in)
        header["kept"][1] -= len(tensors[B])
        first[2] = width
        tensors[A] = torch.ones(0, width)
        tensors[B], tensors[BITS] = tensors[B][:0], tensors[BITS] * 0

    place.write_bytes(adapter_files.rewritten(folder / "fr.safetensors", change))
    files.read(folder / "fr.safetensors")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (200 << 20), limits[1]))
    try:
        files.read(place)
        with pytest.raises(RuntimeError):
            packing.unpack(Q, files.read(place).tensors, width, 16, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def parts(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(table, payload):
    text = table if isinstance(table, str) else json.dumps(table)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + payload


def first_entry(table):
    return next(name for name in table if name.startswith("encoder"))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda t, p: (f'{json.dumps(t)[:-1]}, "{first_entry(t)}": 1}}', p), "a name stands twice"),
        (lambda t, p: (json.dumps(t).replace("[", "[NaN, ", 1), p), "holds NaN"),
        (lambda t, p: ("[" * 100_000, p), "its table of contents cannot be read"),
        (lambda t, p: ("[]", p), "its table of contents cannot be read"),
        (lambda t, p: ({**t, "x": 1}, p), "an entry that is no tensor"),
        (lambda t, p: ({**t, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, p),
         "its tensors overlap"),
        (lambda t, p: ({**t, "x": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}},
                       p), "larger or smaller than its place"),
        (lambda t, p: ({**t, "x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, p),
         "without shape or place"),
        (lambda t, p: ({**t, "x": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}, p),
         "a type that adapters never are"),
        (lambda t, p: (t, p + b"\0"), "its tensors take"),
        (lambda t, p: (t, b"\0" * len(p)), "it is damaged, its content does not have its checksum"),
        (lambda t, p: ({**t, "__metadata__": {**t["__metadata__"], "x": "y"}}, p),
         "it has metadata beside its header"),
        (lambda t, p: (" " * (3 << 20), p), "its table of contents has 3,145,728 bytes"),
    ],
)  # fmt: skip
def test_a_table_of_contents_that_is_not_as_written(written, place, change, told):
    content = joined(*change(*parts(written)))
    assert told in refusal(place, content)


def test_files_of_others(written, place, tmp_path):
    table, payload = parts(written)
    del table["__metadata__"]
    told = "was not written by lslora extract: name a file that was"
    assert refusal(place, joined(table, payload)) == told
    torch.save({"model": {}}, place)
    assert refusal(place).startswith("is refused: it is cut short, or no safetensors file")
    path = tmp_path / "none.safetensors"
    with pytest.raises(ConfigError, match=f"^{path}: no such file: name one that lslora extract"):
        files.read(path)


def test_a_later_version_is_told(folder, place):
    content = adapter_files.rewritten(folder / "fr.safetensors", changed(version=2))
    told = "is of version 2 of the format, this package reads 1: update lslora_fairseq"
    assert refusal(place, content) == told


def test_a_file_under_another_name_is_mislabelled(written, tmp_path):
    place = tmp_path / "de.safetensors"
    assert "it holds the adapters of fr, which its name does not say" in refusal(place, written)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(written, place):
    place.write_bytes(written)
    place.chmod(0)
    assert "cannot be read (Permission denied)" in refusal(place)
    place.chmod(0o600)


def test_values_that_a_dtype_does_not_hold(tmp_path):
    made = adapter_files.model()
    made.encoder.layers[0].source_adapters.lora_fr.data[1, 0] = 1e6
    taken = adapter_files.extraction(tmp_path, made)
    with pytest.raises(ConfigError, match="holds values that are no numbers in fp16: give --dtype"):
        list(taken.files(["fr"], "fp16"))
    header, _ = taken.language("fr", "bf16")
    assert header == replace(taken.language("fr", "fp32")[0], dtype="bf16")
