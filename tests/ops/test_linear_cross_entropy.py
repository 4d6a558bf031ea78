"""linear_cross_entropy on every backend, against torch's own F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, assert_near, randint, randn
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
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(backend, reduction):
    if backend == "triton" and reduction == "sum":
        pytest.skip("the reduction is the same code on every backend; the interpreter is slow")
    device = DEVICE[backend]
    x, w = randn(5, 3, seed=0, dtype=torch.float64), randn(7, 3, seed=1, dtype=torch.float64)
    x, w = x.to(device).requires_grad_(), w.to(device).requires_grad_()
    targets = torch.tensor([1, -1, 6, 0, 2], device=device)

    def function(x, w):
        options = {"ignore_index": -1, "reduction": reduction, "softcap": 4.0, "temperature": 0.7}
        return linear_cross_entropy(x, w, targets, backend=backend, **options)

    assert torch.autograd.gradcheck(function, (x, w), fast_mode=backend == "triton")


@each_backend
def test_opcheck(backend):
    if backend == "reference":
        pytest.skip("the reference has no raw op")
    x, w, b, targets = inputs(device=DEVICE[backend])
    x, w = x.requires_grad_(), w.requires_grad_()
    one = torch.ones((), device=x.device)
    arguments = (x, w, b, None, targets, targets != -100, None, one, [], [1.0, 0.0, 1.0])
    arguments += (None, False, "linear_cross_entropy", "fast", backend, [True, True, False, False])
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    utils += [] if backend == "triton" else ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.fastrlhf.linear_loss_fwd, arguments, test_utils=utils)


@each_backend
def test_compiles_without_graph_break(backend):
    x, w, b, targets = inputs(device=DEVICE[backend])
    x.requires_grad_()

    def loss(x):
        return linear_cross_entropy(x, w, targets, bias=b, backend=backend) * 3

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(cases.compiled(loss)(x), x)
    torch.testing.assert_close(got, expected)


@each_backend
def test_autocast_does_not_round_the_logits(backend):
    x, w, _, targets = inputs(device=DEVICE[backend])
    plain = linear_cross_entropy(x, w, targets, backend=backend)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(linear_cross_entropy(x, w, targets, backend=backend), plain)


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
def test_repeats_bit_for_bit_and_backward_twice(backend):
    x, w, _, targets = inputs(device=DEVICE[backend])
    x.requires_grad_(), w.requires_grad_()
    first = linear_cross_entropy(x, w, targets, backend=backend)
    again = linear_cross_entropy(x, w, targets, backend=backend)
    assert torch.equal(first, again)
    one = torch.autograd.grad(first, (x, w), retain_graph=True)
    for other in (torch.autograd.grad(first, (x, w)), torch.autograd.grad(again, (x, w))):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("power", [1, 2])
def test_no_gradient_of_the_gradient(power):
    """Refused where its graph is asked for: under a constant upstream gradient it would be lost later."""
    x, w, _, targets = inputs()
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, targets) ** power
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: the gradient of the grad"):
        torch.autograd.grad(loss, x, create_graph=True)


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


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int; got float"),
        ({"ignore_index": 3}, ValueError, r"ignore_index must be outside \[0, 5\); got 3"),
        (
            {"targets": torch.tensor([0, 5])},
            ValueError,
            r"cross_entropy: targets must be in \[0, 5",
        ),
        ({"targets": torch.tensor([0, -1])}, ValueError, r"targets must be in \[0, 5\); got -1"),
        ({"hidden": torch.zeros(2, 3)}, ValueError, r"weight must have shape \(V, 3\)"),
        (
            {"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)},
            ValueError,
            "hidden must have at least 1 feature",
        ),
        ({"workspace": None}, ValueError, "workspace must be 'fast' or 'compact'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_errors_name_the_argument(change, error, match, backend):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1]),
        **change,
    }
    with pytest.raises(error, match=match):
        linear_cross_entropy(**arguments, backend=backend)
