"""ppo_loss: values, every gradient and every metric against a loop over Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.ppo_cases import METRICS, NAMES, TRAINED, batch, naive, run
from _support.tolerance import assert_near
from fastrlhf import ppo_loss, reference
from fastrlhf.ops import _backend

NAN = float("nan")
each_backend = cases.each_backend("ppo_loss")
fused = cases.each_backend("ppo_loss", cases.FUSED)
each_cpp = cases.each_backend("ppo_loss", cases.CPP)


def on(backend):
    call = cases.anywhere(ppo_loss)
    return lambda *tensors, **options: call(*tensors, **options, backend=backend)


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
    assert_near(ours[0], eager[0], truth[0], "loss")
    for name in METRICS:
        assert_near(ours[1][name], eager[1][name], truth[1][name], name)
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
            assert_near(*parts, name)
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
        loss, metrics, _ = run(on(backend), tensors, entropy_coef=0.1)
        assert loss.isnan(), name
        if name in ("logprob", "old_logprob"):
            assert metrics["ratio_mean"].isnan() and metrics["ratio_max"].isnan()


@each_backend
def test_masked_tokens_cost_the_mean_ratio_no_digits(backend):
    logprob, mask = torch.full((4096,), -6.5), torch.zeros(4096, dtype=torch.bool)
    mask[::1024] = True
    metrics = on(backend)(logprob, 0 * logprob, 0 * logprob, mask=mask).metrics
    assert metrics["ratio_mean"].item() == pytest.approx(math.exp(-6.5), rel=1e-6)


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
    ratio = {"policy_loss", "approx_kl", "ratio_mean", "ratio_max"}
    clip = {"clip_fraction", "clip_fraction_low", "clip_fraction_high"}
    assert set(metrics) == ratio | clip | {"dual_clip_fraction", "outside_fraction"}
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
def test_constant_returns_explain_no_variance(backend):
    tensors = batch((9,), torch.float32)
    tensors["returns"] = torch.full((9,), 2.0)
    assert run(on(backend), tensors)[1]["explained_variance"] == 0
    tensors = batch((9,), torch.float32)
    tensors["values"] = tensors["returns"].clone()
    assert run(on(backend), tensors)[1]["explained_variance"] == 1


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.1, -0.3, 1e-30, 1e6 / 3, -1e25])
def test_constant_returns_of_any_size(backend, size, dtype):
    """Where the mean does not come out exact either; blocks, programs and a mask that leave 0 to start with."""
    for shape in ((9,), (3, 1000), (7, 4001)):
        tensors, mask = batch(shape, dtype), cases.random_mask(shape, 1)
        tensors["returns"] = torch.full(shape, size, dtype=dtype)
        for m in (None, mask):
            metrics = run(on(backend), tensors, mask=m, value_clip=None)[1]
            assert metrics["explained_variance"] == 0, (shape, m is not None)


@pytest.mark.skipif(
    "cpu" not in _backend.kernels("ppo_loss"), reason="the C++ extension is not built"
)
def test_the_ratio_to_its_last_digits_whatever_its_size():
    logprob = torch.linspace(-20, 20, 4001, requires_grad=True)
    zero = torch.zeros_like(logprob)
    ppo_loss(logprob, zero, zero - 1, clip=1e9, backend="cpu").loss.backward()
    expected = logprob.detach().double().exp() / logprob.numel()
    assert ((logprob.grad - expected) / expected).abs().max() < 3e-7


@fused
def test_every_rank_and_stride(backend, poisoned):
    rows = 12 if cases.emulated(backend) else 60  # 11 and 53 programs or blocks
    tensors, mask = batch((rows, 900), torch.float32), cases.random_mask((rows, 900), 1)

    def call(view=lambda x: x, view_mask=mask):
        loss, metrics, grads = run(
            on(backend), {n: view(x) for n, x in tensors.items()}, mask=view_mask, entropy_coef=0.1
        )
        return [loss, *metrics.values(), *grads.values()]

    plain = call()
    others = [
        call(),
        call(cases.with_strides, mask.T.contiguous().T),
        call(torch.flatten, mask.flatten()),
        call(lambda x: x.reshape(-1, 2, 900), mask.reshape(-1, 2, 900)),
    ]
    for other in others:
        for a, b in zip(plain, other, strict=True):
            assert torch.equal(a.flatten(), b.flatten())


@each_backend
@pytest.mark.parametrize("shape", [(70, 903), (65537,)])
def test_every_dtype_beside_every_other(backend, shape):
    """A cast to fp32 is exact, so mixed dtypes and strides give bitwise the same results."""
    if cases.emulated(backend) and len(shape) == 2:  # 13 programs
        shape = (14, 903)
    elif cases.emulated(backend):  # 9 programs or blocks; the last one holds one token
        shape = (8193,)
    tensors, mask = batch(shape, torch.float32), cases.random_mask(shape, 1)
    for turn in range(3):
        mixed = {
            name: cases.with_strides(x.to(cases.DTYPES[(i + turn) % 3])) if i % 2 else x
            for i, (name, x) in enumerate(tensors.items())
        }
        wide = {name: x.float().contiguous() for name, x in mixed.items()}
        ours = run(on(backend), mixed, mask=mask, entropy_coef=0.1)
        other = run(on(backend), wide, mask=mask, entropy_coef=0.1)
        assert torch.equal(ours[0], other[0])
        assert all(torch.equal(ours[1][name], other[1][name]) for name in METRICS)
        for name, grad in ours[2].items():
            assert torch.equal(grad, other[2][name].to(mixed[name].dtype)), name


@each_backend
@pytest.mark.parametrize(("tokens", "offset"), [(65536, 0), (65536, 3), (4 * 65536 + 5, 3)])
def test_long_batches_with_a_mask(backend, tokens, offset):
    """The mask is counted in one slice and in several, from any address; a CUDA block comes back for more tiles."""
    if cases.interpreted(backend):  # 8 and 33 programs; one takes one tile whatever the length
        tokens //= 8
    tensors = {name: x[offset:] for name, x in batch((tokens + offset,), torch.float32).items()}
    mask = cases.random_mask((tokens + offset,), 1, 0.3)[offset:]
    ours = run(on(backend), tensors, mask=mask, entropy_coef=0.1)
    doubles = {name: x.double() for name, x in tensors.items()}
    truth = run(reference.ppo_loss, doubles, mask=mask, entropy_coef=0.1)
    assert ours[0].item() == pytest.approx(truth[0].item(), rel=2e-6)
    for name in METRICS:
        assert ours[1][name].item() == pytest.approx(truth[1][name].item(), rel=2e-6), name
    for name in TRAINED:
        wrong = ~torch.isclose(ours[2][name].double(), truth[2][name], rtol=2e-5, atol=1e-12)
        assert wrong.sum() <= 3, name  # a token on an edge of a clip may fall on the other side
    kept = ours[2]["entropy"] != 0
    assert torch.equal(kept, mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graph_replays_and_streams_do_not_meet():
    shape = (5, 40007)
    inputs = [[x.cuda() for x in batch(shape, torch.float32, seed).values()] for seed in range(4)]
    mask = cases.random_mask(shape, 1).cuda()

    def call(tensors):
        options = (mask, None, [], 0.8, 1.2, math.inf, 0.2, 0.5, 0.01, [], True)
        return torch.ops.fastrlhf.ppo_loss_fwd(*tensors, *options)

    expected = [call(tensors) for tensors in inputs]
    static = [x.clone() for x in inputs[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call(static)
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, tensors, wanted in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                for a, b in zip(call(tensors), wanted, strict=True):
                    assert torch.equal(a, b)
        for tensors, wanted in zip(inputs, expected, strict=True):
            for to, x in zip(static, tensors, strict=True):
                to.copy_(x)
            graph.replay()
            for a, b in zip(replayed, wanted, strict=True):
                assert torch.equal(a, b)


@fused
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(0, 99),
    st.floats(0.01, 2),
    st.one_of(st.none(), st.floats(1.01, 4)),
    st.one_of(st.none(), st.floats(0.01, 2)),
    st.floats(0, 1),
)
def test_any_options(backend, count, seed, clip, dual_clip, value_clip, keep):
    tensors, mask = batch((count,), seed=seed, spread=0.6), cases.random_mask((count,), seed, keep)
    options = {"clip": clip, "dual_clip": dual_clip, "value_clip": value_clip}
    options |= {"value_coef": 0.5, "entropy_coef": 0.1}
    loss, _, grads = run(on(backend), tensors, mask=mask, **options)
    expected, _, expected_grads = naive(tensors, mask, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], rtol=1e-10, atol=1e-14)
