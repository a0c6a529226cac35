"""A file's size in the shape of a public model, 12 + 12 layers of d = 1024."""

import torch

from lslora_fairseq.adapters import files, packing
from lslora_fairseq.adapters.header import COMMON, Header, Module
from lslora_fairseq.config import LSLoConfig, resolve
from lslora_fairseq.lora.plan import MODULES

D, FFN, RANK = 1024, 4096, 2
DIMS = {m: (FFN, D) if m == "fc2" else (D, FFN if m == "fc1" else D) for m in MODULES["decoder"]}


def made(sparsity, dtype="fp32"):
    """A file's bytes, and the entries of B, those of them that survive, and those of A that are
    needed; entries are pruned at random."""
    config = LSLoConfig("low=wo", str(RANK))
    layers = {"encoder": 12, "decoder": 12}
    plan = resolve(config, layers, {**dict.fromkeys(layers, DIMS), "embeddings": (D, 256_125)})
    tensors, modules, entries, kept, needed = {}, [], [0, 0], [0, 0], 0
    for site in plan.sites:
        n_in, n_out = site.in_features, site.out_features
        masks = torch.ones(RANK, n_in, dtype=torch.bool), torch.rand(n_out, RANK) >= sparsity
        factors = torch.rand(RANK, n_in) + 1, (torch.rand(n_out, RANK) + 1) * masks[1]
        tensors.update(packing.pack(site.name, factors, masks, packing.DTYPES[dtype]))
        modules.append(Module(site.name, site.side, n_in, n_out, RANK, RANK))
        needed += int(masks[1].any(0).sum()) * n_in
        for i, mask in enumerate(masks):
            entries[i] += mask.numel()
            kept[i] += int(mask.sum())
    langs = [f"l{number}" for number in range(124)]
    header = Header(
        "wo", "low", "__wo__", tuple(modules), {name: getattr(config, name) for name in COMMON},
        {"encoder_langtok": "src", "decoder_langtok": True, "lang_tok_replacing_bos_eos": False,
         "lang_tok_style": "multilingual", "langtoks_specs": ["main"],
         "langtoks": {"main": ["src", "tgt"]}},
        langs, [], 256_001, [f"__{code}__" for code in langs], "0" * 63 + "1", None, None, [],
        dtype, entries, kept, "0.1.0",
    )  # fmt: skip
    return len(files.encode(header, tensors)), entries[1], kept[1], needed


def test_at_nine_tenths_a_file_is_little_more_than_what_survives():
    size, entries, survivors, needed = made(0.9)
    assert entries == 466_944 and survivors / entries < 0.11
    assert size <= 1.05 * (4 * survivors + entries / 8 + 4 * needed)


def test_nothing_pruned_or_little_is_as_large_as_dense():
    dense, entries, _, needed = made(0.0)
    assert dense <= 1.05 * 4 * (entries + needed)
    for sparsity in (0.01, 0.02, 0.05):
        size, *_ = made(sparsity)
        assert size <= dense + 156 * len(packing.SIGNED + packing.MASK) * 2


def test_half_precision_is_half_as_large():
    assert made(0.9, "bf16")[0] < 0.54 * made(0.9)[0]
