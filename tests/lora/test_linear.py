"""LSLoLinear: the formula, its gradients, shapes, dropout, precision."""

import pytest
import torch
from torch import nn

from lslora_fairseq.lora import routing
from lslora_fairseq.lora.linear import AdapterFactor, LSLoLinear, apply_linears
from lslora_fairseq.lora.plan import Site
from lslora_fairseq.lora.routing import AdapterLayout, RouteSlot

RANKS = (1, 3, 2)
UNSORTED = [2, 0, 1, 0, 2]
SORTED = [0, 0, 1, 2, 2]


@pytest.fixture(params=[16, 3, 1], ids=lambda columns: f"blocks of {columns}", autouse=True)
def block_rank(request, monkeypatch):
    """The languages of a sorted batch in one block, in two, and each in its own."""
    monkeypatch.setattr(routing, "BLOCK_RANK", request.param)


def route(layout, ids):
    """In both formulations: shared blocks where the sentences are sorted, else gathered rows."""
    lang_ids = torch.tensor(ids)
    return layout.sorted(lang_ids) if ids == sorted(ids) else layout.gathered(lang_ids)


def make(ids, n_in=6, n_out=5, site_in=None, site_out=None, alphas=RANKS, bias=True, **kwargs):
    """A linear with random adapters, routed for sentences of the languages *ids*."""
    site = Site("encoder", 0, "fc1", "source", site_in or n_in, site_out or n_out)
    layout = AdapterLayout(RANKS, alphas)
    slot = RouteSlot()
    slot.routes = {"source": route(layout, ids)}
    linear = LSLoLinear(nn.Linear(n_in, n_out, bias=bias), site, layout, slot, **kwargs)
    with torch.no_grad():
        linear.lora_B.normal_()
    return linear


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
    rows = slice(1, 4)
    expected = 6 / 3 * linear.lora_B[rows].T @ linear.lora_A[rows]
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


def test_fresh_adapter_is_zero_and_a_is_kaiming():
    linear = make([0])
    fresh = LSLoLinear(nn.Linear(6, 5), linear.site, linear.layout, linear.slot)
    assert not fresh.lora_B.any()
    bound = 6**-0.5  # Kaiming-uniform with a = √5
    assert 0.8 * bound < fresh.lora_A.abs().max() <= bound
    x = torch.randn(3, 1, 6)
    assert torch.equal(fresh(x), nn.functional.linear(x, fresh.weight, fresh.bias))


@pytest.mark.parametrize("ids", [[2, 0, 1, 2], [0, 1, 2, 2]])
@pytest.mark.parametrize("site_in, site_out", [(None, None), (3, 3)])
def test_gradcheck(ids, site_in, site_out):
    linear = make(ids, site_in=site_in, site_out=site_out, alphas=(2.0, 1.0, 5.0)).double()
    linear.layout.double()
    linear.slot.routes = {"source": route(linear.layout, ids)}
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)

    def function(x, A, B):
        return torch.func.functional_call(linear, {"lora_A": A, "lora_B": B}, (x,))

    factors = [f.detach().clone().requires_grad_() for f in (linear.lora_A, linear.lora_B)]
    assert torch.autograd.gradcheck(function, (x, *factors))


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_reach_only_the_languages_present(count):
    linear = make([0, 2, 2, 0][:count])
    linear(torch.randn(3, count, 6)).square().sum().backward()
    for factor in (linear.lora_A, linear.lora_B):
        touched = factor.grad.ne(0).any(1)
        assert touched.tolist() == [True, False, False, False, True, True]
    assert linear.weight.grad is None and linear.bias.grad is None


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 1, 0]])
def test_a_pruned_entry_gets_no_gradient(ids):
    linear = make(ids)
    linear.lora_B_mask[2, 3] = False
    linear.lora_A_mask[0, 1] = False
    linear(torch.randn(3, 3, 6)).square().sum().backward()
    assert linear.lora_B.grad[2, 3] == 0 and linear.lora_A.grad[0, 1] == 0
    assert linear.lora_B.grad.ne(0).sum() == linear.lora_B.numel() - 1
    assert linear.lora_A.grad.ne(0).sum() == linear.lora_A.numel() - 1


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
    grads = torch.autograd.grad(dropped.square().sum(), (x, linear.lora_A))
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, linear.lora_A))
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    linear.eval()
    torch.testing.assert_close(linear(x), by_formula(linear, x, [0, 1]), atol=1e-5, rtol=1e-5)


def test_beams_of_a_sentence_share_its_route():
    """Cross-attention projects each sentence once while the routes count its beams."""
    linear = make([1, 1, 1, 0, 0, 0])  # not sorted
    x = torch.randn(4, 2, 6)
    torch.testing.assert_close(linear(x), by_formula(linear, x, [1, 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_and_keeps_fp32_gradients(dtype):
    linear = make([0, 1, 2])
    x = torch.randn(4, 3, 6)
    expected = linear(x)
    expected.sum().backward()
    exact = linear.lora_B.grad.clone()
    linear.lora_B.grad = None
    with torch.autocast("cpu", dtype):
        y = linear(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert linear.lora_B.grad.dtype == torch.float32
    # bf16 keeps 8 bits of the mantissa
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(linear.lora_B.grad, exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("ids", [UNSORTED, SORTED])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_linears_of_one_input_together_equal_each_alone(ids, dropout):
    """q, k and v, of which one has no adapters and all outputs differ in size."""
    first = make(ids, n_out=5, dropout=dropout)
    third = make(ids, n_out=7, dropout=dropout)
    third.slot = first.slot
    linears = (first, nn.Linear(6, 4).requires_grad_(False), third)
    x = torch.randn(len(ids), 4, 6, requires_grad=True)
    adapters = [f for lin in (first, third) for f in (lin.lora_A, lin.lora_B)]
    torch.manual_seed(5)
    together = apply_linears(x, linears)
    alone = []
    for linear in linears:
        torch.manual_seed(5)  # they share the dropped entries
        alone += apply_linears(x, (linear,))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), (x, *adapters))
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
    linear.slot.routes = {}
    with pytest.raises(RuntimeError, match="source_lang_ids"):
        linear(torch.randn(2, 1, 6))


def test_only_the_factors_train_and_are_known_to_the_optimizer():
    linear = make([0])
    trained = {name for name, p in linear.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert AdapterFactor.of(linear.lora_B).mask is linear.lora_B_mask
    assert AdapterFactor.of(linear.weight) is None
