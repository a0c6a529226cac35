"""``lslora export-peft``: folders of PEFT adapters from a checkpoint with adapters."""

EXAMPLES = """\
examples:
  lslora export-peft finetuned/checkpoint_last.pt --out peft
      each language twice, peft/en-source and peft/en-target, and peft/shared if they share
      adapters: en-source, fr-target and shared, active together, translate from en to fr
  lslora export-peft finetuned/checkpoint_last.pt --pair 'en-fr,oc-*' --out peft
      peft/en-fr and so on, each with all adapters of a direction
  lslora export-peft --base base.pt --adapters adapters --out peft
      of adapter files that lslora extract wrote

PEFT loads them onto the model that lslora export-hf --without-adapters writes, or onto the folder
that lslora import-hf made the base model from.
"""


def add_arguments(parser):
    from lslora_fairseq.adapters.merge import add_sources

    add_sources(parser)
    add = parser.add_argument
    add("--pair", metavar="PAIRS", help="directions with commas, or patterns: 'en-*'")
    add("--base-name", metavar="NAME", help="of the base model on a model hub, for the cards")
    add("--out", metavar="DIR", required=True, help="a new folder")


def run(args):
    """Writes the folders and tells what is in them; returns the exit status."""
    # not for --help: torch takes seconds
    from lslora_fairseq.adapters.merge import trained_of
    from lslora_fairseq.adapters.merging import Merging
    from lslora_fairseq.errors import ConfigError
    from lslora_fairseq.evaluation import pairs
    from lslora_fairseq.huggingface import peft_exporting

    made = Merging(trained_of(args))
    chosen = None
    if args.pair is not None:
        if made.directions is None:
            raise ConfigError(
                f"the adapters of {made.trained.path} belong to all languages alike: leave out "
                "--pair"
            )
        chosen = pairs.chosen(args.pair, made.directions, "--pair", made.trained.path)
    found = peft_exporting.write(args.out, made, chosen, args.base_name)
    for name, (modules, entries) in found.items():
        print(f"{args.out}/{name:<24}{modules:>5} modules{entries:>14,} entries")
    return 0
