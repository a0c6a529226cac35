"""Gradients over several processes: what fairseq's ``legacy_ddp`` sends of them."""

import functools
from contextlib import contextmanager

import torch
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed.utils import all_reduce


@contextmanager
def only_present(module):
    """While it lasts, fairseq's legacy_ddp reduces the gradients that some process has, and those
    alone.

    On its own it sends a whole buffer, which is as large as all parameters, frozen ones too, up to
    1 GiB in fp32, with zeros for languages without a sentence. Which gradients there are, the
    processes tell each other first, in one byte for each trained parameter. No other backend lets
    itself be told.

    Args:
        module: the model as the trainer wraps it
    """
    while module is not None and not isinstance(module, LegacyDistributedDataParallel):
        module = getattr(module, "module", None)
    if module is None:
        yield
        return
    everything, limit = module.per_device_params, module.buffer_size
    trained = [[p for p in params if p.requires_grad] for params in everything]
    given = [p.grad is not None for params in trained for p in params]
    device = next(p.device for params in trained for p in params)
    given = torch.tensor(given, dtype=torch.uint8, device=device)
    all_reduce(given, module.process_group, op="max")
    wanted = iter(given.tolist())
    present = [[p for p in params if next(wanted)] for params in trained]
    module.per_device_params = present
    module.buffer_size = min(limit, sum(p.numel() for params in present for p in params))
    module.buffer = None  # made anew, of this size
    try:
        yield
    finally:
        module.per_device_params, module.buffer_size = everything, limit
        module.buffer = None


def reduce_what_is_trained():
    """The buffer in which gradients are summed is as large as all of them together, in their dtype.

    fairseq makes one as large as the model, and of the dtype of its first parameter: that of a
    frozen base in half precision, in which gradients of fp32 adapters would lose their digits.
    """
    reduce = LegacyDistributedDataParallel.all_reduce_grads
    if getattr(reduce, "reduces_what_is_trained", False):
        return

    @functools.wraps(reduce)
    def all_reduce_grads(self):
        trained = [param for param in self.module.parameters() if param.requires_grad]
        if self.buffer is None and trained:
            entries = sum(param.numel() for param in trained)
            self.buffer = trained[0].new_zeros(min(self.buffer_size, entries))
        return reduce(self)

    all_reduce_grads.reduces_what_is_trained = True
    LegacyDistributedDataParallel.all_reduce_grads = all_reduce_grads
