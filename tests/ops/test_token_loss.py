"""token_loss on every backend, against float64, torch's own functions and the ops that it fuses."""

import pytest
import torch
import torch.nn.functional as F

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.loss_cases import LOSSES, check_against_truth, eager, gradient
from fastrlhf import ppo_loss, token_logprob, token_loss
from fastrlhf.ops import _backend

V = 4133  # ragged; more than one block of the C++ kernel (2048)
NAN, INF = float("nan"), float("inf")
BACKENDS = ("reference", "cpu", "triton", "cuda")
ENDS = ("fwd", "fwd_", "bwd_")
RAGGED = [50257, 151936, 129920, 248320]  # GPT-2, Qwen2.5, and two that others' kernels met

each_backend = cases.each_backend("token_loss", BACKENDS)
fused = cases.each_backend("token_loss", BACKENDS[1:])


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


@each_backend
def test_gradcheck(backend):
    device = DEVICE[backend]
    rows, width = (3, 3) if cases.interpreted(backend) else (6, 5)
    logits = randn(rows, width, seed=0, dtype=torch.float64, device=device).requires_grad_()
    targets = randint(width, (rows,), 1, device=device)
    row = torch.arange(rows, dtype=torch.float64, device=device)
    kwargs = {"temperature": 0.5 + row, "softcap": 2.5, "mask": row != 1, "backend": backend}
    old = (
        token_logprob(logits, targets, softcap=2.5, temperature=0.5 + row).detach()
        + 0.5 * row.sin()
    )
    for more in ({}, {"old_logprob": old, "dual_clip": 1.3, "scale": 0.3}):

        def function(x, more=more):
            return token_loss(x, targets, row - row.mean(), **kwargs, **more)[0]

        assert torch.autograd.gradcheck(function, (logits,))


@fused
def test_opcheck(backend):
    device = DEVICE[backend]
    name = "token_loss_triton" if backend == "triton" else "token_loss"
    fwd, fwd_, bwd_ = (getattr(torch.ops.fastrlhf, f"{name}_{end}") for end in ENDS)
    logits = randn(3, 5, seed=0, device=device)
    targets, mask = randint(5, (3,), 1, device=device), torch.tensor([1, 0, 1], device=device) > 0
    rows = torch.tensor([1.0, 2.0, 0.5], device=device)
    scale = torch.tensor(0.5, device=device)
    arguments = (targets, rows, -rows, 0.2, 3.0, rows, 1.0, 4.0, mask, scale, 1.0)
    checks = torch.library.opcheck
    checks(fwd, (logits.clone().requires_grad_(), *arguments))
    checks(fwd_, (logits, *arguments, torch.empty_like(logits)))
    for g in (rows, torch.ones((), device=device).expand(3)):
        checks(bwd_, (randn(3, 5, seed=1, device=device), g))


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
    name = "token_loss_triton_fwd_" if backend == "triton" else "token_loss_fwd_"
    getattr(torch.ops.fastrlhf, name)(logits.detach(), targets, *unused, 0.2, out)
    assert torch.equal(grad, out)


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
    torch.testing.assert_close(grad, gradient(token_loss, leaf, targets, backend=backend)[2])
    with pytest.raises(NotImplementedError, match="gradient of the gradient"):
        grad.sum().backward()
    loss, _ = token_loss(leaf * 1, targets, inplace_backward=True, backend=backend)
    with pytest.raises(NotImplementedError, match="must not meet inplace_backward=True"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True)


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
