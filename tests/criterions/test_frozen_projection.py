"""The loss over a frozen projection against its formula, and what it computes and keeps."""

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from toy import HALF_ON_CPU, Work

from lslora_fairseq.criterions import frozen_projection
from lslora_fairseq.criterions.frozen_projection import frozen_projection_loss

# padding is the word that wins a tie, as all words do where features are zero
BATCH, TIME, DIM, WORDS, RANK, PAD = 3, 6, 8, 50, 3, 0
TOKENS = 13  # that are not padding


def problem(adapted=True, dtype=torch.double, scale=1.0):
    """Features, projection and targets, of which five are padding."""
    x = torch.randn(BATCH, TIME, DIM, dtype=torch.double)
    E = torch.randn(WORDS, DIM, dtype=torch.double)
    A, B = (torch.randn(RANK, n, dtype=torch.double) for n in (DIM, WORDS))
    target = torch.randint(4, WORDS, (BATCH, TIME))
    target[0, 4:] = target[1, 3:] = PAD
    x, E, A, B = (t.mul(scale).to(dtype) for t in (x, E, A, B))
    trained = [t.requires_grad_() for t in ((x, A, B) if adapted else (x,))]
    return trained, (E, *trained[1:]) if adapted else (E, None, None), target


def stock(x, projection, target, smoothing):
    """Loss, nll and hits by fairseq's function."""
    E, A, B = projection
    logits = x @ E.t() if A is None else x @ (E + B.t() @ A).t()
    lprobs = logits.log_softmax(-1).flatten(0, 1)
    flat = target.flatten()
    hits = (lprobs.argmax(1).eq(flat) & flat.ne(PAD)).sum()
    return *label_smoothed_nll_loss(lprobs, flat, smoothing, ignore_index=PAD), hits


@pytest.fixture
def pieces(monkeypatch):
    """Makes the loss take so many pieces of the tokens."""

    def cut(number, dtype=torch.double):
        one, size = frozen_projection.pieces(-(-TOKENS // number), WORDS, dtype, "cpu")
        assert one == 1
        monkeypatch.setitem(frozen_projection.BUFFER, "cpu", size)
        assert frozen_projection.pieces(TOKENS, WORDS, dtype, "cpu") == (number, size)

    return cut


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS + 3])
def test_it_is_the_formula(pieces, adapted, smoothing, number, tokens):
    """In double precision; also where it is told of more targets than there are."""
    pieces(number)
    trained, projection, target = problem(adapted)
    expected = stock(trained[0], projection, target, smoothing)
    found = frozen_projection_loss(trained[0], projection, target, smoothing, PAD, tokens, True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for grad in (1.0, 0.37):
        wanted = torch.autograd.grad(expected[0] * grad, trained, retain_graph=True)
        given = torch.autograd.grad(found[0] * grad, trained, retain_graph=True)
        torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-13)
    assert all(grad.abs().max() > 0.1 for grad in given)
    assert not found[1].requires_grad


def test_some_targets_are_hit(pieces):
    pieces(3)
    trained, projection, target = problem()
    E, A, B = projection
    likeliest = (trained[0] @ (E + B.t() @ A).t()).argmax(-1)[:, :2]
    target[:, :2] = likeliest.where(likeliest != PAD, target[:, :2])
    *_, hits = frozen_projection_loss(trained[0], projection, target, 0.1, PAD, TOKENS, True)
    assert hits == stock(trained[0], projection, target, 0.1)[2] >= 4
    assert frozen_projection_loss(trained[0], projection, target, 0.1, PAD, TOKENS)[2] is None


def test_a_softmax_may_take_its_own_place():
    """torch does not promise it."""
    for shape in ((3, 7), (5, 1000), (2, 70_000)):
        logits = torch.randn(shape) * 9
        expected = logits.log_softmax(1)
        assert torch.equal(torch.log_softmax(logits, 1, out=logits), expected)


def test_padding_is_left_out_before_the_product(pieces):
    pieces(4)
    (x, *factors), projection, target = problem()
    with torch.no_grad():
        x[target == PAD] = float("nan")
    loss, *_ = frozen_projection_loss(x, projection, target, 0.1, PAD, TOKENS)
    loss.backward()
    assert not x.grad[target == PAD].any() and x.grad[target != PAD].all()
    assert all(factor.grad.isfinite().all() for factor in factors)


def test_no_tensor_of_all_tokens_and_words_and_no_waiting_for_the_device(pieces):
    pieces(4)
    trained, projection, target = problem()
    with Work() as work:
        loss, *_ = frozen_projection_loss(trained[0], projection, target, 0.1, PAD, TOKENS, True)
        forward = len(work.done)
        loss.backward()
    over_words = {size[0] for _, sizes in work.done for size in sizes if size[1:] == (WORDS,)}
    assert over_words == {DIM, RANK, 4, 3}  # Eᵀ, B and dB, and 13 tokens in 4 pieces
    names = [name for name, _ in work.done]
    assert not any(n in name for name in names for n in ("local_scalar", "nonzero", "masked_sel"))
    # the backward pass only multiplies what is there
    assert any("mm" in n for n in names[:forward]) and not any("mm" in n for n in names[forward:])


def test_only_the_gradients_that_are_wanted(pieces):
    pieces(2)
    trained, projection, target = problem()
    args = (projection, target, 0.1, PAD, TOKENS)

    def count(x):
        with Work() as work:
            frozen_projection_loss(x, *args)
        return sum("mm" in name for name, _ in work.done)

    both = count(trained[0])
    with torch.no_grad():
        assert count(trained[0]) == 2 * 3  # features · A, · B and · E
    for factor in projection[1:]:
        factor.requires_grad_(False)
    assert 2 * 3 < count(trained[0]) < both
    loss, *_ = frozen_projection_loss(trained[0], *args)
    loss.backward()
    (wanted,) = torch.autograd.grad(stock(trained[0], projection, target, 0.1)[0], trained[0])
    torch.testing.assert_close(trained[0].grad, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_keeps_small_gradients_until_the_loss_is_scaled(pieces, dtype):
    """The target is so likely that the dz of another word is 1e-7; the least of fp16 is 6e-8."""
    if dtype == torch.half and not HALF_ON_CPU:
        pytest.skip("this torch computes no fp16 on a CPU")
    pieces(2, dtype)
    trained, projection, target = problem(dtype=dtype, scale=0.05)
    x, E = trained[0], projection[0]
    target[target != PAD] = 7
    with torch.no_grad():
        x.add_(1).mul_(16)  # and small weights, so that dx is 1e-6
        E.div_(16)[7] = 2 / 16
        projection[1].div_(16)
    wide = [t.detach().float().requires_grad_() for t in trained]
    scaled = 2.0**12
    loss, *_ = frozen_projection_loss(x, projection, target, 0.0, PAD, TOKENS)
    (loss * scaled).backward()
    expected, *_ = stock(wide[0], (E.float(), *wide[1:]), target, 0.0)
    (expected * scaled).backward()
    assert loss.dtype == torch.float
    for half, full in zip(trained, wide):
        assert half.grad.dtype == dtype and 0 < full.grad.abs().max() < scaled * 1e-3
        error = (half.grad.float() - full.grad).norm() / full.grad.norm()
        assert error < (0.02 if dtype == torch.half else 0.15)  # of a logit of 16, as e^z


@pytest.mark.parametrize(
    "words, dtype, device, number",
    [
        (16_000, torch.float, "cpu", 3),  # by tokens
        (256_125, torch.float, "cpu", 4),  # by bytes
        (256_125, torch.half, "cpu", 6),  # its softmax is in fp32
        (16_000, torch.half, "cuda", 1),
        (256_125, torch.half, "cuda", 3),
    ],
)
def test_a_piece_is_bounded_in_bytes_and_on_a_cpu_in_tokens(words, dtype, device, number):
    tokens = -(-2000 // number)
    of_token = words * (4 if dtype == torch.float else 6)
    assert frozen_projection.pieces(2000, words, dtype, device) == (number, tokens * of_token)
