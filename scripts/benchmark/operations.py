"""The section about operations, which a GPU is sent one by one, and about waiting for it.

On a GPU every operation costs its launch, whatever its size: what counts is their number, which
depends on neither width nor device. On a CPU the package is told to work as it would on a GPU.
"""

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.contenders import CONTENDERS, FROZEN, HUGGING_FACE, at, loop_note, measurable
from benchmark.measuring import free, progress
from benchmark.report import Result, Spread, Table
from benchmark.shapes import Setting
from lslora_fairseq.criterions import frozen_projection
from lslora_fairseq.lora import routing

aten = torch.ops.aten
SHAPE = Setting(12, 16, 32, 2, words=100, sentences=120, dropout=0.0)  # M2M-124 615M, but narrow
BEAM = 5
ASKING = {  # their result, or its size, is known once the device has done its work
    aten._local_scalar_dense,
    aten._unique2,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # masks among the indices ask
READING = (torch.Tensor.tolist, torch.Tensor.cpu)  # on a CPU, these dispatch nothing


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside, in forward and backward passes alike.

    Attributes:
        count: operations that are neither views nor ``detach``; allocations are among them
        waits: how often the host asks for a value, and on a GPU waits for it
    """

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0
        self._reading = _Reading(self)
        self._on_host = {}  # storages of what is computed from shapes, by address

    def __enter__(self):
        self._reading.__enter__()
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self._reading.__exit__(*failure)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not aten.detach.default
        result = func(*args, **(kwargs or {}))
        storages = [arg.untyped_storage() for arg in args if isinstance(arg, torch.Tensor)]
        if storages and all(s.data_ptr() in self._on_host for s in storages):
            if isinstance(result, torch.Tensor):
                self.keep_on_host(result)
        else:
            self.waits += _asks(func, args)
        return result

    def keep_on_host(self, tensor):
        """Notes that a tensor lies on the host whatever the device, so that reading it is free."""
        storage = tensor.untyped_storage()
        self._on_host[storage.data_ptr()] = storage


class _Reading(TorchFunctionMode):
    """Tells *operations* of what is not dispatched: reading whole tensors, and making shapes."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.operations.waits += func in READING
        result = func(*args, **(kwargs or {}))
        if func is torch._shape_as_tensor:
            self.operations.keep_on_host(result)
        return result


def _asks(func, args):
    """Whether an operation makes the host wait for the device."""
    if func.overloadpacket in INDEXING:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return func.overloadpacket in ASKING or func is aten.repeat_interleave.Tensor


@contextmanager
def as_on_cuda():
    """On a CPU, lets the package choose its formulations and the pieces of the loss as on a GPU."""
    with ExitStack() as changes:
        for rule in (routing.COSTS, frozen_projection.BUFFER):
            changes.enter_context(patch.dict(rule, cpu=rule["cuda"]))
        changes.enter_context(patch.dict(frozen_projection.MOST_TOKENS, clear=True))
        yield


@contextmanager
def synchronisations(device):
    """A list of what CUDA warns of that makes the host wait; None elsewhere."""
    if device != "cuda":
        yield None
        return
    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass
class Counts:
    """What a contender asks a device to do.

    Attributes:
        operations: of the forward and backward pass of a loss
        waits: of the host, in the same
        warnings: of CUDA about them; None on a CPU
        update: operations of clipping and optimizer; None where nothing is trained
        decoding: operations of a step of the decoder; None where it is another decoder
    """

    operations: int
    waits: int
    warnings: int | None
    update: int | None
    decoding: int | None


def training_pass(contender, batch, device):
    """The :class:`Operations` of a loss and its backward pass, and the warnings of CUDA.

    The optimizer is not in them. What is made once was made before.
    """
    for _ in range(2):
        contender.model.zero_grad(set_to_none=True)
        with synchronisations(device) as warned, Operations() as found:
            contender.forward_backward(batch)
    return found, warned


def update(contender, batch):
    """Operations of clipping and optimizer, whose state was made before; None without one."""
    contender.start_optimizer()
    for _ in range(2):
        contender.forward_backward(batch)
        with Operations() as found:
            contender.update()
    return found.count if contender.optimizer else None


@torch.no_grad()
def decoding_step(contender, batch):
    """The :class:`Operations` of the decoder for the third token of every hypothesis of a beam."""
    model = contender.model.eval()
    for layer in model.decoder.layers:
        layer.need_attn = False  # as fairseq-generate has it
    net_input = dict(contender.net_input(batch))
    tokens = net_input.pop("prev_output_tokens")
    order = torch.arange(len(tokens), device=tokens.device).repeat_interleave(BEAM)
    encoder_out = model.encoder.reorder_encoder_out(model.encoder(**net_input), order)
    state = {}
    for length in (1, 2, 3):
        with Operations() as found:
            model.decoder(tokens[order, :length], encoder_out, incremental_state=state)
    model.train()
    return found


def count(label, setting, languages):
    """The :class:`Counts` of a contender."""
    contender, batch = CONTENDERS[label](setting, languages), setting.batch(languages)
    batch.target_tokens  # noqa: B018 - fairseq counts them where it collates, on the host
    with as_on_cuda():
        found, warned = training_pass(contender, batch, setting.device)
        moved = update(contender, batch)
        decoding = None
        if label not in HUGGING_FACE:
            decoding = decoding_step(contender, batch).count
    warnings = None if warned is None else len(warned)
    return Counts(found.count, found.waits, warnings, moved, decoding)


def operations(options):
    """Number of operations of a forward and backward pass, of an update, and of a decoding step,
    against those of the frozen base, and how often the host waits for the device, in 12 + 12
    layers; as on a GPU, also on a CPU."""
    labels, notes = measurable()
    setting = replace(SHAPE, device=options.setting.device, precision=options.setting.precision)
    raw = {}
    for languages in options.languages:
        progress(f"operations: {languages} languages")
        raw[languages] = {}
        for label in at(languages, labels, options):
            raw[languages][label] = vars(count(label, setting, languages))
            free(setting.device)
    notes += loop_note(options)
    return Result(operation_tables(labels, raw), {"counts": raw}, notes)


def operation_tables(labels, raw):
    """Tables by number of languages."""

    def table(title, name, over_base=False):
        rows = {}
        for label in labels:
            found = [counts.get(label, {}).get(name) for counts in raw.values()]
            if over_base:
                base = [counts[FROZEN][name] for counts in raw.values()]
                found = [None if n is None else n / b for n, b in zip(found, base)]
            if any(n is not None for n in found):
                rows[label] = [None if n is None else Spread.of([n]) for n in found]
        return Table(title, list(raw), rows)

    passes = "forward and backward pass"
    tables = [
        table(f"Operations of a {passes} ÷ {FROZEN}", "operations", over_base=True),
        table(f"Operations of a decoding step ÷ {FROZEN}", "decoding", over_base=True),
        table(f"Operations of a {passes}", "operations"),
        table("Operations of an update (clipping, optimizer)", "update"),
        table(f"How often the host waits in a {passes}", "waits"),
    ]
    warned = table(f"How often CUDA warns that the host waits in a {passes}", "warnings")
    return tables + [warned] * bool(warned.rows)
