#!/usr/bin/env python3
"""Measures what adapters cost, as ratios: interleaved repetitions in one process, medians.

Compared are the frozen base without adapters (the limit), full fine-tuning, one LoRA for all
languages, one LoRA per language applied by a loop of boolean masks (the obvious implementation),
this package, the same with --lora-weight-learning, and PEFT on a Hugging Face model of the same
shape where peft and transformers are installed. Of the languages every third has rank 8, the others
rank 2; the encoder is indexed by the source language, the decoder by the target language.

sections:
  step       training step: forward and backward, clipping and optimizer
  memory     peak memory of training steps, each kind in a process of its own
  decode     beam search of one direction and of mixed directions
  evaluate   batches of several directions as lslora evaluate makes them, against merging one
  optimizer  12 languages against 200 of which 12 are in the batch
  loss       projection, loss and their backward pass over the words of M2M-124, against fairseq's
             criterion (needs about 8 GB of memory)
  loss-step  peak memory of training steps in the shape of M2M-124 615M (needs about 20 GB)
  pruning    one pruning in the shape of M2M-124 615M (needs about 3 GB of memory)
  startup    fairseq-train up to its first update on a base of that size, against fairseq alone
             (needs about 6 GB of memory and writes 3 GB to the folder for temporary files)
  lifecycle  a base of that size through load, update, save, resume, pruning, merge and decoding
             (needs about 10 GB of memory and writes 11 GB)

presets:
  cpu-small  d 512, feed-forward 2048, 6 + 6 layers, 8 heads, 16,000 words
  cpu-m2m    d 1024, feed-forward 4096, 3 + 3 layers, 16 heads, 16,000 words
  gpu        d 1024, feed-forward 4096, 12 + 12 layers, 16 heads, 256,000 words; fp32 on CUDA

Prints tables of medians (min-max) and writes OUT/benchmark.json, with every single measurement, and
OUT/benchmark.svg. Ratios hold from run to run within a few percent, seconds do not; nothing else
should run meanwhile. Unless GLIBC_TUNABLES is set, glibc's allocator is told to keep memory for
reuse: PyTorch's large tensors otherwise cost fresh pages every time.

examples:
  python scripts/benchmark.py
  python scripts/benchmark.py --preset cpu-m2m --languages 1,12,100 --sections step,memory
  python scripts/benchmark.py --sections pruning,startup,lifecycle --repetitions 3
"""

import argparse
import json
import logging
import os
import platform
import re
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import benchmark_615m
import benchmark_loss
import benchmark_sections
import torch
from benchmark_models import PRESETS
from benchmark_report import can_draw, draw
from benchmark_sections import progress

from lslora_fairseq.errors import ConfigError, one_line_errors

SECTIONS = {
    **benchmark_sections.SECTIONS,
    **benchmark_loss.SECTIONS,
    **benchmark_615m.SECTIONS,
}
DEFAULT_SECTIONS = ",".join(benchmark_sections.SECTIONS)
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
PACKAGES = (
    "lslora_fairseq", "torch", "fairseq", "ve-fairseq", "numpy", "transformers", "peft",
)  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu-small", help="default: cpu-small")
    add("--languages", default="1,4,12,30,100,200", metavar="N,N,...",
        help="numbers of languages of step and memory (default: 1,4,12,30,100,200)")  # fmt: skip
    add("--sections", default=DEFAULT_SECTIONS, metavar="NAME,NAME,...",
        help=f"what to measure (default: {DEFAULT_SECTIONS})")  # fmt: skip
    add("--repetitions", type=int, default=7, metavar="N", help="default: 7, after a warm-up")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    add("--loop-up-to", type=int, default=100, metavar="N",
        help="largest number of languages at which the loop is timed (default: 100)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="default: benchmark_PRESET")
    return parser.parse_args(argv)


def validate(args):
    """Turns the options into values; raises ConfigError before anything is measured."""
    args.setting = PRESETS[args.preset]
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
    setting = args.setting
    subtitle = (
        f"{setting.layers} + {setting.layers} layers, d = {setting.dim}, {setting.words:,} words, "
        f"{setting.sentences} sentences, {setting.device}"
    )
    draw(table, "frozen base", subtitle, args.out / "benchmark.svg")


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(OSError):
        validate(args)
        args.out.mkdir(parents=True, exist_ok=True)
        if "step" in args.sections and not can_draw():
            progress("matplotlib is not installed, no figure will be drawn: pip install matplotlib")
        torch.set_num_threads(args.threads)
        measure(args)


def restart_with_allocator():
    """glibc reads the setting of its allocator when a process starts."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    restart_with_allocator()
    logging.disable(logging.INFO)  # fairseq and the models would tell of every adapter
    main()
