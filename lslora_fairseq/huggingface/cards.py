"""Model cards of what is written for Hugging Face: README.md, with the lines to use it."""

import json
import os

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
        first, second = ([*tokenizer.langs.values()] * 2)[:2]
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
        f"{about}\n\nWritten by lslora_fairseq from `{os.path.basename(made.path)}`.",
        _python(_MODEL.format(place='"."') + call),
    ]) + "\n"  # fmt: skip


def _front(library, codes):
    """What model hubs read."""
    lines = [f"library_name: {library}", "pipeline_tag: translation", "tags: [lslora_fairseq]"]
    lines += ["language:", *(f"- {json.dumps(code)}" for code in dict.fromkeys(codes))]
    return "\n".join(["---", *lines, "---"])


def _python(code):
    return f"{_FENCE}python\n{code}\n{_FENCE}"
