"""token_loss on every backend, against float64, torch's own functions and the ops that it fuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import logit_cases as cases
from fastrlhf import ppo_loss, token_logprob, token_loss
from fastrlhf.ops import _backend
from logit_cases import DEVICE, assert_near, randint, randn

V = 4133  # ragged; more than one block of the C++ kernel (2048)
NAN, INF = float("nan"), float("inf")
BACKENDS = ("reference", "cpu", "cuda")
RAGGED = [50257, 151936, 129920, 248320]  # GPT-2, Qwen2.5, and two that others' kernels met

each_backend = cases.each_backend("token_loss", BACKENDS)
fused = cases.each_backend("token_loss", BACKENDS[1:])

# Losses; each is a function of (eager log-probabilities of the rows, device).
LOSSES = {
    "cross_entropy": lambda logprob, device: {},
    "policy_gradient": lambda logprob, device: {"advantages": advantages(logprob, device)},
    "clipped": lambda logprob, device: {
        "advantages": advantages(logprob, device),
        "old_logprob": old_logprob(logprob, device),
        "clip": 0.3,
    },
    "dual_clip": lambda logprob, device: {
        "advantages": advantages(logprob, device),
        "old_logprob": old_logprob(logprob, device) - 1.0,
        "dual_clip": 1.5,
        "scale": 0.25,
    },
    "scaled": lambda logprob, device: {
        "old_logprob": old_logprob(logprob, device),
        "scale": torch.tensor(-0.125, device=device),
    },
}


def advantages(logprob, device):
    return randn(*logprob.shape, seed=11, device=device)


def old_logprob(logprob, device):
    return (logprob.detach().float().cpu() + randn(*logprob.shape, seed=12, scale=0.4)).to(device)


def eager(
    logits,
    targets,
    advantages=None,
    *,
    old_logprob=None,
    clip=0.2,
    dual_clip=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    scale=1.0,
):
    """log_softmax, gather and the loss, as a trainer writes them: in fp32, whatever the logits."""
    z = logits.float() if logits.dtype != torch.float64 else logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1)
    logp = torch.log_softmax(z / temperature, dim=-1)
    logprob = logp.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    a = 1.0 if advantages is None else advantages
    if old_logprob is None:
        loss = -a * logprob
    else:
        ratio = torch.exp(logprob - old_logprob)
        loss = torch.max(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
        if dual_clip is not None:
            a = torch.as_tensor(a, device=loss.device)
            loss = torch.where(a < 0, torch.min(loss, -a * dual_clip), loss)
    loss = scale * loss
    if mask is not None:
        loss, logprob = loss * mask, logprob * mask
    return loss, logprob.detach()


def gradient(function, logits, *args, g=None, **kwargs):
    """(loss, logprob, dL/dlogits) for the upstream gradient g of the loss, or of ones."""
    logits = logits.detach().requires_grad_()
    loss, logprob = function(logits, *args, **kwargs)
    g = torch.ones_like(loss) if g is None else g.to(loss.device, loss.dtype)
    return loss.detach(), logprob, torch.autograd.grad(loss, logits, g)[0]


def check_against_truth(backend, logits, targets, kwargs, g=None):
    ours = gradient(token_loss, logits, targets, g=g, backend=backend, **kwargs)
    theirs = gradient(eager, logits, targets, g=g, **kwargs)
    double = cases.to_double(kwargs)
    truth = gradient(eager, logits.cpu().double(), targets.cpu(), g=g, **double)
    for what, o, e, t in zip(("loss", "logprob", "gradient"), ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)
    return ours


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_values_and_gradients(backend, options, loss, dtype, poisoned):
    """With the upstream gradient of ones, which the backward leaves alone, and with any other."""
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


@each_backend
def test_gradcheck(backend):
    device = DEVICE[backend]
    logits = randn(6, 5, seed=0, dtype=torch.float64, device=device).requires_grad_()
    targets = randint(5, (6,), 1, device=device)
    row = torch.arange(6, dtype=torch.float64, device=device)
    kwargs = {"temperature": 0.5 + row, "softcap": 2.5, "mask": row != 1, "backend": backend}
    old = (
        token_logprob(logits, targets, softcap=2.5, temperature=0.5 + row).detach()
        + 0.5 * row.sin()
    )
    for more in ({}, {"old_logprob": old, "dual_clip": 1.3, "scale": 0.3}):

        def function(x, more=more):
            return token_loss(x, targets, row - 2.5, **kwargs, **more)[0]

        assert torch.autograd.gradcheck(function, (logits,))


@fused
def test_opcheck(backend):
    device = DEVICE[backend]
    ops = torch.ops.fastrlhf
    logits = randn(3, 5, seed=0, device=device)
    targets, mask = randint(5, (3,), 1, device=device), torch.tensor([1, 0, 1], device=device) > 0
    rows = torch.tensor([1.0, 2.0, 0.5], device=device)
    scale = torch.tensor(0.5, device=device)
    arguments = (targets, rows, -rows, 0.2, 3.0, rows, 1.0, 4.0, mask, scale, 1.0)
    checks = torch.library.opcheck
    checks(ops.token_loss_fwd, (logits.clone().requires_grad_(), *arguments))
    checks(ops.token_loss_fwd_, (logits, *arguments, torch.empty_like(logits)))
    for g in (rows, torch.ones((), device=device).expand(3)):
        checks(ops.token_loss_bwd_, (randn(3, 5, seed=1, device=device), g))


@each_backend
def test_compiles_without_graph_break(backend):
    device = DEVICE[backend]
    logits = randn(4, 9, seed=0, device=device).requires_grad_()
    targets = randint(9, (4,), 1, device=device)
    a, g = randn(4, seed=1, device=device), randn(4, seed=2, device=device)
    old = token_logprob(logits, targets).detach()

    def loss(logits):
        options = {"inplace_backward": True, "backend": backend, "temperature": 0.8}
        out, logprob = token_loss(logits, targets, a, old_logprob=old, scale=g[0].abs(), **options)
        return (out * g).sum() + logprob.sum()

    before = logits.detach().clone()
    (got,) = torch.autograd.grad(cases.compiled(loss)(logits), logits)
    assert torch.equal(logits, before)
    (expected,) = torch.autograd.grad(loss(logits * 1.0), logits)
    torch.testing.assert_close(got, expected)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_views_at_every_offset(backend, dtype):
    """Stray reads meet NaN, stray writes meet 42: only the view may change."""
    device, width = DEVICE[backend], 37
    for offset in range(9):
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
def test_one_write_where_the_upstream_gradient_is_one(backend):
    """The backward hands out what the forward wrote: the same memory, the same bits."""
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
    unused = (None, None, 0.2, INF, None, 1.0, 0.0, None, None)
    torch.ops.fastrlhf.token_loss_fwd_(logits.detach(), targets, *unused, 0.2, out)
    assert torch.equal(grad, out)


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
    for shape in ((0, 5), (2, 0, 5), (5,), (1, 1), (2, 1, 3, 4)):
        logits = randn(*shape, seed=0, device=device)
        targets = torch.zeros(shape[:-1], dtype=torch.int32, device=device)
        for inplace in (False, True):
            loss, logprob, grad = gradient(
                token_loss, logits.clone(), targets, inplace_backward=inplace, backend=backend
            )
            assert loss.shape == logprob.shape == targets.shape and grad.shape == logits.shape
            torch.testing.assert_close(loss, -torch.log_softmax(logits, -1)[..., 0])


@each_backend
def test_repeats_bit_for_bit_and_rows_are_independent(backend):
    device = DEVICE[backend]
    logits = randn(6, V, seed=0, scale=3, device=device)
    targets = randint(V, (6,), 1, device=device)
    run = lambda z, t: gradient(token_loss, z, t, scale=0.3, backend=backend)  # noqa: E731
    first, again = run(logits, targets), run(logits, targets)
    order = torch.tensor([4, 1], device=device)
    some = run(logits[order], targets[order])
    for a, b, c in zip(first, again, some, strict=True):
        assert torch.equal(a, b)
        if backend != "reference":
            assert torch.equal(a[order], c)


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


@fused
def test_backward_twice(backend):
    """From the logits the second time; not at all where they are gone."""
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
def test_whoever_saved_the_overwritten_logits_hears_of_it(backend):
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
    assert torch.equal(grad, gradient(token_loss, leaf, targets, backend=backend)[2])
    with pytest.raises(NotImplementedError, match="gradient of the gradient"):
        grad.sum().backward()
    loss, _ = token_loss(leaf * 1, targets, inplace_backward=True, backend=backend)
    with pytest.raises(NotImplementedError, match="must not meet inplace_backward=True"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True)


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


ROWS = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor; got list"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be float32"),
        ({"logits": torch.tensor(1.0)}, ValueError, "last axis"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "at least 1 entry"),
        ({"targets": torch.zeros(2)}, TypeError, "targets must be int32 or int64; got torch.float"),
        ({"targets": torch.tensor([1])}, ValueError, r"targets must have shape \(2,\); got \(1,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "must be on"),
        ({"advantages": 1.0}, TypeError, "advantages must be a torch.Tensor; got float"),
        ({"advantages": ROWS.long()}, TypeError, "advantages must be float32"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages must have shape \(2,\); got \(3,"),
        ({"advantages": ROWS.to("meta")}, ValueError, "advantages must be on cpu; got meta"),
        ({"old_logprob": "x"}, TypeError, "old_logprob must be a torch.Tensor; got str"),
        ({"old_logprob": ROWS.int()}, TypeError, "old_logprob must be float32"),
        ({"old_logprob": torch.ones(2, 1)}, ValueError, r"old_logprob must have shape \(2,\)"),
        ({"old_logprob": ROWS.to("meta")}, ValueError, "old_logprob must be on cpu; got meta"),
        ({"clip": 0}, ValueError, "clip must be a finite number above 0; got 0"),
        ({"clip": "x"}, TypeError, "clip must be a number; got str"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be a finite number above 1; got 1"),
        ({"scale": NAN}, ValueError, "scale must be a finite number; got nan"),
        ({"scale": "1"}, TypeError, "scale must be a number; got str"),
        ({"scale": torch.ones(1)}, ValueError, r"scale must have shape \(\); got \(1,\)"),
        ({"scale": torch.tensor(1)}, TypeError, "scale must be float32"),
        ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "scale must be on cpu; got meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0; got 0"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature must be above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number above 0; got -1"),
        ({"mask": torch.ones(3)}, ValueError, r"mask must have shape \(2,\); got \(3,\)"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_errors_name_the_argument(change, error, match, backend):
    arguments = {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1]), "backend": backend}
    arguments |= change
    with pytest.raises(error, match=rf"^token_loss: .*{match}"):
        token_loss(**arguments)
