"""``lslora import-hf``: a checkpoint of fairseq from a folder of Hugging Face transformers."""

import shlex

EXAMPLES = """\
examples:
  lslora import-hf nllb-200-distilled-600M --out nllb
      nllb/model.pt, dict.txt, langs.txt and sentencepiece.bpe.model, and the options to use them
  flags=$(lslora import-hf m2m100_418M --out m2m --format flags)
      only the options are printed, on one line: fairseq-train data --user-dir lslora_fairseq $flags

The folder is one that save_pretrained writes and model hubs offer: of M2M-100, M2M-124, NLLB-200
(dense) or SMALL-100. Neither transformers nor a network is needed.
"""


def add_arguments(parser):
    parser.add_argument("folder", metavar="FOLDER", help="with config.json, weights and tokenizer")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    parser.add_argument(
        "--format", choices=("table", "flags"), default="table", help="(default: table)"
    )


def run(args):
    """Writes the folder and tells how to use it; returns the exit status."""
    # not for --help: torch takes seconds
    from lslora_fairseq.huggingface import importing

    made = importing.write(args.folder, args.out)
    flags = shlex.join(made.flags())
    print(flags if args.format == "flags" else _table(made, flags))
    return 0


def _table(made, flags):
    from lslora_fairseq.errors import listed
    from lslora_fairseq.huggingface import importing

    words = made.vocabulary
    rows = len(words.symbols) + 4
    lines = [
        f"{importing.MODEL:<20}{made.parameters:,} parameters, {made.dtype}",
        f"{importing.DICTIONARY:<20}{len(words.symbols):,} lines + 4 specials = {rows:,} rows, "
        f"{words.unused} of them without a token",
        f"{importing.LANGS:<20}{len(words.langs)} languages, in the order of their rows: "
        f"{listed(words.langs, ',')}",
        f"{importing.SPM:<20}for raw text: --bpe sentencepiece --sentencepiece-model",
    ]
    lines += [f"{old} is {new} here, as in fairseq" for old, new in words.renamed.items()]
    return "\n".join([*lines, "", "options of fairseq-train:", flags])
