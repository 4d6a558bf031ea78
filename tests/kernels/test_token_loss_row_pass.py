"""token_loss_rows_ on CUDA, the row pass of the linear losses: bitwise identical to the kernels that it replaces.

All kernels share one reduction for a row's logprob, entropy and statistics, and compute the gradient from these
statistics; the loss terms are those of ppo_loss. The tests run on a GPU and in the host shim
(tests/kernels/test_cuda_on_host.py), which also varies the blocks per row: clusters of 1, 2, 4 and 8, and the two-read
path.
"""

import math
import os
from dataclasses import dataclass, replace

import pytest
import torch

from _support.logit_cases import DEVICE, each_backend, generator, randint, randn
from _support.tolerance import assert_near
from fastrlhf.ops import ppo_loss, token_logprob, token_loss  # noqa: F401  (register the raw ops)

OPS = torch.ops.fastrlhf
CAPS = {"plain": 0.0, "capped": 3.0, "exact cap": 100.0}
CLIP, DUAL_CLIP, COEF = 0.2, 1.7, 0.03
PLAIN = [], 1 - CLIP, 1 + CLIP, DUAL_CLIP, []  # more, low, high, dual_clip, options
F32, NARROW = torch.float32, (torch.bfloat16, torch.float16)
ROWS, MASKED, WITHOUT_TARGET = 9, 1, 7
IN_SHIM, SM = "FASTRLHF_HOST_SHIM" in os.environ, int(os.environ.get("HOST_SHIM_SM", 0))
cuda = each_backend("token_loss", ("cuda",))


def matrix(rows, width, dtype, offset=0, extra=0):
    """NaN [rows, V] that begins `offset` elements after a 16-byte boundary, with row stride V + `extra`."""
    size = offset + rows * (width + extra)
    buffer = torch.full((size,), torch.nan, dtype=dtype, device=DEVICE["cuda"])
    assert buffer.data_ptr() % 16 == 0
    return buffer[offset:].as_strided((rows, width), (width + extra, 1))


def bitwise_equal(a, b):
    """Equal, or both NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((equal | (a.isnan() & b.isnan())).all())


@dataclass(frozen=True)
class Problem:
    logits: torch.Tensor
    targets: torch.Tensor
    temperature: torch.Tensor
    softcap: float
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logprob: torch.Tensor | None

    @property
    def scale(self):
        """1 / n, rounded as in ppo_loss."""
        dtype = torch.float64 if self.logits.dtype == torch.float64 else F32
        return torch.tensor(1 / max(1, int(self.mask.sum())), dtype=dtype, device=DEVICE["cuda"])

    def first(self, rows):
        parts = {k: v[:rows] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **parts)

    def forward(self, with_entropy=True):
        """(logprob, entropy, row_stats) of token_logprob."""
        return OPS.token_logprob_fwd(
            *(self.logits, self.targets, self.temperature, 1.0, self.softcap, self.mask),
            *(with_entropy, False),
        )

    def backward(self, grad_logprob, h, row_stats, out):
        """token_logprob's gradient, written to `out`."""
        OPS.token_logprob_bwd_(
            *(
                grad_logprob,
                h,
                self.logits,
                self.targets,
                row_stats,
                self.temperature,
                1.0,
                self.softcap,
            ),
            *(self.mask, out),
        )
        return out

    def token_loss(self, out=None):
        """(loss, logprob, grad_logprob, row_stats) of token_loss."""
        op, more = (OPS.token_loss_fwd, ()) if out is None else (OPS.token_loss_fwd_, (out,))
        return op(
            *(self.logits, self.targets, self.advantages, self.old_logprob, *PLAIN),
            *(self.temperature, 1.0, self.softcap, self.mask, self.scale, 0.0, *more),
        )

    def rows(self, out, coef=COEF, with_entropy=True, with_grad_logprob=True):
        """(out, logprob, entropy, grad_logprob) of the row pass."""
        logprob, entropy, grad_logprob = torch.full_like(self.scale, torch.nan).repeat(
            3, len(self.targets)
        )
        OPS.token_loss_rows_(
            *(self.logits, self.targets, self.advantages, self.old_logprob, *PLAIN, coef),
            *(self.temperature, 1.0, self.softcap, self.mask, self.scale, out, logprob),
            *(entropy if with_entropy else None, grad_logprob if with_grad_logprob else None),
        )
        return out, logprob, entropy, grad_logprob


def problem(width, dtype=F32, softcap=0.0, offset=0):
    """Common rows, and a masked one of NaN, one with a huge z ("far"), one half -inf, one with an invalid target."""
    wide = torch.float64 if dtype == torch.float64 else F32
    logits = matrix(ROWS, width, dtype, offset)
    logits.copy_(randn(ROWS, width, seed=0, dtype=dtype, scale=3))
    temperature = (0.5 + torch.rand(ROWS, generator=generator(7))).to(logits.device, wide)
    targets = randint(width, (ROWS,), 1, device=logits.device)
    logits[MASKED] = math.nan
    logits[2, width - 7], temperature[2], targets[2] = 6e4, 1e-4, width - 7
    logits[4, : width // 2] = -torch.inf
    targets[3], targets[4], targets[WITHOUT_TARGET] = 0, width - 1, width
    # All ratios are inside the clips except rows 5 (clip) and 6 (dual clip). Row 8 has advantage 0.
    numbers = {"dtype": wide, "device": logits.device}
    steps = torch.tensor([0.1, 0.0, -0.1, 0.05, 0.15, 1.0, 1.0, 0.0, 1.0], **numbers)
    advantages = torch.tensor([0.7, -1.2, 0.4, -0.9, 1.1, 1.0, -1.0, 0.3, 0.0], **numbers)
    mask = torch.arange(ROWS, device=DEVICE["cuda"]) != MASKED
    p = Problem(logits, targets, temperature, softcap, mask, advantages, None)
    return replace(p, old_logprob=p.forward()[0].nan_to_num(0.0) - steps)


def plans(width, dtype):
    """[(shared memory limit per block in bytes, resulting blocks per row)]; on a GPU its own limit applies.

    The first reads a row twice, the others keep it on chip.
    """
    if not IN_SHIM:
        return [(0, 0)]
    if SM < 90:
        return [(0, 1), (227 << 10, 1)]
    from token_loss_clusters import shares

    return [(0, 1), *((shared, blocks) for blocks, shared in shares(width, dtype).items())]


def check_launch(blocks, on_chip):
    if IN_SHIM:
        from shim_plugin import last_launch

        kernel, cluster, shared = last_launch("token_loss")
        assert (kernel, cluster, shared > 0) == ("token_loss_fwd_kernel", blocks, on_chip)


@cuda
@pytest.mark.parametrize(
    ("width", "offset", "cap"),
    [(20011, 0, "plain"), (20011, 1, "capped"), (5003, 3, "plain"), (5003, 0, "exact cap")],
)
def test_is_bitwise_identical_to_the_separate_kernels(width, offset, cap, backend, monkeypatch):
    p = problem(width, softcap=CAPS[cap], offset=offset)
    logprob, entropy, row_stats = p.forward()
    plain, _, plain_row_stats = p.forward(with_entropy=False)
    assert bitwise_equal(plain, logprob) and bitwise_equal(plain_row_stats[:2], row_stats[:2])
    finite = torch.arange(ROWS, device=DEVICE["cuda"]) != WITHOUT_TARGET
    assert logprob[finite & p.mask].isfinite().all() and logprob[WITHOUT_TARGET].isnan()

    # Expected grad_logprob and h = dL/dentropy: ppo_loss on these log-probs.
    safe = logprob.masked_fill(~finite, 0.0)
    *_, grads = OPS.ppo_loss_fwd(
        *(safe, p.old_logprob, p.advantages, None, None, None, entropy, p.mask, None),
        *(*PLAIN[:4], math.inf, 0.0, COEF, [], True),
    )
    # Masked tokens are -0.0 or 0.0, by the sign of the advantage.
    grad_logprob, h = grads[0].masked_fill(~p.mask, 0.0).masked_fill(~finite, math.nan), grads[1]
    assert (grad_logprob[p.mask & finite] == 0).sum() == 3 and (
        grad_logprob[p.mask & finite] != 0
    ).sum() == 4
    expected = {
        (dtype, coef): p.backward(
            grad_logprob, h if coef else None, row_stats, matrix(ROWS, width, dtype)
        )
        for dtype in (F32, *NARROW)
        for coef in (0.0, COEF)
    }
    tried = plans(width, F32)
    if cap == "exact cap":
        tried = tried[:2]  # never on chip
    for i, (shared, blocks) in enumerate(tried):
        monkeypatch.setenv("HOST_SHIM_SHARED", str(shared))
        # Each dtype on chip, and on sm_80 in two reads; of the other sizes of a cluster one dtype each.
        dtypes = (F32, *NARROW) if len(tried) <= 2 or i == 1 else [(F32, *NARROW)[(i + offset) % 3]]
        for (dtype, coef), gradient in expected.items():
            if dtype not in dtypes:
                continue
            for with_entropy in {coef != 0, True}:
                got = p.rows(matrix(ROWS, width, dtype, offset), coef, with_entropy)
                on_chip = shared > 0 and cap != "exact cap"
                check_launch(blocks if on_chip else 1, on_chip)
                assert bitwise_equal(got[0], gradient), (shared, dtype, coef)
                assert bitwise_equal(got[1], logprob) and bitwise_equal(got[3], grad_logprob), (
                    shared,
                    dtype,
                )
                assert not with_entropy or bitwise_equal(got[2], entropy), (shared, dtype)
        out = matrix(ROWS, width, F32, offset)
        _, of_loss, loss_grad_logprob, loss_stats = p.token_loss(out)
        assert bitwise_equal(of_loss, logprob) and bitwise_equal(loss_stats, row_stats[:2])
        assert bitwise_equal(loss_grad_logprob, grad_logprob) and bitwise_equal(
            out, expected[F32, 0.0]
        )
        _, of_loss, loss_grad_logprob, loss_stats = p.token_loss()
        assert bitwise_equal(of_loss, logprob) and bitwise_equal(loss_stats, row_stats[:2])
        assert bitwise_equal(loss_grad_logprob, grad_logprob)
    for dtype in NARROW:  # one rounding, at the store
        for coef in (0.0, COEF):
            assert bitwise_equal(expected[dtype, coef], expected[F32, coef].to(dtype))


@cuda
@pytest.mark.parametrize("width", [256 * 1024, 256 * 1024 + 1])
def test_the_widest_row_in_shared_memory(width, backend, monkeypatch):
    """256 tiles are merged at once. With one more, every kernel merges twice, and the row is read twice."""
    monkeypatch.delenv("HOST_SHIM_SHARED", raising=False)
    p = problem(width)
    one = p.first(1)
    one = replace(one, old_logprob=one.forward()[0] - 0.1)
    logprob, entropy, row_stats = one.forward()
    dlogits, *got, grad_logprob = one.rows(matrix(1, width, torch.bfloat16))
    on_chip = SM >= 90 and width == 256 * 1024
    check_launch(8 if on_chip else 1, on_chip)
    assert bitwise_equal(got[0], logprob) and bitwise_equal(got[1], entropy)
    h = -COEF * one.scale.view(1)
    assert bitwise_equal(
        one.backward(grad_logprob, h, row_stats, torch.empty_like(dlogits)), dlogits
    )


@cuda
def test_masked_rows_give_0_and_are_not_read(backend):
    p = problem(301)
    for out in (matrix(ROWS, 301, F32), matrix(ROWS, 301, torch.bfloat16)):
        dlogits, logprob, entropy, grad_logprob = p.rows(out)
        assert not dlogits[MASKED].any() and not dlogits[MASKED].signbit().any()
        assert logprob[MASKED] == entropy[MASKED] == grad_logprob[MASKED] == 0
        assert dlogits[WITHOUT_TARGET].isnan().all() and entropy[WITHOUT_TARGET].isfinite()
        rest = p.mask & (torch.arange(ROWS, device=DEVICE["cuda"]) != WITHOUT_TARGET)
        assert dlogits[rest].isfinite().all()
        certain = (
            torch.arange(ROWS, device=DEVICE["cuda"]) == 2
        )  # p = 1 at the target: the gradient is 0
        assert (dlogits != 0).any(-1)[rest & ~certain].all()
    # Without an entropy term, clipped rows have gradient 0 too.
    clipped, _, _, grad_logprob = p.rows(matrix(ROWS, 301, F32), coef=0.0)
    assert not clipped[grad_logprob == 0].any() and (grad_logprob == 0).sum() == 4


@cuda
@pytest.mark.parametrize("dtype", [F32, *NARROW, torch.float64])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("clipped", [False, True])
def test_is_the_gradient_of_the_loss(clipped, cap, dtype, backend):
    """Against fp64 autograd; the error is at most twice that of eager in the logits' dtype."""
    p = problem(701, dtype, CAPS[cap])
    # Only rows for which eager is finite: no huge z, no -inf.
    keep = p.mask.clone()
    keep[[WITHOUT_TARGET, 2, 4]] = False
    p = replace(p, mask=keep, old_logprob=p.old_logprob if clipped else None)

    def eager(dtype):
        logits = p.logits.to(dtype).detach().requires_grad_()
        wide = dtype if dtype == torch.float64 else F32
        z = logits[keep].to(wide)
        z = p.softcap * torch.tanh(z / p.softcap) if p.softcap else z
        log_p = (z / p.temperature[keep, None].to(wide)).log_softmax(-1)
        logprob = log_p.gather(-1, p.targets[keep, None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        a, loss = p.advantages[keep].to(wide), None
        if clipped:
            rho = (logprob - p.old_logprob[keep].to(wide)).exp()
            loss = torch.maximum(-a * rho, -a * rho.clamp(1 - CLIP, 1 + CLIP))
            loss = torch.where(a < 0, torch.minimum(loss, -a * DUAL_CLIP), loss)
        else:
            loss = -a * logprob
        (p.scale.to(wide) * (loss - COEF * entropy)).sum().backward()
        return logprob, entropy, logits.grad

    dlogits, logprob, entropy, _ = p.rows(matrix(ROWS, 701, dtype))
    ours = (logprob[keep], entropy[keep], dlogits)
    for o, e, t in zip(ours, eager(dtype), eager(torch.float64), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(o, t, rtol=1e-11, atol=1e-12)
        else:
            assert_near(o, e, t)


@cuda
@pytest.mark.parametrize("dtype", [F32, *NARROW, torch.float64])
def test_in_place(dtype, backend, monkeypatch):
    p = problem(5003, dtype, offset=1)
    for shared, _ in plans(5003, dtype)[:3]:
        monkeypatch.setenv("HOST_SHIM_SHARED", str(shared))
        expected = p.rows(matrix(ROWS, 5003, dtype, 1))
        inside = replace(p, logits=matrix(ROWS, 5003, dtype, 1).copy_(p.logits))
        assert all(map(bitwise_equal, inside.rows(inside.logits), expected))


@cuda
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_every_alignment_of_the_gradient(offset, dtype, backend):
    """Aligned and misaligned rows of both tensors; nothing outside the rows is written."""
    width = 1027
    p, rows = problem(width, offset=offset).first(4), 4  # a masked one among them
    expected = p.rows(matrix(rows, width, dtype))
    _, _, row_stats = p.forward()
    h = torch.where(p.mask, -COEF * p.scale, 0.0)
    for out_offset in range(8):
        for extra in (0, 1, 5):
            out = matrix(rows, width, dtype, out_offset, extra)
            assert all(map(bitwise_equal, p.rows(out), expected))
            whole = out.as_strided((rows - 1, width + extra), (width + extra, 1), out_offset)
            assert whole[:, width:].isnan().all()
            apart = matrix(rows, width, dtype, out_offset, extra)
            assert bitwise_equal(p.backward(expected[3], h, row_stats, apart), expected[0])
            whole = apart.as_strided((rows - 1, width + extra), (width + extra, 1), out_offset)
            assert whole[:, width:].isnan().all()


@cuda
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", NARROW)
def test_token_logprobs_backward_rounds_once(dtype, cap, backend):
    p = problem(2051, softcap=CAPS[cap], offset=1)
    _, _, row_stats = p.forward()
    grad_logprob = randn(ROWS, seed=5, device=DEVICE["cuda"])
    grad_logprob[3] = 0
    h = randn(ROWS, seed=6, device=DEVICE["cuda"])
    h[3:5] = 0
    for g, of_entropy in ((grad_logprob, None), (None, h), (grad_logprob, h)):
        wide = p.backward(g, of_entropy, row_stats, matrix(ROWS, 2051, F32))
        assert bitwise_equal(
            p.backward(g, of_entropy, row_stats, matrix(ROWS, 2051, dtype)), wide.to(dtype)
        )
        assert not wide[3].any() or g is None or of_entropy is None


@cuda
def test_outputs_that_are_slices(backend):
    """Outputs may be slices of [N] vectors; zero rows are allowed."""
    p, width = problem(301), 301
    every = torch.full((3, ROWS + 4), 7.0, device=DEVICE["cuda"])
    parts = [v[2 : 2 + ROWS] for v in every]
    arguments = (p.logits, p.targets, p.advantages, p.old_logprob, *PLAIN, COEF)
    arguments += (p.temperature, 1.0, 0.0, p.mask, p.scale, matrix(ROWS, width, torch.bfloat16))
    OPS.token_loss_rows_(*arguments, *parts)
    assert all(map(bitwise_equal, parts, p.rows(matrix(ROWS, width, torch.bfloat16))[1:]))
    assert all((v[:2] == 7).all() and (v[2 + ROWS :] == 7).all() for v in every)
    p.first(0).rows(matrix(0, width, F32))


@cuda
def test_bad_input(backend):
    p = problem(64)
    good = {
        "logits": p.logits,
        "targets": p.targets,
        "advantages": p.advantages,
        "old_logprob": p.old_logprob,
        **dict(zip(("more", "low", "high", "dual_clip", "options"), PLAIN, strict=True)),
        "entropy_coef": COEF,
        "row_temperature": None,
        "temperature": 1.0,
        "softcap": 0.0,
        "mask": None,
        "scale": p.scale,
        "dlogits": matrix(ROWS, 64, torch.bfloat16),
        **{name: torch.empty_like(p.advantages) for name in ("logprob", "entropy", "grad_logprob")},
    }
    OPS.token_loss_rows_(**good)
    halves = p.logits.view(torch.bfloat16)
    bad = [
        ({"dlogits": halves[:, :64]}, "must not overlap"),
        ({"dlogits": halves[:, 64:]}, "must not overlap"),
        ({"dlogits": matrix(ROWS, 64, torch.float64)}, "out must be like logits"),
        ({"dlogits": matrix(ROWS, 63, F32)}, "out must be like logits"),
        ({"logits": p.logits.bfloat16(), "dlogits": matrix(ROWS, 64, F32)}, "out must be like"),
        ({"entropy": None}, "needs the entropy"),
        ({"logprob": p.advantages.double()}, "logprob must be contiguous"),
        ({"entropy": p.advantages.repeat(2)[::2]}, "entropy must be contiguous"),
        ({"grad_logprob": p.advantages[1:].clone()}, "grad_logprob must be contiguous"),
        ({"scale": p.scale.double()}, "scale must have"),
        ({"scale": p.scale.repeat(2)}, "scale must have"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message):
            OPS.token_loss_rows_(**(good | change))
    OPS.token_loss_rows_(**(good | {"entropy": None, "entropy_coef": 0.0, "grad_logprob": None}))
    _, _, row_stats = p.forward()
    for out in (halves[:, :64], halves[:, 64:]):
        with pytest.raises(RuntimeError, match="must not overlap"):
            p.backward(torch.ones_like(p.advantages), None, row_stats, out)
