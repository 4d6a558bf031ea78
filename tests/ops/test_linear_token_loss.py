"""linear_token_loss on every backend: user's losses against float64, what they return, GEMMs, memory."""

import pytest
import torch

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near, off_by_rounded_log_probs
from fastrlhf import linear_cross_entropy, linear_logprob, linear_token_loss, ppo_loss, reference
from fastrlhf.ops import _backend, _gemms

N, H, V = 11, 19, 301
each_backend = cases.each_backend("linear_token_loss")


def grpo(logprob, entropy, old_logprob, advantage):
    """Clip, KL to the sampling policy (k3) and an entropy bonus; the ratio as a metric."""
    ratio = (logprob - old_logprob).exp()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (old_logprob - logprob).exp() - 1 - (old_logprob - logprob)
    return policy + 0.04 * kl - 0.01 * entropy, {"ratio": ratio.detach()}


def dapo(logprob, old_logprob, advantage):
    """Clip-higher."""
    ratio = (logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)


def cispo(logprob, old_logprob, advantage):
    """The clipped importance weight is a constant: every row keeps its gradient."""
    weight = (logprob - old_logprob).exp().clamp(max=1.2).detach()
    return -weight * advantage * logprob


NAMES = ("loss", "dX", "dW", "db")
LOSSES = {"grpo": (grpo, True), "dapo": (dapo, False), "cispo": (cispo, False)}


@pytest.fixture
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)


def inputs(dtype=torch.float32, device="cpu", count=N, vocab=V, width=H):
    x = randn(1, count, width, seed=0, dtype=dtype, device=device)
    w = randn(vocab, width, seed=1, dtype=dtype, scale=0.4, device=device)
    b = randn(vocab, seed=2, dtype=dtype, device=device)
    targets = randint(vocab, (1, count), 3, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        logprob = linear_logprob(x, w, targets, bias=b, backend="reference")
    noise = 0.3 * randn(1, count, seed=9, dtype=torch.float64, device=device)
    advantage = randn(1, count, seed=8, dtype=wide, device=device)
    advantage[0, ::5] = 0
    rows = {"old_logprob": (logprob.double() + noise).to(wide), "advantage": advantage}
    return (x, w, b), targets, rows


def run(function, loss, problem, dtype=None, upstream=None, **options):
    """((loss, dX, dW, db), the whole output); in fp64 on CPU where dtype is fp64."""
    tensors, targets, rows = problem
    loss_fn, with_entropy = LOSSES[loss]
    if "move" in rows:
        loss_fn = moved(loss_fn)
    if dtype == torch.float64:
        move = lambda v: v.cpu().double() if v.is_floating_point() else v.cpu()  # noqa: E731
        tensors, targets = [t.detach().cpu().double() for t in tensors], targets.cpu()
        rows = {k: move(v) for k, v in rows.items()}
        options = {k: move(v) if torch.is_tensor(v) else v for k, v in options.items()}
    x, w, b = leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(
        x, w, targets, loss_fn, per_token=rows, with_entropy=with_entropy, bias=b, **options
    )
    upstream = torch.tensor(0.7) if upstream is None else upstream
    grads = torch.autograd.grad(out.loss, leaves, upstream.to(out.loss))
    return (out.loss.detach(), *grads), out


def moved(loss_fn):
    """`loss_fn` of log-probs that are off by the rows `move`."""
    return lambda logprob, *rest, move, **rows: loss_fn(logprob + move, *rest, **rows)


def truth_and_bar(loss, problem, **options):
    """The fp64 results, the same off by the log-probs' rounding, and the whole output.

    fp32 rounds the log-prob l, and every reader gets that: the ratio exp(l - l_old), and CISPO's factor l.
    """
    tensors, targets, rows = problem

    def run_fp64(**move):
        moved_problem = tensors, targets, {**rows, **move}
        return run(reference.linear_token_loss, loss, moved_problem, dtype=torch.float64, **options)

    truth, exact = run_fp64()
    rounded = off_by_rounded_log_probs(truth, exact.logprob, lambda move: run_fp64(move=move)[0])
    return truth, rounded, exact


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ["plain", "row_temperature", "softcap", "mask", "all"])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(backend, loss, options, reduction, four_rows_a_chunk, poisoned):
    if backend == "triton" and (loss, options) not in (("grpo", "all"), ("cispo", "mask")):
        pytest.skip("the loop is the same code on every backend; the interpreter is slow")
    device = DEVICE[backend]
    problem = inputs(device=device)
    kwargs = {**cases.OPTIONS[options]((1, N), device), "reduction": reduction, "scale": 1.5}
    kwargs["upstream"] = randn(1, N, seed=5, device=device) if reduction == "none" else None
    ours, out = run(linear_token_loss, loss, problem, backend=backend, **kwargs)
    eager, _ = run(reference.linear_token_loss, loss, problem, **kwargs)
    truth, rounded, exact = truth_and_bar(loss, problem, **kwargs)
    for what, o, e, t, r in zip(NAMES, ours, eager, truth, rounded, strict=True):
        assert_near(o, e, t, what, r)
    assert out.logprob.shape == (1, N) and not out.logprob.requires_grad
    torch.testing.assert_close(out.logprob.cpu().double(), exact.logprob, rtol=1e-5, atol=1e-5)
    for name, value in exact.metrics.items():
        torch.testing.assert_close(out.metrics[name].cpu().double(), value, rtol=1e-5, atol=1e-5)
    assert (out.entropy is None) == (exact.entropy is None)
    assert _backend.calls["linear_token_loss", backend] > 0


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands(backend, dtype, four_rows_a_chunk):
    if backend == "triton":
        pytest.skip("linear_logprob's tests run its row maths on 16-bit operands")
    problem = inputs(dtype, DEVICE[backend])
    ours, _ = run(linear_token_loss, "grpo", problem, backend=backend)
    eager, _ = run(reference.linear_token_loss, "grpo", problem)
    truth, rounded, _ = truth_and_bar("grpo", problem)
    for what, o, e, t, r in zip(NAMES, ours, eager, truth, rounded, strict=True):
        assert_near(o, e, t, what, r)
    assert {g.dtype for g in ours[1:]} == {dtype}


@each_backend
def test_it_is_the_fixed_ops_with_their_losses(backend, four_rows_a_chunk):
    """Cross entropy and the clipped policy loss, written as a user would."""
    device = DEVICE[backend]
    (x, w, _), targets, rows = inputs(device=device)
    x.requires_grad_(), w.requires_grad_()
    ours = linear_token_loss(x, w, targets, torch.neg, backend=backend).loss
    theirs = linear_cross_entropy(x, w, targets, backend=backend)
    ours_grads, grads = (torch.autograd.grad(o, (x, w)) for o in (ours, theirs))
    torch.testing.assert_close((ours, *ours_grads), (theirs, *grads))
    ours = linear_token_loss(x, w, targets, dapo, per_token=rows, backend=backend)
    old, advantage = rows.values()
    low = (advantage > 0) & (ours.logprob - old > torch.tensor(1.2).log())
    keep = ~low  # between 1.2 and 1.28 the two losses differ
    ours = linear_token_loss(x, w, targets, dapo, per_token=rows, mask=keep, backend=backend).loss
    theirs = ppo_loss(linear_logprob(x, w, targets, mask=keep), old, advantage, mask=keep).loss
    torch.testing.assert_close(ours, theirs)


@each_backend
def test_accumulate_into_and_compact_rows(backend, four_rows_a_chunk):
    device = DEVICE[backend]
    problem = inputs(device=device)
    plain, _ = run(linear_token_loss, "dapo", problem, backend=backend, upstream=torch.tensor(2.5))
    (x, w, b), targets, rows = problem
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for compact in (False, True):
        into = torch.ones(V, H, device=device)
        options = {"per_token": rows, "bias": b, "scale": 2.5, "compact_rows": compact}
        loss = linear_token_loss(
            x, w, targets, dapo, **options, accumulate_into=into, backend=backend
        ).loss
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert grads[1] is None
        for got, expected in zip((grads[0], into - 1, grads[2]), plain[1:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_an_error_in_a_late_chunk_leaves_accumulate_into_alone(four_rows_a_chunk):
    (x, w, _), targets, rows = inputs()
    into = torch.ones(V, H)

    def late(logprob, old_logprob, advantage):
        if len(logprob) < 4:
            raise KeyError("the third chunk")
        return dapo(logprob, old_logprob, advantage)

    def not_finite(logprob, old_logprob, advantage):
        return dapo(logprob, old_logprob, advantage / advantage.ne(advantage[-1]))

    for loss, error, match in (
        (late, KeyError, "the third chunk"),
        (not_finite, ValueError, r"return finite numbers; got -?(inf|nan) at row 3, where logprob"),
    ):
        with pytest.raises(error, match=match):
            linear_token_loss(
                x, w.requires_grad_(), targets, loss, per_token=rows, accumulate_into=into
            )
        assert (into == 1).all() and w.grad is None


def test_gemms_and_rows_that_the_loss_sees(four_rows_a_chunk):
    (x, w, _), targets, rows = inputs()
    mask = torch.arange(N).reshape(1, N) % 3 > 0
    x.requires_grad_(), w.requires_grad_()
    seen = []

    def loss(logprob, old_logprob, advantage):
        seen.append(len(logprob))
        return advantage * logprob

    count = int(mask.sum())
    idle = int((rows["advantage"][mask] == 0).sum())
    assert idle > 0
    for compact, kept in ((False, count), (True, count - idle)):
        options = {"per_token": rows, "mask": mask, "compact_rows": compact}
        _, work, _ = cases.profiled(
            lambda o=options: linear_token_loss(x, w, targets, loss, **o).loss.backward()
        )
        assert work == (count + 2 * kept) * H * V
        assert sum(seen) == count and max(seen) == 4
        seen.clear()
    with torch.no_grad():
        _, work, _ = cases.profiled(lambda: linear_token_loss(x, w, targets, loss, per_token=rows))
    assert work == N * H * V


def test_peak_memory_is_one_chunk_of_logits():
    """4096 x 8192 logits (128 MiB) are never whole."""
    x = randn(4096, 16, seed=0).requires_grad_()
    w = randn(8192, 16, seed=1).requires_grad_()
    targets = randint(8192, (4096,), 2)
    step = lambda: linear_token_loss(x, w, targets, torch.neg, workspace="compact").loss.backward()  # noqa: E731
    _, _, largest = cases.profiled(step)
    budget = _gemms.Gemms.logits_bytes["compact"]
    assert 0.8 * budget < largest <= budget


@each_backend
def test_metrics_have_their_names_where_nothing_counts(backend):
    """A batch without a token must not be a KeyError of the caller's log."""
    device = DEVICE[backend]
    (x, w, _), targets, rows = inputs(device=device)
    with_metric = lambda p, old_logprob, advantage: (-p, {"ratio": (p - old_logprob).exp()})  # noqa: E731
    for count, mask in ((0, None), (N, torch.zeros(1, N, dtype=torch.bool, device=device))):
        few = {k: v[:, :count] for k, v in rows.items()}
        out = linear_token_loss(
            *(x[:, :count].requires_grad_(), w, targets[:, :count], with_metric),
            per_token=few,
            mask=mask,
            backend=backend,
        )
        assert out.loss == 0
        assert torch.equal(out.metrics["ratio"], torch.zeros(1, count, device=device))


def test_a_tensor_of_the_closure_gets_its_gradient_or_an_error():
    (x, w, _), targets, _ = inputs()
    x.requires_grad_()
    alpha = torch.tensor(2.0, requires_grad=True)
    for captured in (alpha, alpha * 3):
        with pytest.raises(ValueError, match="no tensor that requires grad but its arguments"):
            linear_token_loss(x, w, targets, lambda p, a=captured: -a * p)
        linear_token_loss(x, w, targets, lambda p, a=captured: -a.detach() * p)
    # A leaf made inside the loss has no owner to receive its gradient.
    with pytest.raises(ValueError, match="no tensor that requires grad but its arguments"):
        linear_token_loss(x, w, targets, lambda p: (-p.detach()).requires_grad_())
    assert linear_token_loss(x, w, targets, lambda p: p).loss.requires_grad
    loss = linear_token_loss(x, w, targets, lambda p: -alpha * p, reduction="none").loss
    (got,) = torch.autograd.grad(loss.mean(), alpha)
    torch.testing.assert_close(got, -linear_logprob(x, w, targets).mean().detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("written", ["logprob", "a"])
def test_a_loss_that_writes_into_its_arguments(reduction, written):
    """They are views of the caller's tensors, or of a result."""

    def in_place(logprob, a):
        (logprob if written == "logprob" else a).mul_(2)
        return -logprob * a

    given = torch.ones(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])
    options = {"per_token": {"a": torch.ones(2)}, "reduction": reduction}
    with pytest.raises(ValueError, match=f"loss_fn must not write into {written}; it changed it"):
        linear_token_loss(*given, in_place, **options)


@each_backend
@pytest.mark.parametrize("name", ["mask", "loss_fn"])
def test_a_tensor_per_token_may_have_any_name(backend, name):
    (x, w, _), targets, rows = inputs(device=DEVICE[backend], count=4)
    advantage = rows["advantage"]

    def loss_fn(logprob, **per_token):
        return -per_token[name] * logprob

    out = linear_token_loss(x, w, targets, loss_fn, per_token={name: advantage}, backend=backend)
    torch.testing.assert_close(out.loss, -(advantage * out.logprob).mean())


@each_backend
def test_masked_rows_may_have_any_temperature(backend):
    x, w, targets = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    mask = torch.tensor([1, 0, 1, 1])
    if DEVICE[backend] != "cpu":
        pytest.skip("only the CPU looks at temperatures")
    call = lambda t: linear_token_loss(  # noqa: E731
        x, w, targets, torch.neg, temperature=t, mask=mask, backend=backend
    )
    assert call(torch.tensor([1.0, 0.0, 1.0, 1.0])).loss.isfinite()
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        call(torch.tensor([0.0, 0.0, 1.0, 1.0]))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_function_without_a_gradient_is_zeros(monkeypatch):
    # Unwritten memory holds NaN.
    empty = lambda *a, **k: torch.full(*a, fill_value=torch.nan, **k)  # noqa: E731
    monkeypatch.setattr(_gemms.torch, "empty", empty)
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    linear_token_loss(x, w, torch.arange(4), NoGradient.apply).loss.backward()
    assert torch.equal(x.grad, torch.zeros(4, 3)) and torch.equal(w.grad, torch.zeros(5, 3))


@each_backend
@pytest.mark.parametrize("other", ["name", "dtype"])
def test_other_metrics_in_a_later_chunk(backend, other, four_rows_a_chunk):
    """Otherwise rows of a later chunk would keep unwritten memory."""
    if backend == "reference":
        pytest.skip("the reference calls loss_fn once")
    (x, w, _), targets, _ = inputs(device=DEVICE[backend])
    into = torch.ones_like(w)
    sizes = []

    def loss_fn(logprob):
        sizes.append(len(logprob))
        first = len(sizes) == 1
        name = "a" if first or other == "dtype" else "b"
        value = logprob.detach() if first or other == "name" else logprob.detach().double()
        return -logprob, {name: value}

    with pytest.raises(ValueError, match="loss_fn must return the same metrics.*for every chunk"):
        linear_token_loss(
            x, w.requires_grad_(), targets, loss_fn, accumulate_into=into, backend=backend
        )
    assert len(sizes) == 2 and (into == 1).all()
