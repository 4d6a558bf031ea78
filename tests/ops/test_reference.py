"""The reference against torch's own functions. The sequence ops and the losses have naive oracles in
their own test files, which run on the reference too."""

import pytest
import torch
import torch.nn.functional as F

from _support import sequence_cases as cases
from fastrlhf import reference

NAN, INF = float("nan"), float("inf")
ROWS, HIDDEN, VOCAB = 37, 8, 53


def logits_and_targets(dtype=torch.float64):
    targets = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(1))
    return cases.randn((ROWS, VOCAB), 2, dtype, scale=3.0), targets


def head(dtype=torch.float64):
    hidden = cases.randn((ROWS, HIDDEN), 3, dtype).requires_grad_()
    weight = cases.randn((VOCAB, HIDDEN), 4, dtype).requires_grad_()
    return hidden, weight, logits_and_targets()[1]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows (float64)."""
    monkeypatch.setitem(reference._CHUNK_BYTES, "fast", 3 * VOCAB * 8)


def test_token_logprob_is_log_softmax_and_entropy():
    logits, targets = logits_and_targets()
    logprob, entropy = reference.token_logprob(logits, targets, return_entropy=True)
    both = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprob, both.log_prob(targets))
    torch.testing.assert_close(entropy, both.entropy())


def test_token_logprob_softcap_before_temperature():
    logits, targets = logits_and_targets()
    temperature = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    capped = 5 * torch.tanh(logits / 5)
    for t, rows in ((0.7, 0.7), (temperature, temperature.unsqueeze(1))):
        got = reference.token_logprob(logits, targets, temperature=t, softcap=5.0)
        expected = F.log_softmax(capped / rows, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(got, expected)


def test_token_logprob_masked_rows_are_not_looked_at():
    logits, targets = logits_and_targets()
    mask = cases.random_mask((ROWS,), 5)
    dirty = logits.masked_fill(~mask.unsqueeze(1), NAN).requires_grad_()
    bad = targets.masked_fill(~mask, -100)
    logprob, entropy = reference.token_logprob(dirty, bad, mask=mask, return_entropy=True)
    assert (logprob[~mask] == 0).all() and (entropy[~mask] == 0).all()
    torch.testing.assert_close(logprob[mask], reference.token_logprob(logits, targets)[mask])
    (grad,) = torch.autograd.grad((logprob + entropy).sum(), dirty)
    assert grad.isfinite().all() and (grad[~mask] == 0).all()


def test_token_logprob_infinite_logits_are_finite_and_nan_stays():
    logits, targets = logits_and_targets()
    logits[:, ::3] = -INF
    targets = targets // 3 * 3 + 1
    targets[targets >= VOCAB] = 1
    logits[5, 7] = NAN
    logits.requires_grad_()
    logprob, entropy = reference.token_logprob(logits, targets, return_entropy=True)
    clean = torch.arange(ROWS) != 5
    assert logprob[5].isnan() and entropy[5].isnan()
    assert logprob[clean].isfinite().all() and entropy[clean].isfinite().all()
    (grad,) = torch.autograd.grad((logprob + entropy)[clean].sum(), logits)
    assert grad[clean].isfinite().all()


def test_linear_logprob_is_the_head_and_then_token_logprob(small_chunks):
    hidden, weight, targets = head()
    bias = cases.randn(VOCAB, 6).requires_grad_()
    mask, temperature = cases.random_mask((ROWS,), 7), torch.linspace(0.5, 2, ROWS).double()
    options = {"temperature": temperature, "softcap": 4.0, "mask": mask, "return_entropy": True}
    ours = reference.linear_logprob(hidden, weight, targets, bias=bias, **options)
    dense = reference.token_logprob(F.linear(hidden, weight, bias), targets, **options)
    upstream = cases.randn((2, ROWS), 8).unbind()
    leaves = (hidden, weight, bias)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(dense, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_linear_logprob_keeps_no_logits(small_chunks):
    hidden, weight, targets = head()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        reference.linear_logprob(hidden, weight, targets).sum().backward()
    assert kept  # the rows and the weight, per chunk
    largest = max(shape.numel() for shape in kept)
    assert largest <= VOCAB * HIDDEN < ROWS * VOCAB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_logprob_rounds_gradients_once(dtype, monkeypatch):
    hidden, weight, targets = head(dtype)
    whole = torch.autograd.grad(
        reference.linear_logprob(hidden, weight, targets).sum(), (hidden, weight)
    )
    monkeypatch.setitem(reference._CHUNK_BYTES, "fast", 3 * VOCAB * 4)
    chunked = torch.autograd.grad(
        reference.linear_logprob(hidden, weight, targets).sum(), (hidden, weight)
    )
    exact = torch.autograd.grad(
        reference.linear_logprob(hidden.double(), weight.double(), targets).sum(), (hidden, weight)
    )
    for a, b, c in zip(whole, chunked, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        # A sum in 16 bits over 13 chunks would be off by several roundings.
        assert torch.allclose(b.float(), c.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.allclose(a.float(), b.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_linear_logprob_shapes_and_empty(small_chunks):
    hidden, weight, targets = head()
    flat = reference.linear_logprob(hidden[:36], weight, targets[:36])
    boxed = reference.linear_logprob(
        hidden[:36].view(4, 9, HIDDEN), weight, targets[:36].view(4, 9)
    )
    assert torch.equal(flat.view(4, 9), boxed)
    assert reference.linear_logprob(hidden[:0], weight, targets[:0]).shape == (0,)
    with pytest.raises(ValueError, match="process_group"):
        reference.linear_logprob(hidden, weight, targets, process_group=object())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_torchs(reduction, small_chunks):
    hidden, weight, targets = head()
    targets[::4] = -100
    ours = reference.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    torchs = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(ours, torchs)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight)),
        torch.autograd.grad(torchs.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    nothing = torch.full_like(targets, -100)
    assert (reference.linear_cross_entropy(hidden, weight, nothing, reduction=reduction) == 0).all()


def test_sequence_ops_are_differentiable():
    # The public ops return constants; the specification itself follows autograd.
    logprob, values = cases.randn((2, 9), 1).requires_grad_(), cases.randn((2, 9), 2)
    values.requires_grad_()
    cu = cases.cu_of([4, 0, 5])

    def outputs(logprob, values):
        out = reference.kl_gae(
            logprob[0], logprob[1], logprob[0, :3], values[0], beta=0.1, whiten=True, cu_seqlens=cu
        )
        return out.advantages, out.returns, out.rewards

    assert torch.autograd.gradcheck(outputs, (logprob, values))
