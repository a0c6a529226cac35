"""Adapter files of small models, for tests that need no console."""

from argparse import Namespace
from types import SimpleNamespace

import torch
import toy
from fairseq.data import Dictionary

from lslora_fairseq.adapters.extraction import Extraction
from lslora_fairseq.adapters.files import SUFFIX, encode
from lslora_fairseq.analysis import trained
from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.lora.adapters import LayerAdapters
from lslora_fairseq.models.lslora_transformer import LSLoTransformerModel

LANGTOKS = {"encoder_langtok": "src", "decoder_langtok": True}


def model(langs=toy.CODES, seed=1, prune=0.7, **options):
    """A model whose adapters are random and pruned, some components of B as a whole; the same seed
    gives the same base weights if the languages are as many.

    Args:
        langs: in the order of their tokens
        prune: share of B that is pruned
    """
    words = Dictionary()
    for number in range(30):
        words.add_symbol(f"w{number}")
    words.rows_in_file = len(words)
    for code in langs:
        words.add_symbol(f"__{code}__")
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words, langs=list(langs))
    torch.manual_seed(seed)
    made = LSLoTransformerModel.build_model(Namespace(**{**toy.OPTIONS, **options}), task)
    toy.set_adapters(made, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for holder in made.modules():
        if isinstance(holder, LayerAdapters) and holder.side != "shared":
            drawn = torch.rand(holder.mask.shape, generator=generator) > prune
            drawn[:, : holder.width_A] = True
            for start in holder.offsets:  # the first component of each linear
                drawn[start, holder.width_A :] &= prune == 0
            holder.mask.copy_(drawn)
            holder.refresh_pruned()
            for language in range(len(holder.names)):
                weight, mask = holder.weight(language).data, drawn[holder.rows(language)]
                weight.mul_(mask)
    return made


def save(path, made, **options):
    """Writes a checkpoint of a model made with these options; returns its path."""
    told = {**toy.OPTIONS, **LANGTOKS, "langs": made.identity.langs, **options}
    torch.save({"args": Namespace(**told), "model": made.state_dict()}, path)
    return str(path)


def base_of(made):
    """The state dict of its base model."""
    return {k: w.clone() for k, w in made.state_dict().items() if not is_adapter_key(k)}


def extraction(folder, made, **options):
    """The :class:`Extraction` of a checkpoint of a model made with these options."""
    folder.mkdir(parents=True, exist_ok=True)
    return Extraction(trained.read(save(folder / "checkpoint.pt", made, **options)))


def write(folder, made, codes=None, dtype="fp32", **options):
    """Writes adapter files of a model made with these options; returns the folder."""
    taken = extraction(folder, made, **options)
    for owner, _, content in taken.files(taken.codes if codes is None else codes, dtype):
        (folder / f"{owner}{SUFFIX}").write_bytes(content)
    return folder


def rewritten(path, change):
    """A file's bytes with its header or tensors changed and sealed again, as by someone who knows
    the format.

    Args:
        change: is called with the header as a dict and the tensors, which it changes in place
    """
    from lslora_fairseq.adapters.files import read

    file = read(path)
    header, tensors = file.header.plain(), dict(file.tensors)
    header["modules"] = [list(module) for module in header["modules"]]
    change(header, tensors)
    return encode(SimpleNamespace(plain=lambda: header), tensors)
