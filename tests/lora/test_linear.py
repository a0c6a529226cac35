"""LSLoLinear: the formula, its gradients, shapes, dropout, precision."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lslora_fairseq.lora import routing
from lslora_fairseq.lora.adapters import LayerAdapters
from lslora_fairseq.lora.linear import LSLoLinear, apply_linears
from lslora_fairseq.lora.plan import Site
from lslora_fairseq.lora.routing import AdapterLayout, Costs, Present, current_pass, routed

RANKS = (1, 3, 2)
CODES = ("de", "en", "fr")
UNSORTED = [2, 0, 1, 0, 2]
SORTED = [0, 0, 1, 2, 2]


@pytest.fixture(
    params=[(16, 0), (3, 0), (1, 0), (1, 9)],
    ids=["one block", "two blocks", "blocks of one language", "gathered"],
    autouse=True,
)
def costs(request, monkeypatch):
    """The languages of a batch in one block, in two, and each in its own; where the batch is not
    sorted, in one block or with gathered rows, as in the last case where it is."""
    columns, below = request.param
    found = Costs(columns, waste=1500, unsorted_columns=columns, gathers_below=below)
    monkeypatch.setitem(routing.COSTS, "cpu", found)


PASSES = ExitStack()


def enter(routes):
    """From here to the end of the test, linears find these routes."""
    PASSES.enter_context(routed(routes))


@pytest.fixture(autouse=True)
def passes_end():
    yield
    PASSES.pop_all().close()


def route(layout, ids):
    lang_ids = torch.tensor(ids)
    present = Present(layout, lang_ids)
    return present.sorted(lang_ids, 4) if ids == sorted(ids) else present.unsorted(lang_ids)


def site(module, n_in, n_out):
    return Site("encoder", 0, module, "source", n_in, n_out)


def make(
    ids, n_in=6, n_out=5, site_in=None, site_out=None, alphas=RANKS, bias=True, n_more=0, **kwargs
):
    """A linear with random adapters, routed for sentences of the languages *ids*.

    With *n_more*, a second one of that output size in the same layer: a list of both.
    """
    sites = [site("fc1", site_in or n_in, site_out or n_out)]
    sites += [site("fc2", n_in, n_more)] if n_more else []
    layout = AdapterLayout(RANKS, alphas)
    enter({"source": route(layout, ids)})
    adapters = LayerAdapters(sites, CODES, RANKS, torch.zeros(1))
    with torch.no_grad():
        for param in adapters.parameters():
            param[:, adapters.width_A :].normal_()
    linears = [
        LSLoLinear(
            nn.Linear(n_in, size, bias=bias),
            where,
            {"source": adapters},
            {"source": layout},
            **kwargs,
        )
        for where, size in zip(sites, (n_out, n_more))
    ]
    return linears if n_more else linears[0]


def parameters(linear):
    return list(linear.adapters["source"].parameters())


def gradients(linear):
    """The gradients of A and of B of each language; None where there is none."""
    found = []
    for language in range(3):
        grad = linear.adapters["source"].weight(language).grad
        columns = linear.adapters["source"].columns[linear.site.module]
        found.append([None if grad is None else grad[:, part] for part in columns])
    return found


def by_formula(linear, x, ids):
    """y = W x + b + ΔW_l x, sentence by sentence; x is (time, batch, in)."""
    y = nn.functional.linear(x, linear.weight, linear.bias)
    adapted = [x[:, i] @ linear.delta_weight(lang).T for i, lang in enumerate(ids)]
    return y + torch.stack(adapted, 1)


@pytest.mark.parametrize("ids", [[0], [1, 1], UNSORTED, SORTED])
@pytest.mark.parametrize("alphas", [RANKS, (4.0, 1.0, 0.5)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_formula(ids, alphas, bias):
    linear = make(ids, alphas=alphas, bias=bias)
    x = torch.randn(4, len(ids), 6)
    torch.testing.assert_close(linear(x), by_formula(linear, x, ids), atol=1e-5, rtol=1e-5)


def test_delta_weight_scales_by_alpha_over_rank():
    linear = make([1], alphas=(1, 6, 2))
    A, B = linear.factors(1)
    expected = 6 / 3 * B.T @ A
    torch.testing.assert_close(linear.delta_weight(1), expected)


def test_square_shape_leaves_the_rest_of_the_output_alone():
    linear = make([0, 1], n_in=4, n_out=8, site_in=4, site_out=4)
    x = torch.randn(3, 2, 4)
    base = nn.functional.linear(x, linear.weight, linear.bias)
    y = linear(x)
    assert torch.equal(y[..., 4:], base[..., 4:])
    assert not torch.equal(y[..., :4], base[..., :4])
    torch.testing.assert_close(y, by_formula(linear, x, [0, 1]), atol=1e-5, rtol=1e-5)


def test_square_shape_ignores_the_rest_of_the_input():
    linear = make([0, 1], n_in=8, n_out=4, site_in=4, site_out=4)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(linear(x), by_formula(linear, x, [0, 1]), atol=1e-5, rtol=1e-5)
    assert not linear.delta_weight(1)[:, 4:].any()


def test_a_fresh_adapter_changes_no_bit():
    linear = make([0])
    for language in range(3):
        linear.factors(language)[1].data.zero_()
    x = torch.randn(3, 1, 6)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("ids", [[2, 0, 1, 2], [0, 1, 2, 2]])
@pytest.mark.parametrize("site_in, site_out", [(None, None), (3, 3)])
def test_gradcheck(ids, site_in, site_out):
    linear = make(ids, site_in=site_in, site_out=site_out, alphas=(2.0, 1.0, 5.0)).double()
    linear.adapters["source"].double()
    linear.layouts["source"].double()
    routes = {"source": route(linear.layouts["source"], ids)}
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)

    def function(x, *adapters):
        with routed(routes):
            return linear(x)

    assert torch.autograd.gradcheck(function, (x, *parameters(linear)))


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_reach_only_the_languages_present(count):
    linear = make([0, 2, 2, 0][:count])
    linear(torch.randn(3, count, 6)).square().sum().backward()
    for language, grads in enumerate(gradients(linear)):
        for grad in grads:
            assert grad is None if language == 1 else grad.ne(0).any(1).all()
    assert linear.weight.grad is None and linear.bias.grad is None


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 1, 0]])
def test_a_pruned_entry_gets_no_gradient(ids):
    linear = make(ids)
    linear.masks(1)[1][1, 3] = False
    linear.masks(0)[0][0, 1] = False
    linear.adapters["source"].refresh_pruned()
    linear(torch.randn(3, 3, 6)).square().sum().backward()
    for language, grads in enumerate(gradients(linear)):
        for grad, mask in zip(grads, linear.masks(language)):
            assert torch.equal(grad.ne(0), mask)


def test_dropout_acts_on_the_adapters_alone_and_in_training_alone():
    linear = make([0, 1], dropout=0.5)
    x = torch.randn(50, 2, 6, requires_grad=True)
    base = nn.functional.linear(x, linear.weight, linear.bias)
    torch.manual_seed(1)
    dropped = linear(x)
    torch.manual_seed(1)
    z = nn.functional.dropout(x.transpose(0, 1).contiguous(), 0.5).transpose(0, 1)
    expected = (
        base + by_formula(linear, z, [0, 1]) - nn.functional.linear(z, linear.weight, linear.bias)
    )
    torch.testing.assert_close(dropped, expected, atol=1e-5, rtol=1e-5)
    trained = parameters(linear)[:2]
    grads = torch.autograd.grad(dropped.square().sum(), (x, *trained))
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, *trained))
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    linear.eval()
    torch.testing.assert_close(linear(x), by_formula(linear, x, [0, 1]), atol=1e-5, rtol=1e-5)


def test_beams_of_a_sentence_share_its_route():
    """Cross-attention projects each sentence once while the routes count its beams."""
    ids = [1, 1, 1, 0, 0, 0]  # not sorted
    linear = make(ids)
    beams, x = torch.randn(4, 6, 6), torch.randn(4, 2, 6)
    torch.testing.assert_close(linear(beams), by_formula(linear, beams, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(x), by_formula(linear, x, [1, 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_and_keeps_fp32_gradients(dtype):
    linear = make([0, 1, 2])
    x = torch.randn(4, 3, 6)
    expected = linear(x)
    expected.sum().backward()
    exact = [p.grad for p in parameters(linear)]
    for param in parameters(linear):
        param.grad = None
    enter(current_pass().routes)
    with torch.autocast("cpu", dtype):
        y = linear(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters(linear))
    # bf16 keeps 8 bits of the mantissa
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close([p.grad for p in parameters(linear)], exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("ids", [UNSORTED, SORTED])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_linears_of_one_input_together_equal_each_alone(ids, dropout):
    """q, k and v, of which one has no adapters and all outputs differ in size."""
    first, third = make(ids, n_out=5, n_more=7, dropout=dropout)
    linears = (first, nn.Linear(6, 4).requires_grad_(False), third)
    x = torch.randn(len(ids), 4, 6, requires_grad=True)
    torch.manual_seed(5)
    together = apply_linears(x, linears)
    alone = []
    for linear in linears:
        torch.manual_seed(5)  # they share the dropped entries
        alone += apply_linears(x, (linear,))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), (x, *parameters(first)))
        for outs in (together, alone)
    ]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_outputs_are_contiguous_batch_first():
    """Whatever the layout of x; the frozen matrices then see rows side by side."""
    linear = make(SORTED)
    for x in (torch.randn(4, 5, 6), torch.randn(5, 4, 6).transpose(0, 1)):
        assert linear(x).transpose(0, 1).is_contiguous()


def test_missing_languages_are_an_error():
    linear = make([0])
    enter({})
    with pytest.raises(RuntimeError, match="source_lang_ids"):
        linear(torch.randn(2, 1, 6))


def test_the_linear_itself_is_frozen():
    linear = make([0])
    assert not any(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize("ids", [UNSORTED, SORTED])
def test_a_linear_that_is_left_out_has_zero_gradients(ids):
    """Its columns of the shared buffer are not left as they were in memory."""
    first, second = make(ids, n_more=7)
    x = torch.randn(4, len(ids), 6)
    second(x)
    first(x).sum().backward()
    assert all(grad.any() for grads in gradients(first) for grad in grads)
    assert not any(grad.any() for grads in gradients(second) for grad in grads)


@pytest.mark.parametrize("ids", [UNSORTED, SORTED])
def test_gradients_add_up(ids):
    """A linear that is used twice, two backward passes, and one that stops before the adapters."""
    linear = make(ids)
    x, other = torch.randn(2, 4, len(ids), 6)
    x.requires_grad_()

    def loss(*inputs):
        return sum(linear(i).square().sum() for i in inputs)

    once = [torch.autograd.grad(loss(i), parameters(linear)) for i in (x, other)]
    expected = [a + b for a, b in zip(*once)]
    both = loss(x, other)
    torch.autograd.grad(both, x, retain_graph=True)
    torch.testing.assert_close(
        list(torch.autograd.grad(both, parameters(linear), retain_graph=True)), expected
    )
    torch.testing.assert_close(list(torch.autograd.grad(both, parameters(linear))), expected)
