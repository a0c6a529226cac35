"""What fairseq's ``legacy_ddp`` sends: the gradients of what is trained, in their own dtype."""

import functools


def reduce_what_is_trained():
    """The buffer in which gradients are summed over processes is as large as all of them together.

    fairseq makes one as large as the model, and of the dtype of its first parameter: that of a
    frozen base in half precision, in which gradients of fp32 adapters would lose their digits.
    """
    from fairseq.distributed import LegacyDistributedDataParallel

    init = LegacyDistributedDataParallel.__init__
    if getattr(init, "reduces_what_is_trained", False):
        return

    @functools.wraps(init)
    def __init__(self, module, *args, **kwargs):
        init(self, module, *args, **kwargs)
        trained = [param for param in module.parameters() if param.requires_grad]
        if trained:
            entries = sum(param.numel() for param in trained)
            self.buffer = trained[0].new_zeros(min(self.buffer_size, entries))

    __init__.reduces_what_is_trained = True
    LegacyDistributedDataParallel.__init__ = __init__
