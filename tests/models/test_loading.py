"""Fitting a checkpoint: its keys, and languages that it lacks."""

import re

import adapter_files
import pytest
import torch

from lslora_fairseq.errors import ConfigError, UserError
from lslora_fairseq.identity import Identity
from lslora_fairseq.keys import is_adapter_key
from lslora_fairseq.models.loading import check_keys


@pytest.mark.parametrize(
    "key, expected",
    [
        ("encoder.layers.0.source_adapters.lora_en", True),
        ("decoder.layers.1.target_adapters.pruned", True),
        ("lslora_record", True),
        ("encoder.lslora_record", False),
        ("target_adapters.lora_zh-Hans", True),
        ("encoder.xsource_adapters.lora_en", False),
        ("encoder.source_adapters.0.weight", False),
        ("mask", False),
        ("encoder.layers.0.fc1.weight", False),
    ],
)
def test_adapter_keys_are_matched_whole(key, expected):
    assert is_adapter_key(key) == expected


def state(**shapes):
    return {key.replace("__", "."): torch.empty(shape) for key, shape in shapes.items()}


def test_fitting_keys_pass():
    check_keys(state(fc1__weight=(2, 3)), state(fc1__weight=(2, 3)), Identity("base.pt"))


def test_keys_that_do_not_fit_are_listed_with_the_remedy():
    own = state(a=(1,), b=(2,), c=(3,), d=(4,), e=(5,))
    found = state(b=(2, 2), c=(3,), d=(4,), e=(6,), f=(1,))
    message = (
        "base.pt does not fit this model: a: missing; f: not in this model; b: (2, 2) in the "
        "checkpoint, (2,) here and 1 more: choose the --arch and sizes of the checkpoint (big)"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_keys(own, found, Identity("base.pt", "big"))
    with pytest.raises(ConfigError, match="a: missing: choose the --arch and sizes of the check"):
        check_keys(state(a=(1,)), {}, Identity("base.pt"))


def test_adapters_that_do_not_fit_have_a_remedy_of_their_own():
    own = {f"source_adapters.{k}": v for k, v in state(lora_en=(2, 3), lora_fr=(2, 3)).items()}
    found = {f"source_adapters.{k}": v for k, v in state(lora_en=(4, 3), lora_de=(2, 3)).items()}
    message = (
        "the checkpoint does not fit this model: source_adapters.lora_fr: missing; "
        "source_adapters.lora_de: not in this model; source_adapters.lora_en: (4, 3) in the "
        "checkpoint, (2, 3) here: its adapters do not fit: give the --lora-* options and index "
        "sides it was trained with, or none of them"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_keys(own, found, Identity(arch="big"))


def test_a_language_is_added_in_the_middle():
    """The others keep their adapters and masks; it has those of the language it starts as."""
    langs = {"lora_tiers": "high=de,en;low=ja", "lora_rank": "de=1,en=2,ja=5"}
    before = adapter_files.model(**langs)
    model = adapter_files.model(lora_rank="de=1,en=2,fr=5,ja=5", seed=2)
    model.added, model.init_from = ("fr",), {"fr": "ja"}
    model.load_state_dict(before.state_dict())
    for stack in ("encoder", "decoder"):
        for here, there in zip(*(getattr(m, stack).layers for m in (model, before))):
            for name in ("source_adapters", "target_adapters"):
                ours, theirs = (getattr(layer, name, None) for layer in (here, there))
                if ours is None:
                    continue
                for number, code in enumerate(("de", "en", "fr", "ja")):
                    other = before.languages.index(code if code != "fr" else "ja")
                    assert torch.equal(ours.weight(number), theirs.weight(other))
                    mask = ours.mask[ours.rows(number)]
                    if code == "fr":  # its own is free
                        assert mask.all() and not theirs.mask[theirs.rows(other)].all()
                    else:
                        assert torch.equal(mask, theirs.mask[theirs.rows(other)])
    model.added = ()
    with pytest.raises(UserError, match="has adapters of de, en, ja, this model of de, en, fr, ja"):
        model.load_state_dict(before.state_dict())
