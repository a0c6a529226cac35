"""The console command ``lslora``: thin subcommands over the package's folders."""

import argparse
import logging
import os
import sys
from importlib import import_module

from lslora_fairseq.errors import one_line_errors

# Subcommand -> its module in this package, and what it does, in one line. The module has EXAMPLES
# (text), add_arguments(parser) and run(args), which returns the exit status. Only the one that is
# called gets imported, so that another's needs cannot break it. A module that reads its command
# line by itself, beside the options of fairseq, has parse(argv) too.
COMMANDS = {
    "doctor": (
        "doctor",
        "check versions, dictionary, languages, data, memory and disk before a run",
    ),
    "evaluate": (
        "evaluation.evaluate",
        "decode and score all directions of a model at once",
    ),
    "sides": ("analysis.sides", "which language should index each layer, after weight learning"),
    "demand": ("analysis.demand", "how much of its adapters each language needs, after pruning"),
    "suggest": (
        "analysis.suggest",
        "ranks and modules for a budget of parameters, from the demand",
    ),
    "extract": ("adapters.extract", "a small file for each language's adapters, of a checkpoint"),
    "inspect": ("adapters.inspect", "what adapter files, or a checkpoint with adapters, hold"),
    "assemble": ("adapters.assemble", "a checkpoint of a base model and adapter files"),
    "merge": ("adapters.merge", "a checkpoint of fairseq's own transformer, for one direction"),
    "import-hf": (
        "huggingface.import_hf",
        "a checkpoint of fairseq from a folder of Hugging Face",
    ),
    "export-hf": (
        "huggingface.export_hf",
        "a folder of Hugging Face from a model of fairseq",
    ),
    "export-peft": (
        "huggingface.export_peft",
        "folders of PEFT adapters from a checkpoint with adapters",
    ),
    "import-peft": (
        "huggingface.import_peft",
        "files of languages' adapters from folders of PEFT",
    ),
    "compare": (
        "evaluation.compare",
        "is a system better than another, direction by direction and tier by tier",
    ),
}


def build_parser(chosen):
    """The parser of all subcommands, with the options of the *chosen* one only."""
    parser = argparse.ArgumentParser(
        prog="lslora", description="Tools for fairseq models with language-specific LoRA."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        if name != chosen:
            subparsers.add_parser(name, help=summary)
            continue
        command = import_module(f"lslora_fairseq.{module}")
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def read(argv):
    """The options of a command line, with the function of its subcommand as ``run``."""
    module, _ = COMMANDS.get(argv[0] if argv else None, (None, None))
    if module and not {"-h", "--help"} & set(argv):
        command = import_module(f"lslora_fairseq.{module}")
        if hasattr(command, "parse"):
            args = command.parse(argv[1:])
            args.run = command.run
            return args
    return build_parser(argv[0] if argv else None).parse_args(argv)


def main(argv=None):
    """Runs a subcommand; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s", force=True
    )
    with one_line_errors():
        try:
            args = read(argv)
            status = args.run(args)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


if __name__ == "__main__":
    sys.exit(main())
