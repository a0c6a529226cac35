#!/usr/bin/env python3
"""Tries choices of settings, one at a time, on the corpus few: what is each worth?

Each is trained once, for two epochs, and judged by the loss on the validation set. OUT
gets choices.md, and choices.json with all losses. WORK is the folder in which run.sh has prepared
the corpora and the base. What was trained before is not trained again.
"""

import argparse
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import finetune
from evidence import Evidence
from report import table
from systems import PAPER, PRUNED, SYSTEMS, TRIED_ON, adapters

from lslora_fairseq.cores import cores
from lslora_fairseq.errors import one_line_errors

LENGTH = ("--max-epoch", "2")
OUT_PROJ = (
    "--encoder-target-modules self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,"
    "self_attn.out_proj,fc1,fc2 "
    "--decoder-target-modules self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,"
    "self_attn.out_proj,encoder_attn.q_proj,encoder_attn.k_proj,encoder_attn.v_proj,"
    "encoder_attn.out_proj,fc1,fc2"
)
FFN = "--encoder-target-modules fc1,fc2 --decoder-target-modules fc1,fc2"
# name -> options of the adapters and learning rate
CHOICES = {
    "rank 8, as the paper has adapters": (f"--lora-rank 8 {PAPER}", 4e-3),
    "ranks 2;2;8, as the paper": (f"--lora-rank high=2,medium=2,low=8 {PAPER}", 8e-3),
    "rank 32, as the paper has adapters": (f"--lora-rank 32 {PAPER}", 4e-3),
    "rank 4, shared 16, no embeddings": ("--lora-embedding-rank 0", 4e-3),
    "rank 8, nothing shared, embeddings 48": ("--lora-rank 8 --lora-shared-rank 0", 4e-3),
    "shared 48, embeddings 48, nothing of languages": ("--lora-rank 0 --lora-shared-rank 48", 4e-3),
    "defaults: rank 4, shared 16, embeddings 48": ("", 4e-3),
    "defaults, learning rate 2e-3": ("", 2e-3),
    "defaults, learning rate 8e-3": ("", 8e-3),
    "rank 2": ("--lora-rank 2", 4e-3),
    "rank 8": ("--lora-rank 8", 4e-3),
    "rank 16": ("--lora-rank 16", 4e-3),
    "rank 4, English 16": ("--lora-rank high=4,medium=4,low=4,en=16", 4e-3),
    "shared 32": ("--lora-shared-rank 32", 4e-3),
    "embeddings 16": ("--lora-embedding-rank 16", 4e-3),
    "embeddings 96": ("--lora-embedding-rank 96", 4e-3),
    # B's steps four times as large as A's: with Adam the same as LoRA+ or another size of A
    "alpha = 4 rank, learning rate 2e-3": ("--lora-alpha 16 --lora-shared-alpha 64", 2e-3),
    "out_proj too": (OUT_PROJ, 4e-3),
    "rank 8, shared 32, in fc1 and fc2 alone": (
        f"--lora-rank 8 --lora-shared-rank 32 {FFN}",
        4e-3,
    ),
    "dropout 0.1": ("--dropout 0.1", 4e-3),
    "weight decay 0.01": ("--weight-decay 0.01", 4e-3),
    "0.9 of B pruned": (PRUNED, 4e-3),
}


def systems():
    """name -> :class:`~systems.System` of a single learning rate."""
    full = SYSTEMS["full"]
    found = {
        f"full fine-tuning, learning rate {rate:g}": replace(full, rates=(rate,))
        for rate in full.rates
    }
    found["full fine-tuning, learning rate 0.001, dropout 0.1"] = replace(
        full, options=("--dropout", "0.1"), rates=(1e-3,)
    )
    for name, (options, rate) in CHOICES.items():
        found[name] = adapters(options, rate)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="the folder that run.sh has prepared")
    add("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    evidence = Evidence(args.work, "base", [1])

    def tried(item):
        name, system = item
        (rate,) = system.rates
        place = f"choices/{re.sub('[^a-z0-9.-]+', '_', name.lower())}"
        losses = evidence.train(place, TRIED_ON, system, rate, 1, LENGTH)
        run = finetune.facts(evidence.jobs.log(evidence.run(place, rate, 1)))
        return {"name": name, "rate": rate, "options": system.options, "losses": losses, **run}

    with one_line_errors(), ThreadPoolExecutor(cores()) as pool:
        found = list(pool.map(tried, systems().items()))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "choices.json").write_text(json.dumps(found, indent=1) + os.linesep)
    rows = [
        [each["name"], f"{each['rate']:g}", f"{each['trained']:,}",
         " ".join(f"{loss:.3f}" for _, loss in each["losses"])]
        for each in found
    ]  # fmt: skip
    header = ["choice", "learning rate", "trained", "validation loss by epoch"]
    text = table(header, rows) + "\n"
    (args.out / "choices.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
