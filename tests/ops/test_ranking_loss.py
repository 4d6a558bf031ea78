"""ranking_loss against pairs enumerated in Python, and against torch's own logsigmoid for K = 2."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from fastrlhf import ranking_loss, reference
from fastrlhf.ops import _backend

GROUPS = (4, 9, 1, 0, 2, 6, 3, 2)
each_backend = cases.each_backend("ranking_loss")
fused = cases.each_backend("ranking_loss", cases.FUSED)
each_cpp = cases.each_backend("ranking_loss", cases.CPP)
anywhere = cases.anywhere(ranking_loss)
M = sum(GROUPS)


def ranks_of(groups, seed, highest=4, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, highest + 1, (sum(groups),), generator=generator, dtype=dtype)


def naive(scores, ranks, groups):
    """Pairs of each prompt, one by one: (loss, gradient)."""
    prompts, start = [], 0
    for size in groups:
        members = range(start, start + size)
        pairs = [(w, b) for w, b in itertools.permutations(members, 2) if ranks[w] < ranks[b]]
        start += size
        if pairs:
            prompts.append(pairs)
    loss, grad = 0.0, [0.0] * len(scores)
    for pairs in prompts:
        weight = 1 / (len(pairs) * len(prompts))
        for better, worse in pairs:
            margin = scores[better] - scores[worse]
            loss += weight * (math.log1p(math.exp(-abs(margin))) - min(margin, 0.0))
            slope = weight / (1 + math.exp(margin))
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
    for a, b, c in zip(ours, eager, truth, strict=True):
        cases.assert_close_to_eager(a, b, c)


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
def test_layouts_and_unwritten_memory(backend):
    scores, ranks, cu = cases.randn(M, 1, torch.float32), ranks_of(GROUPS, 2), cases.cu_of(GROUPS)
    plain = run(anywhere, scores, ranks, cu, backend=backend)
    strided_ranks = torch.stack([ranks, -ranks], dim=1)[:, 0]
    with cases.poisoned_empty():
        leaf = scores.clone().requires_grad_()
        wide = torch.stack([leaf, leaf + 1], dim=1)[:, 0]
        loss = anywhere(wide, strided_ranks, cu, backend=backend)
        (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(plain[0], loss.detach()) and torch.equal(plain[1], grad)
    cases.assert_same_for_any_threads(lambda: run(anywhere, scores, ranks, cu, backend=backend))


@each_cpp
def test_gradcheck_and_one_derivative_only(backend):
    scores, ranks, cu = cases.randn(M, 1), ranks_of(GROUPS, 2), cases.cu_of(GROUPS)
    scores.requires_grad_()
    torch.autograd.gradcheck(lambda s: anywhere(s, ranks, cu, backend=backend), scores)
    loss = anywhere(scores, ranks, cu, backend=backend)
    with pytest.raises(NotImplementedError, match="ranking_loss: the gradient of the gradient"):
        torch.autograd.grad(loss * loss, scores, create_graph=True)


@each_cpp
def test_compiles_without_a_graph_break(backend):
    scores, ranks, cu = cases.randn(M, 1, torch.float32), ranks_of(GROUPS, 2), cases.cu_of(GROUPS)
    scores, ranks, cu = cases.at(backend, (scores, ranks, cu))
    leaf = scores.requires_grad_()
    cases.assert_compiles(lambda *x: (ranking_loss(*x, backend=backend),), leaf, ranks, cu)


@each_cpp
def test_opcheck(backend):
    scores, ranks, cu = cases.randn(M, 1, torch.float32), ranks_of(GROUPS, 2), cases.cu_of(GROUPS)
    scores, ranks, cu = cases.at(backend, (scores, ranks, cu))
    op = torch.ops.fastrlhf.ranking_loss_fwd.default
    torch.library.opcheck(op, (scores.requires_grad_(), ranks, cu, True))
    torch.library.opcheck(op, (scores.detach(), ranks, cu, False))


@fused
def test_many_prompts_and_long_ones(backend, monkeypatch):
    """Blocks, or Triton's programs, take several prompts each."""
    prompts = 2500
    if cases.interpreted(backend):  # 2.4 prompts a program too
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
    loss, grad = torch.ops.fastrlhf.ranking_loss_fwd(*arguments, True)
    assert loss.isnan() and grad.isnan().all()


def test_says_which_backend_ran():
    before = _backend.calls["ranking_loss", "cpu"]
    ranking_loss(torch.zeros(2), torch.tensor([1, 2]), cases.cu_of([2]))
    assert _backend.calls["ranking_loss", "cpu"] == before + 1


@each_backend
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 99), st.integers(1, 9))
def test_any_groups(backend, groups, seed, highest):
    scores, ranks = cases.randn(sum(groups), seed), ranks_of(groups, seed, highest)
    expected, expected_grad = naive(scores.tolist(), ranks.tolist(), groups)
    loss, grad = run(anywhere, scores, ranks, cases.cu_of(groups), backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert torch.allclose(grad, expected_grad, rtol=1e-11, atol=1e-15)


S, R, CU = torch.zeros(4), torch.ones(4, dtype=torch.int64), torch.tensor([0, 4]).int()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"scores": [0.0]}, TypeError, ("scores", "Tensor", "list")),
        ({"scores": S.int()}, TypeError, ("scores", "float32", "int32")),
        ({"scores": S.view(2, 2)}, ValueError, ("scores", "(M,)", "(2, 2)")),
        ({"ranks": R.float()}, TypeError, ("ranks", "int64", "float32")),
        ({"ranks": R[:3]}, ValueError, ("ranks", "(4,)", "(3,)")),
        ({"ranks": R - 1}, ValueError, ("ranks", "at least 1", "0")),
        ({"ranks": R.to("meta")}, ValueError, ("ranks", "cpu", "meta")),
        ({"cu_groups": CU.long()}, TypeError, ("cu_groups", "int32", "int64")),
        ({"cu_groups": CU[:0]}, ValueError, ("cu_groups", "(P + 1,)", "(0,)")),
        ({"cu_groups": torch.tensor([0, 3]).int()}, ValueError, ("cu_groups", "4", "[0, 3]")),
        ({"cu_groups": torch.tensor([1, 4]).int()}, ValueError, ("cu_groups", "[1, 4]")),
        ({"cu_groups": torch.tensor([0, 3, 2, 4]).int()}, ValueError, ("cu_groups", "3, 2")),
        ({"cu_groups": None}, TypeError, ("cu_groups", "Tensor", "NoneType")),
        ({"backend": "cuda"}, ValueError, ("cuda", "cannot run")),
    ],
)
def test_errors_name_the_argument(arguments, kind, words):
    call = {"scores": S, "ranks": R, "cu_groups": CU, **arguments}
    cases.assert_raises(lambda: ranking_loss(**call), kind, "ranking_loss", *words)
