"""The measurements of benchmark.py; every section returns its tables, raw values and notes."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from ctypes import CDLL
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import benchmark_models as models
import torch
from benchmark_report import Spread, Table, ratios
from fairseq.models.transformer import TransformerModel
from fairseq.sequence_generator import SequenceGenerator

from lslora_fairseq.errors import ConfigError

USER_DIR = Path(__file__).resolve().parents[1] / "lslora_fairseq"
LANGUAGES = 12  # of the sections that do not vary their number
MANY_LANGUAGES = 200
MEGABYTE = 2**20


@dataclass
class Result:
    """Attributes:
    tables: list of :class:`Table`
    raw: every single measurement, plain values
    notes: lines to print below the tables
    """

    tables: list
    raw: dict
    notes: list = field(default_factory=list)


def progress(text):
    print(text, file=sys.stderr, flush=True)


def seconds(device):
    """A time stamp, taken once the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(name, runs, repetitions):
    """Measures several things in turn, starting with another one in each repetition.

    Args:
        name: of the measurement, for progress
        runs: label -> function without arguments that runs once and returns its measurement
        repetitions: how often, after a warm-up

    Returns:
        label -> list of measurements
    """
    labels = list(runs)
    found = {label: [] for label in labels}
    for repetition in range(repetitions + 1):
        began = time.perf_counter()
        start = repetition % len(labels)
        for label in labels[start:] + labels[:start]:
            measured = runs[label]()
            if repetition:
                found[label].append(measured)
        number = f"repetition {repetition} of {repetitions}" if repetition else "warm-up"
        progress(f"{name}: {number}, {time.perf_counter() - began:.1f} s")
    return found


def free(device):
    """Gives the memory of models that are no longer referenced back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed_step(contender, batch, device):
    """Seconds of one training step, by part."""
    start = seconds(device)
    contender.forward_backward(batch)
    middle = seconds(device)
    contender.update()
    end = seconds(device)
    return {"forward_backward": middle - start, "optimizer": end - middle, "step": end - start}


def step_times(name, contenders, batch, options):
    """Runs training steps of several contenders.

    Returns:
        part of a step -> label -> seconds of each repetition
    """
    device = options.setting.device
    for contender in contenders.values():
        contender.start_optimizer()
    runs = {
        label: lambda contender=contender: timed_step(contender, batch, device)
        for label, contender in contenders.items()
    }
    found = interleaved(name, runs, options.repetitions)
    parts = ("forward_backward", "optimizer", "step")
    return {p: {label: [t[p] for t in times] for label, times in found.items()} for p in parts}


def step(options):
    """A training step against the number of languages."""
    labels, notes = list(models.CONTENDERS), []
    try:
        models.check_peft()
    except ConfigError as error:
        notes.append(str(error))
        labels = [k for k in labels if k not in (models.HF_FROZEN, models.HF_PEFT)]
    raw, present = {}, {}
    for languages in options.languages:
        batch = options.setting.batch(languages)
        contenders = {
            label: models.CONTENDERS[label](options.setting, languages)
            for label in labels
            if label != models.LOOP or languages <= options.loop_up_to
        }
        raw[languages] = step_times(f"step, {languages} languages", contenders, batch, options)
        present[languages] = batch.present()
        del contenders
        free(options.setting.device)
    left_out = [str(n) for n in options.languages if n > options.loop_up_to]
    if left_out:
        notes.append(f"{models.LOOP} left out at {', '.join(left_out)} languages (--loop-up-to)")
    notes.append(
        "languages present in the batch, source + target: "
        + ", ".join(f"{s} + {t} of {n}" for n, (s, t) in present.items())
    )
    return Result(step_tables(labels, raw), {"times": raw, "present": present}, notes)


def step_tables(labels, raw):
    """Tables by number of languages; the first is the one to draw."""

    def cell(times, label, reference):
        if label not in times:
            return None
        return ratios(times[label], times[reference]) if reference else Spread.of(times[label])

    def table(title, part, reference=None, shown=labels):
        rows = {
            label: [cell(times[part], label, reference) for times in raw.values()]
            for label in shown
            if label != reference
        }
        return Table(title, list(raw), rows)

    whole, inner = "Training step (forward, backward, clipping, optimizer)", "Forward and backward"
    tables = [
        table(f"{whole} ÷ {models.FROZEN}", "step", models.FROZEN),
        table(f"{inner} ÷ {models.FROZEN}", "forward_backward", models.FROZEN),
        table(f"{whole} ÷ {models.FULL}", "step", models.FULL),
        table(f"{whole} ÷ {models.OURS}", "step", models.OURS),
        table(f"{whole}, seconds", "step"),
    ]
    if models.HF_PEFT in labels:
        title, twin = f"{inner} ÷ {models.HF_FROZEN}", models.HF_FROZEN
        tables.append(table(title, "forward_backward", twin, shown=[models.HF_PEFT]))
    return tables


def in_own_process(function, *args):
    """Calls a function in a fresh process, whose memory holds nothing else.

    Raises:
        ConfigError: the process was killed.
    """
    try:
        with ProcessPoolExecutor(
            1, get_context("spawn"), initializer=logging.disable, initargs=(logging.INFO,)
        ) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise ConfigError(
            "a process of the benchmark was killed, probably for want of memory: free some, or "
            "leave its section out (--sections)"
        ) from None


def memory_status(name):
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("the system does not tell a process's memory: leave out --sections memory")


def current_memory(device):
    """Bytes in use; the peak is counted anew from here on."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        raise ConfigError("peak memory is read from Linux's /proc: leave out --sections memory")
    trim = getattr(CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: give back what building the model has left behind
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_status("VmRSS")


def peak_memory(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory_status("VmHWM")


def step_memory(setting, label, languages, threads):
    """Memory of training; to be run in a process of its own.

    Returns:
        bytes once model and batch are built, and the peak above that of three training steps with
        their optimizer
    """
    torch.set_num_threads(threads)
    contender = models.CONTENDERS[label](setting, languages)
    batch = setting.batch(languages)
    built = current_memory(setting.device)
    contender.start_optimizer()
    for _ in range(3):
        contender.forward_backward(batch)
        contender.update()
    return built, peak_memory(setting.device) - built


def memory(options):
    """Peak memory of a training step above the weights."""
    counts = options.languages
    loop = min((n for n in counts if n >= LANGUAGES), default=max(counts))
    chosen = [(models.FROZEN, 1), (models.FULL, 1)]
    chosen += [(models.OURS, n) for n in counts] + [(models.LOOP, loop)]
    raw = {}
    for label, languages in chosen:
        name = label
        if label in (models.OURS, models.LOOP):
            name = f"{label}, {languages} language{'s' if languages > 1 else ''}"
        progress(f"memory: {name}")
        raw[name] = in_own_process(step_memory, options.setting, label, languages, options.threads)
    full = raw[models.FULL][1]
    rows = {
        name: [Spread.of([value]) for value in (built / MEGABYTE, above / MEGABYTE, above / full)]
        for name, (built, above) in raw.items()
    }
    columns = ["model and batch, MiB", "peak above, MiB", f"peak above ÷ {models.FULL}"]
    title = "Peak memory of training steps, above what model and batch take"
    return Result([Table(title, columns, rows)], {"bytes": raw})


def decoding(contender, batch, setting, direction=(None, None), length=25, beam=5):
    """Prepares a model as fairseq-generate does; returns a function that decodes once.

    All hypotheses get the same length.

    Args:
        direction: codes of the source and target language if all sentences share them: the
            adapters may then be merged
    """
    # frozen, the output projection of stock models would take a slow path (ContiguousFrozenBase)
    model = contender.model.eval().requires_grad_()
    source, target = direction
    task = SimpleNamespace(source_lang=source, target_lang=target)
    model.prepare_for_inference_(SimpleNamespace(generation=SimpleNamespace(), task=task))
    generator = SequenceGenerator(
        [model], setting.dictionary, beam_size=beam, max_len_b=length, min_len=length
    )

    def decode():
        start = seconds(setting.device)
        generator.generate([model], {"net_input": contender.net_input(batch)})
        return seconds(setting.device) - start

    return decode


def decode(options):
    """Beam search of one direction and of mixed directions."""
    setting = options.setting
    mixed = setting.batch(LANGUAGES, sentences=8, tokens=25)
    single = mixed.in_one_direction()
    direction = models.codes(LANGUAGES)[:2]
    runs = {}
    for name, label, batch, merged in (
        ("base", models.FULL, single, False),
        ("merged, one direction", models.OURS, single, True),
        ("adapters, one direction", models.OURS, single, False),
        ("adapters, mixed directions", models.OURS, mixed, False),
        ("per-language loop, mixed directions", models.LOOP, mixed, False),
    ):
        contender = models.CONTENDERS[label](setting, LANGUAGES)
        contender.add_noise()
        runs[name] = decoding(contender, batch, setting, direction if merged else (None, None))
    found = interleaved("decode", runs, options.repetitions)
    base = found["base"]
    rows = {name: [Spread.of(times), ratios(times, base)] for name, times in found.items()}
    title = f"Decoding, beam 5, 8 sentences of 25 tokens, {LANGUAGES} languages"
    return Result([Table(title, ["seconds", "÷ base"], rows)], {"times": found})


def optimizer(options):
    """What languages that are absent from the batch cost."""
    counts = (LANGUAGES, MANY_LANGUAGES)
    batch = options.setting.batch(LANGUAGES)
    names = [f"{n} languages" for n in counts]
    contenders = {name: models.Ours(options.setting, n) for name, n in zip(names, counts)}
    raw = step_times("optimizer", contenders, batch, options)
    rows = {}
    for row, part in (("clipping and optimizer", "optimizer"), ("whole training step", "step")):
        few, many = (raw[part][name] for name in names)
        rows[row] = [Spread.of(few), Spread.of(many), ratios(many, few)]
    title = f"{models.OURS} with {LANGUAGES} languages in the batch, seconds"
    columns = [*names, f"{MANY_LANGUAGES} ÷ {LANGUAGES}"]
    return Result([Table(title, columns, rows)], {"times": raw})


def pruning(options):
    """Time of bringing the masks of a 615M model to another sparsity."""
    setting = models.M2M_615M
    setting = models.Setting(setting.layers, setting.dim, setting.ffn, setting.heads, words=100)
    contender = models.Ours(setting, LANGUAGES)
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


def startup(options):
    """fairseq-train up to its first update, with a base model of 615M."""
    setting, raw = models.M2M_615M, {}
    needed = 5 * setting.base_parameters  # fairseq 0.12.2 saves some of the weights twice
    with tempfile.TemporaryDirectory() as folder:
        available = shutil.disk_usage(folder).free
        if available < needed:
            raise ConfigError(
                f"--sections startup writes {needed / 1e9:.1f} GB to {tempfile.gettempdir()}, "
                f"which has {available / 1e9:.1f}: free some, or set TMPDIR to another folder"
            )
        progress("startup: writing a base model")
        in_own_process(write_base, setting, folder)
        commands = {
            "fairseq alone": train_command(
                setting, folder, "--arch", "transformer", "--optimizer", "adam",
                "--task", "translation_multi_simple_epoch",
            ),
            models.OURS: train_command(
                setting, folder, "--user-dir", USER_DIR, "--arch", "lslora_transformer",
                "--optimizer", "pruned_adam", "--task", "translation_multi_lslora",
                *as_arguments(models.adapter_options(LANGUAGES)),
            ),
        }  # fmt: skip
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


def write_base(setting, folder):
    """Writes a stock checkpoint with random weights, base.pt, and a small data set for it."""
    folder, langs = Path(folder), models.codes(LANGUAGES)
    words = setting.dictionary.symbols[4 : setting.words - LANGUAGES]  # then come the languages
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    for lang in langs[:2]:
        (folder / f"train.{lang}").write_text(f"{' '.join(words[:20])}\n" * 100)
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
    """fairseq-train that loads everything, base.pt too, and ends before the first update."""
    langs = models.codes(LANGUAGES)
    folder = Path(folder)
    return [
        sys.executable, "-m", "fairseq_cli.train", folder / "data", *more, "--cpu",
        "--langs", ",".join(langs), "--lang-pairs", f"{langs[0]}-{langs[1]}",
        "--encoder-langtok", "src", "--decoder-langtok", "--sampling-method", "temperature",
        "--finetune-from-model", folder / "base.pt", *as_arguments(setting.options()),
        "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
        "--max-tokens", "4000", "--num-workers", "0", "--lr", "0.001", "--stop-min-lr", "1",
        "--no-save", "--save-dir", folder / "none",
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


SECTIONS = {
    "step": step,
    "memory": memory,
    "decode": decode,
    "optimizer": optimizer,
    "pruning": pruning,
    "startup": startup,
}
