"""token_logprob on every backend, against float64 and against torch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near
from fastrlhf import linear_logprob, reference, token_logprob
from fastrlhf.ops import _backend

V = 4133  # ragged; more than one block of the Triton (4096) and C++ (2048) kernels
NAN, INF = float("nan"), float("inf")

each_backend = cases.each_backend("token_logprob")
fused = cases.each_backend("token_logprob", ("cpu", "triton", "cuda"))


def eager(logits, targets, temperature=1.0, softcap=None, mask=None):
    """log_softmax and gather, as a trainer writes it: in fp32, whatever the logits."""
    z = logits.float() if logits.dtype != torch.float64 else logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1)
    logp = torch.log_softmax(z / temperature, dim=-1)
    logprob = logp.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    if mask is not None:
        logprob, entropy = logprob * mask, entropy * mask
    return logprob, entropy


@each_backend
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_values_and_gradients(backend, options, dtype, poisoned):
    device, shape = DEVICE[backend], (2, 3) if cases.emulated(backend) else (4, 25)
    whole = randn(shape[0], shape[1] + 1, V, seed=0, dtype=dtype, scale=3, device=device)
    # Ramps: in some rows the maximum moves with every block, in others the first block holds it.
    ramp = torch.linspace(-12, 12, V, device=device).to(dtype)
    whole[:, ::2] += ramp
    whole[:, 1::2] -= ramp
    targets = randint(V, shape, 1, device=device)
    kwargs = cases.OPTIONS[options](shape, device)
    grads = [randn(*shape, seed=s, device=device) for s in (2, 3)]

    def run(function, dtype, device=device, kwargs=kwargs, **more):
        logits = whole.to(device).to(dtype).requires_grad_()
        out = function(logits[:, :-1], targets.to(device), **kwargs, **more)
        return *out, torch.autograd.grad(out, logits, [g.to(device, o) for g, o in upstream(out)])[
            0
        ]

    def upstream(out):
        return zip(grads, (o.dtype for o in out), strict=True)

    ours = run(token_logprob, dtype, backend=backend, return_entropy=True)
    theirs = run(eager, dtype)
    truth = run(eager, torch.float64, "cpu", cases.to_double(kwargs))
    for what, o, e, t in zip(("logprob", "entropy", "gradient"), ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    assert _backend.calls["token_logprob", backend] > 0


@each_backend
def test_meaning_is_torchs_own(backend):
    """F.cross_entropy and torch.distributions define log-probability and entropy."""
    device = DEVICE[backend]
    logits = randn(7, 301, seed=0, dtype=torch.float64, scale=2, device=device)
    targets = randint(301, (7,), 1, device=device)
    logprob, entropy = token_logprob(logits, targets, return_entropy=True, backend=backend)
    expected = -F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(logprob, expected, rtol=1e-12, atol=1e-12)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, expected, rtol=1e-12, atol=1e-12)


@each_backend
def test_numbers_keep_the_digits_of_fp64(backend):
    logits = randn(2, 9, seed=0, dtype=torch.float64, scale=2, device=DEVICE[backend])
    targets = randint(9, (2,), 1, device=logits.device)
    logprob = token_logprob(logits, targets, softcap=0.7, temperature=0.3, backend=backend)
    expected, _ = eager(logits, targets, softcap=0.7, temperature=0.3)
    torch.testing.assert_close(logprob, expected, rtol=1e-12, atol=1e-12)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_views_at_every_offset(backend, dtype):
    """Stray reads meet NaN, stray writes meet 42: only the view may change."""
    device = DEVICE[backend]
    width, offsets = 37, range(9) if backend != "triton" else (0, 3)
    for offset in offsets:
        buffer = torch.full((3 * 50 + 16,), 42.0, dtype=dtype, device=device)
        view = buffer[offset:].as_strided((3, width), (50, 1))
        values = randn(3, width, seed=offset, dtype=dtype, device=device)
        view.copy_(values)
        rest = torch.ones_like(buffer, dtype=torch.bool)
        rest[offset:].as_strided((3, width), (50, 1)).zero_()
        targets = randint(width, (3,), 1, dtype=torch.int32, device=device)
        logits = view.detach().requires_grad_()
        poisoned = torch.where(rest, NAN, buffer)[offset:].as_strided((3, width), (50, 1))
        out = token_logprob(poisoned, targets, backend=backend)
        expected = reference.token_logprob(values, targets)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        g = randn(3, seed=3, device=device)
        token_logprob(logits, targets, inplace_backward=True, backend=backend).backward(g)
        assert (buffer[rest] == 42).all()
        logits = values.clone().requires_grad_()
        token_logprob(logits, targets, backend=backend).backward(g)
        assert torch.equal(view, logits.grad)


@each_backend
def test_minus_infinity_is_probability_zero(backend):
    """Whole blocks of -inf before and after the finite logits, as a top-k filter leaves them."""
    device = DEVICE[backend]
    logits = torch.full((3, V), -INF, device=device)
    logits[0, 4100:4110] = randn(10, seed=0, device=device)
    logits[1, :3] = randn(3, seed=1, device=device)
    logits[2, ::7] = 0.0
    targets = torch.tensor([4105, 1, 5], device=device)  # the last one is impossible
    logits.requires_grad_()
    logprob, entropy = token_logprob(logits, targets, return_entropy=True, backend=backend)
    logp = torch.log_softmax(logits.detach().double(), -1)
    expected = -torch.where(logp == -INF, 0, logp.exp() * logp.clamp(min=-1e3)).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logprob[:2].double(), logp[[0, 1], targets[:2]])
    assert logprob[2] == -INF
    (grad,) = torch.autograd.grad((logprob[:2].sum() + entropy.sum()), logits)
    assert grad.isfinite().all() and (grad[:2][logits[:2] == -INF] == 0).all()
    assert grad.abs().sum() > 0.1


def gradients(function, logits, targets, grads, **kwargs):
    """(logprob, entropy, dL/dlogits) for upstream gradients of both."""
    logits = logits.detach().requires_grad_()
    out = function(logits, targets, **kwargs)
    grads = [g.to(o.device, o.dtype) for g, o in zip(grads, out, strict=True)]
    return *(o.detach() for o in out), torch.autograd.grad(out, logits, grads)[0]


def off_in_the_sum(relative, logits, targets, grads, temperature):
    """dL/dlogits with the sum of every row's exponentials off by that much."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    p = logp.exp() * (1 - relative)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    g, h = (x.unsqueeze(-1) for x in grads)
    own = torch.zeros_like(p).scatter_(-1, targets.unsqueeze(-1), 1.0)
    return (g * (own - p) - h * p * (logp + entropy)) / temperature


def eager_of_any(logits, targets, temperature):
    """`eager`, where a logit of -inf has probability 0 and adds nothing to the entropy."""
    z = logits.float() if logits.dtype != torch.float64 else logits
    logp = torch.log_softmax(z / temperature, dim=-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -INF, 0.0)).sum(-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


NAMES = ("logprob", "entropy", "gradient")


@fused
@pytest.mark.parametrize("temperature", cases.TEMPERATURES)
@pytest.mark.parametrize("kind", cases.LOWEST)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_whole_batches_of_the_lowest_logit(backend, dtype, kind, temperature):
    logits, targets = cases.rows_of_the_lowest(kind, dtype, backend)
    grads = [randn(len(targets), seed=s) for s in (2, 3)]
    kwargs = {"temperature": temperature}
    ours = gradients(
        token_logprob, logits, targets, grads, return_entropy=True, backend=backend, **kwargs
    )
    theirs = gradients(eager_of_any, logits, targets, grads, **kwargs)
    truth = gradients(eager_of_any, logits.cpu().double(), targets.cpu(), grads, **kwargs)
    for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-9, 1e-12])
def test_probabilities_sum_to_one_at_tiny_temperatures(backend, temperature, dtype):
    """Gradients of the largest logit's log-probability are those of probabilities: within 1, and they add up to 0."""
    rows = 5 if cases.interpreted(backend) else 12
    logits = (-0.2 - 3 * randn(rows, 2500, seed=0, device=DEVICE[backend]).abs()).to(dtype)
    logits[-1] = -math.inf  # soft-capped: V finite z
    kwargs = {"temperature": temperature, "softcap": 30.0, "return_entropy": True}
    targets, grads = logits.argmax(-1), [torch.ones(rows), torch.zeros(rows)]
    logprob, entropy, grad = gradients(
        token_logprob, logits, targets, grads, backend=backend, **kwargs
    )
    assert (logprob < 1e-3).all() and logprob.isfinite().all() and entropy.isfinite().all()
    assert abs(logprob[-1] + math.log(2500)) < 1e-5
    grad = grad.double() * temperature
    assert grad.abs().max() <= 1 and grad.sum(-1).abs().max() < 0.05


@fused
@pytest.mark.parametrize("temperature", [1.0, *cases.TEMPERATURES, 2.0])
def test_rows_of_one_huge_logit(backend, temperature):
    """All logits equal and so large that an ulp is more than any exponent: each has probability 1 / V.

    Not where z itself leaves the range of fp32: there log_softmax gives NaN too.
    """
    device, width = DEVICE[backend], 4133
    largest = torch.finfo(torch.float32).max * min(temperature, 1.0)
    sizes = torch.tensor([-1.0, 1.0, -1e-9, 1e-20, 1e-28, -1e-29], device=device)
    logits = (0.99 * largest * sizes)[:, None].repeat(1, width)
    targets = torch.arange(len(logits), device=device)
    kwargs = {"temperature": temperature, "return_entropy": True, "backend": backend}
    out = gradients(token_logprob, logits, targets, torch.ones(2, len(logits)), **kwargs)
    truth = math.log(width)
    assert (out[0] + truth).abs().max() < 2e-6 and (out[1] - truth).abs().max() < 2e-6
    expected = torch.full_like(logits, -1 / width)
    expected[targets, targets] += 1
    torch.testing.assert_close(out[2], expected / temperature, rtol=2e-6, atol=1e-9)


@each_backend
@pytest.mark.parametrize("options", [{}, {"softcap": 3.3}])
def test_the_only_entry_has_probability_1(backend, options):
    """At any temperature. Exactly, but on GPUs: their exponentials to base 2 have a relative error of 2^-22."""
    rows = 2 if cases.interpreted(backend) else 20
    bar = 2**-22 + 2**-23 if backend in ("triton", "cuda") else 0  # and an ulp of the rest
    logits = 5 * randn(rows, 1, seed=0, device=DEVICE[backend])
    targets = torch.zeros(rows, dtype=torch.long, device=DEVICE[backend])
    for temperature in (0.7, 1.3, 1e-12, torch.linspace(0.3, 3, rows, device=DEVICE[backend])):
        kwargs = {"temperature": temperature, "backend": backend, **options}
        ones = torch.ones(2, rows, device=DEVICE[backend])
        for out in gradients(token_logprob, logits, targets, ones, return_entropy=True, **kwargs):
            assert out.abs().max() <= bar
        head = torch.ones(1, 1, device=DEVICE[backend])
        assert linear_logprob(logits, head, targets, **kwargs).abs().max() <= bar
    wrong = torch.linspace(-1, 1, rows)
    if DEVICE[backend] == "cpu" and not cases.emulated(backend):
        with pytest.raises(ValueError, match="temperature must be above 0; got -1.000000 at row 0"):
            token_logprob(logits, targets, temperature=wrong, backend=backend)


@fused
@pytest.mark.parametrize("temperature", [1.0, *cases.TEMPERATURES])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_common_shift_costs_no_accuracy(backend, shift, temperature):
    """softmax(z + s) = softmax(z): the bar is that of the logits without the shift."""
    logits, far = cases.shifted(shift, DEVICE[backend])
    targets, grads = (
        randint(5003, (4,), 1, device=logits.device),
        [randn(4, seed=s) for s in (2, 3)],
    )
    kwargs = {"temperature": temperature}
    ours = gradients(
        token_logprob, far, targets, grads, return_entropy=True, backend=backend, **kwargs
    )
    theirs = gradients(eager, logits, targets, grads, **kwargs)
    truth = gradients(eager, logits.cpu().double(), targets.cpu(), grads, **kwargs)
    for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)


@fused
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_every_size(backend, sign):
    """Neighbours in fp32 around 2^k ln(2): where one way to take the maximum off ends, another begins.

    At T = 1, where z is exact: at any other its rounding leaves no digit of the largest.
    """
    device, width = DEVICE[backend], 4133
    sizes = sign * math.log(2) * 2.0 ** torch.arange(18, 36, device=device)
    ulps = randint(5, (len(sizes), width), 0, device=device).sort()[0] - 2  # few alike in a tile
    logits = sizes[:, None] + ulps * (sizes.abs() * 2.0**-23)[:, None]
    targets = randint(width, (len(sizes),), 1, device=device)
    grads = [randn(len(sizes), seed=s) for s in (2, 3)]
    ours = gradients(token_logprob, logits, targets, grads, return_entropy=True, backend=backend)
    theirs = gradients(eager_of_any, logits, targets, grads, temperature=1.0)
    truth = gradients(eager_of_any, logits.cpu().double(), targets.cpu(), grads, temperature=1.0)
    for row in range(len(sizes)):
        for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
            assert_near(o[row], e[row], t[row], f"{what} of row {row}")


@each_backend
def test_a_shift_that_only_fp64_can_hold(backend):
    logits = (randn(3, 300, seed=0, dtype=torch.float64, scale=3) * 256).round() / 256
    targets, grads = randint(300, (3,), 1), [randn(3, seed=s) for s in (2, 3)]
    logits, targets = logits.to(DEVICE[backend]), targets.to(DEVICE[backend])
    expected = gradients(eager, logits, targets, grads)
    kwargs = {"return_entropy": True, "backend": backend}
    for o, e in zip(
        gradients(token_logprob, logits + 2.0**33, targets, grads, **kwargs), expected, strict=True
    ):
        torch.testing.assert_close(o, e, rtol=1e-6, atol=1e-9)


@fused
@pytest.mark.parametrize("mode", ["logprob", "entropy", "both"])
def test_gradients_at_a_low_temperature(backend, mode):
    """exp(z - max) / sum, not exp(z - lse): at T = 0.3 the rounding of lse alone would be seen."""
    device = DEVICE[backend]
    logits = randn(6, V, seed=0, scale=3, device=device)
    logits[::2] += torch.linspace(-12, 12, V, device=device)
    targets = randint(V, (6,), 1, device=device)
    targets[3:] = logits[3:].argmax(-1)
    grads = [
        randn(6, seed=s) * (mode in (name, "both")) for s, name in ((2, NAMES[0]), (3, NAMES[1]))
    ]
    kwargs = {"temperature": 0.3}
    ours = gradients(
        token_logprob, logits, targets, grads, return_entropy=True, backend=backend, **kwargs
    )
    theirs = gradients(eager, logits, targets, grads, **kwargs)
    truth = gradients(eager, logits.cpu().double(), targets.cpu(), grads, **kwargs)
    # Every implementation rounds a row's sum to fp32 several times. An ulp of it (2^-23) moves the log-prob and the
    # entropy by as much and scales all probabilities of the row; 1 - p magnifies that for a target with p near 1.
    # exp(z - lse) would be off by 2^-19 here.
    ulp = 2.0**-23
    off = off_in_the_sum(ulp, logits.cpu().double(), targets.cpu(), grads, **kwargs)
    off = (truth[0] + ulp, truth[1] + ulp, off)
    for row in range(6):  # a row of small gradients has a small bar
        for what, o, e, t, r in zip(NAMES, ours, theirs, truth, off, strict=True):
            assert_near(o[row], e[row], t[row], f"{what} of row {row}", r[row])


@fused
@pytest.mark.parametrize("softcap", [0.5, 3.0, 30.0, 32.0, 50.0, 1e4])
def test_soft_caps_of_any_size(backend, softcap):
    """The bar has no allowance for the soft-cap. Logits around 0, and far beyond the cap."""
    device = DEVICE[backend]
    # At the largest cap the entropies err by several eps, eager's too: 100 of them are needed to measure that.
    rows, width = (100, 601) if softcap == 1e4 else (4, 3001)
    logits = randn(rows, width, seed=0, scale=4, device=device)
    logits[rows // 2 :] += torch.linspace(-3, 3, width, device=device) * min(softcap, 40.0)
    targets = randint(width, (rows,), 1, device=device)
    grads = [randn(rows, seed=s) for s in (2, 3)]
    kwargs = {"softcap": softcap, "temperature": 0.7}
    ours = gradients(
        token_logprob, logits, targets, grads, return_entropy=True, backend=backend, **kwargs
    )
    theirs = gradients(eager, logits, targets, grads, **kwargs)
    truth = gradients(eager, logits.cpu().double(), targets.cpu(), grads, **kwargs)
    for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
        assert_near(o, e, t, what)


@cases.each_backend("token_logprob", ("triton",))
def test_a_walk_without_the_entropy(backend):
    from fastrlhf.kernels import token_logprob as kernels

    logits = randn(3, V, seed=0, scale=3, device=DEVICE[backend])
    arguments = (logits, randint(V, (3,), 1, device=logits.device), None, 0.7, 0.0, None)
    with_it, without = (kernels.forward(*arguments, with_entropy=x) for x in (True, False))
    assert torch.equal(with_it[0], without[0]) and torch.equal(with_it[2][:2], without[2][:2])
    assert (with_it[1] > 0).all() and (without[1] == 0).all() and (without[2][2] == 0).all()


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bitwise_the_same_wherever_a_row_lies(backend, dtype):
    """Nor on whether the entropy is asked for: rows at every offset, at odd and even strides."""
    device, width = DEVICE[backend], 20011
    rows = randn(2, width, seed=0, dtype=dtype, scale=3, device=device)
    rows[1] += torch.linspace(-12, 12, width, device=device).to(dtype)
    targets, grads = randint(width, (2,), 1, device=device), [randn(2, seed=s) for s in (2, 3)]

    def run(logits, entropy):
        logits = logits.detach().requires_grad_()
        kwargs = {"temperature": 0.7, "return_entropy": entropy, "backend": backend}
        out = token_logprob(logits, targets, **kwargs)
        out = out if entropy else (out,)
        used = [g.to(device) for g in grads[: len(out)]]
        return *out, torch.autograd.grad(out, logits, used)[0]

    expected = {entropy: run(cases.moved(rows, 0, 5), entropy) for entropy in (False, True)}
    assert torch.equal(expected[True][0], expected[False][0])
    for offset in (1, 3) if cases.interpreted(backend) else range(8):
        extra = (5, 0, 6, 1)[offset % 4]
        for entropy, known in expected.items():
            got = run(cases.moved(rows, offset, extra), entropy)
            for a, b in zip(got, known, strict=True):
                assert torch.equal(a, b), (offset, extra, entropy)


@each_backend
def test_a_long_row(backend):
    """More tiles than wait for one merge; the largest logits lie in the first and the last ones."""
    # In the host shim: a merge of 256 tiles, one of its result and 255 more, and a ragged one.
    device = DEVICE[backend]
    width = 530_003 if backend == "cuda" and cases.emulated(backend) else 1_100_003
    logits = randn(2, width, seed=0, scale=3, device=device)
    logits[0, :3000] += 20
    logits[1, -3000:] += 20
    targets = torch.tensor([2000, 5], device=device)
    grads = [randn(2, seed=s) for s in (2, 3)]
    ours = gradients(token_logprob, logits, targets, grads, return_entropy=True, backend=backend)
    theirs = gradients(eager, logits, targets, grads)
    truth = gradients(eager, logits.cpu().double(), targets.cpu(), grads)
    for what, o, e, t in zip(NAMES, ours, theirs, truth, strict=True):
        # Eager's error is not luck here: each result is a sum of many terms.
        assert_near(o, e, t, what, enough=1)


@each_backend
def test_nan_stays_nan_in_its_row(backend):
    device = DEVICE[backend]
    logits = randn(4, 33, seed=0, device=device)
    logits[1, 20], logits[2, 3] = NAN, INF
    targets = randint(19, (4,), 1, device=device)
    for more in ({}, {"softcap": 3.0}):
        logits.requires_grad_()
        out = token_logprob(logits, targets, return_entropy=True, backend=backend, **more)
        (grad,) = torch.autograd.grad(out[0].sum() + out[1].sum(), logits)
        for o in (*out, grad.sum(-1)):
            bad = [False, True, not more, False]  # a capped +inf is finite
            assert o.isnan().tolist() == bad


@each_backend
@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40])
def test_target_outside_the_vocabulary(backend, bad):
    device = DEVICE[backend]
    logits = randn(3, 7, seed=0, device=device).requires_grad_()
    targets = torch.tensor([0, bad, 6], device=device)
    if backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 7\); got {bad} at row 1"):
            token_logprob(logits, targets, backend=backend)
        return
    out = token_logprob(logits, targets, backend=backend)
    assert out.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert grad.isnan().any(-1).tolist() == [False, True, False]


@fused
def test_rows_are_independent(backend):
    device = DEVICE[backend]
    logits = randn(6, V, seed=0, scale=3, device=device)
    targets = randint(V, (6,), 1, device=device)

    def run(logits, targets):
        logits = logits.detach().requires_grad_()
        out = token_logprob(logits, targets, return_entropy=True, backend=backend)
        return *out, torch.autograd.grad(out[0].sum() + out[1].sum(), logits)[0]

    order = torch.tensor([4, 1], device=device)
    all_rows, some = run(logits, targets), run(logits[order], targets[order])
    for a, b in zip(all_rows, some, strict=True):
        assert torch.equal(a[order], b)


@fused
def test_layouts_need_no_copy(backend):
    """A slice of [B, T, V], a broadcast row, a transpose of the rows: read where they lie."""
    device = DEVICE[backend]
    base = randn(3, 5, 40, seed=0, device=device)
    layouts = {
        "slice": base[:, :-1],
        "columns": base[:, 1::2, 3:30],
        "transposed": base.transpose(0, 1),
        "expanded": base[0, 0].expand(4, 6, 40),
    }
    for name, logits in layouts.items():
        targets = randint(logits.shape[-1], logits.shape[:-1], 1, device=device)
        with torch.profiler.profile() as profile:
            out = token_logprob(logits, targets, backend=backend)
        copies = [e.key for e in profile.key_averages() if "clone" in e.key or "copy" in e.key]
        if device == "cpu" and backend == "triton":
            copies = []  # the interpreter's own
        assert not copies, (name, copies)
        torch.testing.assert_close(out, reference.token_logprob(logits.contiguous(), targets))
    three = base.as_strided((2, 2, 2, 20), (200, 41, 21, 1))  # needs the copy, and gets it
    targets = randint(20, (2, 2, 2), 1, device=device)
    expected = reference.token_logprob(three, targets)
    torch.testing.assert_close(token_logprob(three, targets, backend=backend), expected)
    wide = randn(40, 3, seed=1, device=device).t()  # the classes are strided: copied too
    targets = randint(40, (3,), 1, device=device)
    expected = reference.token_logprob(wide, targets)
    torch.testing.assert_close(token_logprob(wide, targets, backend=backend), expected)


@fused
def test_offsets_beyond_32_bits(backend):
    device = DEVICE[backend]
    stride = 2**31 + 64
    buffer = cases.untouched(stride + 20, torch.float16, device)
    logits = buffer.as_strided((2, 20), (stride, 1))
    logits.copy_(randn(2, 20, seed=0))
    targets = randint(20, (2,), 1, device=device)
    values = logits.clone().requires_grad_()
    expected = token_logprob(values, targets, backend="reference")
    expected.sum().backward()
    logits = logits.detach().requires_grad_()
    out = token_logprob(logits, targets, inplace_backward=True, backend=backend)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(buffer.as_strided((2, 20), (stride, 1)), values.grad)


@fused
@pytest.mark.parametrize("layout", ["expanded", "overlapping", "transposed", "three strides"])
def test_in_place_is_refused_where_it_would_be_wrong(backend, layout):
    """Rows that share memory, or that the kernels copy: the licence is not used."""
    device = DEVICE[backend]
    leaf = randn(6, 11, seed=0, device=device).requires_grad_()
    view = {
        "expanded": lambda x: x[:1].expand(6, 11),
        "overlapping": lambda x: x.as_strided((6, 11), (5, 1)),
        "transposed": lambda x: x.t(),
        "three strides": lambda x: x.as_strided((2, 2, 2, 3), (33, 13, 5, 1)),
    }[layout]
    results = []
    for options in ({"inplace_backward": True, "backend": backend}, {"backend": "reference"}):
        logits = view(leaf * 1.0)
        targets = randint(logits.shape[-1], logits.shape[:-1], 1, device=device)
        token_logprob(logits, targets, **options).sum().backward()
        results.append(leaf.grad)
        leaf.grad = None
    torch.testing.assert_close(*results)


@fused
def test_a_second_backward_in_place_is_refused(backend):
    device = DEVICE[backend]
    leaf = randn(3, 11, seed=0, device=device).requires_grad_()
    targets = randint(11, (3,), 1, device=device)
    (first,) = torch.autograd.grad(token_logprob(leaf, targets, backend=backend).sum(), leaf)
    logits = leaf * 1.0
    out = token_logprob(logits, targets, inplace_backward=True, backend=backend).sum()
    (grad,) = torch.autograd.grad(out, leaf, retain_graph=True)
    assert torch.equal(grad, first) and torch.equal(logits.detach(), first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaf)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.1, 4.0, 300.0]),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_rows(rows, width, scale, shift, seed, data):
    """C++ against float64; a large common shift of the logits costs only their own rounding."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)) or [])
    logits = (randn(rows, width, seed=seed, scale=scale) + shift).requires_grad_()
    targets = randint(width, (rows,), seed)
    kwargs = {"mask": mask.bool(), "temperature": 0.5 + seed / 500}
    out = token_logprob(logits, targets, return_entropy=True, **kwargs)
    truth = logits.detach().double().requires_grad_()
    expected = eager(truth, targets, **kwargs)
    for o, e in zip(out, expected, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=2e-6, atol=4e-5 if shift else 4e-6)
    g = randn(rows, seed=seed + 1)
    torch.autograd.backward(out, [g, g])
    torch.autograd.backward(expected, [g.double()] * 2)
    torch.testing.assert_close(
        logits.grad.double(), truth.grad, rtol=1e-4, atol=2e-3 if shift else 2e-4
    )
