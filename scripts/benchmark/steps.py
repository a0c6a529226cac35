"""The sections about the time of training steps."""

import torch

from benchmark.contenders import (
    CONTENDERS,
    FROZEN,
    FULL,
    HF_FROZEN,
    HF_MIXED,
    HF_PEFT,
    OURS,
    STOCK_LOSS,
    Ours,
    at,
    loop_note,
    measurable,
)
from benchmark.measuring import free, interleaved, seconds
from benchmark.report import Result, Spread, Table, ratios
from benchmark.shapes import LANGUAGES, MANY_LANGUAGES


def event(device):
    """A mark in the queue of a GPU; None elsewhere."""
    if device != "cuda":
        return None
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def timed_step(contender, batch, device):
    """Seconds of one training step, by part; on CUDA also those between two events."""
    start, first = seconds(device), event(device)
    contender.forward_backward(batch)
    last, middle = event(device), seconds(device)
    contender.update()
    end = seconds(device)
    times = {"forward_backward": middle - start, "optimizer": end - middle, "step": end - start}
    if first is not None:
        times["events"] = first.elapsed_time(last) / 1000
    return times


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
    parts = next(iter(found.values()))[0]
    return {p: {label: [t[p] for t in times] for label, times in found.items()} for p in parts}


def step(options):
    """A training step (forward and backward, clipping and optimizer) against the number of
    languages."""
    labels, notes = measurable()
    labels.remove(STOCK_LOSS)
    raw, present = {}, {}
    for languages in options.languages:
        batch = options.setting.batch(languages)
        contenders = {
            label: CONTENDERS[label](options.setting, languages)
            for label in at(languages, labels, options)
        }
        raw[languages] = step_times(f"step, {languages} languages", contenders, batch, options)
        present[languages] = batch.present()
        del contenders
        free(options.setting.device)
    notes += loop_note(options) + precision_note(options.setting)
    notes.append(
        "languages present in the batch, source + target: "
        + ", ".join(f"{s} + {t} of {n}" for n, (s, t) in present.items())
    )
    return Result(step_tables(labels, raw), {"times": raw, "present": present}, notes)


def precision_note(setting):
    """A list with a note on what training in half precision leaves out, if it is."""
    if setting.precision == "fp32":
        return []
    return [
        f"{setting.precision}: this package's adapters, and PEFT's, keep their parameters in fp32 "
        "over a base in half precision (--lora-base-dtype). All else is in half precision: "
        "fairseq's optimizers update it by way of fp32 and with their state in fp32; no fp32 copy "
        "of it is kept and the loss is not scaled"
    ]


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
        table(f"{whole} ÷ {FROZEN}", "step", FROZEN),
        table(f"{inner} ÷ {FROZEN}", "forward_backward", FROZEN),
        table(f"{whole} ÷ {FULL}", "step", FULL),
        table(f"{whole} ÷ {OURS}", "step", OURS),
        table(f"{whole}, seconds", "step"),
    ]
    if "events" in next(iter(raw.values())):
        title = f"{inner} by CUDA events"
        tables.append(table(f"{title} ÷ {FROZEN}", "events", FROZEN))
        tables.append(table(f"{title}, seconds", "events"))
    if HF_PEFT in labels:
        title, twin = f"{inner} ÷ {HF_FROZEN}", HF_FROZEN
        tables.append(table(title, "forward_backward", twin, shown=[HF_PEFT, HF_MIXED]))
    return tables


def optimizer(options):
    """A training step of 12 languages against that of 200 of which 12 are in the batch."""
    counts = (LANGUAGES, MANY_LANGUAGES)
    batch = options.setting.batch(LANGUAGES)
    names = [f"{n} languages" for n in counts]
    contenders = {name: Ours(options.setting, n) for name, n in zip(names, counts)}
    raw = step_times("optimizer", contenders, batch, options)
    rows = {}
    for row, part in (("clipping and optimizer", "optimizer"), ("whole training step", "step")):
        few, many = (raw[part][name] for name in names)
        rows[row] = [Spread.of(few), Spread.of(many), ratios(many, few)]
    title = f"{OURS} with {LANGUAGES} languages in the batch, seconds"
    columns = [*names, f"{MANY_LANGUAGES} ÷ {LANGUAGES}"]
    return Result([Table(title, columns, rows)], {"times": raw})
