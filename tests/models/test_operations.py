"""What a GPU would be asked to do, counted on a CPU: few operations, however many languages."""

from functools import cache

import pytest
import torch
from benchmark.contenders import FROZEN, OURS, FrozenBase
from benchmark.operations import SHAPE, Operations, count
from benchmark.shapes import Setting

TINY = Setting(layers=2, dim=16, ffn=32, heads=2, words=40, sentences=9, tokens=6, dropout=0.0)


with_later_versions = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="older versions of torch and fairseq dispatch other operations",
)


@cache
def base():
    """fairseq's transformer without adapters, 12 + 12 layers."""
    return count(FROZEN, SHAPE, 1)


@with_later_versions
@pytest.mark.parametrize("languages, limit", [(12, 1.5), (30, 1.6), (100, 1.7), (200, 1.8)])
def test_operations_do_not_grow_with_the_languages(languages, limit):
    ours = count(OURS, SHAPE, languages)
    assert base().operations < ours.operations <= limit * base().operations
    assert base().decoding < ours.decoding <= 1.25 * base().decoding


@with_later_versions
def test_the_host_waits_once_beside_the_decoder_of_fairseq():
    """Whatever the number of layers; the stock encoder asks once a layer and more."""
    batch = TINY.batch(4)
    stock = FrozenBase(TINY, 4).model
    encoder_out = stock.encoder(batch.tokens["src_tokens"], batch.tokens["src_lengths"])
    with Operations() as decoder:
        stock.decoder(batch.tokens["prev_output_tokens"], encoder_out)
    assert decoder.waits == 1
    assert count(OURS, TINY, 4).waits == 1 + decoder.waits
    assert count(FROZEN, TINY, 4).waits > TINY.layers + decoder.waits


@pytest.mark.parametrize(
    "run, waits",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: int(torch._shape_as_tensor(x)[0] + 2), 0),  # the host knows it
    ],
)
def test_what_makes_the_host_wait(run, waits):
    with Operations() as found:
        run(torch.arange(3.0))
    assert found.waits == waits


def test_views_are_no_operations():
    x = torch.ones(2, 3, requires_grad=True)
    with Operations() as found:
        x.t()[0].detach()
    assert found.count == 0
    with Operations() as found:
        y = (x * 2).sum()
    assert found.count == 2
    with Operations() as found:
        y.backward()  # a first gradient; of the sum a view, of the product a product
    assert found.count == 2
