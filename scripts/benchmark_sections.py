"""The measurements of benchmark.py; every section returns its tables, raw values and notes."""

import gc
import logging
import sys
import time
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
from fairseq.dataclass.configs import GenerationConfig
from fairseq.sequence_generator import SequenceGenerator

from lslora_fairseq.errors import ConfigError
from lslora_fairseq.evaluation.search import BeamSearch

USER_DIR = Path(__file__).resolve().parents[1] / "lslora_fairseq"
LANGUAGES = 12  # of the sections that do not vary their number
MANY_LANGUAGES = 200
EVALUATED = 30  # sentences of a batch in the section evaluate
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
    labels, notes = [k for k in models.CONTENDERS if k != models.STOCK_LOSS], []
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


def searching(contender, batch, setting, length=25, beam=5, merged=None):
    """Prepares a model as ``lslora evaluate`` does; returns a function that decodes once.

    Args:
        merged: numbers of the languages of a direction that is merged first
    """
    model = contender.model.eval()
    if merged:
        model.merge(*merged)
    search = BeamSearch(
        [model],
        setting.dictionary,
        GenerationConfig(beam=beam, max_len_b=length, min_len=length),
    )
    net_input = {k: v for k, v in contender.net_input(batch).items() if k != "prev_output_tokens"}
    if merged:
        net_input = {key: net_input[key] for key in ("src_tokens", "src_lengths")}

    def decode():
        start = seconds(setting.device)
        search.search(net_input, [length] * len(net_input["src_tokens"]))
        return seconds(setting.device) - start

    return decode


def evaluate(options):
    """``lslora evaluate``'s batches of several directions against one direction merged."""
    setting, tables, raw = options.setting, [], {}
    for languages in (LANGUAGES, 100):
        mixed = setting.batch(languages, sentences=EVALUATED, tokens=25)
        single = mixed.in_one_direction()

        def model(languages=languages):
            made = models.CONTENDERS[models.OURS](setting, languages)
            made.add_noise()
            return made

        stock = models.CONTENDERS[models.OURS](setting, languages)
        stock.add_noise()
        runs = {
            "merged, one direction": searching(model(), single, setting, merged=(0, 1)),
            "fairseq's search, merged": decoding(
                stock, single, setting, models.codes(languages)[:2]
            ),
            "five directions into one language": searching(
                model(), mixed.into_one_language(5), setting
            ),
            "all directions": searching(model(), mixed, setting),
        }
        found = interleaved("evaluate", runs, options.repetitions)
        merged = found["merged, one direction"]
        rows = {name: [Spread.of(times), ratios(times, merged)] for name, times in found.items()}
        title = f"Evaluation, beam 5, {EVALUATED} sentences of 25 tokens, {languages} languages"
        tables.append(Table(title, ["seconds", "÷ merged"], rows))
        raw[languages] = found
    return Result(tables, {"times": raw})


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


SECTIONS = {
    "step": step,
    "memory": memory,
    "decode": decode,
    "evaluate": evaluate,
    "optimizer": optimizer,
}
