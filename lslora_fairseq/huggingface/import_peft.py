"""``lslora import-peft``: files of languages' adapters from folders of PEFT."""

EXAMPLES = """\
examples:
  lslora import-peft en-source=hub/a fr-target=hub/b --base base.pt --dict dict.txt --out adapters
      adapters of languages by side, as lslora export-peft writes them
  lslora import-peft en-fr=hub/c --base base.pt --dict dict.txt --out adapters \\
      --encoder-index-side source
      an adapter of a direction: en gets what is in layers that the source language indexes, and
      fr the rest
  lslora import-peft peft/* --base base.pt --dict dict.txt --out adapters
      names are those of the folders

The adapters have to be plain LoRA of attention and feed-forward linears on the same base model,
which lslora import-hf makes of a folder of Hugging Face. --lora-adapters loads what is written.
"""


def add_arguments(parser):
    add = parser.add_argument
    add("folders", metavar="NAME=FOLDER", nargs="+", help="en-source, fr-target, en-fr or shared")
    add("--base", metavar="BASE", required=True, help="checkpoint of the stock base model")
    add("--dict", metavar="FILE", required=True, help="the dictionary file of the base model")
    add("--out", metavar="DIR", required=True, help="a new folder")
    add("--encoder-index-side", metavar="SIDES", help="as for fairseq-train, and its default")
    add("--decoder-index-side", metavar="SIDES", help="as for fairseq-train, and its default")
    add("--lora-tiers", metavar="TIERS", help="such as 'high=en;low=oc' (default: one for all)")
    add("--licence", metavar="ID", help="such as CC-BY-4.0, for the model card")


def run(args):
    """Writes the files and tells what is in them; returns the exit status."""
    # not for --help: torch takes seconds
    from lslora_fairseq.adapters import folder, inspect
    from lslora_fairseq.huggingface import peft_importing

    folders = [peft_importing.read(text) for text in args.folders]
    made = peft_importing.Importing(args.base, args.dict, folders, vars(args)).trained()
    print(inspect.table(folder.write(args.out, made, None, "fp32", args.licence)))
    return 0
