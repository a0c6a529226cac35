"""``lslora extract``: a file for each language's adapters, out of a checkpoint."""

import os

EXAMPLES = """\
examples:
  lslora extract finetuned/checkpoint_last.pt --out adapters
      one file for each language, one for what they share, and a model card
  lslora extract finetuned/checkpoint_last.pt --out adapters_wo --langs wo --dtype fp16
      one language, in half the size; values are rounded
  lslora extract finetuned/checkpoint_last.pt --out adapters --scores results --licence MIT
      the card also has the tables of lslora evaluate, and a licence

A pruned factor is kept as the values that survive and a bit for each of its entries. In fp32 all
values and masks of a checkpoint come back as they were, but for what can have no effect: the rows
of A of which all of B is pruned come back as zeros.
"""


def add_arguments(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="that fairseq-train wrote")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    parser.add_argument("--langs", metavar="wo,sd", help="some languages (default: all)")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: fp32)"
    )
    parser.add_argument(
        "--scores", metavar="DIR", help="what lslora evaluate wrote, for the model card"
    )
    parser.add_argument("--licence", metavar="ID", help="such as CC-BY-4.0, for the model card")


def run(args):
    """Writes the folder and tells what is in it; returns the exit status."""
    # not for --help: torch takes seconds
    from lslora_fairseq.adapters import folder, inspect
    from lslora_fairseq.analysis import trained
    from lslora_fairseq.evaluation import reports, saved

    scores = None
    if args.scores:
        results = args.scores
        if os.path.basename(results) == saved.FILE:
            results = os.path.dirname(results) or "."
        scores = reports.render(saved.load(results), "table")
    checkpoint = trained.read(args.checkpoint)
    found = folder.write(args.out, checkpoint, args.langs, args.dtype, args.licence, scores)
    print(inspect.table(found))
    return 0
