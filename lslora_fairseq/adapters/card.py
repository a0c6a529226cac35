"""The model card of a folder of adapter files: a README.md for people and for model hubs."""

import json
import os

from lslora_fairseq.adapters.files import SUFFIX
from lslora_fairseq.lora.plan import SHARED
from lslora_fairseq.rendering import tables

# options of the training run that are told: no paths, which tell of someone's machine
TRAINING = (
    "lang_pairs", "sampling_method", "sampling_temperature", "optimizer", "lr", "lr_scheduler",
    "warmup_updates", "criterion", "label_smoothing", "dropout", "max_tokens", "update_freq",
    "max_epoch", "max_update", "pruning_final_sparsity", "pruning_begin", "pruning_duration",
    "pruning_unit", "pruning_scope", "pruning_target", "lora_dropout", "seed",
)  # fmt: skip
UNKNOWN = "unknown"
_FENCE = "```"


def card(files, options, licence, scores):
    """The text.

    Args:
        files: owner -> (header, bytes of the file)
        options: what the checkpoint was trained with, by name
        licence: its identifier, or None
        scores: the report of ``lslora evaluate``, or None
    """
    headers = [header for header, _ in files.values()]
    first = headers[0]
    base = os.path.basename(options.get("finetune_from_model") or "") or "the base model"
    parts = [
        _front(headers, licence),
        "# Language-specific adapters\n\n"
        f"LoRA adapters for a multilingual translation model of fairseq, one file for each "
        "language, written by lslora_fairseq "
        f"{first.plugin}. They are loaded onto the base model that they were trained on:\n\n"
        f"- base model: `{base}`, fingerprint `{first.base}`\n"
        f"- licence: {licence or UNKNOWN}\n"
        f"- language tokens: {_tokens(first.tokens)}",
        "## Files\n\n" + files_table(files),
        "## Use\n\n" + _commands(base, files),
        "## Training\n\n" + _training(options),
    ]
    if scores:
        parts.append(f"## Scores\n\n{_FENCE}text\n{scores}\n{_FENCE}")
    return "\n\n".join(parts) + "\n"


def _front(headers, licence):
    """What model hubs read."""
    codes = [header.language for header in headers if header.language]
    lines = ["library_name: fairseq", "pipeline_tag: translation", "tags: [lora, lslora_fairseq]"]
    lines += [f"license: {json.dumps(licence or UNKNOWN)}"]
    if codes:
        lines += ["language:", *(f"- {json.dumps(code)}" for code in codes)]
    return "\n".join(["---", *lines, "---"])


def rows(files):
    """A row for each file: what it holds, in plain values.

    Args:
        files: as for :func:`card`

    Returns:
        list of dicts
    """
    return [
        {
            "file": owner + SUFFIX,
            "language": header.language,
            "tier": header.tier,
            "ranks": sorted({module.rank for module in header.modules}),
            "alphas": sorted({module.alpha for module in header.modules}),
            "modules": len(header.modules),
            "sides": {
                side: sum(module.side == side for module in header.modules)
                for side in dict.fromkeys(module.side for module in header.modules)
            },
            "entries": sum(header.entries),
            "sparsity": [1 - k / n if n else 0.0 for k, n in zip(header.kept, header.entries)],
            "dtype": header.dtype,
            "bytes": size,
        }
        for owner, (header, size) in files.items()
    ]


COLUMNS = (
    "file",
    "tier",
    "rank",
    "alpha",
    "modules",
    "entries",
    "A pruned",
    "B pruned",
    "dtype",
    "bytes",
)


def cells(files):
    """The texts of :data:`COLUMNS`, a list for each file."""
    return [
        [
            row["file"],
            row["tier"] or "for all",
            ", ".join(map(str, row["ranks"])),
            ", ".join(f"{alpha:g}" for alpha in row["alphas"]),
            ", ".join(f"{count} {side}" for side, count in row["sides"].items()),
            f"{row['entries']:,}",
            *map(tables.percent, row["sparsity"]),
            row["dtype"],
            f"{row['bytes']:,}",
        ]
        for row in rows(files)
    ]


def files_table(files):
    """As Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells(files)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tokens(tokens):
    source, target = tokens["langtoks"].get("main") or (
        tokens["encoder_langtok"], "tgt" if tokens["decoder_langtok"] else None
    )  # fmt: skip
    names = {"src": "the source language's", "tgt": "the target language's", None: "none"}
    source, target = (names.get(spec, spec) for spec in (source, target))
    return f"{source} in the source, {target} in the target ({tokens['lang_tok_style']})"


def _commands(base, files):
    codes = [owner for owner in files if owner != SHARED]
    source, target = (*codes, "SRC", "TGT")[:2]
    return "\n".join(
        [
            f"{_FENCE}bash",
            "lslora inspect .",
            "fairseq-generate DATA --user-dir lslora_fairseq --task translation_multi_lslora \\",
            f"    --path {base if base.endswith('.pt') else 'BASE.pt'} --lora-adapters . "
            f"-s {source} -t {target}",
            "lslora assemble --base BASE.pt --adapters . --out CHECKPOINT.pt",
            _FENCE,
        ]
    )


def _training(options):
    lines = []
    for name in TRAINING:
        value = options.get(name)
        if value not in (None, "", []):
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append(f"- `--{name.replace('_', '-')} {text}`")
    return "\n".join(lines)
