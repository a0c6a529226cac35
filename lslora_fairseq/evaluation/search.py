"""Beam search in which each sentence has a longest length of its own."""

import math

import torch


def limit_lengths(generator):
    """Lets a fairseq generator end each sentence by a limit of its own.

    fairseq ends all sentences of a batch after ``max_len_a`` · (longest source of the batch) +
    ``max_len_b`` tokens, so that a translation depends on the sentences beside it. From here on
    :func:`set_limits` says where each sentence ends, whatever batch it is in.

    Args:
        generator: fairseq's ``SequenceGenerator``, changed in place
    """
    stock = type(generator.search)

    class Limited(stock):
        limits = None  # (sentences of the batch,) positions of the last token, and the least

        def step(self, step, lprobs, scores, prev_output_tokens, original_batch_idxs, **kwargs):
            limits, least = self.limits
            if step >= least:
                over = limits[original_batch_idxs] <= step
                keep = torch.arange(lprobs.size(-1), device=lprobs.device) == self.eos
                lprobs.masked_fill_(over.view(-1, 1, 1) & ~keep, -math.inf)
            return super().step(
                step, lprobs, scores, prev_output_tokens, original_batch_idxs, **kwargs
            )

    Limited.__name__, Limited.__qualname__ = stock.__name__, stock.__qualname__
    generator.search.__class__ = Limited


def set_limits(generator, limits, device):
    """Sets where each sentence of the next batch ends.

    Args:
        limits: list of the position of each sentence's last token, counted from 0; the ids of
            the batch number its sentences from 0
        device: where the batch is
    """
    generator.search.limits = torch.tensor(limits, device=device), min(limits)
    generator.max_len_a, generator.max_len_b = 0, max(limits)


def fairseq_limit(generator, source_length, max_len_a, max_len_b):
    """The position of the last token that fairseq allows in a batch.

    Args:
        source_length: tokens of the longest source of that batch
    """
    return min(int(max_len_a * source_length + max_len_b), generator.max_len - 1)
