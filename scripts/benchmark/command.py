"""The command: its options, the sections that it runs, and the record that it writes."""

import argparse
import json
import os
import platform
import re
import textwrap
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmark import decoding, inventory, lifecycle, loss, memory, operations, steps
from benchmark.contenders import FROZEN
from benchmark.measuring import progress
from benchmark.report import can_draw, draw
from benchmark.shapes import DTYPES, PRESETS
from lslora_fairseq.errors import ConfigError, one_line_errors

DESCRIPTION = """\
Measures what adapters cost, as ratios: interleaved repetitions in one process, medians.

Compared are the frozen base without adapters (the limit), full fine-tuning, one LoRA for all
languages, one LoRA per language applied by a loop of boolean masks (the obvious implementation),
this package, the same with --lora-weight-learning, and PEFT on a Hugging Face model of the same
shape, with one adapter and with one per language (its mixed batch), where peft and transformers are
installed. Of the languages every third has rank 8, the others rank 2; the encoder is indexed by the
source language, the decoder by the target language.
"""
REMARKS = """
Prints tables of medians (min-max) and writes OUT/benchmark.json, with every single measurement, and
OUT/benchmark.svg. Ratios hold from run to run within a few percent, seconds do not; nothing else
should run meanwhile. Unless GLIBC_TUNABLES is set, glibc's allocator is told to keep memory for
reuse: PyTorch's large tensors otherwise cost fresh pages every time. Memory is measured
where it gives back what is free.

examples:
  python scripts/benchmark
  python scripts/benchmark --preset cpu-m2m --languages 1,12,100 --sections step,memory
  python scripts/benchmark --preset gpu --precision bf16 --sections step,memory,decode,operations
  python scripts/benchmark --sections pruning,startup,lifecycle --repetitions 3
"""
OF_THE_PRESET = {
    "step": steps.step,
    "memory": memory.memory,
    "decode": decoding.decode,
    "evaluate": decoding.evaluate,
    "optimizer": steps.optimizer,
    "operations": operations.operations,
}
SECTIONS = {
    **OF_THE_PRESET,
    "loss": loss.loss,
    "loss-step": loss.loss_step,
    "pruning": lifecycle.pruning,
    "startup": lifecycle.startup,
    "lifecycle": lifecycle.lifecycle,
    "inventory": inventory.inventory,
}
DEFAULT_SECTIONS = ",".join(OF_THE_PRESET)
PACKAGES = (
    "lslora_fairseq", "torch", "fairseq", "ve-fairseq", "numpy", "transformers", "peft",
)  # fmt: skip


def listing(heading, entries):
    """Lines of help: a name and its text each."""
    lines = [
        textwrap.fill(
            f"{name:<11} {' '.join(str(text).split())}",
            100,
            initial_indent="  ",
            subsequent_indent=" " * 14,
        )
        for name, text in entries.items()
    ]
    return "\n".join([f"{heading}:", *lines, ""])


def parse_args(argv=None):
    sections = {name: section.__doc__ for name, section in SECTIONS.items()}
    parser = argparse.ArgumentParser(
        prog="python scripts/benchmark",
        description="\n".join(
            [DESCRIPTION, listing("sections", sections), listing("presets", PRESETS) + REMARKS]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu-small", help="default: cpu-small")
    add("--precision", choices=DTYPES, default="fp32",
        help="of the preset's weights and activations (default: fp32)")  # fmt: skip
    add("--languages", default="1,4,12,30,100,200", metavar="N,N,...",
        help="numbers of languages of step, memory, decode and operations "
        "(default: 1,4,12,30,100,200)")  # fmt: skip
    add("--sections", default=DEFAULT_SECTIONS, metavar="NAME,NAME,...",
        help=f"what to measure (default: {DEFAULT_SECTIONS})")  # fmt: skip
    add("--repetitions", type=int, default=7, metavar="N", help="default: 7, after a warm-up")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    add("--loop-up-to", type=int, default=100, metavar="N",
        help="largest number of languages at which the loop runs (default: 100)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="default: benchmark_PRESET")
    return parser.parse_args(argv)


def validate(args):
    """Turns the options into values; raises ConfigError before anything is measured."""
    args.setting = replace(PRESETS[args.preset], precision=args.precision)
    if args.setting.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--preset {args.preset} needs a CUDA device and torch finds none: choose cpu-small "
            "or cpu-m2m"
        )
    try:
        args.languages = sorted({int(n) for n in args.languages.split(",")})
    except ValueError:
        args.languages = [0]
    if not 1 <= args.languages[0] <= args.languages[-1] <= 999:
        raise ConfigError("--languages: write numbers from 1 to 999, such as 1,12,100")
    args.sections = args.sections.split(",")
    for name in args.sections:
        if name not in SECTIONS:
            raise ConfigError(f"--sections: unknown section {name!r}; valid: {', '.join(SECTIONS)}")
    for option in ("repetitions", "threads"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} {getattr(args, option)} must be at least 1")
    args.out = args.out or Path(f"benchmark_{args.preset}")


def machine(args):
    """What the measurements were made on, in general terms."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = model[1] if model else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": args.threads,
        "gpu": torch.cuda.get_device_name() if args.setting.device == "cuda" else None,
        "allocator": os.environ.get("GLIBC_TUNABLES") or "default",
    }


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(args):
    """Runs the sections; each one's tables are printed and written as soon as it is done."""
    record = {
        "preset": args.preset,
        "setting": asdict(args.setting),
        "repetitions": args.repetitions,
        "machine": machine(args),
        "versions": versions(),
        "sections": {},
    }
    print("\n".join(f"{name}: {value}" for name, value in record["machine"].items() if value))
    print(", ".join(f"{name} {value}" for name, value in record["versions"].items()))
    for name in args.sections:
        result = SECTIONS[name](args)
        print("", *result.tables, *result.notes, sep="\n\n", flush=True)
        record["sections"][name] = {
            "tables": [table.as_json() for table in result.tables],
            "notes": result.notes,
            "raw": result.raw,
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (args.out / "benchmark.json").write_text(text + "\n", encoding="utf-8")
        if name == "step" and can_draw():
            draw_steps(result.tables[0], args)
    progress(f"written to {args.out}")


def draw_steps(table, args):
    draw(table, FROZEN, f"{args.setting}, {args.precision}", args.out / "benchmark.svg")


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(OSError):
        validate(args)
        args.out.mkdir(parents=True, exist_ok=True)
        if "step" in args.sections and not can_draw():
            progress("matplotlib is not installed, no figure will be drawn: pip install matplotlib")
        torch.set_num_threads(args.threads)
        measure(args)
