"""The sections about the loss over the words of M2M-124."""

from functools import partial

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from benchmark import contenders, shapes
from benchmark.measuring import interleaved, progress, seconds
from benchmark.memory import MEGABYTE, current_memory, memory_of, peak_memory, step_memory
from benchmark.report import Result, Spread, Table, ratios
from benchmark.shapes import LANGUAGES, PAD
from lslora_fairseq.criterions.frozen_projection import frozen_projection_loss

TOKENS = 1000
RANK = 48  # of the embeddings' adapter
STOCK, OURS = "fairseq's criterion", "this package's"
ADAPTED = ", adapter of the embeddings"


class Loss:
    """Projection, loss and their backward pass, on random features.

    Args:
        setting: the shape of a model
        label: one of :data:`STOCK` and :data:`OURS`, with or without :data:`ADAPTED`
    """

    def __init__(self, setting, label):
        torch.manual_seed(0)
        self.is_ours = label.startswith(OURS)

        def normal(*shape):
            return torch.randn(shape, device=setting.device).mul_(setting.dim**-0.5)

        self.x = normal(1, TOKENS, setting.dim).mul_(setting.dim**0.5).requires_grad_()
        self.E, self.A, self.B = normal(setting.words, setting.dim), None, None
        if label.endswith(ADAPTED):
            self.A = normal(RANK, setting.dim).requires_grad_()
            self.B = normal(RANK, setting.words).requires_grad_()
        self.target = torch.randint(4, setting.words, (1, TOKENS), device=setting.device)

    def run(self):
        """The loss, and the gradients of features and adapter."""
        if self.is_ours:
            projection = self.E, self.A, self.B
            loss, *_ = frozen_projection_loss(self.x, projection, self.target, 0.1, PAD, TOKENS)
        else:
            flat = self.x.flatten(0, 1)
            logits = F.linear(flat, self.E)
            if self.A is not None:  # as the model does it
                logits.addmm_(F.linear(flat, self.A), self.B)
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float)
            loss, _ = label_smoothed_nll_loss(
                log_probs, self.target.flatten(), 0.1, ignore_index=PAD
            )
        trained = [t for t in (self.x, self.A, self.B) if t is not None]
        return loss.detach(), torch.autograd.grad(loss, trained)


def loss_memory(setting, label, threads):
    """Peak memory of a loss above its inputs, in bytes; to be run in a process of its own."""
    torch.set_num_threads(threads)
    measured = Loss(setting, label)
    before = current_memory(setting.device)
    measured.run()
    return peak_memory(setting.device) - before


def loss_times(setting, labels, repetitions):
    """label -> seconds of each repetition."""
    made = {label: Loss(setting, label) for label in labels}

    def timed(label):
        start = seconds(setting.device)
        made[label].run()
        return seconds(setting.device) - start

    return interleaved(labels[1], {label: partial(timed, label) for label in labels}, repetitions)


def loss(options):
    """Projection, loss and their backward pass over the words of M2M-124, against fairseq's
    criterion (needs about 8 GB of memory)."""
    setting, tables, raw = shapes.M2M_615M, [], {"times": {}, "bytes": {}}
    for kind in ("", ADAPTED):
        labels = [STOCK + kind, OURS + kind]
        times = loss_times(setting, labels, options.repetitions)
        peaks = {k: memory_of(loss_memory, setting, k, options.threads) for k in labels}
        rows = {
            label: [
                Spread.of(times[label]),
                ratios(times[label], times[labels[0]]),
                Spread.of([peaks[label] / MEGABYTE]),
                Spread.of([peaks[label] / peaks[labels[0]]]),
            ]
            for label in labels
        }
        title = (
            f"Projection, loss and backward, {TOKENS:,} tokens, {setting.words:,} words, "
            f"d = {setting.dim}{kind}"
        )
        columns = ["seconds", "÷ fairseq's", "peak, MiB", "÷ fairseq's"]
        tables.append(Table(title, columns, rows))
        raw["times"].update(times)
        raw["bytes"].update(peaks)
    return Result(tables, raw)


def loss_step(options):
    """Peak memory of training steps in the shape of M2M-124 615M (needs about 20 GB)."""
    raw = {}
    for label in (contenders.FULL, contenders.STOCK_LOSS, contenders.OURS):
        progress(f"loss-step: {label}")
        raw[label] = memory_of(step_memory, shapes.M2M_615M, label, LANGUAGES, options.threads)
    full, stock = (raw[label][1] for label in (contenders.FULL, contenders.STOCK_LOSS))
    rows = {
        label: [Spread.of([n]) for n in (above / MEGABYTE, above / full, above / stock)]
        for label, (_, above) in raw.items()
    }
    columns = ["peak, MiB", f"÷ {contenders.FULL}", f"÷ {contenders.STOCK_LOSS}"]
    title = (
        f"Peak memory of training steps of M2M-124 615M above the weights, {LANGUAGES} languages"
    )
    return Result([Table(title, columns, rows)], {"bytes": raw})
