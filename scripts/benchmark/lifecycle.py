"""The sections that need a model of the size of M2M-124 615M: pruning, startup, a whole life."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from fairseq.models.transformer import TransformerModel

from benchmark import shapes
from benchmark.contenders import OURS, Ours
from benchmark.measuring import in_own_process, interleaved, progress, seconds
from benchmark.memory import MEGABYTE
from benchmark.report import Result, Spread, Table, ratios
from benchmark.shapes import LANGUAGES
from lslora_fairseq.errors import ConfigError

USER_DIR = Path(__file__).resolve().parents[2] / "lslora_fairseq"


def pruning(options):
    """One pruning in the shape of M2M-124 615M (needs about 3 GB of memory)."""
    setting = replace(shapes.M2M_615M, words=100)
    contender = Ours(setting, LANGUAGES)
    contender.add_noise()
    # a share that rises in every repetition
    contender.start_optimizer(pruning_begin=0, pruning_duration=options.repetitions + 1)
    epoch = 0

    def prune():
        nonlocal epoch
        epoch += 1
        start = seconds(setting.device)
        contender.optimizer.prune_at(epoch, 0)
        return seconds(setting.device) - start

    found = interleaved("pruning", {"prune": prune}, options.repetitions)["prune"]
    entries = sum(p.numel() for p in contender.trainable())
    title = f"Pruning of {LANGUAGES} languages' adapters in the shape of M2M-124 615M"
    rows = {f"{entries:,} entries": [Spread.of(found)]}
    return Result([Table(title, ["seconds"], rows)], {"times": found})


@contextmanager
def base_model(name, copies):
    """A temporary folder with a base model of that shape, base.pt, and a small data set for it.

    Args:
        name: of the section, for messages
        copies: how many checkpoints of that size will lie in the folder at once

    Raises:
        ConfigError: the disk has no room for them.
    """
    setting = shapes.M2M_615M
    needed = 5 * setting.base_parameters * copies  # fairseq 0.12.2 saves some weights twice
    with tempfile.TemporaryDirectory() as folder:
        available = shutil.disk_usage(folder).free
        if available < needed:
            raise ConfigError(
                f"--sections {name} writes {needed / 1e9:.1f} GB to {tempfile.gettempdir()}, "
                f"which has {available / 1e9:.1f}: free some, or set TMPDIR to another folder"
            )
        progress(f"{name}: writing a base model")
        in_own_process(write_base, setting, folder)
        yield Path(folder)


def our_options(languages=LANGUAGES):
    """The options of this package."""
    return [
        "--user-dir", USER_DIR, "--arch", "lslora_transformer", "--optimizer", "pruned_adam",
        "--task", "translation_multi_lslora", *as_arguments(shapes.adapter_options(languages)),
    ]  # fmt: skip


def startup(options):
    """fairseq-train up to its first update on a base of that size, against fairseq alone (needs
    about 6 GB of memory and writes 3 GB to the folder for temporary files)."""
    setting = shapes.M2M_615M
    with base_model("startup", copies=1) as folder:
        stop = ["--stop-min-lr", "1", "--no-save"]
        stock = [
            "--arch", "transformer", "--optimizer", "adam",
            "--task", "translation_multi_simple_epoch",
        ]  # fmt: skip
        commands = {
            "fairseq alone": train_command(setting, folder, *stock, *stop),
            OURS: train_command(setting, folder, *our_options(), *stop),
        }
        runs = {
            name: lambda command=command: in_own_process(run_command, command, options.threads)
            for name, command in commands.items()
        }
        raw = interleaved("startup", runs, options.repetitions)
    stock = raw["fairseq alone"]
    rows = {}
    for name, measured in raw.items():
        times, peaks = zip(*measured)
        base_times, base_peaks = zip(*stock)
        rows[name] = [
            Spread.of(times),
            ratios(times, base_times),
            Spread.of([peak / MEGABYTE for peak in peaks]),
            ratios(peaks, base_peaks),
        ]
    columns = ["seconds", "÷ fairseq alone", "peak, MiB", "÷ fairseq alone"]
    title = f"Start of fairseq-train up to the first update, base of {setting.words:,} words"
    return Result([Table(title, columns, rows)], {"seconds_and_bytes": raw})


def lifecycle(options):
    """A base of that size through load, update, save, resume, pruning, merge and decoding, once, in
    fairseq's commands (needs about 10 GB of memory and writes 11 GB)."""
    setting = shapes.M2M_615M
    with base_model("lifecycle", copies=4) as folder:
        pruning = ["--pruning-unit", "update", "--pruning-begin", "0", "--pruning-duration", "1"]
        train = train_command(
            setting, folder, *our_options(), *pruning, "--no-epoch-checkpoints",
            "--disable-validation", "--warmup-updates", "1", "--lr-scheduler", "inverse_sqrt",
        )  # fmt: skip
        source, target = shapes.codes(LANGUAGES)[:2]
        checkpoint = folder / "run" / "checkpoint_last.pt"
        decode = [
            sys.executable, "-m", "fairseq_cli.generate", folder / "data", "--user-dir", USER_DIR,
            "--cpu", "--task", "translation_multi_lslora", "-s", source, "-t", target,
            "--path", checkpoint, "--gen-subset", "valid",
            "--beam", "5", "--batch-size", "8", "--max-len-b", "30", "--num-workers", "0",
        ]  # fmt: skip
        raw, size = {}, {}
        for kind, saving in (("", []), (" (light)", ["--lora-save", "adapters"])):
            for name, command in (
                ("load, one update, save", [*train, *saving, "--max-update", "1"]),
                ("resume, prune, one update, save", [*train, *saving, "--max-update", "2"]),
                ("load, merge, decode 8 sentences with beam 5", decode),
            ):
                progress(f"lifecycle: {name}{kind}")
                raw[name + kind] = in_own_process(run_command, command, options.threads)
            size["checkpoint" + kind] = checkpoint.stat().st_size
            shutil.rmtree(checkpoint.parent)
    rows = {
        name: [Spread.of([took]), Spread.of([peak / MEGABYTE])]
        for name, (took, peak) in raw.items()
    }
    title = f"fairseq's commands with the shape of M2M-124 615M and {LANGUAGES} languages"
    notes = [f"{name}: {of_it / MEGABYTE:,.0f} MiB" for name, of_it in size.items()]
    table = Table(title, ["seconds", "peak, MiB"], rows)
    return Result([table], {"seconds_and_bytes": raw, **size}, notes)


def write_base(setting, folder):
    """Writes a stock checkpoint with random weights, base.pt, and a small data set for it."""
    folder, langs = Path(folder), shapes.codes(LANGUAGES)
    words = setting.dictionary.symbols[4 : setting.words - LANGUAGES]  # then come the languages
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    for lang in langs[:2]:
        (folder / f"train.{lang}").write_text(f"{' '.join(words[:20])}\n" * 8)
    run_command(
        [
            sys.executable, "-m", "fairseq_cli.preprocess", "-s", langs[0], "-t", langs[1],
            "--trainpref", folder / "train", "--validpref", folder / "train",
            "--destdir", folder / "data",
            "--srcdict", folder / "dict.txt", "--tgtdict", folder / "dict.txt",
        ],
        1,
    )  # fmt: skip
    model = setting.build(TransformerModel)
    args = Namespace(
        **setting.options(), arch="transformer", task="translation_multi_simple_epoch", langs=langs
    )
    history = {
        "criterion_name": "LabelSmoothedCrossEntropyCriterion",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    state = {
        "args": args,
        "model": model.state_dict(),
        "optimizer_history": [history],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(state, folder / "base.pt")


def train_command(setting, folder, *more):
    """fairseq-train from base.pt."""
    langs = shapes.codes(LANGUAGES)
    folder = Path(folder)
    return [
        sys.executable, "-m", "fairseq_cli.train", folder / "data", *more, "--cpu",
        "--langs", ",".join(langs), "--lang-pairs", f"{langs[0]}-{langs[1]}",
        "--encoder-langtok", "src", "--decoder-langtok", "--sampling-method", "temperature",
        "--finetune-from-model", folder / "base.pt", *as_arguments(setting.options()),
        "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
        "--max-tokens", "4000", "--num-workers", "0", "--lr", "0.001",
        "--save-dir", folder / "run",
    ]  # fmt: skip


def as_arguments(options):
    """Options by name as a command line; True is a flag."""
    found = []
    for name, value in options.items():
        found += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return found


def run_command(command, threads):
    """Runs a command of fairseq's to its end.

    Its peak would not count below that of the process which starts it: start it from a small one.

    Returns:
        seconds and peak memory in bytes

    Raises:
        ConfigError: it failed.
    """
    # fairseq alone does not tell torch ≥ 2.6 that its checkpoints may be read
    env = {"OMP_NUM_THREADS": str(threads), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=log,
            env={**os.environ, **env},
        )
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1]
            raise ConfigError(f"{command[2]} ended with status {process.returncode}: {last}")
    return took, usage.ru_maxrss * 1024
