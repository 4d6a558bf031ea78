"""ranking_loss against pairs enumerated in Python, and against torch's own logsigmoid for K = 2."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.tolerance import assert_near
from fastrlhf import ranking_loss, reference

GROUPS = (4, 9, 1, 0, 2, 6, 3, 2)
each_backend = cases.each_backend("ranking_loss")
fused = cases.each_backend("ranking_loss", cases.FUSED)
each_cpp = cases.each_backend("ranking_loss", cases.CPP)
anywhere = cases.anywhere(ranking_loss)
M = sum(GROUPS)


def ranks_of(groups, seed, highest=4, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, highest + 1, (sum(groups),), generator=generator, dtype=dtype)


def naive(scores, ranks, groups, margins=None):
    """Pairs of each prompt, one by one: (loss, gradient)."""
    prompts, start = [], 0
    margins = [0.0] * len(groups) if margins is None else margins
    for size, margin in zip(groups, margins, strict=True):
        members = range(start, start + size)
        pairs = [(w, b) for w, b in itertools.permutations(members, 2) if ranks[w] < ranks[b]]
        start += size
        if pairs:
            prompts.append((pairs, margin))
    loss, grad = 0.0, [0.0] * len(scores)
    for pairs, margin in prompts:
        weight = 1 / (len(pairs) * len(prompts))
        for better, worse in pairs:
            d = scores[better] - scores[worse] - margin
            loss += weight * (math.log1p(math.exp(-abs(d))) - min(d, 0.0))
            slope = weight / (1 + math.exp(d))
            grad[better] -= slope
            grad[worse] += slope
    return loss, torch.tensor(grad, dtype=torch.float64)


def run(function, scores, *arguments, upstream=1.0, **options):
    leaf = scores.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss * upstream, leaf)[0]


@each_backend
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_pairs_one_by_one(backend, scale):
    scores, ranks = cases.randn(M, 1, scale=scale), ranks_of(GROUPS, 2)
    cu = cases.cu_of(GROUPS)
    loss, grad = run(anywhere, scores, ranks, cu, upstream=2.5, backend=backend)
    expected, expected_grad = naive(scores.tolist(), ranks.tolist(), GROUPS)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(grad, 2.5 * expected_grad, rtol=1e-11, atol=1e-15)


@each_backend
def test_margins_of_the_prompts_one_by_one(backend):
    scores, ranks, cu = cases.randn(M, 1, scale=2.0), ranks_of(GROUPS, 2), cases.cu_of(GROUPS)
    margins = cases.randn(len(GROUPS), 5, scale=2.0)
    expected, expected_grad = naive(scores.tolist(), ranks.tolist(), GROUPS, margins.tolist())
    margins[2] = math.nan  # a prompt of one completion has no pair to compare
    for margin in (margins, cases.with_strides(margins)):
        loss, grad = run(anywhere, scores, ranks, cu, margin=margin, backend=backend)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert torch.allclose(grad, expected_grad, rtol=1e-11, atol=1e-15)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_number_is_the_margin_of_every_prompt(backend, dtype):
    """-0.75 is exact in each dtype. A margin of 0 changes no bit."""
    scores, ranks, cu = cases.randn(M, 1, dtype), ranks_of(GROUPS, 2), cases.cu_of(GROUPS)
    for number in (-0.75, 0.0):
        margins = torch.full((len(GROUPS),), number, dtype=dtype)
        ours = run(anywhere, scores, ranks, cu, margin=number, backend=backend)
        each = run(anywhere, scores, ranks, cu, margin=margins, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(ours, each, strict=True))
        plain = run(anywhere, scores, ranks, cu, backend=backend)
        assert torch.equal(ours[0], plain[0]) == (number == 0)


@each_backend
def test_a_margin_of_a_pair_is_the_one_of_trainers(backend):
    """-logsigmoid(chosen - rejected - margin), as TRL's and OpenRLHF's reward trainers write it."""
    chosen, rejected = cases.randn((2, 33), 1, torch.float32, scale=3.0)
    margin = cases.randn(33, 2, torch.float32).abs()
    scores = torch.stack([chosen, rejected], dim=1).flatten()
    cu, ranks = cases.cu_of([2] * 33), torch.tensor([1, 2] * 33)
    loss, grad = run(anywhere, scores, ranks, cu, margin=margin, backend=backend)
    both = torch.stack([chosen, rejected]).requires_grad_()
    pairwise = -F.logsigmoid(both[0] - both[1] - margin).mean()
    (pairwise_grad,) = torch.autograd.grad(pairwise, both)
    assert torch.allclose(loss, pairwise.detach(), rtol=1e-6)
    assert torch.allclose(grad.view(33, 2), pairwise_grad.T, rtol=1e-5, atol=1e-8)


@cases.each_backend("ranking_loss", cases.CPP)
def test_the_raw_op_refuses_other_margins(backend):
    arguments = (torch.ones(4), torch.arange(4), cases.cu_of((2, 2)))
    scores, ranks, cu = cases.at(backend, arguments)
    with pytest.raises(RuntimeError, match="margins: expected"):
        torch.ops.fastrlhf.ranking_loss_fwd(scores, ranks, cu, scores[:3], False)


@each_backend
def test_a_nan_outside_every_pair_reaches_no_gradient(backend):
    """Ties and a prompt of one completion are not counted, whatever their scores."""
    scores = torch.tensor([1.0, 2.0, math.nan, math.nan, math.nan])
    ranks, cu = torch.tensor([1, 2, 1, 3, 3]), cases.cu_of((2, 1, 2))
    loss, grad = run(anywhere, scores, ranks, cu, backend=backend)
    expected, expected_grad = naive(scores.tolist(), ranks.tolist(), (2, 1, 2))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(grad, expected_grad.float(), rtol=1e-6)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_completions_are_the_pairwise_loss(backend, dtype):
    chosen, rejected = cases.randn((2, 33), 1, dtype, scale=3.0)
    scores = torch.stack([chosen, rejected], dim=1).flatten()
    cu = cases.cu_of([2] * 33)
    loss, grad = run(anywhere, scores, torch.tensor([1, 2] * 33), cu, backend=backend)
    both = torch.stack([chosen, rejected]).requires_grad_()
    pairwise = -F.logsigmoid(both[0] - both[1]).mean()
    (pairwise_grad,) = torch.autograd.grad(pairwise, both)
    close = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 0}
    assert torch.allclose(loss, pairwise.detach(), **close)
    assert torch.allclose(grad.view(33, 2), pairwise_grad.T, **close)
    swapped = scores.view(33, 2).flip(1).flatten()
    other = anywhere(swapped, torch.tensor([2, 1] * 33), cu, backend=backend)
    assert torch.equal(loss, other)


@each_backend
def test_the_papers_normaliser_is_the_number_of_pairs(backend):
    # No ties, K = 4: 1 / C(4, 2) times the sum over the pairs.
    scores = cases.randn(4, 1)
    expected = sum(-F.logsigmoid(scores[i] - scores[j]) for i in range(4) for j in range(i + 1, 4))
    loss = anywhere(scores, torch.arange(1, 5), cases.cu_of([4]), backend=backend)
    torch.testing.assert_close(loss, expected / math.comb(4, 2))


@each_backend
def test_prompts_without_a_strict_pair_are_not_counted(backend):
    scores, ranks = cases.randn(4, 1), torch.tensor([2, 1, 3, 3])
    alone = anywhere(scores[:2], ranks[:2], cases.cu_of([2]), backend=backend)
    for groups in ([2, 2], [2, 1, 1], [0, 2, 0, 2]):
        loss, grad = run(anywhere, scores, ranks, cases.cu_of(groups), backend=backend)
        assert torch.equal(loss, alone)
        assert (grad[2:] == 0).all() and (grad[:2] != 0).all()


@each_backend
def test_no_pairs_at_all_is_zero(backend):
    for groups, ranks in (([], []), ([0, 0], []), ([1, 1], [1, 2]), ([3], [2, 2, 2])):
        loss, grad = run(
            anywhere,
            torch.ones(len(ranks)),
            torch.tensor(ranks, dtype=torch.int64),
            cases.cu_of(groups),
            backend=backend,
        )
        assert loss == 0 and loss.shape == ()
        assert torch.equal(grad, torch.zeros(len(ranks)))


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_error_at_most_twice_eager(backend, dtype, scale):
    scores, ranks, cu = cases.randn(M, 3, dtype, scale), ranks_of(GROUPS, 4), cases.cu_of(GROUPS)
    ours = run(anywhere, scores, ranks, cu, backend=backend, upstream=1.7)
    eager = run(reference.ranking_loss, scores, ranks, cu, upstream=1.7)
    truth = run(reference.ranking_loss, scores.double(), ranks, cu, upstream=1.7)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert_near(ours[0], eager[0], truth[0], "loss")
    if dtype == torch.float32:
        assert_near(ours[1], eager[1], truth[1], "gradient")
    else:  # rounded once
        close = {"rtol": 1.01 * torch.finfo(dtype).eps / 2, "atol": 1e-7}
        torch.testing.assert_close(ours[1].double(), truth[1].double(), **close)


@each_backend
def test_only_the_order_of_ranks_matters(backend):
    scores, cu = cases.randn(M, 1, torch.float32), cases.cu_of(GROUPS)
    ranks = ranks_of(GROUPS, 2)
    loss = anywhere(scores, ranks, cu, backend=backend)
    assert torch.equal(loss, anywhere(scores, ranks * 10 - 7, cu, backend=backend))
    assert torch.equal(loss, anywhere(scores, ranks.int(), cu, backend=backend))
    shifted = anywhere(scores + 0.5, ranks, cu, backend=backend)
    torch.testing.assert_close(loss, shifted)


@each_backend
def test_nan_shows(backend):
    scores = torch.tensor([1.0, float("nan")])
    assert anywhere(scores, torch.tensor([1, 2]), cases.cu_of([2]), backend=backend).isnan()


@fused
def test_many_prompts_and_long_ones(backend, monkeypatch):
    """Blocks, or Triton's programs, take several prompts each."""
    prompts = 2500
    if cases.interpreted(backend):  # 2.4 prompts per program too
        from fastrlhf.kernels import ranking_loss as kernels

        prompts = 2500 * 64 // kernels.PROGRAMS
        monkeypatch.setattr(kernels, "PROGRAMS", 64)
    groups = [*torch.randint(0, 9, (prompts,), generator=torch.Generator().manual_seed(3)), 75, 33]
    groups = [int(size) for size in groups]
    scores, ranks = cases.randn(sum(groups), 1), ranks_of(groups, 2, highest=30)
    loss, grad = run(anywhere, scores, ranks, cases.cu_of(groups), backend=backend)
    expected, expected_grad = naive(scores.tolist(), ranks.tolist(), groups)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(grad, expected_grad, rtol=1e-11, atol=1e-17)


@cases.each_backend("ranking_loss", ("cuda",))
@pytest.mark.parametrize("cu", [[0, 3], [1, 6], [0, 5, 3, 6], [0, 7, 6], [0, -1, 6], [0]])
def test_broken_groups_are_not_followed(backend, cu):
    arguments = cases.at(backend, (torch.ones(6), torch.arange(6), torch.tensor(cu).int()))
    loss, grad = torch.ops.fastrlhf.ranking_loss_fwd(*arguments, None, True)
    assert loss.isnan() and grad.isnan().all()


@each_backend
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 99), st.integers(1, 9))
def test_any_groups(backend, groups, seed, highest):
    scores, ranks = cases.randn(sum(groups), seed), ranks_of(groups, seed, highest)
    expected, expected_grad = naive(scores.tolist(), ranks.tolist(), groups)
    loss, grad = run(anywhere, scores, ranks, cases.cu_of(groups), backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert torch.allclose(grad, expected_grad, rtol=1e-11, atol=1e-15)
