"""``lslora doctor``: what would go wrong in a run, told before it starts.

This file and ``versions.py`` work where fairseq cannot be imported; the rest is imported only
once it can, and not for ``--help``.
"""

import argparse

import lslora_fairseq
from lslora_fairseq.config import LSLoConfig
from lslora_fairseq.doctor import versions
from lslora_fairseq.doctor.report import ERROR, Report

EXAMPLES = """\
examples:
  lslora doctor
      the versions alone
  lslora doctor --checkpoint model.pt --data data
      also the dictionary, languages and <unk> of prepared data against a base model
  lslora doctor --checkpoint model.pt --data data --langs de,en,fr \\
      --arch lslora_m2m_124_615m --lora-tiers 'high=de,en;low=fr' --lora-rank 'high=2,low=8' \\
      --criterion lslora_label_smoothed_cross_entropy --max-tokens 4000 --amp \\
      --save-dir runs/first
      also the options of a run, and its memory and disk space

Exit status: 0 without an error line, 1 with one; warnings do not count.
"""


def add_arguments(parser):
    """The options of the command; those of the adapters are fairseq-train's own."""
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="(default: table)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", metavar="FILE", help="a base model, or a run's checkpoint")
    files.add_argument(
        "--data", metavar="FOLDER", help="what fairseq-preprocess wrote; a:b for shards"
    )
    files.add_argument(
        "--dict", "--fixed-dictionary", metavar="FILE", help="the run's --fixed-dictionary, if any"
    )
    files.add_argument("--save-dir", metavar="FOLDER", help="where the run will save")
    run = parser.add_argument_group("languages, model, loss and precision, as for fairseq-train")
    run.add_argument(
        "--langs",
        type=_codes,
        metavar="CODES",
        help="comma-separated, in order (default: those of --lang-dict; else of --lang-pairs, "
        "sorted; else the checkpoint's; else those of the data, sorted)",
    )
    run.add_argument("--lang-dict", metavar="FILE", help="the languages, one a line, in order")
    run.add_argument(
        "--lang-pairs",
        metavar="PAIRS",
        help="directions to train, such as de-en,en-de, or a file of them (default: all of the "
        "data)",
    )
    run.add_argument("--lang-tok-style", choices=("multilingual", "mbart"))
    run.add_argument("--arch", metavar="NAME", help="(default: sizes of the checkpoint)")
    run.add_argument("--criterion", metavar="NAME", help="for the estimate of memory")
    run.add_argument("--max-tokens", type=_positive, metavar="N")
    run.add_argument("--checkpoint-activations", action="store_true")
    run.add_argument("--cpu", action="store_true", help="the run will not use a GPU")
    precision = run.add_mutually_exclusive_group()
    for name in ("amp", "fp16", "memory-efficient-fp16"):
        precision.add_argument(
            f"--{name}",
            dest="precision",
            action="store_const",
            const=name,
            help="precision (default: fp32)",
        )
    precision.add_argument(
        "--lora-base-dtype",
        dest="precision",
        type=_base_dtype,
        metavar="DTYPE",
        help="the frozen base alone in fp32, bf16 or fp16",
    )
    parser.set_defaults(precision="fp32")
    group = parser.add_argument_group("adapters, as for fairseq-train")
    LSLoConfig.add_options(group, defaults=False)


def _codes(text):
    return [code.strip() for code in text.split(",") if code.strip()]


def _base_dtype(text):
    """The name of the precision in which the base alone has this dtype."""
    if text not in ("fp32", "bf16", "fp16"):
        raise argparse.ArgumentTypeError(f"{text} must be fp32, bf16 or fp16")
    return text if text == "fp32" else f"{text} base"


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def run(args):
    """Prints the report; returns the exit status."""
    installed = versions.installed()
    report = Report(versions.check(installed))
    if installed.import_error is None:
        lslora_fairseq.register()
        from lslora_fairseq.doctor.checks import run_checks
        from lslora_fairseq.doctor.inputs import Inputs

        run_checks(Inputs(args), report)
    else:
        report.not_checked["everything else"] = "a fairseq that can be imported"
    print(report.table() if args.format == "table" else report.json())
    return 1 if report.count(ERROR) else 0
