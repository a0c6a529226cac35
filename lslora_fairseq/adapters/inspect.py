"""``lslora inspect``: what adapter files, or a checkpoint with adapters, hold."""

import os

EXAMPLES = """\
examples:
  lslora inspect adapters
      the files of a folder, checked, in a table
  lslora inspect adapters/wo.safetensors --format json
      all that a file says of itself: modules, ranks, sides, tokens, base model
  lslora inspect finetuned/checkpoint_last.pt
      the files that lslora extract would make of a checkpoint
"""


def add_arguments(parser):
    parser.add_argument("path", metavar="FILE|DIR|CHECKPOINT", help="what to look at")
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="(default: table)"
    )


def run(args):
    """Prints what is there; returns the exit status."""
    from lslora_fairseq.rendering import tables

    found = contents(args.path)
    if args.format == "json":
        print(
            tables.json_text(
                [
                    {
                        **header.plain(),
                        "modules": [module._asdict() for module in header.modules],
                        "bytes": size,
                    }
                    for header, size in found.values()
                ]
            )
        )
    else:
        print(table(found))
    return 0


def contents(path):
    """What there is: owner -> (header, bytes of the file).

    Raises:
        ConfigError: it cannot be read, or is refused.
    """
    from lslora_fairseq.adapters import collection, files
    from lslora_fairseq.adapters.extraction import Extraction
    from lslora_fairseq.analysis import trained

    if os.path.isfile(path) and not path.endswith(files.SUFFIX):
        made = Extraction(trained.read(path))
        found = made.files(made.codes, "fp32")
        return {owner: (header, len(content)) for owner, header, content in found}
    read = [files.read(place) for place in collection.paths_in([path])]
    return {file.header.owner: (file.header, file.size) for file in read}


def table(found):
    """The text for people."""
    from lslora_fairseq.adapters import card
    from lslora_fairseq.rendering import tables

    first, _ = next(iter(found.values()))
    rows = card.cells(found)
    total = sum(size for _, size in found.values())
    return "\n".join(
        [
            f"base model {first.base[:12]}…, {first.lines:,} symbols in its dictionary file, "
            f"{len(first.langs)} languages",
            tables.aligned("<<>>>>>>>>", card.COLUMNS, rows),
            f"{len(found)} files, {total:,} bytes",
        ]
    )
