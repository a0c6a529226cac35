"""Runs the real console commands on the test corpus."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USER_DIR = ROOT / "lslora_fairseq"
LANGS = "de,en,fr,ja"
PAIRS = "en-de,de-en,en-fr,fr-en,en-ja,ja-en"
TIERS = "high=en,de;low=fr,ja"
SIZES = (
    "--encoder-layers 3 --decoder-layers 2 --encoder-embed-dim 32 --decoder-embed-dim 32 "
    "--encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --share-all-embeddings --encoder-normalize-before "
    "--decoder-normalize-before"
).split()
LANGTOKS = ["--encoder-langtok", "src", "--decoder-langtok"]


def run(command, *args, check=True, stdin=None, **env):
    """Runs a console command of this environment; returns (exit status, stdout, stderr).

    Extra keywords are environment variables.
    """
    path = Path(sys.executable).parent / command
    done = subprocess.run(
        [str(path), *map(str, args)],
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=300,
    )
    if check:
        assert done.returncode == 0, (
            f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.returncode, done.stdout, done.stderr


def lslora(*args, **kwargs):
    """Runs the command ``lslora`` of this tree, whether or not it is installed; as :func:`run`."""
    path = os.pathsep.join([*kwargs.pop("first_on_path", []), str(ROOT)])
    kwargs = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **kwargs}
    return run(sys.executable, "-m", "lslora", *args, **kwargs)


def train_args(corpus, save_dir, *more, task="translation_multi_lslora", langs=LANGS):
    """Arguments of fairseq-train that all training runs on the test corpus share."""
    return [
        corpus.data, "--user-dir", USER_DIR, "--cpu", "--task", task, "--langs", langs,
        "--lang-pairs", PAIRS, *LANGTOKS, "--sampling-method", "temperature",
        "--sampling-temperature", "5", "--criterion", "label_smoothed_cross_entropy",
        "--label-smoothing", "0.1", "--max-tokens", "600", "--num-workers", "0", "--lr", "0.003",
        "--adam-betas", "(0.9, 0.98)", "--save-dir", save_dir, "--no-epoch-checkpoints",
        "--log-format", "simple", "--log-interval", "5", "--seed", "7", *SIZES, *more,
    ]  # fmt: skip


def finetune_args(corpus, save_dir, *more, **kwargs):
    """Arguments of fairseq-train that fine-tune the base model with adapters."""
    return train_args(
        corpus, save_dir, "--arch", "lslora_transformer", "--finetune-from-model", corpus.base,
        "--optimizer", "pruned_adam", "--lora-tiers", TIERS, "--lora-rank", "high=2,low=4",
        "--pruning-begin", "1", "--pruning-duration", "2", "--max-epoch", "3", *more, **kwargs,
    )  # fmt: skip


def generate_args(corpus, checkpoint, source, target, *more):
    return [
        corpus.data, "--user-dir", USER_DIR, "--cpu", "--task", "translation_multi_lslora",
        "--path", checkpoint, "-s", source, "-t", target, "--gen-subset", "test", "--beam", "3",
        "--num-workers", "0", "--max-len-b", "30", *more,
    ]  # fmt: skip


def adapters_in(model):
    """The adapters in a state dict of the models above, whose A and B are equally wide.

    Returns:
        dict of (layer, language) -> (A, B, mask of A, mask of B), each (rank, columns)
    """
    found = {}
    for key, pruned in model.items():
        layer, _, name = key.rpartition(".")
        if name != "pruned":
            continue
        mask = pruned == 0
        weights = {k: v for k, v in model.items() if k.startswith(f"{layer}.lora_")}
        masks = mask.split([w.size(0) for w in weights.values()])
        for (key, weight), rows in zip(weights.items(), masks):
            code = key.rpartition(".lora_")[2]
            found[layer, code] = (*weight.chunk(2, 1), *rows.chunk(2, 1))
    return found


def with_option(args, option, value):
    """A copy of *args* with the value of one option replaced."""
    args = list(args)
    args[args.index(option) + 1] = value
    return args


def without(args, option, values=1):
    """A copy of *args* without one option and its values."""
    place = args.index(option)
    return args[:place] + args[place + 1 + values :]
