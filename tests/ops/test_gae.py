"""gae against a naive loop per sequence, in every layout the public function takes."""

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from fastrlhf import gae as plain_gae
from fastrlhf import reference
from fastrlhf.ops import _backend

LENGTHS = cases.LENGTHS
N, B = sum(LENGTHS), len(LENGTHS)
NAN = float("nan")
gae = cases.anywhere(plain_gae)
each_backend = cases.each_backend("gae")
fused = cases.each_backend("gae", cases.FUSED)
each_triton = cases.each_backend("gae", ("triton",))


def naive(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=None):
    """[B, T] tensors: the naive loop over the unmasked tokens of each row, in float64."""
    advantages, returns = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        keep = mask[b]
        start = 0.0 if bootstrap is None else float(bootstrap[b])
        a, r = cases.naive_gae(
            rewards[b][keep].tolist(), values[b][keep].tolist(), gamma, lam, start
        )
        advantages[b][keep] = torch.tensor(a, dtype=torch.float64)
        returns[b][keep] = torch.tensor(r, dtype=torch.float64)
    return advantages, returns


def packed(dtype=torch.float32, seed=0):
    return cases.randn(N, seed, dtype), cases.randn(N, seed + 1, dtype), cases.cu_of(LENGTHS)


def loop_over_steps(rewards, values, gamma, lam):
    """The loop that trainers run, in the dtype of its input."""
    advantage, steps, last = 0, [], rewards.shape[1] - 1
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t < last else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


@each_backend
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.0, 0.5), (0.7, 0.0)])
def test_equals_naive_loop_on_random_masks(backend, gamma, lam):
    shape = (9, 300)
    rewards, values = cases.randn(shape, 1), cases.randn(shape, 2)
    mask, bootstrap = cases.random_mask(shape, 3), cases.randn(9, 4)
    mask[0], mask[1], mask[2, 40:] = False, True, False
    expected = naive(rewards, values, mask, gamma, lam, bootstrap)
    got = gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        mask=mask,
        bootstrap=bootstrap,
        backend=backend,
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_backend
def test_packed_equals_naive_loop(backend):
    rewards, values, cu = packed(torch.float64)
    bootstrap = cases.randn(B, 5)
    got = gae(rewards, values, cu_seqlens=cu, bootstrap=bootstrap, backend=backend)
    mask = cases.length_mask(LENGTHS)
    expected = naive(
        cases.pad(rewards, LENGTHS), cases.pad(values, LENGTHS), mask, bootstrap=bootstrap
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, cases.unpad(b, LENGTHS), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="other compilers may fuse multiply and add in the recurrence",
)
def test_bit_for_bit_the_loop_over_steps():
    rewards, values = cases.randn((11, 700), 1, torch.float32), cases.randn((11, 700), 2)
    values = values.float()
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9)):
        got = gae(rewards, values, gamma=gamma, lam=lam, backend="cpu")
        for a, b in zip(got, loop_over_steps(rewards, values, gamma, lam), strict=True):
            assert torch.equal(a, b)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", ["packed", "masked", "whitened"])
def test_error_at_most_twice_eager(backend, dtype, layout):
    rewards, values, cu = packed(dtype)
    options = {"cu_seqlens": cu, "whiten": layout == "whitened"}
    if layout == "masked":
        rewards, values = cases.pad(rewards, LENGTHS), cases.pad(values, LENGTHS)
        options = {"mask": cases.random_mask(rewards.shape, 7)}
    ours = gae(rewards, values, **options, backend=backend)
    eager = reference.gae(rewards, values, **options)
    truth = reference.gae(rewards.double(), values.double(), **options)
    for name, a, b, c in zip(("advantages", "returns"), ours, eager, truth, strict=True):
        assert a.dtype == torch.float32
        cases.assert_close_to_eager(a, b, c, name)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_packed_padded_and_one_by_one_agree_bitwise(backend, dtype):
    rewards, values, cu = packed(dtype)
    together = gae(rewards, values, cu_seqlens=cu, backend=backend)
    padded = gae(
        cases.pad(rewards, LENGTHS, fill=NAN),
        cases.pad(values, LENGTHS, fill=NAN),
        mask=cases.length_mask(LENGTHS),
        backend=backend,
    )
    for a, b in zip(together, padded, strict=True):
        assert torch.equal(a, cases.unpad(b, LENGTHS))
        assert (b[~cases.length_mask(LENGTHS)] == 0).all()
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        alone = gae(rewards[None, start:end], values[None, start:end], backend=backend)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[start:end], b[0])


@fused
def test_masked_steps_are_as_if_they_were_not_there(backend):
    rewards, values = cases.randn((20, 600), 1, torch.float32), cases.randn((20, 600), 2)
    values, mask = values.float(), cases.random_mask((20, 600), 3, keep=0.3)
    masked = gae(rewards, values, mask=mask, backend=backend)
    lengths = mask.sum(1).tolist()
    squeezed = gae(rewards[mask], values[mask], cu_seqlens=cases.cu_of(lengths), backend=backend)
    for a, b in zip(masked, squeezed, strict=True):
        if backend == "cpu":
            assert torch.equal(a[mask], b)
        else:  # a scan groups its sums by place
            torch.testing.assert_close(a[mask], b, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("whiten", [False, True])
def test_nothing_behind_the_mask_is_used(backend, whiten):
    rewards, values = cases.randn((6, 300), 1, torch.float32), cases.randn((6, 300), 2)
    values, mask = values.float(), cases.random_mask((6, 300), 3)
    clean = gae(rewards, values, mask=mask, whiten=whiten, backend=backend)
    dirty = gae(
        rewards.masked_fill(~mask, NAN),
        values.masked_fill(~mask, float("inf")),
        mask=mask,
        whiten=whiten,
        backend=backend,
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()


@each_backend
def test_whitens_like_the_statistics_of_the_unmasked_tokens(backend):
    rewards, values, cu = packed(torch.float64)
    plain, returns = gae(rewards, values, cu_seqlens=cu, backend=backend)
    white, same = gae(rewards, values, cu_seqlens=cu, whiten=True, backend=backend)
    expected = torch.tensor(cases.naive_whiten(plain.tolist()), dtype=torch.float64)
    torch.testing.assert_close(white, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(returns, same)


@each_backend
@pytest.mark.parametrize("whiten", [False, True])
def test_empty_and_shortest_inputs(backend, whiten):
    def run(rewards, **options):
        return gae(rewards, rewards, whiten=whiten, backend=backend, **options)

    for shape in ((0, 5), (5, 0), (0, 0)):
        assert [x.shape for x in run(torch.zeros(shape))] == [shape, shape]
    for cu in ((0,), (0, 0, 0)):
        advantages, _ = run(torch.zeros(0), cu_seqlens=torch.tensor(cu, dtype=torch.int32))
        assert advantages.shape == (0,)
    ones = torch.ones(3, 1)
    advantages, returns = run(ones)
    # One step: A = r - V = 0, R = r.
    assert torch.equal(advantages, torch.zeros(3, 1))
    assert torch.equal(returns, ones)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    for out in run(torch.ones(2, 4), mask=nothing):
        assert torch.equal(out, torch.zeros(2, 4))


@fused
def test_more_steps_than_a_16_bit_counter(backend):
    steps = 70_001
    rewards, values = cases.randn((1, steps), 1, torch.float32), cases.randn((1, steps), 2)
    values, mask = values.float(), cases.random_mask((1, steps), 3, keep=0.9)
    got = gae(rewards, values, gamma=0.99, mask=mask, backend=backend)
    expected = naive(rewards, values, mask, gamma=0.99)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    if cases.interpreted(backend):
        return  # 5 ms a row
    rows = torch.full((70_001, 1), 2.0)
    assert torch.equal(gae(rows, rows, backend=backend)[1], rows)


@each_triton
def test_a_program_takes_several_sequences(backend, monkeypatch):
    from fastrlhf.kernels import _launch

    rewards, values, cu = packed()
    mask = cases.random_mask((7, 30), 1)
    x = cases.randn((7, 30), 2, torch.float32)
    calls = (
        lambda: gae(rewards, values, cu_seqlens=cu, whiten=True, backend=backend),
        lambda: gae(x, x + 1, mask=mask, bootstrap=torch.ones(7), backend=backend),
    )
    many = [call() for call in calls]
    monkeypatch.setattr(_launch, "PROGRAMS", 3)
    for before, call in zip(many, calls, strict=True):
        for a, b in zip(before, call(), strict=True):
            torch.testing.assert_close(a, b)


@fused
def test_any_stride_is_read_in_place(backend):
    rewards, values, cu = packed()
    flat = gae(rewards, values, cu_seqlens=cu, backend=backend)
    strided = gae(
        cases.with_strides(rewards), cases.with_strides(values), cu_seqlens=cu, backend=backend
    )
    rewards, values = cases.pad(rewards, LENGTHS), cases.pad(values, LENGTHS)
    mask = cases.length_mask(LENGTHS)
    sliced = gae(
        cases.with_strides(rewards),
        values.T.contiguous().T,
        mask=mask.T.contiguous().T,
        backend=backend,
    )
    for a, b, c in zip(flat, strided, sliced, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, cases.unpad(c, LENGTHS))
        assert c.is_contiguous()


@fused
def test_same_bits_for_any_number_of_threads(backend):
    lengths = [1 + (37 * i) % 700 for i in range(12 if cases.interpreted(backend) else 150)]
    rewards, values = (cases.randn(sum(lengths), seed, torch.float32) for seed in (1, 2))
    cu = cases.cu_of(lengths)
    if backend == "cpu":
        assert rewards.numel() > 3 * 12 * 1024  # three threads get work
    cases.assert_same_for_any_threads(
        lambda: gae(rewards, values, cu_seqlens=cu, whiten=True, backend=backend)
    )


@fused
def test_every_output_is_written(backend):
    rewards, values, cu = packed()
    mask = cases.random_mask((7, 300), 1, keep=0.1)
    with cases.poisoned_empty():
        for whiten in (False, True):
            outputs = [
                *gae(rewards, values, cu_seqlens=cu, whiten=whiten, backend=backend),
                *gae(mask.float(), mask.float(), mask=mask, whiten=whiten, backend=backend),
            ]
            assert not any(x.isnan().any() for x in outputs)


@each_backend
def test_is_a_constant_to_autograd(backend):
    rewards = torch.ones(2, 3, requires_grad=True)
    for out in gae(rewards, rewards * 1, backend=backend):
        assert not out.requires_grad


@fused
def test_compiles_without_a_graph_break(backend):
    rewards, values, cu = packed()
    cases.assert_compiles(
        lambda r, v, c: gae(r, v, cu_seqlens=c, whiten=True, backend=backend), rewards, values, cu
    )


@fused
def test_opcheck(backend):
    rewards, values = cases.randn((3, 7), 1, torch.float32), cases.randn((3, 7), 2).float()
    mask, bootstrap = cases.random_mask((3, 7), 3), torch.ones(3)
    arguments = (rewards, values, 0.9, 0.8, None, mask, bootstrap, True)
    cases.opcheck("gae", backend, arguments)


@fused
def test_says_which_backend_ran(backend):
    before = _backend.calls["gae", backend]
    gae(torch.ones(1, 2), torch.ones(1, 2), backend="auto" if backend == "cpu" else backend)
    assert _backend.calls["gae", backend] == before + 1


@each_triton
def test_two_launches_with_whitening(backend):
    with cases.triton_launches() as names:
        gae(torch.ones(2, 3), torch.ones(2, 3), whiten=True, backend=backend)
    assert names == ["gae_kernel", "masked_whiten_kernel"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_layout(data):
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=12))
    seed, whiten = data.draw(st.integers(0, 999)), data.draw(st.booleans())
    tokens, cu = sum(lengths), cases.cu_of(lengths)
    rewards, values = (cases.randn(tokens, seed + i, torch.float32) for i in (0, 1))
    got = gae(rewards, values, cu_seqlens=cu, whiten=whiten, backend="cpu")
    truth = reference.gae(rewards.double(), values.double(), cu_seqlens=cu, whiten=whiten)
    eager = reference.gae(rewards, values, cu_seqlens=cu, whiten=whiten)
    for a, b, c in zip(got, eager, truth, strict=True):
        cases.assert_close_to_eager(a, b, c)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_mask(data):
    rows, steps = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 30))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * steps, max_size=rows * steps))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(rows, steps)
    rewards, values = (cases.randn((rows, steps), i) for i in (0, 1))
    for backend in ("reference", "cpu", "triton"):
        got = gae(rewards, values, mask=mask, backend=backend)
        for a, b in zip(got, naive(rewards, values, mask), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


X, CU = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"rewards": [0.0]}, TypeError, ("rewards", "Tensor", "list")),
        ({"rewards": torch.zeros(4).int()}, TypeError, ("rewards", "float32", "int32")),
        ({"values": torch.zeros(4).long()}, TypeError, ("values", "int64")),
        ({"values": torch.zeros(5)}, ValueError, ("values", "(4,)", "(5,)")),
        ({"values": torch.zeros(4).double()}, TypeError, ("values", "float64", "float32")),
        ({"values": torch.zeros(4, device="meta")}, ValueError, ("values", "cpu", "meta")),
        ({"cu_seqlens": None}, ValueError, ("rewards", "[B, T]", "(4,)")),
        ({"mask": torch.ones(4)}, ValueError, ("cu_seqlens", "mask", "not both")),
        ({"cu_seqlens": CU.long()}, TypeError, ("cu_seqlens", "int32", "int64")),
        ({"cu_seqlens": CU[None]}, ValueError, ("cu_seqlens", "(B + 1,)", "(1, 2)")),
        ({"cu_seqlens": CU[:0]}, ValueError, ("cu_seqlens", "(B + 1,)", "(0,)")),
        ({"cu_seqlens": torch.tensor([1, 4]).int()}, ValueError, ("cu_seqlens", "0", "[1, 4]")),
        ({"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, ("cu_seqlens", "4", "[0, 3]")),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4]).int()}, ValueError, ("cu_seqlens", "3, 2")),
        ({"cu_seqlens": CU.to("meta")}, ValueError, ("cu_seqlens", "cpu", "meta")),
        ({"gamma": 1.5}, ValueError, ("gamma", "[0, 1]", "1.5")),
        ({"gamma": -0.1}, ValueError, ("gamma", "-0.1")),
        ({"gamma": "1"}, TypeError, ("gamma", "number", "str")),
        ({"lam": 2}, ValueError, ("lam", "[0, 1]", "2")),
        ({"lam": NAN}, ValueError, ("lam", "nan")),
        ({"whiten": 1}, TypeError, ("whiten", "bool", "int")),
        ({"bootstrap": torch.zeros(2)}, ValueError, ("bootstrap", "(1,)", "(2,)")),
        ({"bootstrap": torch.zeros(1).int()}, TypeError, ("bootstrap", "int32")),
        ({"backend": "gpu"}, ValueError, ("backend", "cpu", "gpu")),
        ({"backend": "cuda"}, ValueError, ("cuda", "cannot run", "Use")),
    ],
)
def test_errors_name_the_argument(arguments, kind, words):
    call = {"rewards": X, "values": X, "cu_seqlens": CU, **arguments}
    rewards, values = call.pop("rewards"), call.pop("values")
    cases.assert_raises(lambda: plain_gae(rewards, values, **call), kind, "gae", *words)


@pytest.mark.parametrize(
    ("mask", "kind", "words"),
    [
        (torch.ones(2, 3), ValueError, ("mask", "(2, 4)", "(2, 3)")),
        (torch.full((2, 4), 2), ValueError, ("mask", "0 and 1", "2")),
        (torch.full((2, 4), 0.5), ValueError, ("mask", "0 and 1", "0.5")),
        (torch.ones(2, 4, device="meta"), ValueError, ("mask", "cpu", "meta")),
        ([[1]], TypeError, ("mask", "Tensor", "list")),
    ],
)
def test_mask_errors(mask, kind, words):
    x = torch.zeros(2, 4)
    cases.assert_raises(lambda: gae(x, x, mask=mask), kind, "gae", *words)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_masks_of_0_and_1_are_taken(dtype):
    mask = cases.random_mask((3, 9), 1)
    x = cases.randn((3, 9), 2, torch.float32)
    for a, b in zip(gae(x, x, mask=mask.to(dtype)), gae(x, x, mask=mask), strict=True):
        assert torch.equal(a, b)


def test_a_bad_cu_seqlens_cannot_reach_memory():
    # What torch.compile cannot check in Python, the kernel checks.
    for bad in ([0, 9], [0, 5, 4], [1, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.fastrlhf.gae(
                X, X, 1.0, 1.0, torch.tensor(bad, dtype=torch.int32), None, None, False
            )
