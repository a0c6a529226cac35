"""Model cards of what is written for Hugging Face: README.md, with the lines to use it."""

import json
import os

from lslora_fairseq.identity import plugin_version

_FENCE = "```"
_MODEL = """\
import torch
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained({place})
model = M2M100ForConditionalGeneration.from_pretrained({place})
"""


def model(made, tokenizer, before, forced):
    """Of a model.

    Args:
        made: :class:`~lslora_fairseq.huggingface.exporting.Model`
        tokenizer: :class:`~lslora_fairseq.huggingface.tokenizer.Tokenizer`
        before, forced: languages whose tokens the tokenizer puts in front of a text, and the
            generation in front of its translation; or None
    """
    if made.pair:
        title = f"# Translation from {made.pair[0]} to {made.pair[1]}"
        about = (
            "A model of fairseq with the adapters of this direction folded in. The tokenizer puts "
            f"the token of {before or 'no language'} in front of a text, and decoding starts with "
            f"that of {forced or 'no language'}."
        )
        call = (
            'inputs = tokenizer("A text.", return_tensors="pt")\nout = model.generate(**inputs)\n'
        )
    else:
        first, second = [*tokenizer.langs.values(), "LANGUAGE", "LANGUAGE"][:2]
        title = "# Multilingual translation"
        about = (
            "A model of fairseq. The token of the source language is written in front of a text; "
            "that of the target language is what decoding starts with."
        )
        call = (
            f'inputs = tokenizer("{first} A text.", return_tensors="pt")\n'
            f'target = tokenizer.convert_tokens_to_ids("{second}")\n'
            "out = model.generate(**inputs, forced_bos_token_id=target)\n"
        )
    call += "tokenizer.batch_decode(out, skip_special_tokens=True)"
    codes = [code.partition("_")[0] for code in made.pair or tokenizer.langs]
    return "\n\n".join([
        _front("transformers", codes), title,
        f"{about}\n\nWritten by lslora_fairseq {plugin_version()} from "
        f"`{os.path.basename(made.path)}`.",
        _python(_MODEL.format(place='"."') + call),
    ]) + "\n"  # fmt: skip


_ADAPTER = """\
from peft import PeftModel
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

base = "BASE"  # {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = M2M100ForConditionalGeneration.from_pretrained(base)
"""


def adapter(name, base, merging, chosen, modules):
    """Of a PEFT adapter.

    Args:
        name: of its folder
        base: name of the base model, or None
        merging: :class:`~lslora_fairseq.adapters.merging.Merging`
        chosen: names of all folders
        modules: name of each module -> its factors
    """
    codes = [part for part in name.split("-") if part in merging.plan.languages]
    call = _ADAPTER.format(base=base or "the base model")
    if "-source" in name or "-target" in name or name == "shared":
        about = (
            "One part of the adapters of a direction. Those of its source language, of its target "
            "language and, if there are any, the shared ones are active together; PEFT adds them "
            "up."
        )
        code = codes[0] if codes else merging.plan.languages.codes[0]
        other = next((c for c in merging.plan.languages.codes if c != code), code)
        parts = [p for p in (f"{code}-source", f"{other}-target", "shared") if p in chosen]
        first, *rest = parts
        call += f'model = PeftModel.from_pretrained(model, "../{first}", adapter_name="{first}")\n'
        call += "".join(
            f'model.load_adapter("../{part}", adapter_name="{part}")\n' for part in rest
        )
        call += f"model.base_model.set_adapter({json.dumps(parts)})"
    else:
        about = "All adapters of a direction, as one."
        call += 'model = PeftModel.from_pretrained(model, ".")'
    about += " They are language-specific LoRA of a fairseq model."
    if any(key.endswith("embed_tokens") for key in modules):
        about += (
            " The embeddings have an adapter, too: keep it apart, since merging it would add it to "
            "one matrix three times."
        )
    parts = [_front("peft", codes, base), f"# {name}", about, _python(call)]
    return "\n\n".join([*parts, f"Written by lslora_fairseq {plugin_version()}."]) + "\n"


def _front(library, codes, base=None):
    """What model hubs read."""
    lines = [f"library_name: {library}", "pipeline_tag: translation", "tags: [lslora_fairseq]"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    if codes:
        lines += ["language:", *(f"- {json.dumps(code)}" for code in dict.fromkeys(codes))]
    return "\n".join(["---", *lines, "---"])


def _python(code):
    return f"{_FENCE}python\n{code}\n{_FENCE}"
