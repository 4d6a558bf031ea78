"""ppo_loss: values, every gradient and every metric against a loop over Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sequence_cases as cases
from fastrlhf import PPOLossOutput, reference
from fastrlhf import ppo_loss as plain_ppo_loss
from fastrlhf.ops import _backend
from fastrlhf.ops.ppo_loss import METRICS

NAN = float("nan")
ppo_loss = cases.anywhere(plain_ppo_loss)
each_backend = cases.each_backend("ppo_loss")
fused = cases.each_backend("ppo_loss", cases.FUSED)
each_triton = cases.each_backend("ppo_loss", ("triton",))
NAMES = ("logprob", "old_logprob", "advantages", "values", "old_values", "returns", "entropy")
TRAINED = ("logprob", "values", "entropy")


def batch(shape, dtype=torch.float64, seed=0, spread=0.3):
    """Tokens by name; log-ratios on both sides of the clip, advantages of both signs and of 0."""
    draws = dict(zip(NAMES, cases.randn((7, *shape), seed), strict=True))
    draws["old_logprob"] = draws["logprob"] + spread * draws["old_logprob"]
    draws["old_values"] = draws["values"] + 0.3 * draws["old_values"]
    draws["entropy"] = draws["entropy"].abs()
    draws["advantages"].flatten()[::7] = 0.0
    return {name: x.to(dtype) for name, x in draws.items()}


def split(tensors):
    """Positional and keyword tensors of a call, the trained ones as fresh leaves."""
    leaves = {
        name: x.detach().clone().requires_grad_() if name in TRAINED else x
        for name, x in tensors.items()
    }
    positional = [leaves[name] for name in NAMES[:3]]
    return positional, {n: leaves[n] for n in NAMES[3:] if n in leaves}, leaves


def run(function, tensors, upstream=1.0, **options):
    """(loss, metrics, gradients by name) with a given gradient of the loss."""
    positional, keywords, leaves = split(tensors)
    loss, metrics = function(*positional, **keywords, **options)
    names = [name for name in TRAINED if name in tensors]
    grads = torch.autograd.grad(loss * upstream, [leaves[name] for name in names])
    return loss.detach(), metrics, dict(zip(names, grads, strict=True))


def on(backend):
    return lambda *tensors, **options: ppo_loss(*tensors, **options, backend=backend)


def naive(tensors, mask, clip, dual_clip, value_clip, value_coef, entropy_coef):
    """The same from lists of floats: (loss, metrics, gradients)."""
    kept = mask.flatten().nonzero().flatten().tolist()
    count = max(len(kept), 1)
    flat = {name: x.double().flatten().tolist() for name, x in tensors.items()}
    grads = {name: torch.zeros(mask.numel(), dtype=torch.float64) for name in TRAINED}
    sums, ratios, errors = dict.fromkeys(METRICS, 0.0), [], []
    for i in kept:
        log_ratio = flat["logprob"][i] - flat["old_logprob"][i]
        ratio, advantage = math.exp(log_ratio), flat["advantages"][i]
        clipped_ratio = min(max(ratio, 1 - clip), 1 + clip)
        branches = [(-advantage * ratio, -advantage * ratio), (-advantage * clipped_ratio, 0.0)]
        loss, grad = branches[1] if branches[1][0] > branches[0][0] else branches[0]
        sums["clip_fraction"] += branches[1][0] > branches[0][0]
        if dual_clip is not None and advantage < 0 and -advantage * dual_clip < loss:
            loss, grad = -advantage * dual_clip, 0.0
        sums["policy_loss"] += loss
        grads["logprob"][i] = grad / count
        sums["approx_kl"] += ratio - 1 - log_ratio
        ratios.append(ratio)
        value, target = flat["values"][i], flat["returns"][i]
        old_value, half = flat["old_values"][i], 0.5 * (value - target) ** 2
        errors.append(target - value)
        grad = value - target
        if value_clip is not None:
            near = min(max(value, old_value - value_clip), old_value + value_clip)
            if 0.5 * (near - target) ** 2 > half:
                half, grad = 0.5 * (near - target) ** 2, 0.0
                sums["value_clip_fraction"] += 1
        sums["value_loss"] += half
        grads["values"][i] = value_coef * grad / count
        sums["entropy"] += flat["entropy"][i]
        grads["entropy"][i] = -entropy_coef / count
    metrics = {name: total / count for name, total in sums.items()}
    metrics["ratio_mean"], metrics["ratio_max"] = sum(ratios) / count, max(ratios, default=0.0)
    targets = torch.tensor([flat["returns"][i] for i in kept], dtype=torch.float64)
    errors = torch.tensor(errors, dtype=torch.float64)
    spread = float(targets.var(correction=0)) if kept else 0.0
    noise = float(errors.var(correction=0)) if kept else 0.0
    metrics["explained_variance"] = 1 - noise / spread if spread > 0 else 0.0
    loss = metrics["policy_loss"] + value_coef * metrics["value_loss"]
    return loss - entropy_coef * metrics["entropy"], metrics, grads


@each_backend
@pytest.mark.parametrize("dual_clip", [None, 1.15])
@pytest.mark.parametrize("value_clip", [None, 0.2])
@pytest.mark.parametrize("clip", [0.1, 0.2, 1.5])
def test_equals_a_loop_over_floats(backend, dual_clip, value_clip, clip):
    tensors, mask = batch((5, 300)), cases.random_mask((5, 300), 1)
    options = {"clip": clip, "dual_clip": dual_clip, "value_clip": value_clip}
    options |= {"value_coef": 0.7, "entropy_coef": 0.05}
    loss, metrics, grads = run(on(backend), tensors, upstream=-1.7, mask=mask, **options)
    expected_loss, expected_metrics, expected_grads = naive(tensors, mask, **options)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert set(metrics) == set(METRICS) == set(expected_metrics)
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
        assert value.item() == pytest.approx(expected_metrics[name], rel=1e-6, abs=1e-9), name
    assert metrics["clip_fraction"] > 0 or clip > 1
    for name, grad in grads.items():
        assert torch.allclose(grad.flatten(), -1.7 * expected_grads[name], rtol=1e-11, atol=1e-15)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_error_at_most_twice_eager(backend, dtype, masked):
    tensors = batch((9, 500), dtype)
    options = {"entropy_coef": 0.01, "mask": cases.random_mask((9, 500), 3) if masked else None}
    upstream = 3.3
    ours = run(on(backend), tensors, upstream, **options)
    eager = run(reference.ppo_loss, tensors, upstream, **options)
    doubles = {name: x.double() for name, x in tensors.items()}
    truth = run(reference.ppo_loss, doubles, upstream, **options)
    assert ours[0].dtype == torch.float32
    cases.assert_close_to_eager(ours[0], eager[0], truth[0], "loss")
    for name in METRICS:
        cases.assert_close_to_eager(ours[1][name], eager[1][name], truth[1][name], name)
    # Away from the edges of the clips, where rounding may choose the other branch.
    ratio = torch.exp(doubles["logprob"] - doubles["old_logprob"])
    moved = (doubles["values"] - doubles["old_values"]).abs()
    error = (doubles["values"] - doubles["returns"]).abs()
    safe = ((ratio - 0.8).abs() > 1e-4) & ((ratio - 1.2).abs() > 1e-4)
    safe &= ((moved - 0.2).abs() > 1e-4) & (error > 1e-4)
    assert safe.float().mean() > 0.99
    for name in TRAINED:
        assert ours[2][name].dtype == dtype
        if dtype == torch.float32:
            parts = (x[2][name][safe] * 4500 for x in (ours, eager, truth))
            cases.assert_close_to_eager(*parts, name)
        else:  # rounded once, to the dtype of the input
            close = {"rtol": 1.01 * torch.finfo(dtype).eps / 2, "atol": 1e-7}
            assert torch.allclose(ours[2][name][safe].double(), truth[2][name][safe], **close)


@each_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_edge_of_the_clip_takes_the_unclipped_branch(backend, sign):
    # Ratios around 1.25 and 0.75 in steps of one rounding; 1 +- clip is exact in fp32.
    edges = torch.tensor([0.75, 1.25]).log()
    logprob = torch.stack([edges + k * 2**-22 for k in range(-8, 9)]).flatten()
    tensors = {"logprob": logprob, "old_logprob": torch.zeros(34)}
    tensors["advantages"] = torch.full((34,), sign)
    loss, metrics, grads = run(on(backend), tensors, clip=0.25)
    clipped = (grads["logprob"] == 0).float().mean()
    assert metrics["clip_fraction"] == clipped
    assert 0.1 < clipped < 0.4  # about half of one of the two edges' neighbourhoods
    # Every token is either clipped with no gradient, or not with the gradient -A rho / n.
    full = -sign * logprob.exp() / 34
    assert torch.allclose(grads["logprob"], full.where(grads["logprob"] != 0, torch.zeros(())))
    exact = {name: torch.zeros(1) for name in NAMES[:2]} | {"advantages": torch.full((1,), sign)}
    exact["values"], exact["returns"] = torch.tensor([1.25]), torch.tensor([2.0])
    exact["old_values"] = torch.ones(1)
    _, metrics, grads = run(on(backend), exact, value_clip=0.25)
    assert metrics["value_clip_fraction"] == 0
    assert grads["values"].item() == 0.5 * (1.25 - 2.0)


@each_backend
def test_ratio_is_exactly_one_on_policy(backend):
    logprob = cases.randn(5000, 1, torch.float32)
    tensors = {"logprob": logprob, "old_logprob": logprob, "advantages": torch.ones(5000)}
    loss, metrics, _ = run(on(backend), tensors)
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1
    assert metrics["approx_kl"] == metrics["clip_fraction"] == 0
    assert loss == -1


@each_backend
def test_a_wild_log_ratio_stays_finite(backend):
    tensors = {"logprob": torch.tensor([500.0, -500.0, 25.0]), "old_logprob": torch.zeros(3)}
    tensors["advantages"] = torch.tensor([-1.0, 1.0, 1.0])
    loss, metrics, grads = run(on(backend), tensors)
    assert loss.isfinite() and metrics["ratio_max"] == pytest.approx(math.exp(20), rel=1e-5)
    assert torch.equal(grads["logprob"], torch.zeros(3))  # beyond the clamp, or clipped


@each_backend
def test_nan_shows_in_the_loss(backend):
    for name in set(NAMES) - {"old_values"}:
        tensors = batch((40,), torch.float32)
        tensors[name][7] = NAN
        assert run(on(backend), tensors, entropy_coef=0.1)[0].isnan(), name


@each_backend
def test_nothing_behind_the_mask_is_used(backend):
    tensors, mask = batch((4, 300), torch.float32), cases.random_mask((4, 300), 1)
    clean = run(on(backend), tensors, mask=mask, entropy_coef=0.1)
    dirty = {name: x.masked_fill(~mask, NAN) for name, x in tensors.items()}
    dirty = run(on(backend), dirty, mask=mask, entropy_coef=0.1)
    assert torch.equal(clean[0], dirty[0])
    for name, value in clean[1].items():
        assert torch.equal(value, dirty[1][name]), name
    for name, grad in clean[2].items():
        assert torch.equal(grad, dirty[2][name])
        assert (grad[~mask] == 0).all()


@each_backend
def test_pad_columns_packing_and_order_change_nothing(backend):
    tensors, lengths = batch((sum(cases.LENGTHS),)), cases.LENGTHS
    packed = run(on(backend), tensors)
    padded = {name: cases.pad(x, lengths, 1100, NAN) for name, x in tensors.items()}
    padded = run(on(backend), padded, mask=cases.length_mask(lengths, 1100))
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0))
    shuffled = run(on(backend), {name: x[order] for name, x in tensors.items()})
    for other in (padded, shuffled):
        assert torch.allclose(packed[0], other[0], rtol=1e-13)
        for name, value in packed[1].items():
            assert value.item() == pytest.approx(other[1][name].item(), rel=1e-6)
    for name, grad in packed[2].items():
        assert torch.allclose(grad, cases.unpad(padded[2][name], lengths), rtol=1e-13)
        assert torch.allclose(grad[order], shuffled[2][name], rtol=1e-13)


@each_backend
def test_absent_tensors_leave_their_terms_out(backend):
    tensors = batch((50,), torch.float32)
    policy = {name: tensors[name] for name in NAMES[:3]}
    loss, metrics, grads = run(on(backend), policy)
    assert set(metrics) == {"policy_loss", "approx_kl", "clip_fraction", "ratio_mean", "ratio_max"}
    assert loss == metrics["policy_loss"] and set(grads) == {"logprob"}
    with_entropy = run(on(backend), policy | {"entropy": tensors["entropy"]})
    assert set(with_entropy[1]) - set(metrics) == {"entropy"}
    unclipped = policy | {"values": tensors["values"], "returns": tensors["returns"]}
    with_values = run(on(backend), unclipped, value_clip=None)
    added = {"value_loss", "value_clip_fraction", "explained_variance"}
    assert set(with_values[1]) - set(metrics) == added
    # An old value that no clip looks at is allowed, and changes nothing.
    ignored = run(on(backend), unclipped | {"old_values": tensors["old_values"]}, value_clip=None)
    assert torch.equal(with_values[0], ignored[0])


@each_backend
def test_empty_and_fully_masked(backend):
    full = batch((3, 4), torch.float32)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for tensors, mask in ((batch((0,), torch.float32), None), (full, nothing)):
        loss, metrics, grads = run(on(backend), tensors, mask=mask, entropy_coef=0.1)
        assert loss == 0
        assert all(value == 0 for value in metrics.values())
        assert all((grad == 0).all() for grad in grads.values())


@each_backend
def test_constant_returns_explain_no_variance(backend):
    tensors = batch((9,), torch.float32)
    tensors["returns"] = torch.full((9,), 2.0)
    assert run(on(backend), tensors)[1]["explained_variance"] == 0
    tensors = batch((9,), torch.float32)
    tensors["values"] = tensors["returns"].clone()
    assert run(on(backend), tensors)[1]["explained_variance"] == 1


@each_backend
def test_only_the_trained_tensors_get_gradients(backend):
    tensors = {name: x.requires_grad_() for name, x in batch((6,), torch.float32).items()}
    positional = [tensors[name] for name in NAMES[:3]]
    loss, _ = ppo_loss(*positional, **{n: tensors[n] for n in NAMES[3:]}, backend=backend)
    loss.backward()
    assert {name for name, x in tensors.items() if x.grad is not None} == set(TRAINED)
    loss, _ = ppo_loss(*(x.detach() for x in positional), backend=backend)
    assert not loss.requires_grad
    with torch.no_grad():
        assert not ppo_loss(*positional, backend=backend).loss.requires_grad


@fused
def test_gradient_of_the_gradient_is_refused(backend):
    x = torch.zeros(3, requires_grad=True)
    loss = ppo_loss(x, torch.zeros(3), torch.ones(3), backend=backend).loss
    (grad,) = torch.autograd.grad(loss * loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@fused
def test_gradcheck(backend):
    tensors = batch((23,))
    fixed = {name: x for name, x in tensors.items() if name not in TRAINED}

    def loss(logprob, values, entropy):
        return ppo_loss(
            logprob,
            fixed["old_logprob"],
            fixed["advantages"],
            values=values,
            old_values=fixed["old_values"],
            returns=fixed["returns"],
            entropy=entropy,
            dual_clip=1.3,
            entropy_coef=0.1,
            backend=backend,
        ).loss

    torch.autograd.gradcheck(loss, [tensors[name].requires_grad_() for name in TRAINED])


@fused
def test_layouts_threads_and_unwritten_memory(backend):
    shape = (6, 900) if cases.interpreted(backend) else (60, 900)
    tensors, mask = batch(shape, torch.float32), cases.random_mask(shape, 1)

    def call(view=lambda x: x, view_mask=mask):
        loss, metrics, grads = run(
            on(backend), {n: view(x) for n, x in tensors.items()}, mask=view_mask, entropy_coef=0.1
        )
        return [loss, *metrics.values(), *grads.values()]

    cases.assert_same_for_any_threads(call)
    plain = call()
    with cases.poisoned_empty():
        others = [
            call(cases.with_strides, mask.T.contiguous().T),
            call(torch.flatten, mask.flatten()),
            call(lambda x: x.reshape(-1, 2, 900), mask.reshape(-1, 2, 900)),
        ]
    for other in others:
        for a, b in zip(plain, other, strict=True):
            assert torch.equal(a.flatten(), b.flatten())


@fused
def test_compiles_without_a_graph_break(backend):
    tensors, mask = batch((4, 30), torch.float32), cases.random_mask((4, 30), 1)

    def forward(mask, *values):
        named = dict(zip(NAMES[3:], values[3:], strict=True))
        loss, metrics = ppo_loss(*values[:3], **named, mask=mask, entropy_coef=0.1, backend=backend)
        return [loss, *metrics.values()]

    cases.assert_compiles(forward, mask, *tensors.values())
    torch._dynamo.reset()
    leaves = [tensors[n].requires_grad_() if n in TRAINED else tensors[n] for n in NAMES]
    trained = [x for x in leaves if x.requires_grad]
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(mask, *leaves)[0], trained),
        torch.autograd.grad(forward(mask, *leaves)[0], trained),
        strict=True,
    ):
        assert torch.equal(a, b)


@fused
def test_opcheck(backend):
    tensors, mask = batch((3, 5), torch.float32), cases.random_mask((3, 5), 1)
    arguments = [tensors[n].requires_grad_() if n in TRAINED else tensors[n] for n in NAMES]
    rest = (mask, 0.2, 3.0, 0.2, 0.5, 0.01)
    cases.opcheck("ppo_loss", backend, (*arguments, *rest, True))
    policy = (*arguments[:3], None, None, None, None, None, *rest[1:])
    cases.opcheck("ppo_loss", backend, (*policy, True))
    cases.opcheck("ppo_loss", backend, (*(x.detach() for x in policy[:3]), *policy[3:], False))


@fused
def test_says_which_backend_ran(backend):
    before, named = _backend.calls["ppo_loss", backend], "auto" if backend == "cpu" else backend
    assert isinstance(ppo_loss(*torch.zeros(3, 2), backend=named), PPOLossOutput)
    assert _backend.calls["ppo_loss", backend] == before + 1


@each_triton
def test_a_program_takes_several_blocks(backend, monkeypatch):
    from fastrlhf.kernels import ppo_loss as kernels

    tensors, mask = batch((7, 900)), cases.random_mask((7, 900), 1)
    with cases.triton_launches() as names:
        loss, metrics, grads = run(on(backend), tensors, mask=mask)
    assert names == ["ppo_loss_fwd_kernel", "ppo_loss_metrics_kernel"]
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    again = run(on(backend), tensors, mask=mask)
    torch.testing.assert_close((loss, metrics, grads), again)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(0, 99),
    st.floats(0.01, 2),
    st.one_of(st.none(), st.floats(1.01, 4)),
    st.one_of(st.none(), st.floats(0.01, 2)),
    st.floats(0, 1),
)
def test_any_options(count, seed, clip, dual_clip, value_clip, keep):
    tensors, mask = batch((count,), seed=seed, spread=0.6), cases.random_mask((count,), seed, keep)
    options = {"clip": clip, "dual_clip": dual_clip, "value_clip": value_clip}
    options |= {"value_coef": 0.5, "entropy_coef": 0.1}
    expected, _, expected_grads = naive(tensors, mask, **options)
    for backend in ("cpu", "triton"):
        loss, _, grads = run(on(backend), tensors, mask=mask, **options)
        assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        for name, grad in grads.items():
            assert torch.allclose(grad, expected_grads[name], rtol=1e-10, atol=1e-14)


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"logprob": [0.0]}, TypeError, ("logprob", "Tensor", "list")),
        ({"logprob": X.int()}, TypeError, ("logprob", "float32", "int32")),
        ({"old_logprob": torch.zeros(3)}, ValueError, ("old_logprob", "(4,)", "(3,)")),
        ({"advantages": torch.zeros(4, 1)}, ValueError, ("advantages", "(4,)", "(4, 1)")),
        ({"advantages": X.double()}, TypeError, ("advantages", "float64", "float32")),
        ({"entropy": X.to("meta")}, ValueError, ("entropy", "cpu", "meta")),
        ({"values": torch.zeros(5)}, ValueError, ("values", "(4,)", "(5,)")),
        ({"values": X}, ValueError, ("returns", "values", "None")),
        ({"values": X, "returns": X}, ValueError, ("old_values", "value_clip=None")),
        ({"returns": X}, ValueError, ("returns", "values=None")),
        ({"old_values": X}, ValueError, ("old_values", "values=None")),
        ({"mask": torch.ones(3)}, ValueError, ("mask", "(4,)", "(3,)")),
        ({"mask": torch.full((4,), -1)}, ValueError, ("mask", "0 and 1", "-1")),
        ({"clip": 0.0}, ValueError, ("clip", "above 0", "0.0")),
        ({"clip": -0.2}, ValueError, ("clip", "above 0", "-0.2")),
        ({"clip": None}, TypeError, ("clip", "number", "NoneType")),
        ({"dual_clip": 1.0}, ValueError, ("dual_clip", "above 1", "1.0")),
        ({"value_clip": 0.0}, ValueError, ("value_clip", "above 0", "0.0")),
        ({"value_coef": NAN}, ValueError, ("value_coef", "finite", "nan")),
        ({"entropy_coef": "0"}, TypeError, ("entropy_coef", "number", "str")),
        ({"backend": "c++"}, ValueError, ("backend", "c++")),
        ({"backend": "cuda"}, ValueError, ("cuda", "cannot run")),
    ],
)
def test_errors_name_the_argument(arguments, kind, words):
    call = {"logprob": X, "old_logprob": X, "advantages": X, **arguments}
    tensors = [call.pop(name) for name in NAMES[:3]]
    cases.assert_raises(lambda: plain_ppo_loss(*tensors, **call), kind, "ppo_loss", *words)
