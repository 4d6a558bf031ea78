"""token_loss at its edges: infinite and NaN logits, masks, bad targets, views, empty and huge tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, assert_near, randint, randn
from _support.loss_cases import check_against_truth, eager, gradient
from fastrlhf import token_loss

V = 4133  # ragged; more than one block of the C++ kernel (2048)
NAN, INF = float("nan"), float("inf")

each_backend = cases.each_backend("token_loss")
fused = cases.each_backend("token_loss", ("cpu", "triton", "cuda"))
on_gpu = cases.each_backend("token_loss", ("triton", "cuda"))
NAMES = ("loss", "logprob", "gradient")


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
def test_a_common_shift_costs_nothing(backend, shift, temperature):
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
    for row in range(6):  # a row of small gradients has a small bar
        for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
            assert_near(o[row], e[row], t[row], f"{what} of row {row}")


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bits_do_not_depend_on_where_a_row_lies(backend, dtype):
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
    """As in token_logprob: what carries no gradient gets 0, even where the loss is NaN."""
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
def test_masked_rows_are_not_looked_at(backend, poisoned):
    device = DEVICE[backend]
    logits = randn(4, 50, seed=0, device=device)
    logits[1], logits[3] = NAN, INF
    targets = torch.tensor([3, -100, 5, 999], device=device)
    a, old = (torch.tensor([x, NAN, x, INF], device=device) for x in (2.0, -1.0))
    mask = torch.tensor([True, False, True, False], device=device)
    for kind in (torch.bool, torch.int64, torch.float32):
        kwargs = {"old_logprob": old, "mask": mask.to(kind), "backend": backend}
        out = gradient(token_loss, logits, targets, a, **kwargs)
        for o in (*out[:2], out[2].abs().sum(-1)):
            assert (o[~mask] == 0).all() and (o[mask] != 0).all()
    few = {"old_logprob": old[mask], "backend": backend}
    expected = gradient(token_loss, logits[mask], targets[mask], a[mask], **few)
    assert all(torch.equal(o[mask], e) for o, e in zip(out, expected, strict=True))


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


@each_backend
def test_empty_and_tiny(backend):
    device = DEVICE[backend]
    shapes = ((0, 5), (2, 0, 5), (5,), (1, 1), (2, 1, 3, 4))
    for logits in (
        *(randn(*shape, seed=0, device=device) for shape in shapes),
        torch.zeros(0, 5, 2, device=device)[..., 1],  # contiguous, they say
    ):
        shape = logits.shape
        targets = torch.zeros(shape[:-1], dtype=torch.int32, device=device)
        for inplace in (False, True):
            loss, logprob, grad = gradient(
                token_loss, logits.clone(), targets, inplace_backward=inplace, backend=backend
            )
            assert loss.shape == logprob.shape == targets.shape and grad.shape == logits.shape
            torch.testing.assert_close(loss, -torch.log_softmax(logits, -1)[..., 0])


@fused
def test_offsets_beyond_32_bits(backend):
    device = DEVICE[backend]
    stride = 2**31 + 64
    # Untouched pages of the 4 GiB cost nothing: only 40 elements are written.
    buffer = torch.empty(stride + 20, dtype=torch.float16, device=device)
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
