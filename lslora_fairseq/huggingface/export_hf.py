"""``lslora export-hf``: a folder of Hugging Face transformers from a model of fairseq."""

EXAMPLES = """\
examples:
  lslora export-hf finetuned/checkpoint_last.pt --pair en-fr --out en-fr \\
      --dict data/dict.en.txt --spm sentencepiece.bpe.model
      the adapters of one direction, and what all languages share, folded into the weights
  lslora export-hf base.pt --out base --dict dict.txt --spm sentencepiece.bpe.model
      a base model
  lslora export-hf finetuned/checkpoint_last.pt --without-adapters --out base \\
      --dict data/dict.en.txt --spm sentencepiece.bpe.model
      the model that the adapters of lslora export-peft are loaded onto

transformers loads the folder as M2M100ForConditionalGeneration, with a tokenizer that numbers the
languages as the model does. Models that have no such twin are refused, with all reasons.
"""


def add_arguments(parser):
    from lslora_fairseq.adapters.merge import add_sources

    add_sources(parser)
    add = parser.add_argument
    add("--pair", metavar="PAIR", help="the direction, such as en-fr")
    add("--without-adapters", action="store_true", help="the model that the adapters belong to")
    add("--dict", metavar="FILE", required=True, help="the dictionary file of the model")
    add("--spm", metavar="FILE", required=True, help="the SentencePiece model of its data")
    add("--out", metavar="DIR", required=True, help="a new folder")


def run(args):
    """Writes the folder; returns the exit status."""
    # not for --help: torch takes seconds
    import logging

    from lslora_fairseq.errors import ConfigError
    from lslora_fairseq.huggingface import exporting

    made = exporting.base(args.checkpoint) if args.checkpoint and not args.base else None
    if made is None:
        made = _adapted(args)
    elif args.pair or args.without_adapters:
        raise ConfigError(
            f"{args.checkpoint} has no adapters: leave out --pair and --without-adapters"
        )
    warning = exporting.write(args.out, made, args.dict, args.spm)
    if warning:
        logging.getLogger(__name__).warning("%s", warning)
    print(f"{args.out}: {len(made.identity.langs or ())} languages")
    return 0


def _adapted(args):
    """A model with adapters, which are folded in or left out."""
    from lslora_fairseq.adapters.merge import trained_of
    from lslora_fairseq.adapters.merging import Merging
    from lslora_fairseq.errors import ConfigError
    from lslora_fairseq.huggingface.exporting import Model

    made = Merging(trained_of(args))
    trained, identity = made.trained, made.identity
    if args.without_adapters and args.pair is None:
        return Model(trained.path, trained.options, identity, made.base_weights())
    if made.directions is None and args.pair is None and not args.without_adapters:
        return Model(trained.path, trained.options, identity, made.weights(None))
    if args.without_adapters or made.directions is None or args.pair not in made.directions:
        some = f"--pair, such as {made.directions[0]}, or " if made.directions else ""
        raise ConfigError(
            f"{trained.path} has adapters"
            + (" of languages" if made.directions else " that all languages share alone")
            + f": give {some}--without-adapters"
            + ("" if made.directions else ", or neither it nor --pair to fold them in")
        )
    pair = tuple(args.pair.split("-"))
    identity = made.identity_of(args.pair)
    return Model(trained.path, trained.options, identity, made.weights(args.pair), pair)
