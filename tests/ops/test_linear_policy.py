"""linear_ppo_loss beyond plain PPO: chunks of whole sequences, and each setting through every path of the chunk loop.

N tokens in S sequences, packed; H hidden, V vocabulary. The settings themselves: test_policy_losses.py.
"""

import pytest
import torch

import fastrlhf
from _support import logit_cases as cases
from _support import sequence_cases
from _support.logit_cases import DEVICE, randint, randn
from fastrlhf import linear_logprob, linear_ppo_loss, reference
from fastrlhf.ops import _backend, _gemms, _linear_loss, _linear_policy

LENGTHS = (11, 2, 0, 3, 1, 9, 4)
N, S, H, V = sum(LENGTHS), len(LENGTHS), 8, 37
# Keeps 10 tokens of the first sequence, which are three chunks of at most four rows, and none of the second.
MASK = torch.tensor([i % 7 != 3 and i not in (11, 12) for i in range(N)])
MASK[10] = True
fused = pytest.mark.skipif(
    bool(_backend.unavailable_reason("linear_ppo_loss", "cpu", "cpu")),
    reason="the C++ extension is not built",
)
each_backend = cases.each_backend("linear_ppo_loss", ("cpu", "triton", "cuda"))

TOKENS = (
    "old_logprob",
    "advantages",
    "old_values",
    "returns",
    "ref_logprob",
    "rollout_logprob",
    "rollout_weights",
)
KL = {"ref_logprob": True, "kl_coef": 0.1}
# True: the tensor of that name; "S": one number a sequence.
SETTINGS = {
    "clip pair, dual clip": {"clip": (0.2, 0.3), "dual_clip": 1.5},
    "cispo": {
        **{"objective": "cispo", "clip": (None, 0.3), "aggregation": "seq-mean-token-mean", **KL},
        **{"rollout_logprob": True, "rollout_bounds": (0.7, 1.4), "value_aggregation": "token-sum"},
    },
    "gspo": {"objective": "gspo", "clip": (0.03, 0.04), "entropy_coef": 0.02},
    "gspo of weighted sequences": {
        **{"objective": "gspo", "clip": (0.03, None), "aggregation": "seq-mean-token-sum-norm"},
        **{"length": 7.0, "advantages": "S", "rollout_weights": "S", "scale": 0.3, **KL},
    },
    "sapo": {
        **{"objective": "sapo", "rollout_logprob": True, "rollout_level": "sequence_mean"},
        **{"rollout_mode": "mask", "rollout_bounds": (0.9, 1.2), "num_tokens": 13.0},
    },
    "reinforce": {
        **{"objective": "reinforce", "old_logprob": None, "aggregation": "token-sum", **KL},
        **{"rollout_weights": True, "kl_gradient": "k2", "kl_estimator": "abs"},
    },
    "late rollout": {
        **{"old_logprob": None, "rollout_logprob": True, "rollout_level": "sequence_mean"},
        **{"rollout_bounds": (None, 1.1), "aggregation": "seq-mean-token-sum", "advantages": "S"},
    },
    "late sum of the rollout": {
        **{"objective": "cispo", "old_logprob": None, "rollout_logprob": True},
        **{"rollout_level": "sequence", "kl_gradient": "ratio", "num_sequences": 5.0, **KL},
        "aggregation": "seq-mean-token-mean",
    },
}  # fmt: skip
LATE = ("gspo", "gspo of weighted sequences", "late rollout", "late sum of the rollout")


@pytest.fixture
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)


def inputs(dtype=torch.float64, device="cpu"):
    """(hidden, weight, bias, values), targets, and the tensors of TOKENS by name."""
    x, w = randn(N, H, seed=0, dtype=dtype), randn(V, H, seed=1, dtype=dtype, scale=0.4)
    b, targets = randn(V, seed=2, dtype=dtype), randint(V, (N,), 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logprob = linear_logprob(x.double(), w.double(), targets, bias=b.double(), backend="reference")
    near = lambda seed: (logprob + 0.2 * randn(N, seed=seed, dtype=torch.float64)).to(wide)  # noqa: E731
    rows = {name: randn(N, seed=5 + i, dtype=wide) for i, name in enumerate(TOKENS)}
    rows |= {name: near(20 + i) for i, name in enumerate(TOKENS) if name.endswith("logprob")}
    rows["advantages"][::5] = 0
    rows["rollout_weights"] = rows["rollout_weights"].abs()
    values = randn(N, seed=4, dtype=wide)
    place = lambda t: t.to(device)  # noqa: E731
    return (
        [place(t) for t in (x, w, b, values)],
        place(targets),
        {k: place(t) for k, t in rows.items()},
    )


def options_of(name, rows, device="cpu"):
    """The keyword arguments of SETTINGS[name], with their tensors."""
    chosen = {"old_logprob": True, "advantages": True, "old_values": True, "returns": True}
    chosen |= SETTINGS[name]
    for key in TOKENS:
        if chosen.get(key) is True:
            chosen[key] = rows[key]
        elif chosen.get(key) == "S":
            chosen[key] = rows[key][:S].contiguous()
    return chosen | {"cu_seqlens": sequence_cases.cu_of(LENGTHS).to(device)}


def run(function, tensors, targets, options, upstream=1.0, **more):
    """[loss, dX, dW, db, dvalues], metrics. With accumulate_into dW is what was added."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    x, w, b, values = leaves
    out = function(x, w, targets, bias=b, values=values, **options, **more)
    (out.loss * upstream).backward()
    into = more.get("accumulate_into")
    grads = [t.grad for t in leaves]
    if into is not None:
        assert w.grad is None
        grads[1] = into
    return [out.loss.detach(), *grads], out.metrics


def close(found, expected, **bar):
    for what, a, b in zip(("loss", "dX", "dW", "db", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, **bar, msg=lambda m, w=what: f"{w}: {m}")


PATHS = {
    "plain": {},
    "mask": {"mask": MASK},
    "compact rows": {"mask": MASK, "compact_rows": True},
    "into": {"mask": MASK, "accumulate_into": True},
    "num_rows": {"mask": MASK, "num_rows": int(MASK.sum()), "workspace": "compact"},
    "softcap": {"softcap": 3.0, "temperature": 0.7},
    "frozen head": {"mask": MASK, "frozen": True},
}


@fused
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_path_equals_the_reference_in_fp64(name, path, four_rows_a_chunk, poisoned):
    tensors, targets, rows = inputs()
    options, more = options_of(name, rows), dict(PATHS[path])
    frozen = more.pop("frozen", False)
    whole = {k: v for k, v in more.items() if k in ("mask", "softcap", "temperature")}
    expected, metrics = run(reference.linear_ppo_loss, tensors, targets, options, **whole)
    if more.get("accumulate_into"):
        more["accumulate_into"] = torch.zeros(V, H, dtype=torch.float64)
    bar = {"rtol": 1e-11, "atol": 1e-13}
    if frozen:
        with torch.no_grad():
            out = linear_ppo_loss(
                *tensors[:2], targets, bias=tensors[2], values=tensors[3], **options, **more
            )
        torch.testing.assert_close(out.loss, expected[0], **bar)
        found_metrics = out.metrics
    else:
        found, found_metrics = run(linear_ppo_loss, tensors, targets, options, **more)
        close(found, expected, **bar)
    assert found_metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(found_metrics[key], value, rtol=2e-6, atol=1e-9, msg=key)


@each_backend
@pytest.mark.parametrize("name", ["cispo", "gspo of weighted sequences", "late rollout"])
def test_every_backend_equals_the_reference(name, backend, four_rows_a_chunk):
    tensors, targets, rows = inputs(torch.float32, DEVICE[backend])
    options = options_of(name, rows, DEVICE[backend])
    mask = MASK.to(DEVICE[backend])
    found, metrics = run(linear_ppo_loss, tensors, targets, options, mask=mask, backend=backend)
    expected, wanted = run(reference.linear_ppo_loss, tensors, targets, options, mask=mask)
    close(found, expected, rtol=1e-4, atol=2e-6)
    for key, value in wanted.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-4, atol=1e-6, msg=key)


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cispo", "gspo of weighted sequences"])
def test_a_16_bit_head_is_its_fp32_copy_rounded_once(name, dtype, four_rows_a_chunk):
    tensors, targets, rows = inputs(torch.float32)
    options = options_of(name, rows)
    low = [t.to(dtype) for t in tensors[:3]] + tensors[3:]
    wide = [t.float() for t in low]
    found, metrics = run(linear_ppo_loss, low, targets, options, mask=MASK)
    expected, wanted = run(linear_ppo_loss, wide, targets, options, mask=MASK)
    assert [t.dtype for t in found[1:]] == [dtype] * 3 + [torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype))
    assert all(torch.equal(metrics[key], wanted[key]) for key in wanted)


@fused
@pytest.mark.parametrize("name", SETTINGS)
def test_padded_sequences_equal_packed_ones(name, four_rows_a_chunk):
    """[B, T] with a mask: the gradients have the bits of those of the packed tokens that count."""
    tensors, targets, rows = inputs(torch.float32)
    options = options_of(name, rows)
    cu_seqlens = options.pop("cu_seqlens").tolist()
    position = torch.full((S, max(LENGTHS)), -1)
    for s, (start, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        position[s, : stop - start] = torch.arange(start, stop)
    real = position >= 0

    def pad(t):
        if not isinstance(t, torch.Tensor) or t.shape[0] != N:
            return t
        return t[position.clamp(min=0)]

    padded = {key: pad(t) for key, t in options.items()}
    x, w, b, values = tensors
    found, metrics = run(
        linear_ppo_loss, [pad(x), w, b, pad(values)], pad(targets), padded, mask=real
    )
    packed = {**options, "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}
    expected, wanted = run(linear_ppo_loss, tensors, targets, packed)
    torch.testing.assert_close(found[0], expected[0])  # a sum over other numbers of tokens
    for i, name in enumerate(("dX", "dW", "db", "dv"), 1):
        a = found[i][real] if i in (1, 4) else found[i]
        assert torch.equal(a, expected[i]), name
    for key, value in wanted.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-6, atol=1e-7, msg=key)


# ---- chunks of whole sequences -------------------------------------------------------------------


@fused
@pytest.mark.parametrize("name", LATE)
def test_a_sequence_longer_than_a_chunk_is_multiplied_twice(name, monkeypatch):
    """Three GEMMs of each row, and a fourth of the rows of sequences longer than a chunk."""
    tensors, targets, rows = inputs(torch.float32)
    options = options_of(name, rows)
    leaves = [t.requires_grad_() for t in tensors]

    def work():
        call = lambda: linear_ppo_loss(*leaves[:2], targets, mask=MASK, **more)  # noqa: E731
        return cases.profiled(call)[1] / (H * V)

    more = {k: v for k, v in options.items() if k not in ("old_values", "returns")}
    counted = int(MASK.sum())
    longer = [int(MASK[a:b].sum()) for a, b in ((0, 11), (17, 26))]
    assert longer == [10, 7]
    for rows_a_chunk, twice in ((4, 17), (8, 10), (10, 0), (100, 0)):
        monkeypatch.setattr(_gemms, "chunk_rows", lambda *_, most=rows_a_chunk: most)
        assert work() == 3 * counted + twice
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)
    more = {"old_logprob": rows["old_logprob"], "advantages": rows["advantages"]}
    assert work() == 3 * counted  # plain PPO: chunks end anywhere


@pytest.mark.parametrize("seed", range(20))
def test_ranges_hold_whole_sequences(seed):
    generator = cases.generator(seed)
    lengths = torch.randint(0, 9, (12,), generator=generator) * (seed > 0)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    class Head:
        rows, gemms = int(cu_seqlens[-1]), _gemms.Gemms(torch.float32, torch.float32)

    for most in (1, 4, 7, 30, 200):
        ranges = _linear_policy.whole_sequences(Head, cu_seqlens, most)
        joined = [row for rows, _ in ranges for row in range(rows.start, rows.stop)]
        assert joined == list(range(Head.rows))
        for rows, sequences in ranges:
            assert cu_seqlens[sequences.start] == rows.start
            assert cu_seqlens[sequences.stop] == rows.stop
            count = int((lengths[sequences] > 0).sum())
            assert rows.stop - rows.start <= most or count == 1
        for (one, _), (other, _) in zip(ranges, ranges[1:], strict=False):
            assert other.stop - one.start > most  # as many as fit


# ---- the raw op ----------------------------------------------------------------------------------


@fused
@pytest.mark.parametrize("name", ["cispo", "gspo of weighted sequences", "sapo", "late rollout"])
def test_compiled(name):
    tensors, targets, rows = inputs(torch.float32)
    options = options_of(name, rows)
    function = cases.compiled(linear_ppo_loss)
    found, metrics = run(function, tensors, targets, options, mask=MASK)
    expected, wanted = run(linear_ppo_loss, tensors, targets, options, mask=MASK)
    close(found, expected, rtol=1e-6, atol=1e-7)
    assert metrics.keys() == wanted.keys()


@fused
@pytest.mark.parametrize("name", ["cispo", "gspo of weighted sequences", "late rollout"])
def test_opcheck_of_the_raw_op(name, monkeypatch):
    tensors, targets, rows = inputs()
    calls = []
    real = _linear_loss.FWD

    def record(*arguments):
        calls.append(arguments)
        before = [None if t is None else t.clone() for t in arguments[8]]
        out = real(*arguments)
        for now, then in zip(arguments[8], before, strict=True):  # opcheck does not look into lists
            assert now is then is None or torch.equal(now, then)
        return out

    monkeypatch.setattr(_linear_loss, "FWD", record)
    run(linear_ppo_loss, tensors, targets, options_of(name, rows), mask=MASK)
    (arguments,) = calls
    assert len(arguments[8]) > _linear_policy.PLAIN_TENSORS
    arguments = [t.detach().requires_grad_() if i < 4 else t for i, t in enumerate(arguments)]
    torch.library.opcheck(torch.ops.fastrlhf.linear_loss_fwd.default, arguments)


@fused
@pytest.mark.parametrize("name", SETTINGS)
def test_meta_tensors_give_shapes(name):
    tensors, targets, rows = inputs(torch.float32)
    options = {
        k: t.to("meta") if isinstance(t, torch.Tensor) else t
        for k, t in options_of(name, rows).items()
    }
    meta = [t.to("meta") for t in tensors]
    found, metrics = run(linear_ppo_loss, meta, targets.to("meta"), options)
    assert [t.shape for t in found] == [(), (N, H), (V, H), (V,), (N,)]
    expected = run(linear_ppo_loss, tensors, targets, options_of(name, rows))[1]
    assert metrics.keys() == expected.keys()


@fused
def test_a_backend_needs_the_sums_of_sequences():
    """Whatever has the row pass and the loss, but not sequence_sums, must not be chosen."""
    name = "fastrlhf::sequence_sums"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    sums = {key.lower() for key in ("CPU", "CUDA") if has(name, key)}
    assert _backend.kernels("linear_ppo_loss") - {"triton"} <= sums


@fused
def test_accumulate_into_shares_no_memory_with_the_new_tensors():
    tensors, targets, rows = inputs(torch.float32)
    into = torch.zeros(V, H)
    options = options_of("reinforce", rows)
    options["rollout_weights"] = into.view(-1)[:N]
    with pytest.raises(
        ValueError, match="accumulate_into must not share memory with rollout_weights"
    ):
        run(linear_ppo_loss, tensors, targets, options, accumulate_into=into)
    assert not into.any()


def test_one_advantage_a_sequence_is_the_same_as_one_a_token():
    tensors, targets, rows = inputs(torch.float32)
    options = options_of("gspo of weighted sequences", rows)
    per_token = dict(options)
    lengths = torch.tensor(LENGTHS)
    for key in ("advantages", "rollout_weights"):
        per_token[key] = options[key].repeat_interleave(lengths)
    found, _ = run(fastrlhf.linear_ppo_loss, tensors, targets, options)
    expected, _ = run(fastrlhf.linear_ppo_loss, tensors, targets, per_token)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@fused
@pytest.mark.parametrize("name", ["cispo", "gspo of weighted sequences", "late rollout"])
@pytest.mark.parametrize("what", ["no token", "no sequence", "all masked"])
def test_nothing_to_train_on(name, what):
    """Loss, gradients and metrics are those of the reference: 0."""
    tensors, targets, rows = inputs()
    options = options_of(name, rows)
    if what != "all masked":
        count = 2 if what == "no token" else 0
        options = {
            k: t[:0] if isinstance(t, torch.Tensor) and len(t) == N else t
            for k, t in options.items()
        }
        options = {
            k: t[:count] if isinstance(t, torch.Tensor) and len(t) == S else t
            for k, t in options.items()
        }
        options["cu_seqlens"] = torch.zeros(count + 1, dtype=torch.int32)
        tensors = [t[:0] if len(t) == N else t for t in tensors]
        targets = targets[:0]
    mask = {"mask": torch.zeros(N, dtype=torch.bool)} if what == "all masked" else {}
    found, metrics = run(linear_ppo_loss, tensors, targets, options, **mask)
    expected, wanted = run(reference.linear_ppo_loss, tensors, targets, options, **mask)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, torch.zeros_like(b))
    assert {key: float(x) for key, x in metrics.items()} == {
        key: float(x) for key, x in wanted.items()
    }


@fused
@pytest.mark.parametrize("name", ["cispo", "gspo of weighted sequences"])
def test_vmap_over_the_advantages(name, four_rows_a_chunk):
    tensors, targets, rows = inputs(torch.float32)
    options = options_of(name, rows)
    advantages = options.pop("advantages")
    draws = torch.stack([advantages, -advantages])

    def loss(one):
        x, w, b, values = tensors
        more = {"values": values, "bias": b, "advantages": one, **options}
        return linear_ppo_loss(x, w, targets, **more).loss

    found = torch.vmap(loss)(draws)
    torch.testing.assert_close(found, torch.stack([loss(one) for one in draws]))


@fused
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_reaches_the_gradient_of_its_row(backend, four_rows_a_chunk):
    """A NaN must not hide behind the clip of a sequence's ratio."""
    tensors, targets, rows = inputs(torch.float32)
    tensors[0][12] = torch.nan
    options = options_of("gspo", rows) | {"backend": backend}
    found, _ = run(linear_ppo_loss, tensors, targets, options)
    assert found[0].isnan() and found[1][12].isnan().all()


def test_a_vocabulary_of_one_with_masked_targets():
    """A target outside of it in a row that does not count is not looked at."""
    x, w = randn(3, H, seed=0), randn(1, H, seed=1)
    mask, targets = torch.tensor([True, False, True]), torch.tensor([0, -100, 0])
    row = torch.zeros(3)
    assert linear_ppo_loss(x, w, targets, row, row + 1, mask=mask).loss == -1
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\); got -100"):
        linear_ppo_loss(x, w, targets, row, row + 1)
