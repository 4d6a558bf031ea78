"""linear_logprob on every backend, against float64 and against F.linear with log_softmax."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near
from fastrlhf import linear_logprob, linear_token_loss
from fastrlhf.ops import _backend, _gemms, _linear

module = importlib.import_module("fastrlhf.ops.linear_logprob")  # the name is the function's too
N, H, V = 11, 19, 301
each_backend = cases.each_backend("linear_logprob")


@pytest.fixture
def chunks(monkeypatch):
    """Four rows per chunk, so that a small test meets several chunks and a short last one."""

    def of(rows, keep=False):
        monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: rows)
        monkeypatch.setattr(module, "KEEP_BYTES", (1 << 20) if keep else 0)

    of(4)
    return of


def eager(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, mask=None):
    """F.linear, log_softmax, gather: in fp32 also for 16-bit operands, as a careful trainer does."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1)
    logp = torch.log_softmax(z / temperature, dim=-1)
    index = targets.long() if mask is None else targets.long() * mask
    logprob = logp.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    if mask is not None:
        logprob, entropy = logprob * mask, entropy * mask
    return logprob, entropy


def parameters(dtype=torch.float32, device="cpu"):
    hidden = randn(1, N, H, seed=0, dtype=dtype, device=device)
    weight = randn(V, H, seed=1, dtype=dtype, scale=0.4, device=device)
    return hidden, weight, randn(V, seed=2, dtype=dtype, device=device)


@each_backend
@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_values_and_gradients(backend, keep, options, dtype, chunks, poisoned):
    if backend == "triton" and (keep or dtype == torch.float16):
        pytest.skip("the chunks are the same code on every backend; the interpreter is slow")
    chunks(4, keep)
    device, shape = DEVICE[backend], (1, N)
    targets = randint(V, shape, 3, device=device)
    kwargs = cases.OPTIONS[options](shape, device)
    tensors = parameters(dtype, device)
    upstream = [randn(*shape, seed=s, dtype=torch.float64, device=device) for s in (4, 5)]

    def run(function, dtype, device=device, kwargs=kwargs, **more):
        x, w, b = (t.to(device, dtype).requires_grad_() for t in tensors)
        out = function(x, w, targets.to(device), bias=b, **kwargs, **more)
        grads = [g.to(device, o.dtype) for g, o in zip(upstream, out, strict=True)]
        return *out, *torch.autograd.grad(out, (x, w, b), grads)

    ours = run(linear_logprob, dtype, backend=backend, return_entropy=True)
    theirs = run(eager, dtype)
    truth = run(eager, torch.float64, "cpu", cases.to_double(kwargs))
    names = ("logprob", "entropy", "dX", "dW", "db")
    for what, o, e, t in zip(names, ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)
    assert ours[0].dtype == torch.float32 and {g.dtype for g in ours[2:]} == {dtype}
    assert _backend.calls["linear_logprob", backend] > 0


@each_backend
@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_lse_and_its_gradient(backend, keep, options, chunks, poisoned):
    """Beside the other outputs, with upstream gradients of all, and alone."""
    if backend == "triton" and keep:
        pytest.skip("the chunks are the same code on every backend; the interpreter is slow")
    chunks(4, keep)
    device, shape = DEVICE[backend], (1, N)
    targets = randint(V, shape, 3, device=device)
    kwargs, tensors = cases.OPTIONS[options](shape, device), parameters(device=device)
    on_cpu = cases.OPTIONS[options](shape, "cpu")
    upstream = [randn(*shape, seed=s, dtype=torch.float64, device=device) for s in (4, 5, 6)]

    def by_torch(x, w, targets, *, bias, mask=None, temperature=1.0, softcap=None, **_):
        given = {"mask": mask, "temperature": temperature, "softcap": softcap}
        z = F.linear(x, w, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        row = isinstance(temperature, torch.Tensor)
        lse = torch.logsumexp(z / (temperature.unsqueeze(-1) if row else temperature), -1)
        lse = lse if mask is None else lse * mask
        return *eager(x, w, targets, bias, **given), lse

    def run(function, dtype, device, kwargs, wanted, **more):
        x, w, b = (t.to(device, dtype).requires_grad_() for t in tensors)
        out = function(x, w, targets.to(device), bias=b, **kwargs, **more)
        given = [out[i] for i in wanted]
        grads = [upstream[i].to(device, dtype) for i in wanted]
        return *out, *torch.autograd.grad(given, (x, w, b), grads)

    flags = {"return_entropy": True, "return_lse": True, "backend": backend}
    ours = run(linear_logprob, torch.float32, device, kwargs, (0, 1, 2), **flags)
    theirs = run(by_torch, torch.float32, "cpu", on_cpu, (0, 1, 2))
    truth = run(by_torch, torch.float64, "cpu", cases.to_double(kwargs), (0, 1, 2))
    names = ("logprob", "entropy", "lse", "dX", "dW", "db")
    for what, o, e, t in zip(names, ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)
    if backend != "triton":
        alone = cases.to_double(kwargs)
        truth = run(by_torch, torch.float64, "cpu", alone, (2,))
        alone = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in alone.items()}
        for o, t in zip(
            run(linear_logprob, torch.float64, device, alone, (2,), **flags), truth, strict=True
        ):
            torch.testing.assert_close(o.cpu(), t, rtol=1e-11, atol=1e-13)
    x, w, b = tensors
    without = linear_logprob(x, w, targets, bias=b, **kwargs, return_lse=True, backend=backend)
    assert (
        len(without) == 2 and torch.equal(without[0], ours[0]) and torch.equal(without[1], ours[2])
    )


@each_backend
def test_gradcheck_of_kept_logits(backend, chunks):
    """test_conformance.py checks the gradient that recomputes them."""
    if backend == "triton":
        pytest.skip("the chunks are the same code on every backend; the interpreter is slow")
    chunks(2, keep=True)
    device = DEVICE[backend]
    x, w = randn(5, 3, seed=0, dtype=torch.float64), randn(7, 3, seed=1, dtype=torch.float64)
    b = randn(7, seed=2, dtype=torch.float64)
    tensors = [t.to(device).requires_grad_() for t in (x, w, b)]
    targets, mask = randint(7, (5,), 3, device=device), torch.tensor([1, 1, 0, 1, 1], device=device)

    def function(x, w, b):
        options = {"softcap": 4.0, "temperature": 0.7, "mask": mask, "return_entropy": True}
        return linear_logprob(x, w, targets, bias=b, backend=backend, **options)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_frozen_parameters_and_idle_rows_enter_no_gemm(keep, chunks):
    """From the shapes of the GEMMs that ran: rows x H x V each, and idle rows are not among them."""
    chunks(4, keep)
    targets = randint(V, (1, N), 3)
    mask = torch.zeros(1, N, dtype=torch.bool)
    mask[0, [1, 4, 5, 8, 9, 10]] = True
    upstream = randn(1, N, seed=4)
    upstream[0, 5] = 0  # counts, but carries no gradient
    for frozen, extra in (("none", 2), ("weight", 1), ("hidden", 1)):
        x, w, _ = parameters()
        x.requires_grad_(frozen != "hidden")
        w.requires_grad_(frozen != "weight")
        out, forward, _ = cases.profiled(lambda x=x, w=w: linear_logprob(x, w, targets, mask=mask))
        _, backward, _ = cases.profiled(lambda out=out: out.backward(upstream))
        assert forward == 6 * H * V
        assert backward == (extra + (not keep)) * 5 * H * V
        assert (x.grad is None) == (frozen == "hidden")
        assert (w.grad is None) == (frozen == "weight")


@each_backend
def test_strided_hidden_and_workspaces(backend):
    """A slice [:, :-1] of the hidden states, and both presets, give the same numbers."""
    device = DEVICE[backend]
    whole = randn(2, 5, H, seed=0, device=device)
    w = randn(V, H, seed=1, device=device)
    targets = randint(V, (2, 4), 2, dtype=torch.int32, device=device)
    expected = eager(whole[:, :-1], w, targets)[0]
    for workspace in ("fast", "compact"):
        out = linear_logprob(whole[:, :-1], w, targets, workspace=workspace, backend=backend)
        torch.testing.assert_close(out, expected)


@each_backend
@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_one_fp64_operand_makes_the_sums_fp64(backend, wide):
    if DEVICE[backend] == "cuda":
        pytest.skip("float64 runs on the CPU")
    x, w, bias = randn(3, H, seed=0), randn(V, H, seed=1), randn(V, seed=2)
    x, w = (x.double(), w) if wide == "hidden" else (x, w.double())
    operands = [t.requires_grad_() for t in (x, w, bias)]
    copies = [t.detach().double().requires_grad_() for t in operands]
    targets = randint(V, (3,), 3)
    out = linear_logprob(x, w, targets, bias=bias, backend=backend)
    expected = eager(*copies[:2], targets, copies[2])[0]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for operand, copy in zip(operands, copies, strict=True):
        torch.testing.assert_close(operand.grad, copy.grad.to(operand.dtype))


@each_backend
def test_kept_logits_serve_a_second_backward(backend, chunks):
    chunks(4, keep=True)
    x, w, _ = (t.requires_grad_() for t in parameters(device=DEVICE[backend]))
    out = linear_logprob(x, w, randint(V, (1, N), 3, device=x.device), backend=backend).sum()
    first = torch.autograd.grad(out, (x, w), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, (x, w)), first, strict=True):
        assert torch.equal(a, b)


def test_peak_memory_is_one_chunk_of_logits():
    """The largest allocation, while 4096 x 8192 logits (128 MiB) are never whole."""
    x = randn(4096, 16, seed=0).requires_grad_()
    w = randn(8192, 16, seed=1).requires_grad_()
    targets = randint(8192, (4096,), 2)

    def step():
        linear_logprob(x, w, targets, workspace="compact").sum().backward()

    _, _, largest = cases.profiled(step)
    budget = _gemms.Gemms.logits_bytes["compact"]
    assert 0.8 * budget < largest <= budget


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 9), width=st.integers(1, 9), vocab=st.integers(1, 40), data=st.data())
def test_any_shape(rows, width, vocab, data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)) or [])
    mask = mask.bool()
    x, w = randn(rows, width, seed=rows), randn(vocab, width, seed=vocab)
    targets, g = randint(vocab, (rows,), 1), randn(rows, seed=2)
    results = []
    for function, dtype in ((linear_logprob, torch.float32), (eager, torch.float64)):
        a, b = (t.to(dtype).requires_grad_() for t in (x, w))
        out = function(a, b, targets, mask=mask)
        out = out[0] if isinstance(out, tuple) else out
        results.append((out, *torch.autograd.grad(out, (a, b), g.to(dtype))))
    for o, e in zip(*results, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_bitwise_equal_to_the_update(dtype, options, backend, monkeypatch):
    """The forward takes blocks of the vocabulary with all rows, the update blocks of rows with all columns."""
    if _backend.unavailable_reason("linear_logprob", backend, "cpu"):
        pytest.skip("no C++ extension")
    rows, vocab = 131, 9001  # three blocks of columns, ragged
    monkeypatch.setattr(module, "KEEP_BYTES", 0)
    x = randn(1, rows, 24, seed=0, dtype=dtype)
    w, b = randn(vocab, 24, seed=1, dtype=dtype, scale=0.4), randn(vocab, seed=2, dtype=dtype)
    targets = randint(vocab, (1, rows), 3)
    kwargs = {"bias": b, "backend": backend, **cases.OPTIONS[options]((1, rows), "cpu")}
    forward = linear_logprob(x, w, targets, return_entropy=True, **kwargs)
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 50)
    loss = lambda logprob, entropy: -logprob  # noqa: E731
    update = linear_token_loss(x, w, targets, loss, with_entropy=True, **kwargs)
    assert torch.equal(forward[0], update.logprob) and torch.equal(forward[1], update.entropy)
    monkeypatch.setattr(_linear, "BY_BLOCK_ROWS", rows + 1)
    whole = linear_logprob(x, w, targets, return_entropy=True, **kwargs)
    assert torch.equal(forward[0], whole[0]) and torch.equal(forward[1], whole[1])
    truth = linear_logprob(
        x.double(), w.double(), targets, **kwargs | {"bias": b.double(), "backend": "reference"}
    )
    torch.testing.assert_close(forward[0].double(), truth, rtol=2e-6, atol=2e-6)


def test_fp64_goes_by_rows():
    """A fp64 GEMM is not bitwise independent of the other columns, so the forward would differ from the update."""
    x, w = randn(378, 64, seed=0).double(), randn(9001, 64, seed=1).double()
    targets = randint(9001, (378,), 3)
    update = linear_token_loss(x, w.clone().requires_grad_(), targets, torch.neg)
    assert torch.equal(linear_logprob(x, w, targets), update.logprob)


def test_a_bad_target_of_a_later_block_is_reported():
    x, w = randn(80, 4, seed=0), randn(9001, 4, seed=1)
    targets = torch.zeros(80, dtype=torch.int64).index_fill(0, torch.tensor([7]), 9001)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 9001\); got 9001 at row 7"):
        linear_logprob(x, w, targets)


@pytest.mark.parametrize("rows", [3, 70], ids=["by row", "by block"])
@each_backend
def test_a_whole_block_of_nan_or_padding(backend, rows):
    """The max of a block of NaN may be -inf, as that of padding is; a target in padding has log-prob -inf."""
    if DEVICE[backend] != "cpu":
        pytest.skip("only the CPU combines blocks")
    x, w, b = randn(rows, 4, seed=0), randn(4099, 4, seed=1), randn(4099, seed=2)
    targets = torch.arange(rows)
    last = slice(2050, None)  # the second of two blocks
    b[last] = -torch.inf
    targets[0] = 4098
    padded = linear_logprob(x, w, targets, bias=b, return_entropy=True, backend=backend)
    torch.testing.assert_close(padded[0], eager(x, w, targets, b)[0])
    assert padded[1].isfinite().all()
    w[last] = torch.nan
    for out in linear_logprob(x, w, targets, bias=b, return_entropy=True, backend=backend):
        assert out.isnan().all()
