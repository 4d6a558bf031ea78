"""linear_cross_entropy on every backend, against torch's own F.cross_entropy."""

import functools

import pytest
import torch
import torch.nn.functional as F

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near
from fastrlhf import linear_cross_entropy, linear_logprob
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


# ---- ignore_index in the vocabulary, class weights, label smoothing, z-loss, lse

SETTINGS = {
    "class weight": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.01},
    "lse": {},
    "every": {"class_weight": True, "label_smoothing": 0.2, "z_loss": 0.01},
}
PAD = 5


def every_eager(
    x, w, targets, bias, reduction, class_weight=None, label_smoothing=0.0, z_loss=0.0, temperature=1.0, softcap=None,
):  # fmt: skip
    """(loss, lse) by torch's own cross_entropy and logsumexp."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = F.linear(x.to(wide), w.to(wide), bias.to(wide))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature.unsqueeze(1) if isinstance(temperature, torch.Tensor) else temperature)
    c = None if class_weight is None else class_weight.to(wide)
    options = {"ignore_index": PAD, "reduction": reduction, "label_smoothing": label_smoothing}
    loss, counted = F.cross_entropy(z, targets, weight=c, **options), targets != PAD
    lse = torch.logsumexp(z, 1) * counted
    z_term = z_loss * lse.square()
    if reduction != "none":
        z_term = z_term.sum() / (counted.sum() if reduction == "mean" else 1)
    return loss + z_term, lse.detach()


def check_settings_against_eager(backend, reduction, dtype, name, logits="plain"):
    device, more = DEVICE[backend], dict(SETTINGS[name])
    *tensors, targets = inputs(dtype)
    targets[[2, 7, 10]] = PAD
    if "class_weight" in more:
        more["class_weight"] = torch.rand(V, generator=cases.generator(6)).to(dtype)
    if logits == "softcap":
        more |= {"softcap": 3.0, "temperature": torch.linspace(0.5, 1.5, N)}
    upstream = randn(*((N,) if reduction == "none" else ()), seed=4, dtype=torch.float64)

    def run(function, dtype, device, more, **options):
        more = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in more.items()}
        x, w, b = (t.to(device, dtype).requires_grad_() for t in tensors)
        leaves, on = (x, w, b), targets.to(device)
        loss, lse = function(x, w, on, bias=b, reduction=reduction, **more, **options)
        assert not lse.requires_grad
        return loss, lse, *torch.autograd.grad(loss, leaves, upstream.to(device, loss.dtype))

    options = {"backend": backend, "ignore_index": PAD, "return_lse": True}
    ours = run(linear_cross_entropy, dtype, device, more, **options)
    theirs = run(every_eager, dtype, "cpu", more)
    truth = run(every_eager, torch.float64, "cpu", cases.to_double(more))
    for what, o, e, t in zip(("loss", "lse", "dX", "dW", "db"), ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and {g.dtype for g in ours[2:]} == {
        dtype
    }


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_equal_torchs(backend, reduction, name, poisoned):
    check_settings_against_eager(backend, reduction, torch.float32, name)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_settings_with_softcap_and_temperatures(backend, reduction, dtype, poisoned):
    check_settings_against_eager(backend, reduction, dtype, "every", "softcap")


@each_backend
def test_a_pad_id_of_the_vocabulary_is_ignored(backend):
    """The plain path: the same bits as with another number for it."""
    x, w, b, targets = inputs(device=DEVICE[backend])
    pads = targets.masked_fill(targets == -100, PAD)
    assert (targets == PAD).sum() == 0 and (pads == PAD).sum() == 3
    expected = linear_cross_entropy(x, w, targets, bias=b, backend=backend)
    ours = linear_cross_entropy(x, w, pads, bias=b, ignore_index=PAD, backend=backend)
    assert torch.equal(ours, expected)


@each_backend
def test_a_setting_of_0_runs_the_plain_kernels(backend):
    x, w, b, targets = inputs(device=DEVICE[backend])
    expected = linear_cross_entropy(x, w, targets, bias=b, backend=backend)
    zeros = {"label_smoothing": 0.0, "z_loss": 0, "class_weight": None, "return_lse": False}
    ours = linear_cross_entropy(x, w, targets, bias=b, **zeros, backend=backend)
    assert torch.equal(ours, expected)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_of_0_and_rows_that_do_not_count(backend, reduction):
    """F.cross_entropy gives NaN for the mean; a z-loss is left."""
    x, w, _, targets = inputs(device=DEVICE[backend])
    x.requires_grad_()
    every = {"label_smoothing": 0.0, "reduction": reduction, "backend": backend}
    every["class_weight"] = torch.zeros(V, device=x.device)
    for some in (targets, torch.full_like(targets, -100), targets[:0]):
        loss, lse = linear_cross_entropy(x[: len(some)], w, some, return_lse=True, **every)
        assert torch.equal(loss, torch.zeros_like(loss)) and lse.shape == some.shape
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert (grad == 0).all()
        assert (lse[some == -100] == 0).all() and (lse[some != -100] != 0).all()
    z = linear_cross_entropy(x, w, targets, z_loss=0.5, **every)
    assert (z != 0).any() and z.isfinite().all()


def test_settings_cost_no_gemm():
    x, w, _, targets = inputs()
    x.requires_grad_(), w.requires_grad_()
    more = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weight": torch.ones(V)}
    for softcap in (None, 3.0):
        call = lambda cap=softcap: linear_cross_entropy(x, w, targets, softcap=cap, **more)  # noqa: E731
        _, work, _ = cases.profiled(call)
        assert work == 3 * (N - 3) * H * V


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_settings_accumulate_and_take_a_scale(backend):
    """dW is added to `accumulate_into`, the loss and all gradients times `scale`."""
    if reason := _backend.unavailable_reason("linear_cross_entropy", backend):
        pytest.skip(reason)
    x, w, _, targets = inputs(torch.float64)
    x.requires_grad_(), w.requires_grad_()
    more = {"label_smoothing": 0.1, "z_loss": 0.01, "return_lse": True, "backend": backend}
    more["class_weight"] = torch.linspace(0.5, 2, V, dtype=torch.float64)
    loss, lse = linear_cross_entropy(x, w, targets, **more)
    dx, dw = torch.autograd.grad(loss, (x, w))
    into = torch.ones_like(w)
    more |= {"scale": 0.3, "accumulate_into": into, "num_rows": N - 3}
    out = linear_cross_entropy(x, w, targets, **more)
    out.loss.backward()
    torch.testing.assert_close(out.loss, 0.3 * loss)
    assert torch.equal(out.lse, lse) and w.grad is None
    torch.testing.assert_close(x.grad, 0.3 * dx)
    torch.testing.assert_close(into, 1 + 0.3 * dw)


@each_backend
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_of_lse_alone_keeps_small_probabilities(backend, softcap):
    """db of one row is p itself: 1e-3 and less, which u - u (1 - p) at the target would round to 6e-8."""
    device = DEVICE[backend]
    x, w, b, targets = inputs(device=device)
    b.requires_grad_()
    options = {"bias": b, "return_lse": True, "softcap": softcap, "backend": backend}
    _, lse = linear_logprob(x[:1], w / 100, targets[:1], **options)
    (ours,) = torch.autograd.grad(lse.sum(), b)

    def by_torch(dtype):
        bias = b.detach().cpu().to(dtype).requires_grad_()
        z = F.linear(x[:1].cpu().to(dtype), w.cpu().to(dtype) / 100, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.autograd.grad(torch.logsumexp(z, 1).sum(), bias)[0]

    truth = by_torch(torch.float64)
    assert_near(ours, by_torch(torch.float32), truth)
    own = int(targets[0])
    assert ours[own].item() == pytest.approx(truth[own].item(), rel=2e-6)


@cases.each_backend("linear_cross_entropy", ("cpu",))
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gradient_of_16_bits_is_rounded_once(backend, softcap, weighted):
    """As GPUs keep dlogits: the corrections are added in fp32 first."""
    from fastrlhf.ops import _lse
    from fastrlhf.ops._rows import RowKernels

    class Chunk:
        targets, row_temperature, mask = randint(V, (6,), 3), torch.linspace(0.5, 1.5, 6), None

    kernels = RowKernels(backend, 1.0, softcap)
    weights = torch.linspace(0.5, 2, V) if weighted else None
    c = _lse.class_weights(kernels, V, weights)
    g, u, v = (randn(6, seed=s) for s in (1, 2, 3))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for keep in (False, True):
            chunk = Chunk()
            chunk.logits = randn(6, V, seed=0, scale=2.0)
            before = chunk.logits.clone()
            in_place = dtype == torch.float32 and not keep
            chunk.dlogits = chunk.logits if in_place else chunk.logits.new_empty(6, V, dtype=dtype)
            given = (chunk.targets, chunk.row_temperature, None)
            _, _, stats = kernels.forward(chunk.logits, *given)
            upstream = _lse.Upstream(g, None, u, v / V)
            _lse.backward(kernels, upstream, chunk, stats, c, keep_logits=keep)
            assert not keep or torch.equal(chunk.logits, before)
            found[dtype, keep] = chunk.dlogits
    whole = found[torch.float32, False]
    for (dtype, _), dlogits in found.items():
        assert torch.equal(dlogits, whole.to(dtype))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_vocabulary_of_one(backend, reduction):
    """Its log-prob is 0 whatever z, but its lse is z; an ignored target may be anything."""
    x, w = (
        randn(*s, seed=i, dtype=torch.float64).to(DEVICE[backend])
        for i, s in enumerate(((N, H), (1, H)))
    )
    targets = torch.zeros(N, dtype=torch.long, device=x.device)
    targets[3] = -100
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    z = 2 * torch.tanh((x @ w.T).squeeze(1) / 2) / 0.7
    z[3] = 0
    given = {"temperature": 0.7, "softcap": 2.0, "backend": backend}
    plain = linear_cross_entropy(x, w, targets, reduction=reduction, **given)
    assert_close(plain, torch.zeros_like(plain))
    more = {"z_loss": 0.1, "return_lse": True, "reduction": reduction}
    loss, lse = linear_cross_entropy(x, w, targets, **more, **given)
    truth = 0.1 * z.square()
    assert_close(loss, truth if reduction == "none" else truth.sum() / (N - 1))
    assert_close(lse, z)
    logprob, lse = linear_logprob(x[4:], w, targets[4:], return_lse=True, **given)
    assert_close(lse, z[4:])
    assert_close(logprob, torch.zeros_like(lse))
