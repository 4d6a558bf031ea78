"""token_loss_rows_ (CPU), the row pass of the linear losses: bitwise equal to its parts, and against float64."""

import math

import pytest
import torch
from test_token_logprob_parts import same, settings_of

from _support import logit_cases as cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near
from fastrlhf.ops import ppo_loss, token_logprob, token_loss  # noqa: F401  (register the raw ops)

NAN, INF = float("nan"), float("inf")
NARROW = (torch.bfloat16, torch.float16)
ops = torch.ops.fastrlhf

each_backend = cases.each_backend("token_loss", ("cpu",))


def acc_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


PLAIN = (None, 1.0, 0.0, None)  # settings: row_temperature, temperature, softcap, mask


def settings_on(device, options, rows):
    found = settings_of(options, (rows,))
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in found]


def problem(rows, width, dtype, device, settings=PLAIN):
    """(logits, targets, advantages, old_logprob): ratios on both sides of the clips, some advantages 0."""
    acc = acc_of(dtype)
    logits = randn(rows, width, seed=0, scale=3, dtype=dtype, device=device)
    targets = randint(width, (rows,), 1, device=device)
    logprob, *_ = ops.token_logprob_fwd(logits, targets, *settings, True, False)
    old_logprob = logprob + randn(rows, seed=2, scale=0.5, dtype=acc, device=device)
    advantages = randn(rows, seed=3, dtype=acc, device=device)
    advantages[::7] = 0
    return logits, targets, advantages, old_logprob


class Call:
    """One call, with outputs that hold NaN beforehand and guards around them."""

    def __init__(self, logits, targets, advantages, old_logprob, scale, settings, **more):
        rows, options = len(logits), {"dtype": acc_of(logits.dtype), "device": logits.device}
        self.vectors = torch.full((3, rows + 4), NAN, **options)
        self.vectors[:, :2] = self.vectors[:, -2:] = 42
        self.logprob, self.entropy, self.grad_logprob = (v[2:-2] for v in self.vectors)
        self.dlogits = more.get("dlogits")
        if self.dlogits is None:
            self.dlogits = torch.full_like(logits, NAN)
        scale = torch.tensor(scale, **options)
        clip, dual_clip = more.get("clip", 0.2), more.get("dual_clip", INF)
        clips = [], 1 - clip, 1 + clip, dual_clip, [], more.get("entropy_coef", 0.0)
        row_temperature, *rest = settings
        where = self.dlogits, self.logprob, more.get("entropy", self.entropy), self.grad_logprob
        ops.token_loss_rows_(
            logits, targets, advantages, old_logprob, *clips, row_temperature, *rest, scale, *where
        )
        assert (self.vectors[:, :2] == 42).all() and (self.vectors[:, -2:] == 42).all()


@each_backend
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.float64])
def test_bitwise_equal_to_the_separate_ops(backend, dtype, entropy_coef, options, poisoned):
    """token_logprob_fwd, ppo_loss_fwd and token_logprob_bwd_ on the same logits."""
    rows, width, dual_clip = 300, 773, 3.0
    settings = settings_on(DEVICE[backend], options, rows)
    logits, *policy = problem(rows, width, dtype, DEVICE[backend], settings)
    targets, advantages, old_logprob = policy
    mask = settings[-1]
    logprob, entropy, stats = ops.token_logprob_fwd(logits, targets, *settings, True, False)
    _, _, grads = ops.ppo_loss_fwd(
        logprob, old_logprob, advantages, None, None, None, entropy, mask, None, [], 0.8, 1.2, dual_clip, INF,
        0.0, entropy_coef, [], True,
    )  # fmt: skip
    g, h = grads
    count = rows if mask is None else int(mask.sum())
    for kind in ("own", "in place", *(NARROW if dtype == torch.float32 else ())):
        read = logits.clone()
        out = read if kind == "in place" else torch.full_like(logits, NAN)
        out = out if isinstance(kind, str) else out.to(kind)
        more = {"dual_clip": dual_clip, "entropy_coef": entropy_coef, "dlogits": out}
        call = Call(read, *policy, 1 / count, settings, **more)
        expected = torch.full_like(out, NAN)
        ops.token_logprob_bwd_(
            g, h if entropy_coef else None, logits, targets, stats, *settings, expected
        )
        same((call.logprob, call.entropy, call.grad_logprob), (logprob, entropy, g))
        same((out,), (expected,))
        assert out.isfinite().all()
    assert 0.1 < (g == 0).double().mean() < 0.9 and (g > 0).any() and (g < 0).any()


def loss_in_double(
    logits, targets, advantages, old_logprob, kwargs, scale, dual_clip, entropy_coef
):
    """(L, its gradient) by autograd; a row at a clip's edge has neither's gradient."""
    z = logits.detach().cpu().double().requires_grad_()
    cap, temperature = kwargs.get("softcap"), kwargs.get("temperature", 1.0)
    scaled = z if cap is None else cap * torch.tanh(z / cap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.cpu().double()[:, None]
    logp = torch.log_softmax(scaled / temperature, -1)
    logprob = logp.gather(1, targets.cpu()[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    a = torch.ones_like(logprob) if advantages is None else advantages.cpu().double()
    if old_logprob is None:
        loss = -a * logprob
    else:
        ratio = (logprob - old_logprob.cpu().double()).exp()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    total = scale * (loss - entropy_coef * entropy)
    mask = kwargs.get("mask")
    total = total if mask is None else total * mask.cpu()
    return torch.autograd.grad(total.sum(), z)[0]


@each_backend
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_gradient_in_float64(backend, options, given):
    rows, width = 40, 4133
    settings = settings_on(DEVICE[backend], options, rows)
    logits, targets, *policy = problem(rows, width, torch.float64, DEVICE[backend], settings)
    policy = [x if keep else None for x, keep in zip(policy, given, strict=True)]
    kwargs, more = cases.OPTIONS[options]((rows,), "cpu"), {"dual_clip": 1.5, "entropy_coef": 0.1}
    call = Call(logits, targets, *policy, 0.3, settings, **more)
    truth = loss_in_double(logits, targets, *policy, kwargs, 0.3, 1.5, 0.1)
    torch.testing.assert_close(call.dlogits.cpu(), truth, rtol=1e-10, atol=1e-13)
    # The same in fp32, with one rounding at the store of a 16-bit gradient.
    args = [None if x is None else x.float() for x in policy]
    fp32 = Call(logits.float(), targets, *args, 0.3, settings, **more)
    for dtype in NARROW:
        out = torch.full_like(logits, NAN, dtype=dtype)
        Call(logits.float(), targets, *args, 0.3, settings, dlogits=out, **more)
        assert torch.equal(out, fp32.dlogits.to(dtype))
    loose = 1e-4 if given[1] else 2e-5  # the ratio magnifies the rounding of the log-prob
    torch.testing.assert_close(fp32.dlogits.cpu().double(), truth, rtol=loose, atol=1e-7)


@each_backend
def test_rows_that_do_not_count(backend, poisoned):
    """Masked rows are not read and give 0. Rows with grad_logprob 0 get a zero gradient and keep their log-prob."""
    device = DEVICE[backend]
    logits, targets, advantages, old_logprob = problem(8, 50, torch.float32, device)
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1], device=device) > 0
    expected = ops.token_logprob_fwd(logits, targets, None, 1.0, 0.0, mask, True, False)
    logits[~mask], targets[~mask], old_logprob[~mask] = NAN, -100, NAN
    advantages[:] = 0
    for dtype in (torch.float32, *NARROW):
        out = torch.full_like(logits, NAN, dtype=dtype)
        call = Call(
            logits, targets, advantages, old_logprob, 0.1, (None, 1.0, 0.0, mask), dlogits=out
        )
        assert (call.grad_logprob == 0).all() and (out == 0).all()
        same((call.logprob, call.entropy), expected[:2])
        more = {"dlogits": out, "entropy_coef": 0.5}
        call = Call(logits, targets, advantages, old_logprob, 0.1, (None, 1.0, 0.0, mask), **more)
        assert (call.grad_logprob == 0).all() and ((out != 0).any(-1) == mask).all()


@each_backend
def test_optional_outputs(backend):
    device = DEVICE[backend]
    arguments = problem(5, 33, torch.float32, device)
    full = Call(*arguments, 0.1, PLAIN)
    logprob, dlogits = torch.empty(5, device=device), torch.empty(5, 33, device=device)
    scale = torch.tensor(0.1, device=device)
    rest = ([], 0.8, 1.2, INF, [], 0.0, *PLAIN, scale, dlogits, logprob, None, None)
    ops.token_loss_rows_(*arguments, *rest)
    same((logprob, dlogits), (full.logprob, full.dlogits))


@each_backend
def test_bad_input_is_refused_before_anything_is_written(backend):
    logits, targets, *policy = problem(4, 33, torch.float32, "cpu")
    scale = torch.tensor(0.1)
    before = [torch.full((4, 33), 7.0), *torch.full((3, 4), 7.0)]
    after = [x.clone() for x in before]

    def refused(match, outputs=after, targets=targets, entropy_coef=0.5, settings=PLAIN):
        with pytest.raises(RuntimeError, match=match):
            ops.token_loss_rows_(
                logits,
                targets,
                *policy,
                [],
                0.8,
                1.2,
                INF,
                [],
                entropy_coef,
                *settings,
                scale,
                *outputs,
            )

    dlogits, logprob, entropy, grad_logprob = after
    bad = targets.clone()
    bad[2] = 33
    refused(r"targets must be in \[0, 33\); got 33 at row 2", targets=bad)
    row_temperature = torch.tensor([1.0, -2.0, 1.0, 1.0])
    refused("temperature must be above 0; got -2", settings=(row_temperature, *PLAIN[1:]))
    refused("an entropy_coef needs the entropy", (dlogits, logprob, None, grad_logprob))
    refused(
        "must be contiguous, with one element per row",
        (dlogits, torch.zeros(4, 2)[:, 0], entropy, grad_logprob),
    )
    refused(
        "must be contiguous, with one element per row",
        (dlogits, logprob, entropy, grad_logprob[:3]),
    )
    refused(
        "must be contiguous, with one element per row",
        (dlogits, logprob.double(), entropy, grad_logprob),
    )
    refused("out must be like logits", (dlogits.double(), logprob, entropy, grad_logprob))
    refused("out must be like logits", (dlogits[:, :-1], logprob, entropy, grad_logprob))
    shared = logits.view(torch.bfloat16)[:, :33]
    refused("must not overlap the logits", (shared, logprob, entropy, grad_logprob))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert logits.isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_backward_into_16_bits_rounds_once(backend, options, dtype):
    """token_logprob_bwd_: fp32 logits, a gradient that the next GEMM takes as it is; odd row strides."""
    device = DEVICE[backend]
    logits = randn(6, 4133, seed=0, scale=3, device=device)
    targets, settings = randint(4133, (6,), 1, device=device), settings_on(device, options, 6)
    g, h = (randn(6, seed=s, device=device) for s in (2, 3))
    stats = ops.token_logprob_fwd(logits, targets, *settings, True, False)[2]
    wide = ops.token_logprob_bwd(g, h, logits, targets, stats, *settings)
    out = torch.full((6, 4133 + 3), 42.0, dtype=dtype, device=device)
    ops.token_logprob_bwd_(g, h, logits, targets, stats, *settings, out[:, :4133])
    assert torch.equal(out[:, :4133], wide.to(dtype)) and (out[:, 4133:] == 42).all()
    assert math.isfinite(float(out.float().sum()))
    assert_near(out[:, :4133].float(), wide.to(dtype).float(), wide)
