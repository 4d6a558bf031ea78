"""linear_cross_entropy on every backend, against torch's own F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near
from fastrlhf import linear_cross_entropy
from fastrlhf.ops import _backend, _gemms

N, H, V = 11, 19, 301
each_backend = cases.each_backend("linear_cross_entropy")


@pytest.fixture(autouse=True)
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)


def eager(hidden, weight, targets, bias=None, ignore_index=-100, reduction="mean"):
    """torch's own, in fp32 also for 16-bit operands; "mean" over no rows is 0 rather than NaN."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    options = {"ignore_index": ignore_index, "reduction": reduction}
    return F.cross_entropy(logits.flatten(0, -2), targets.long().flatten(), **options)


def inputs(dtype=torch.float32, device="cpu"):
    x = randn(N, H, seed=0, dtype=dtype, device=device)
    w = randn(V, H, seed=1, dtype=dtype, scale=0.4, device=device)
    b = randn(V, seed=2, dtype=dtype, device=device)
    targets = randint(V, (N,), 3, device=device)
    targets[[2, 7, 10]] = -100
    return x, w, b, targets


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_values_and_gradients(backend, reduction, dtype, poisoned):
    if backend == "triton" and dtype == torch.float16:
        pytest.skip("bfloat16 covers the 16-bit path; the interpreter is slow")
    device = DEVICE[backend]
    *tensors, targets = inputs(dtype, device)
    shape = (N,) if reduction == "none" else ()
    upstream = randn(*shape, seed=4, dtype=torch.float64, device=device)

    def run(function, dtype, device=device, **more):
        x, w, b = (t.to(device, dtype).requires_grad_() for t in tensors)
        out = function(x, w, targets.to(device), bias=b, reduction=reduction, **more)
        return out, *torch.autograd.grad(out, (x, w, b), upstream.to(device, out.dtype))

    ours, theirs = run(linear_cross_entropy, dtype, backend=backend), run(eager, dtype)
    truth = run(eager, torch.float64, "cpu")
    for what, o, e, t in zip(("loss", "dX", "dW", "db"), ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)
    assert ours[0].dtype == torch.float32 and {g.dtype for g in ours[1:]} == {dtype}
    assert _backend.calls["linear_cross_entropy", backend] > 0


@each_backend
def test_nothing_counts(backend):
    x, w, _, targets = inputs(device=DEVICE[backend])
    x.requires_grad_(), w.requires_grad_()
    for some in (torch.full_like(targets, -100), targets[:0]):
        loss = linear_cross_entropy(x[: len(some)], w, some, backend=backend)
        assert loss == 0
        for grad in torch.autograd.grad(loss, (x, w)):
            assert (grad == 0).all()


def test_ignored_rows_and_frozen_parameters_enter_no_gemm():
    for needs, gemms in (((1, 1), 3), ((1, 0), 2), ((0, 1), 2), ((0, 0), 1)):
        x, w, _, targets = inputs()
        x.requires_grad_(bool(needs[0])), w.requires_grad_(bool(needs[1]))
        loss, work, _ = cases.profiled(lambda x=x, w=w, t=targets: linear_cross_entropy(x, w, t))
        assert work == gemms * (N - 3) * H * V
        assert loss.requires_grad == any(needs)
    with torch.no_grad():
        x.requires_grad_(), w.requires_grad_()
        _, work, _ = cases.profiled(lambda: linear_cross_entropy(x, w, targets))
    assert work == (N - 3) * H * V


@each_backend
def test_a_sum_in_fp16_survives_until_it_is_scaled(backend):
    """dW of the sum is beyond 65504; dW of the mean that the user makes of it is not."""
    device, rows, x = DEVICE[backend], 64, 2048.0
    hidden = torch.full((rows, 16), x, dtype=torch.float16, device=device)
    w = torch.zeros(4, 16, dtype=torch.float16, device=device, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    (linear_cross_entropy(hidden, w, targets, reduction="sum", backend=backend) / rows).backward()
    expected = torch.full((4, 16), x / 4, device=device)
    expected[0] = -x * 3 / 4
    assert rows * expected.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(w.grad.float(), expected)
