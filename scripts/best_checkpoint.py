#!/usr/bin/env python3
"""Chooses, of several trainings, the checkpoint with the lowest loss on the validation set.

FOLDERs are those that fairseq-train saved to; the checkpoint_best.pt of each competes. The best one
is copied to OUT/checkpoint_best.pt, and OUT/choice.txt says by which numbers it was chosen.
"""

import argparse
import shutil
from pathlib import Path

import torch

import lslora_fairseq  # noqa: F401  lets torch.load read fairseq's checkpoints

NAME = "checkpoint_best.pt"


def read(path):
    """(loss on the validation set, learning rate, epoch) of a checkpoint."""
    state = torch.load(str(path), map_location="cpu", mmap=True)
    extra = state["extra_state"]
    lr = state["cfg"]["optimization"]["lr"][0]
    # the iterator is that of the next epoch
    return extra["val_loss"], lr, extra["train_iterator"]["epoch"] - 1


def told(facts):
    """The sentence of choice.txt.

    Args:
        facts: what :func:`read` returns of each checkpoint
    """
    (loss, lr, epoch), *others = sorted(facts)
    others = ", ".join(f"{loss:.3f} with {lr:g}" for loss, lr, _ in others)
    return (
        f"full: learning rate {lr:g}, after epoch {epoch}, chosen on the validation set: "
        f"loss {loss:.3f}" + (f" ({others})" if others else "")
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    found = {folder / NAME: read(folder / NAME) for folder in args.folders}
    shutil.copy(min(found, key=found.get), args.out / NAME)
    text = told(found.values())
    (args.out / "choice.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
