"""``lslora merge``: a checkpoint of fairseq's own transformer, for one direction."""

import os

EXAMPLES = """\
examples:
  lslora merge finetuned/checkpoint_last.pt --pair en-fr --out en-fr.pt
      the adapters of one direction, and what all languages share, folded into the weights
  lslora merge --base base.pt --adapters adapters other/wo.safetensors --pair 'en-*,wo-en' --out out
      of a base model and adapter files; a file for each direction, such as out/en-wo.pt
  lslora merge plain.pt --out merged.pt
      adapters that all languages share alone: one file for all directions

fairseq-generate decodes what is written without --user-dir; the line for it is printed. The file
holds plain values, which torch loads with weights_only=True, and CTranslate2 converts it.
"""


def add_arguments(parser):
    add_sources(parser)
    add = parser.add_argument
    add("--pair", metavar="PAIR", help="the direction; several with commas, or patterns: 'en-*'")
    add(
        "--out", metavar="FILE|DIR", required=True,
        help="the file to write; a new folder where --pair is more than one direction",
    )  # fmt: skip


def add_sources(parser):
    """The options that name a model with adapters."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="that fairseq-train wrote")
    add("--base", metavar="BASE", help="instead of it: checkpoint of the stock base model")
    add(
        "--adapters", metavar="DIR|FILE", nargs="+",
        help="with --base: files that lslora extract wrote, and folders of them",
    )  # fmt: skip


def run(args):
    """Writes the checkpoints and prints how to decode with them; returns the exit status."""
    # not for --help: torch takes seconds
    from lslora_fairseq.adapters.merging import Merging
    from lslora_fairseq.errors import ConfigError

    made = Merging(trained_of(args))
    path = made.trained.path
    if made.directions is None and args.pair is not None:
        raise ConfigError(
            f"the adapters of {path} belong to all languages alike, and one file serves every "
            "direction: leave out --pair"
        )
    if made.directions is not None and args.pair is None:
        raise ConfigError(
            f"{path} has adapters of languages, of which a merged model has those of one "
            "direction: give --pair, such as --pair " + made.directions[0]
        )
    if args.pair is None or args.pair in made.directions:
        _write_file(made, args.out, args.pair)
    else:
        _write_folder(made, args.out, args.pair)
    return 0


def trained_of(args):
    """The model with adapters that the options of :func:`add_sources` name."""
    from lslora_fairseq import checkpoints
    from lslora_fairseq.adapters.assembly import assembled
    from lslora_fairseq.analysis import trained
    from lslora_fairseq.errors import ConfigError

    if bool(args.checkpoint) == bool(args.base) or bool(args.base) != bool(args.adapters):
        raise ConfigError(
            "name a checkpoint with adapters, or instead of it a base model with --base and "
            "adapter files with --adapters"
        )
    if args.checkpoint:
        return trained.read(args.checkpoint)
    _, content, changed = assembled(args.base, args.adapters)
    options = {**checkpoints.options_of(content), **changed}
    return trained.of(args.base, options, content["model"])


def _write_file(made, path, pair):
    from lslora_fairseq import checkpoints
    from lslora_fairseq.errors import ConfigError

    if os.path.lexists(path):
        raise ConfigError(f"--out {path} is there already: name a file that is not")
    checkpoints.write_checkpoint(path, made.checkpoint(pair))
    print(made.command(path, pair))


def _write_folder(made, path, spec):
    from lslora_fairseq import checkpoints
    from lslora_fairseq.adapters import folder
    from lslora_fairseq.evaluation import pairs

    chosen = pairs.chosen(spec, made.directions, "--pair", made.trained.path)
    with folder.new(path) as beside:
        for pair in chosen:
            checkpoints.write_checkpoint(os.path.join(beside, f"{pair}.pt"), made.checkpoint(pair))
    for pair in chosen:
        print(made.command(os.path.join(path, f"{pair}.pt"), pair))
