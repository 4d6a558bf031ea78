"""token_loss on every backend: against float64, torch's own functions and the ops that it fuses; then its edges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.loss_cases import LOSSES, check_against_truth, eager, gradient
from _support.tolerance import assert_near
from fastrlhf import ppo_loss, token_logprob, token_loss
from fastrlhf.ops import _backend

V = 4133  # ragged; more than one block of the C++ kernel (2048)
NAN, INF = float("nan"), float("inf")
BACKENDS = ("reference", "cpu", "triton", "cuda")
RAGGED = [50257, 151936, 129920, 248320]  # GPT-2, Qwen2.5, and two that others' kernels met

each_backend = cases.each_backend("token_loss", BACKENDS)
fused = cases.each_backend("token_loss", BACKENDS[1:])
on_gpu = cases.each_backend("token_loss", BACKENDS[2:])
NAMES = ("loss", "logprob", "gradient")


def picked(options, loss, dtype):
    """One of the losses for each option and dtype, every loss three times and more."""
    at = [*cases.OPTIONS].index(options) + 2 * cases.DTYPES.index(dtype)
    return ([*LOSSES].index(loss) + at) % len(LOSSES) == 0


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_values_and_gradients(backend, options, loss, dtype, poisoned):
    """With the upstream gradient of ones, which the backward leaves alone, and with any other."""
    if cases.interpreted(backend) and not picked(options, loss, dtype):
        pytest.skip("the interpreter is slow: each option in each dtype, with one of the losses")
    device, shape = DEVICE[backend], (2, 3)
    whole = randn(2, 4, V, seed=0, dtype=dtype, scale=3, device=device)
    # Ramps: in some rows the maximum moves with every block, in others the first block holds it.
    ramp = torch.linspace(-12, 12, V, device=device).to(dtype)
    whole[:, ::2] += ramp
    whole[:, 1::2] -= ramp
    logits, targets = whole[:, :-1], randint(V, shape, 1, device=device)
    kwargs = cases.OPTIONS[options](shape, device)
    kwargs |= LOSSES[loss](eager(logits, targets, **kwargs)[1], device)
    before = logits.clone()
    for g in (None, randn(*shape, seed=2)):
        ours = check_against_truth(backend, logits, targets, kwargs, g)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    assert torch.equal(logits, before)
    assert _backend.calls["token_loss", backend] > 0


@each_backend
@pytest.mark.parametrize("vocab", RAGGED)
def test_real_vocabularies(backend, vocab):
    if cases.interpreted(backend) and vocab != RAGGED[0]:
        pytest.skip("the interpreter is slow: the smallest, of 13 blocks")
    device = DEVICE[backend]
    for dtype, index in ((torch.bfloat16, torch.int64), (torch.float32, torch.int32)):
        logits = randn(3, vocab, seed=0, dtype=dtype, scale=2, device=device)
        targets = torch.tensor([0, vocab - 1, vocab // 2], dtype=index, device=device)
        kwargs = LOSSES["clipped"](eager(logits, targets)[1], device)
        check_against_truth(backend, logits, targets, kwargs)


@each_backend
def test_meaning_is_torchs_own(backend):
    device = DEVICE[backend]
    logits = randn(7, 301, seed=0, dtype=torch.float64, scale=2, device=device)
    targets = randint(301, (7,), 1, device=device)
    loss, _, grad = gradient(token_loss, logits, targets, scale=1 / 7, backend=backend)
    logits.requires_grad_()
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss.sum(), expected.detach(), rtol=1e-12, atol=1e-12)
    (truth,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-12)


@each_backend
def test_numbers_keep_the_digits_of_fp64(backend):
    """Ratios of 0.5, 1 and 2: both clips, and the dual one, decide."""
    logits = randn(6, 9, seed=0, dtype=torch.float64, scale=2, device=DEVICE[backend])
    targets = randint(9, (6,), 1, device=logits.device)
    a = torch.tensor([0.3, -0.3] * 3, dtype=torch.float64, device=logits.device)
    kwargs = {"softcap": 0.7, "temperature": 0.3, "scale": 0.1, "clip": 0.1, "dual_clip": 1.7}
    step = torch.tensor([0.5, 0.5, 1, 1, 2, 2], dtype=torch.float64, device=logits.device).log()
    kwargs["old_logprob"] = eager(logits, targets, softcap=0.7, temperature=0.3)[1] - step
    ours = gradient(token_loss, logits, targets, a, backend=backend, **kwargs)
    for o, e in zip(ours, gradient(eager, logits, targets, a, **kwargs), strict=True):
        torch.testing.assert_close(o, e, rtol=1e-11, atol=1e-12)


@each_backend
@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_is_token_logprob_and_ppo_loss(backend, dual_clip):
    """The mean over the mask, of both sides of every clip and of ratios beyond e^20."""
    device = DEVICE[backend]
    logits = randn(64, 40, seed=0, scale=3, device=device)
    targets, mask = randint(40, (64,), 1, device=device), randint(2, (64,), 5, device=device) > 0
    logprob = token_logprob(logits, targets)
    old = logprob + randn(64, seed=2, device=device)
    old[:4] += torch.tensor([30.0, -30.0, 30.0, -30.0], device=device)
    mask[:8] = True
    kwargs = {"clip": 0.25, "dual_clip": dual_clip, "mask": mask}
    a = randn(64, seed=3, device=device)
    scale = 1 / mask.sum()
    loss, got, grad = gradient(
        token_loss, logits, targets, a, old_logprob=old, scale=scale, backend=backend, **kwargs
    )
    logits.requires_grad_()
    logprob = token_logprob(logits, targets, mask=mask, backend="reference")
    expected = ppo_loss(logprob, old, a, backend="reference", **kwargs)
    torch.testing.assert_close(loss.sum(), expected.loss.detach())
    torch.testing.assert_close(got, logprob.detach())
    (truth,) = torch.autograd.grad(expected.loss, logits)
    torch.testing.assert_close(grad, truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max()))
    clipped = (truth == 0).all(-1) & mask
    assert clipped.sum() >= 8 and (grad[clipped] == 0).all()


@fused
def test_one_write_where_the_upstream_gradient_is_one(backend):
    """The backward returns the gradient that the forward wrote: no copy, bitwise the same."""
    device = DEVICE[backend]
    logits = randn(5, V, seed=0, device=device).requires_grad_()
    targets = randint(V, (5,), 1, device=device)
    loss, _ = token_loss(logits, targets, scale=0.2, backend=backend)
    with torch.profiler.profile(profile_memory=True) as profile:
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    allocated = [e.self_cpu_memory_usage for e in profile.events()]
    if device == "cpu":
        assert max(allocated, default=0) < grad.nbytes / 5  # not even one row
    out = torch.empty_like(logits)
    unused = (None, None, [], 0.8, 1.2, INF, [], None, 1.0, 0.0, None, None)
    name = "token_loss_triton_fwd_" if backend == "triton" else "token_loss_fwd_"
    getattr(torch.ops.fastrlhf, name)(logits.detach(), targets, *unused, 0.2, out)
    assert torch.equal(grad, out)


@fused
def test_rows_are_independent(backend):
    device = DEVICE[backend]
    logits = randn(6, V, seed=0, scale=3, device=device)
    targets = randint(V, (6,), 1, device=device)
    run = lambda z, t: gradient(token_loss, z, t, scale=0.3, backend=backend)  # noqa: E731
    order = torch.tensor([4, 1], device=device)
    all_rows, some = run(logits, targets), run(logits[order], targets[order])
    for a, b in zip(all_rows, some, strict=True):
        assert torch.equal(a[order], b)


@cases.each_backend("token_loss", ("triton",))
def test_backward_of_more_rows_than_programs(backend, monkeypatch):
    from fastrlhf.kernels import token_loss as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    logits = randn(5, 40, seed=0, device=DEVICE[backend])
    targets, g = randint(40, (5,), 1, device=logits.device), torch.tensor([1.0, 3.0, 0.0, 0.5, 2.0])
    once, out = (
        gradient(token_loss, logits, targets, g=g, backend=backend)[2]
        for g in (None, g.to(logits.device))
    )
    assert torch.equal(out, once * g.to(logits.device)[:, None])


@fused
def test_backward_twice(backend):
    """The second backward recomputes from the logits; it is refused where they were overwritten."""
    device = DEVICE[backend]
    leaf = randn(3, 11, seed=0, device=device).requires_grad_()
    targets, g = randint(11, (3,), 1, device=device), randn(3, seed=2, device=device)
    loss, _ = token_loss(leaf, targets, g, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, g, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, 2 * g, retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first)
    first.zero_()  # it is the caller's
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, g)[0], kept)
    logits = leaf * 1.0
    loss, _ = token_loss(logits, targets, g, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, g, retain_graph=True)
    torch.testing.assert_close(grad, kept)
    torch.testing.assert_close(logits.detach(), kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, g)


@fused
def test_autograd_reports_saved_logits_that_were_overwritten(backend):
    leaf = randn(3, 11, seed=0, device=DEVICE[backend]).requires_grad_()
    logits = leaf.tanh()  # needs its own result for its backward
    targets = randint(11, (3,), 1, device=leaf.device)
    loss, _ = token_loss(logits, targets, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@fused
def test_nothing_is_overwritten_without_autograd(backend):
    logits = randn(3, 11, seed=0, device=DEVICE[backend])
    targets, before = randint(11, (3,), 1, device=logits.device), logits.clone()
    options = {"inplace_backward": True, "backend": backend}
    loss, logprob = token_loss(logits, targets, **options)
    with torch.no_grad():
        again = token_loss(logits.requires_grad_(), targets, **options)
    assert torch.equal(logits.detach(), before) and not loss.requires_grad
    assert torch.equal(again[0], loss) and torch.equal(again[1], logprob)
    loss, logprob = token_loss(logits, targets, **options)
    assert loss.requires_grad and not logprob.requires_grad


@fused
def test_gradient_of_the_gradient_raises(backend):
    leaf = randn(3, 11, seed=0, device=DEVICE[backend]).requires_grad_()
    targets = randint(11, (3,), 1, device=leaf.device)
    loss, _ = token_loss(leaf, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad, gradient(token_loss, leaf, targets, backend=backend)[2])
    with pytest.raises(NotImplementedError, match="gradient of the gradient"):
        grad.sum().backward()
    loss, _ = token_loss(leaf * 1, targets, inplace_backward=True, backend=backend)
    with pytest.raises(NotImplementedError, match="must not meet inplace_backward=True"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True)


# ---------------------------------------------------------------------------------------------
# edges: infinite and NaN logits, bad targets, views, large tensors


@each_backend
def test_minus_infinity_is_probability_zero(backend):
    device = DEVICE[backend]
    logits = torch.full((3, V), -INF, device=device)
    logits[0, 4100:4110] = randn(10, seed=0, device=device)
    logits[1, :3] = randn(3, seed=1, device=device)
    logits[2, ::7] = 0.0
    targets = torch.tensor([4105, 1, 5], device=device)  # the last one is impossible
    loss, logprob, grad = gradient(token_loss, logits, targets, backend=backend)
    assert loss[2] == INF and logprob[2] == -INF
    logp = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(logprob[:2].double(), logp[[0, 1], targets[:2]])
    assert grad.isfinite().all() and (grad[:2][logits[:2] == -INF] == 0).all()
    expected = logp.exp()
    expected[range(3), targets] -= 1
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)
    # A ratio of e^-20 and less carries no gradient.
    old = torch.full((3,), -1.0, device=device)
    loss, _, grad = gradient(token_loss, logits, targets, old_logprob=old, backend=backend)
    assert loss.isfinite().all() and (grad[2] == 0).all()


@on_gpu
@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("kind", cases.LOWEST)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_whole_batches_of_the_lowest_logit(backend, dtype, kind, temperature):
    logits, targets = cases.rows_of_the_lowest(kind, dtype, backend)
    check_against_truth(backend, logits, targets, {"temperature": temperature})


@on_gpu
@pytest.mark.parametrize("temperature", [1.0, *cases.TEMPERATURES])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_common_shift_costs_no_accuracy(backend, shift, temperature):
    """softmax(z + s) = softmax(z): the bar is that of the logits without the shift."""
    logits, far = cases.shifted(shift, DEVICE[backend])
    targets, kwargs = randint(5003, (4,), 1, device=logits.device), {"temperature": temperature}
    ours = gradient(token_loss, far, targets, backend=backend, **kwargs)
    theirs = gradient(eager, logits, targets, **kwargs)
    truth = gradient(eager, logits.cpu().double(), targets.cpu(), **kwargs)
    for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)


@fused
def test_gradients_at_a_low_temperature(backend):
    """exp(z - max) / sum, not exp(z - lse): at T = 0.3 the rounding of lse alone would be seen."""
    device = DEVICE[backend]
    logits = randn(6, V, seed=0, scale=3, device=device)
    logits[::2] += torch.linspace(-12, 12, V, device=device)
    targets = randint(V, (6,), 1, device=device)
    targets[3:] = logits[3:].argmax(-1)
    ours = gradient(token_loss, logits, targets, backend=backend, temperature=0.3)
    theirs = gradient(eager, logits, targets, temperature=0.3)
    truth = gradient(eager, logits.cpu().double(), targets.cpu(), temperature=0.3)
    # An ulp of a row's sum moves its log-prob, and with it the loss, by 2^-23.
    off = (truth[0] + 2.0**-23, truth[1] + 2.0**-23, truth[2])
    for row in range(6):  # a row of small gradients has a small bar
        for what, o, e, t, r in zip(NAMES, ours, theirs, truth, off, strict=True):
            assert_near(o[row], e[row], t[row], f"{what} of row {row}", r[row])


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bitwise_the_same_wherever_a_row_lies(backend, dtype):
    """At every offset, at odd and even strides; in place and not."""
    device, width = DEVICE[backend], 20011
    rows = randn(2, width, seed=0, dtype=dtype, scale=3, device=device)
    rows[1] += torch.linspace(-12, 12, width, device=device).to(dtype)
    targets = randint(width, (2,), 1, device=device)
    kwargs = {"temperature": 0.7, "backend": backend}
    expected = gradient(token_loss, cases.moved(rows, 0, 5), targets, **kwargs)
    for offset in (1, 3) if cases.interpreted(backend) else range(8):
        extra = (5, 0, 6, 1)[offset % 4]
        for inplace in (False, True):
            logits = cases.moved(rows, offset, extra)
            got = gradient(token_loss, logits, targets, inplace_backward=inplace, **kwargs)
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b), (offset, extra, inplace)


@each_backend
def test_nan_stays_nan_in_its_row(backend):
    device = DEVICE[backend]
    logits = randn(4, 33, seed=0, device=device)
    logits[1, 20], logits[2, 3] = NAN, INF
    targets = randint(19, (4,), 1, device=device)
    old = torch.full((4,), -3.0, device=device)
    for more in ({}, {"softcap": 3.0}):
        for loss in ({}, {"old_logprob": old}):
            out = gradient(token_loss, logits, targets, backend=backend, **more, **loss)
            bad = [False, True, not more, False]  # a capped +inf is finite
            assert [o.isnan().tolist() for o in (*out[:2], out[2].sum(-1))] == [bad] * 3


@fused
def test_an_upstream_gradient_of_zero_silences_a_row(backend):
    """As in token_logprob: a row without an upstream gradient gets 0, even where the loss is NaN."""
    device = DEVICE[backend]
    logits, targets = randn(3, 33, seed=0, device=device), randint(33, (3,), 1, device=device)
    logits[1, 20] = NAN
    g = torch.tensor([1.0, 0.0, 2.0])
    grad = gradient(token_loss, logits, targets, g=g, backend=backend)[2]
    assert (grad[1] == 0).all() and (grad[[0, 2]] != 0).all()
    a = torch.tensor([1.0, 0.0, 2.0], device=device)  # the same of an advantage
    grad = gradient(token_loss, logits, targets, a, backend=backend)[2]
    assert (grad[1] == 0).all() and (grad[[0, 2]] != 0).all()


@fused
def test_one_minus_p_of_a_sure_target_does_not_cancel(backend):
    device, rows = DEVICE[backend], torch.arange(8)
    logits = torch.zeros(8, 9, device=device)
    logits[rows, rows] = 2.0 * rows.to(device)  # p from 1 / 9 to 1 - 7e-6
    _, logprob, grad = gradient(token_loss, logits, rows.to(device), backend=backend)
    expected = torch.expm1(logprob.double()).float()
    torch.testing.assert_close(grad[rows, rows], expected, rtol=1e-6, atol=0)


@fused
def test_nan_in_the_inputs_of_the_loss_is_no_clipped_token(backend):
    device = DEVICE[backend]
    logits, targets = randn(3, 33, seed=0, device=device), randint(33, (3,), 1, device=device)
    for name in ("advantages", "old_logprob"):
        kwargs = {"old_logprob": torch.full((3,), -3.0, device=device)}
        kwargs[name] = torch.tensor([1.0, NAN, -2.0], device=device)
        loss, logprob, grad = gradient(token_loss, logits, targets, backend=backend, **kwargs)
        assert loss.isnan().tolist() == grad.isnan().all(-1).tolist() == [False, True, False]
        assert logprob.isfinite().all()


@each_backend
@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40])
def test_target_outside_the_vocabulary(backend, bad):
    device = DEVICE[backend]
    logits = randn(3, 7, seed=0, device=device).requires_grad_()
    targets = torch.tensor([0, bad, 6], device=device)
    options = {"old_logprob": torch.zeros(3, device=device), "inplace_backward": True}
    before = logits.detach().clone()
    if backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 7\); got {bad} at row 1"):
            token_loss(logits, targets, backend=backend, **options)
        assert torch.equal(logits, before)
        return
    out = gradient(token_loss, logits, targets, backend=backend)
    for o in (*out[:2], out[2].sum(-1)):
        assert o.isnan().tolist() == [False, True, False]


@fused
def test_offsets_beyond_32_bits(backend):
    device = DEVICE[backend]
    stride = 2**31 + 64
    buffer = cases.untouched(stride + 20, torch.float16, device)
    logits = buffer.as_strided((2, 20), (stride, 1))
    logits.copy_(randn(2, 20, seed=0))
    targets, g = randint(20, (2,), 1, device=device), torch.tensor([1.0, 0.5], device=device)
    expected = gradient(token_loss, logits.clone(), targets, g=g, backend="reference")
    options = {"g": g, "inplace_backward": True, "backend": backend}
    for o, e in zip(gradient(token_loss, logits, targets, **options), expected, strict=True):
        torch.testing.assert_close(o, e, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(
        buffer.as_strided((2, 20), (stride, 1)), expected[2], rtol=2e-3, atol=1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.1, 4.0, 300.0]),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    clipped=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_rows(rows, width, scale, shift, clipped, seed, data):
    """C++ against float64; a large common shift of the logits costs only their own rounding."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)) or [])
    logits = randn(rows, width, seed=seed, scale=scale) + shift
    targets, g = randint(width, (rows,), seed), randn(rows, seed=seed + 1)
    kwargs = {"mask": mask.bool(), "temperature": 0.5 + seed / 500}
    kwargs["advantages"] = randn(rows, seed=seed + 2)
    if clipped:  # 0.1 and more away from the edges of the clip
        logprob = eager(logits.double(), targets, **kwargs)[1]
        kwargs["old_logprob"] = (logprob - randint(3, (rows,), seed) * 0.3).float()
    out = gradient(token_loss, logits, targets, g=g, **kwargs)
    truth = gradient(eager, logits.double(), targets, g=g, **cases.to_double(kwargs))
    # A ratio is the exponential of a difference of log-probabilities, each rounded to fp32.
    size = max(float(truth[1].abs().max()), float(logits.abs().max())) if rows else 0.0
    for o, t in zip(out, truth, strict=True):
        torch.testing.assert_close(o.double(), t, rtol=1e-5 + 4e-7 * size, atol=1e-5 + 4e-7 * size)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_views_at_every_offset(backend, dtype):
    """Stray reads meet NaN, stray writes meet 42: only the view may change."""
    device, width = DEVICE[backend], 37
    for offset in (0, 3) if cases.interpreted(backend) else range(9):
        buffer = torch.full((3 * 50 + 16,), 42.0, dtype=dtype, device=device)
        view = buffer[offset:].as_strided((3, width), (50, 1))
        values = randn(3, width, seed=offset, dtype=dtype, device=device)
        view.copy_(values)
        rest = torch.ones_like(buffer, dtype=torch.bool)
        rest[offset:].as_strided((3, width), (50, 1)).zero_()
        targets = randint(width, (3,), 1, dtype=torch.int32, device=device)
        g = torch.tensor([1.0, 0.5, 0.0], device=device)
        expected = gradient(token_loss, values, targets, g=g, backend=backend)
        poisoned = torch.where(rest, NAN, buffer)[offset:].as_strided((3, width), (50, 1))
        for o, e in zip(
            gradient(token_loss, poisoned, targets, g=g, backend=backend), expected, strict=True
        ):
            torch.testing.assert_close(
                o, e, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
            )
        logits = view.detach().requires_grad_()
        loss, _ = token_loss(logits, targets, inplace_backward=True, backend=backend)
        (grad,) = torch.autograd.grad(loss, logits, g)
        assert (buffer[rest] == 42).all()
        torch.testing.assert_close(view, expected[2], rtol=1e-2, atol=1e-5)
        assert (view[2] == 0).all() and (view[:2] != 0).any(-1).all()
        assert grad.data_ptr() == view.data_ptr()


@fused
def test_overlapping_logits_are_not_overwritten(backend):
    """inplace_backward is a licence: rows that share memory cannot hold a gradient each."""
    device = DEVICE[backend]
    base = randn(60, seed=0, device=device)
    layouts = {
        "broadcast": base[:20].expand(3, 20),
        "sliding": base.as_strided((3, 20), (7, 1)),
        "strided classes": base.as_strided((3, 20), (1, 3)),
        "four dimensions": base[:48].as_strided((2, 2, 2, 5), (24, 11, 5, 1)),
    }
    for name, logits in layouts.items():
        before = base.clone()
        width = logits.shape[-1]
        targets = randint(width, logits.shape[:-1], 1, device=device)
        options = {"inplace_backward": True, "backend": backend}
        _, _, grad = gradient(token_loss, logits, targets, **options)
        assert torch.equal(base, before), name
        _, _, expected = gradient(token_loss, logits.contiguous(), targets, backend="reference")
        torch.testing.assert_close(grad, expected, msg=name)
