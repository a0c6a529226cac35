"""Runs the real console commands on the test corpus, each in a process of its own.

By default the process is a fork of one that has imported torch and fairseq before (forkserver.py):
arguments, environment, files, exit status, signals and state are those of any process, and five of
six seconds are saved. How to choose:

- ``run(...)``, ``lslora(...)``: what a command does, prints, writes or refuses. Nearly every test.
- ``run(..., fresh=True)``: where starting anew is part of what is tested: imports and their errors,
  what is printed during them, variables that act on them or on the interpreter, other modules on
  the path (``lslora(first_on_path=...)`` is fresh by itself), workers that are spawned, and, once
  in a test of equal bits, another order of hashes: forks share theirs.
- ``start(...)``: a command that is watched or killed.
- ``folder_of_commands()``: shell scripts that call console commands by name.

A test that needs what a training run wrote and only reads it takes a module's fixture, or
conftest.py's, before it trains a model of its own.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

import forkserver

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


def run(command, *args, check=True, stdin=None, fresh=False, **env):
    """Runs a console command of this environment; returns (exit status, stdout, stderr).

    Args:
        command: the name of a console script, or the path of any program
        check: whether an exit status other than 0 fails the test
        stdin: text
        fresh: start Python anew; see above
        env: environment variables
    """
    with TemporaryFile("w+") as told, TemporaryFile("w+") as said, TemporaryFile("w+") as errors:
        told.write(stdin or "")
        told.seek(0)
        process = start(command, *args, files=(told, said, errors), fresh=fresh, **env)
        try:
            status = process.wait(300)
        except (TimeoutError, subprocess.TimeoutExpired):
            os.kill(process.pid, signal.SIGKILL)
            raise
        said.seek(0)
        errors.seek(0)
        out, err = said.read(), errors.read()
    if check:
        assert status == 0, f"{command} failed:\n{out[-3000:]}\n{err[-3000:]}"
    return status, out, err


def start(command, *args, files, fresh=False, **env):
    """Starts a command as :func:`run` does, with *files* for stdin, stdout and stderr.

    Returns:
        an object with ``pid`` and ``wait(timeout)``, as subprocess.Popen has
    """
    argv = [str(Path(sys.executable).parent / command), *map(str, args)]
    acts_at_start = {"PYTHONHASHSEED", "OMP_NUM_THREADS"} & env.keys()
    assert fresh or not acts_at_start, f"{acts_at_start} needs fresh=True"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    is_python = command == sys.executable or os.sep not in command  # console scripts are
    if fresh or not is_python or not forkserver.AVAILABLE:
        stdin, stdout, stderr = files
        return subprocess.Popen(argv, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
    argv = argv[1:] if command == sys.executable else argv
    numbers = [file.fileno() for file in files]
    return forkserver.Process(forkserver.folder(), argv, env, numbers)


def folder_of_commands():
    """The folder for PATH with which a shell script runs console commands as :func:`run` does."""
    return forkserver.shims() if forkserver.AVAILABLE else Path(sys.executable).parent


def lslora(*args, first_on_path=(), **kwargs):
    """Runs the command ``lslora`` of this tree, whether or not it is installed; as :func:`run`.

    Args:
        first_on_path: folders with modules that stand in for those of other packages
    """
    path = os.pathsep.join([*first_on_path, str(ROOT)])
    kwargs = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **kwargs}
    kwargs["fresh"] = kwargs.get("fresh", False) or bool(first_on_path)  # imported already
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


def adapters_in(model, embeddings=False):
    """The adapters in a state dict of the models above, whose A and B are equally wide but for
    that of the embeddings, which is left out unless asked for.

    Returns:
        dict of (layer, language) -> (A, B, mask of A, mask of B), each (rank, columns)
    """
    found = {}
    for key, pruned in model.items():
        layer, _, name = key.rpartition(".")
        if name != "pruned" or (layer == "embedding_adapters" and not embeddings):
            continue
        mask = pruned == 0
        weights = {k: v for k, v in model.items() if k.startswith(f"{layer}.lora_")}
        masks = mask.split([w.size(0) for w in weights.values()])
        for (key, weight), rows in zip(weights.items(), masks):
            code = key.rpartition(".lora_")[2]
            width_A = weight.size(1) // 2
            if layer == "embedding_adapters":
                width_A = model["encoder.embed_tokens.weight"].size(1)
            parts = (w.tensor_split([width_A], 1) for w in (weight, rows))
            found[layer, code] = tuple(part for pair in parts for part in pair)
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


def assert_alike(ours, theirs):
    """Lines of hypotheses that fairseq prints: the same texts, with scores that are the same but
    for rounding."""
    ours, theirs = ([line.split("\t") for line in lines] for lines in (ours, theirs))
    assert [(i, text) for i, _, text in ours] == [(i, text) for i, _, text in theirs]
    for (_, mine, _), (_, other, _) in zip(ours, theirs):
        assert abs(float(mine) - float(other)) < 1e-5
