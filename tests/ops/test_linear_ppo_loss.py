"""linear_ppo_loss on every backend: bitwise equal to the two ops, gradients against float64, GEMMs and memory."""

import pytest
import torch
import torch.nn.functional as F

from _support import logit_cases as cases
from _support import ppo_cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near, off_by_rounded_log_probs
from fastrlhf import linear_cross_entropy, linear_logprob, linear_ppo_loss, ppo_loss, reference
from fastrlhf.ops import _backend, _gemms, _linear_loss

N, H, V = 11, 19, 301
each_backend = cases.each_backend("linear_ppo_loss")
FULL = {"entropy_coef": 0.02, "dual_clip": 1.5}


@pytest.fixture
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)


def inputs(dtype=torch.float32, device="cpu", count=N, vocab=V, width=H):
    """(hidden, weight, bias), targets, rows by name: log-ratios on both sides of the clip."""
    x = randn(1, count, width, seed=0, dtype=dtype, device=device)
    w = randn(vocab, width, seed=1, dtype=dtype, scale=0.4, device=device)
    b = randn(vocab, seed=2, dtype=dtype, device=device)
    targets = randint(vocab, (1, count), 3, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        logprob = linear_logprob(x, w, targets, bias=b, backend="reference")
    draws = ppo_cases.batch((1, count))
    rows = {k: draws[k].to(device, wide) for k in ("advantages", "values", "old_values", "returns")}
    noise = 0.3 * randn(1, count, seed=9, dtype=torch.float64, device=device)
    rows["old_logprob"] = (logprob.double() + noise).to(wide)
    return (x, w, b), targets, rows


def run(function, tensors, targets, rows, dtype=None, device=None, upstream=0.7, **options):
    """(loss, dX, dW, db, dvalues) and the metrics."""
    place = {"device": device or targets.device}
    leaves = [t.to(dtype=dtype or t.dtype, **place).requires_grad_() for t in tensors]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {k: v.to(dtype=wide, **place) for k, v in rows.items()}
    rows["values"].requires_grad_()
    x, w, b = leaves
    options = {
        k: v.to(dtype=v.dtype if v.dtype == torch.bool else wide, **place)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in options.items()
    }
    out = function(x, w, targets.to(**place), bias=b, **rows, **options)
    grads = torch.autograd.grad(out.loss * upstream, (*leaves, rows["values"]))
    return (out.loss.detach(), *grads), out.metrics


def truth_and_bar(tensors, targets, rows, **options):
    """The fp64 results, and the same off by the rounding of the log-probs l, which exp(l - l_old) keeps."""
    old_logprob = rows["old_logprob"].cpu().double()

    def moved(move):
        moved_rows = {**rows, "old_logprob": old_logprob - move}
        place = {"dtype": torch.float64, "device": "cpu"}
        return run(reference.linear_ppo_loss, tensors, targets, moved_rows, **place, **options)[0]

    x, w, b = (t.cpu().double() for t in tensors)
    head = {k: v for k, v in cases.to_double(options).items() if k in ("temperature", "softcap")}
    logprob = reference.linear_logprob(x, w, targets.cpu(), bias=b, **head)
    truth = moved(0)
    return truth, off_by_rounded_log_probs(truth, logprob, moved)


def in_two_ops(
    x, w, targets, *, bias, old_logprob, advantages, backend, temperature=1.0, softcap=None, **more
):
    head = {"bias": bias, "temperature": temperature, "softcap": softcap}
    logprob, entropy = linear_logprob(
        x, w, targets, **head, mask=more.get("mask"), return_entropy=True, backend=backend
    )
    return ppo_loss(logprob, old_logprob, advantages, entropy=entropy, backend=backend, **more)


@each_backend
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_values_and_gradients(backend, options, dtype, four_rows_a_chunk, poisoned):
    if backend == "triton" and (dtype != torch.float32 or options not in ("plain", "all")):
        pytest.skip("the loop is the same code on every backend; the interpreter is slow")
    device = DEVICE[backend]
    problem = inputs(dtype, device)
    kwargs = {**cases.OPTIONS[options]((1, N), device), **FULL}
    ours, _ = run(linear_ppo_loss, *problem, backend=backend, **kwargs)
    eager, _ = run(reference.linear_ppo_loss, *problem, **kwargs)
    truth, rounded = truth_and_bar(*problem, **kwargs)
    names = ("loss", "dX", "dW", "db", "dv")
    for what, o, e, t, r in zip(names, ours, eager, truth, rounded, strict=True):
        assert_near(o, e, t, what, r)
    assert {g.dtype for g in ours[1:4]} == {dtype}
    assert _backend.calls["linear_ppo_loss", backend] > 0


@each_backend
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_bitwise_equal_to_the_two_ops(backend, masked, four_rows_a_chunk, monkeypatch):
    """Loss and metrics (and the gradient of the values); both with chunks of four rows."""
    import importlib

    module = importlib.import_module("fastrlhf.ops.linear_logprob")
    monkeypatch.setattr(module, "KEEP_BYTES", 0)
    problem = inputs(device=DEVICE[backend])
    mask = {"mask": torch.arange(N, device=DEVICE[backend]).reshape(1, N) % 3 > 0} if masked else {}
    options = {"backend": backend, **FULL, **mask}
    ours, metrics = run(linear_ppo_loss, *problem, **options)
    theirs, expected = run(in_two_ops, *problem, **options)
    assert torch.equal(ours[0], theirs[0])
    # ppo_loss on Triton multiplies 1 / n into the upstream gradient, here it is in the gradient.
    bar = {"rtol": 1e-6, "atol": 1e-9} if backend == "triton" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours[4], theirs[4], **bar)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(metrics[name], value), name


@pytest.mark.skipif(
    bool(_backend.unavailable_reason("linear_ppo_loss", "cpu")), reason="no C++ extension"
)
@pytest.mark.parametrize("flat", [False, True], ids=["3-d", "flat"])
@pytest.mark.parametrize("options", [o for o in cases.OPTIONS if "mask" not in o])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_one_chunk_is_bitwise_equal_to_the_loop(dtype, options, flat, monkeypatch):
    """A batch of one chunk takes a shortcut: every result is bitwise the same, cross entropy's too."""
    (x, w, b), targets, rows = inputs(dtype)
    kwargs = {**cases.OPTIONS[options]((1, N), "cpu"), **FULL}
    kwargs.pop("mask", None)
    if flat:
        x, targets = x[0], targets[0]
        rows = {name: value[0] for name, value in rows.items()}
        kwargs = {
            k: v[0] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in kwargs.items()
        }
    head = {k: v for k, v in kwargs.items() if k in ("temperature", "softcap")}
    results = []
    for short in (True, False):
        if not short:
            monkeypatch.setattr(_linear_loss, "_one_chunk", lambda *_: None)
        found, metrics = run(linear_ppo_loss, (x, w, b), targets, rows, backend="cpu", **kwargs)
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
        nll = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], scale=0.3, **head)
        results.append([*found, *metrics.values(), nll, *torch.autograd.grad(nll, leaves)])
    for shorter, loop in zip(*results, strict=True):
        assert torch.equal(shorter, loop)


@each_backend
@pytest.mark.parametrize("compact", [False, True], ids=["all rows", "compact rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_into_adds_dw_once(backend, compact, dtype, four_rows_a_chunk):
    device = DEVICE[backend]
    tensors, targets, rows = inputs(dtype, device)
    options = {"mask": torch.arange(N, device=device).reshape(1, N) != 5, **FULL}
    plain, _ = run(
        linear_ppo_loss, tensors, targets, rows, upstream=2.5, backend=backend, **options
    )
    into = torch.ones(V, H, device=device)
    x, w, b = (t.requires_grad_() for t in tensors)
    v = rows.pop("values").requires_grad_()
    options |= {"accumulate_into": into, "scale": 2.5, "compact_rows": compact}
    out = linear_ppo_loss(x, w, targets, bias=b, values=v, **rows, backend=backend, **options)
    out.loss.backward()
    assert w.grad is None
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    got = (out.loss.detach() / 2.5, x.grad, into - 1, b.grad, v.grad)
    for ours, expected in zip(got, plain, strict=True):
        close = tolerance if ours.dim() else {}
        torch.testing.assert_close(
            ours.float(), expected.float(), **(close or {"rtol": 1e-4, "atol": 1e-6})
        )


def test_accumulate_into_wants_an_upstream_gradient_of_one():
    (x, w, _), targets, rows = inputs()
    into = torch.zeros(V, H)
    loss = linear_ppo_loss(x, w.requires_grad_(), targets, **rows, accumulate_into=into).loss
    with pytest.raises(RuntimeError, match="upstream gradient of the loss must be 1.*got 2"):
        (2 * loss).backward()


@pytest.mark.parametrize(
    ("into", "error", "match"),
    [
        (lambda w: torch.zeros(V, H - 1), ValueError, "accumulate_into must have shape"),
        (lambda w: torch.zeros(V, H).half(), TypeError, "accumulate_into must be torch.float32"),
        (lambda w: torch.zeros(H, V).t(), ValueError, "accumulate_into must be contiguous"),
        (lambda w: w.detach(), ValueError, "accumulate_into must not share memory with weight"),
        (lambda w: "x", TypeError, "accumulate_into must be a torch.Tensor; got str"),
        (lambda w: torch.zeros(V, H, requires_grad=True), ValueError, "must be a constant"),
    ],
)
def test_accumulate_into_is_checked_first(into, error, match):
    (x, w, _), targets, rows = inputs()
    w.requires_grad_()
    into, before = into(w), w.detach().clone()
    kept = into.detach().clone() if isinstance(into, torch.Tensor) else None
    with pytest.raises(error, match=match):
        linear_ppo_loss(x, w, targets, **rows, accumulate_into=into)
    assert torch.equal(w, before) and (kept is None or torch.equal(into, kept))


@each_backend
@pytest.mark.parametrize("change", ["target", "temperature"])
def test_bad_values_in_a_late_chunk_leave_accumulate_into_alone(backend, change, four_rows_a_chunk):
    if DEVICE[backend] != "cpu":
        pytest.skip("a GPU gives NaN instead of an error")
    (x, w, _), targets, rows = inputs()
    into, options = torch.ones(V, H), {}
    if change == "target":
        targets[0, -1] = V
    else:
        options["temperature"] = torch.ones(1, N)
        options["temperature"][0, -1] = 0
    with pytest.raises(ValueError, match=f"linear_ppo_loss: {change}s? must be"):
        linear_ppo_loss(
            x, w.requires_grad_(), targets, **rows, accumulate_into=into, backend=backend, **options
        )
    assert (into == 1).all()


def test_gemms_of_masked_idle_and_frozen_rows():
    """Three GEMMs of the rows that count; with compact_rows two of them only of those with a gradient."""
    (x, w, _), targets, rows = inputs()
    rows = {k: rows[k] for k in ("old_logprob", "advantages")}
    mask = torch.arange(N).reshape(1, N) != 3
    x.requires_grad_(), w.requires_grad_()
    idle = int((rows["advantages"][mask] == 0).sum())
    assert idle > 0
    for compact in (False, True):
        options = {"mask": mask, "clip": 100.0, "compact_rows": compact}
        _, work, _ = cases.profiled(lambda o=options: linear_ppo_loss(x, w, targets, **rows, **o))
        kept = N - 1 - idle * compact
        assert work == (N - 1 + 2 * kept) * H * V
    frozen = w.detach()
    _, work, _ = cases.profiled(lambda: linear_ppo_loss(x, frozen, targets, **rows, mask=mask))
    assert work == 2 * (N - 1) * H * V
    with torch.no_grad():
        _, work, _ = cases.profiled(lambda: linear_ppo_loss(x, w, targets, **rows, mask=mask))
    assert work == (N - 1) * H * V


@pytest.mark.parametrize("vocab", [50257, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_of_16_bit_operands(vocab, dtype):
    """|log-prob - truth| <= 2e-5 max(1, |z|). Eager with a 16-bit head is a thousand times less accurate."""
    x, w = randn(6, 64, seed=0, dtype=dtype), randn(vocab, 64, seed=1, dtype=dtype, scale=0.4)
    targets = randint(vocab, (6,), 2)
    z = x.double() @ w.double().t()
    truth = torch.log_softmax(z, -1).gather(1, targets[:, None]).squeeze(1)
    old = truth.float()
    adv = torch.ones(6)
    error = (linear_logprob(x, w, targets).double() - truth).abs().max()
    assert error <= 2e-5 * max(1.0, float(z.abs().max()))
    low = torch.log_softmax(F.linear(x, w).float(), -1).gather(1, targets[:, None]).squeeze(1)
    assert (low.double() - truth).abs().max() > 20 * error
    x, w = x.requires_grad_(), w.requires_grad_()
    ours = torch.autograd.grad(linear_ppo_loss(x, w, targets, old, adv).loss, (x, w))
    eager = torch.autograd.grad(reference.linear_ppo_loss(x, w, targets, old, adv).loss, (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = reference.linear_ppo_loss(*wide, targets, truth, adv.double()).loss
    for o, e, t in zip(ours, eager, torch.autograd.grad(exact, wide), strict=True):
        assert_near(o, e, t)


def test_peak_memory_is_one_chunk_of_logits():
    """4096 x 8192 logits (128 MiB) are never whole."""
    x = randn(4096, 16, seed=0).requires_grad_()
    w = randn(8192, 16, seed=1).requires_grad_()
    targets, old = randint(8192, (4096,), 2), torch.full((4096,), -9.0)
    adv = randn(4096, seed=3)

    def step():
        linear_ppo_loss(x, w, targets, old, adv, workspace="compact").loss.backward()

    _, _, largest = cases.profiled(step)
    budget = _gemms.Gemms.logits_bytes["compact"]
    assert 0.8 * budget < largest <= budget


@each_backend
def test_an_embedding_tied_to_the_head(backend, four_rows_a_chunk):
    """One parameter gets both gradients."""
    (_, w, _), targets, rows = inputs(device=DEVICE[backend])
    rows = {k: rows[k].flatten() for k in ("old_logprob", "advantages")}
    w.requires_grad_()
    tied = lambda f, **o: f(F.embedding(targets[0], w), w, targets[0], **rows, **o).loss  # noqa: E731
    (ours,) = torch.autograd.grad(tied(linear_ppo_loss, backend=backend), w)
    (expected,) = torch.autograd.grad(tied(reference.linear_ppo_loss), w)
    torch.testing.assert_close(ours, expected)


def test_a_bad_target_of_a_later_block_names_this_op():
    x, w, row = torch.zeros(2, 4), torch.zeros(9001, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"^linear_ppo_loss: targets must be in \[0, 9001\)"):
        linear_ppo_loss(x, w, torch.tensor([0, 9001]), row, row)
