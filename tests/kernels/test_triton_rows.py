"""token_loss_rows_ in Triton, the row pass of the linear losses: bitwise against separate ops, float64, edge cases."""

import pytest
import torch

from _support import logit_cases as cases
from _support import loss_cases
from _support.logit_cases import DEVICE, randint, randn
from _support.tolerance import assert_near
from fastrlhf.ops import ppo_loss, token_logprob, token_loss

V = 5003  # odd; two and a half tiles of the statistics
NAN, INF = float("nan"), float("inf")
NARROW = (torch.bfloat16, torch.float16)
EVERY_DTYPE = (*cases.DTYPES, torch.float64)
PLAIN = (None, 1.0, 0.0, None)  # row_temperature, temperature, softcap, mask
LIMITS = ([], 0.8, 1.2, 3.0, [])  # more, low, high, dual_clip, options

triton = cases.each_backend("token_loss", ("triton",))


def acc_of(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def settings_of(options, rows, device):
    """(row_temperature, temperature, softcap, mask) as the raw ops take them."""
    kwargs = cases.OPTIONS[options]((rows,), device)
    temperature = kwargs.get("temperature", 1.0)
    per_row = isinstance(temperature, torch.Tensor)
    numbers = (temperature, 1.0) if per_row else (None, temperature)
    return *numbers, kwargs.get("softcap", 0.0), kwargs.get("mask")


def problem(rows, width, dtype, settings=PLAIN, *, device, seed=0):
    """(logits, targets, advantages, old_logprob) with clipped and unclipped ratios and an advantage of 0."""
    logits = randn(rows, width, seed=seed, scale=3, dtype=dtype, device=device)
    targets = randint(width, (rows,), seed + 1, device=device)
    options = {"dtype": acc_of(logits), "device": device}
    logprob = token_logprob.FWD["triton"](logits, targets, *settings, False, False)[0]
    old_logprob = logprob + randn(rows, seed=seed + 2, scale=0.5, **options)
    advantages = randn(rows, seed=seed + 3, **options)
    advantages[2:3] = 0
    return logits, targets, advantages, old_logprob


def row_pass(
    logits, *policy, settings=PLAIN, scale=0.3, entropy_coef=0.0, dlogits=None, wanted=True
):
    """(dlogits, logprob, entropy, grad_logprob) of a call on NaN outputs. `wanted`: pass the last two."""
    options = {"dtype": acc_of(logits), "device": logits.device}
    logprob, entropy, grad_logprob = torch.full((3, *policy[0].shape), NAN, **options)
    dlogits = torch.full_like(logits, NAN) if dlogits is None else dlogits
    scale = torch.tensor(scale, **options)
    row_temperature, *rest = settings
    more = (entropy, grad_logprob) if wanted else (None, None)
    numbers = (*LIMITS, entropy_coef)
    rows_ = token_loss.ROWS_["triton"]
    rows_(logits, *policy, *numbers, row_temperature, *rest, scale, dlogits, logprob, *more)
    return dlogits, logprob, *more


def in_parts(logits, targets, *policy, settings=PLAIN, scale=0.3, entropy_coef=0.0, into=None):
    """The same by token_logprob forward, token_loss forward, and token_logprob_bwd_ with gradient dtype `into`."""
    fwd = token_logprob.FWD["triton"]
    logprob, entropy, row_stats = fwd(logits, targets, *settings, True, False)
    scale = torch.tensor(scale, dtype=logprob.dtype, device=logits.device)
    terms = token_loss.FWD["triton"](logits, targets, *policy, *LIMITS, *settings, scale, 1.0)
    _, same_logprob, grad_logprob, loss_stats = terms
    assert_bitwise((same_logprob, loss_stats), (logprob, row_stats[:2]))
    h = (-entropy_coef * scale).expand_as(grad_logprob) if entropy_coef else None
    dlogits = torch.full_like(logits, NAN, dtype=into)
    token_logprob.BWD_["triton"](grad_logprob, h, logits, targets, row_stats, *settings, dlogits)
    return dlogits, logprob, entropy, grad_logprob


def assert_bitwise(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@triton
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_is_bitwise_identical_to_the_separate_ops(backend, dtype, options, entropy_coef, poisoned):
    """token_logprob, ppo_loss or token_loss, and token_logprob_bwd_."""
    turn = [*cases.OPTIONS].index(options) + EVERY_DTYPE.index(dtype) + (entropy_coef > 0)
    if cases.interpreted(backend) and dtype != torch.float32 and turn % 2:
        pytest.skip(
            "the interpreter is slow: each option in each dtype, with or without the entropy"
        )
    device = DEVICE[backend]
    settings = settings_of(options, 4, device)
    logits, *policy = problem(4, V, dtype, settings, device=device)
    logits[1] += torch.linspace(-12, 12, V, device=device).to(
        dtype
    )  # the running maximum keeps rising
    count = 4 if settings[-1] is None else int(settings[-1].sum())
    kwargs = {"settings": settings, "entropy_coef": entropy_coef, "scale": 1 / count}
    expected = in_parts(logits, *policy, **kwargs)
    _, logprob, entropy, grad_logprob = expected
    rest = (
        None,
        None,
        None,
        entropy,
        settings[-1],
        None,
        *LIMITS[:4],
        INF,
        0.0,
        entropy_coef,
        [],
        True,
    )
    grads = ppo_loss.FWD["triton"](logprob, policy[2], policy[1], *rest)[2]
    assert torch.equal(grad_logprob, grads[0])
    assert_bitwise(row_pass(logits, *policy, **kwargs), expected)
    copy = logits.clone()
    assert_bitwise(row_pass(copy, *policy, dlogits=copy, **kwargs), expected)  # in place
    assert (grad_logprob != 0).any() and expected[0].isfinite().all()
    if dtype == torch.float32:
        half = NARROW[entropy_coef == 0.0]
        out = torch.full_like(logits, NAN, dtype=half)
        assert_bitwise(
            row_pass(logits, *policy, dlogits=out, **kwargs),
            in_parts(logits, *policy, into=half, **kwargs),
        )
        assert torch.equal(out, expected[0].to(half))  # rounded once


@triton
def test_log_probs_of_many_rows(backend):
    """Enough long rows that another summation order would change some log-prob."""
    device, rows = DEVICE[backend], 32 if cases.interpreted(backend) else 512
    logits, targets, _, _ = problem(rows, 4 * V, torch.float32, device=device)
    fwd = token_logprob.FWD["triton"]
    for with_entropy in (False, True):
        logprob = fwd(logits, targets, *PLAIN, with_entropy, False)[0]
        got = row_pass(logits, targets, None, None, wanted=with_entropy)[1]
        assert torch.equal(got, logprob)


@triton
def test_the_exact_soft_cap_is_bitwise_identical(backend):
    logits, *policy = problem(3, 1501, torch.float32, device=DEVICE[backend])
    kwargs = {"settings": (None, 0.7, 50.0, None), "entropy_coef": 0.01}
    out = torch.full_like(logits, NAN, dtype=torch.bfloat16)
    expected = in_parts(logits, *policy, into=out.dtype, **kwargs)
    assert_bitwise(row_pass(logits, *policy, dlogits=out, **kwargs), expected)


@triton
def test_the_entropy_changes_no_other_output(backend):
    """Neither do other rows, nor optional outputs that are absent."""
    logits, *policy = problem(4, V, torch.float32, device=DEVICE[backend])
    dlogits, logprob, _, grad_logprob = full = row_pass(logits, *policy)
    alone, same_logprob, _, _ = row_pass(logits, *policy, wanted=False)
    assert torch.equal(alone, dlogits) and torch.equal(same_logprob, logprob)
    _, same_logprob, entropy, same_grad_logprob = row_pass(logits, *policy, entropy_coef=0.5)
    assert torch.equal(same_logprob, logprob) and torch.equal(same_grad_logprob, grad_logprob)
    assert torch.equal(entropy, full[2])
    some = torch.tensor([3, 1], device=logits.device)
    few = row_pass(logits[some], *(x[some] for x in policy))
    assert_bitwise(few, [x[some] for x in full])


@triton
@pytest.mark.parametrize("into", [None, torch.bfloat16])
def test_rows_of_padded_buffers(backend, into):
    """Any alignment and row stride: bitwise identical, and nothing outside the rows is written."""
    device = DEVICE[backend]
    rows, *policy = problem(2, 2501, torch.float32, device=device)
    kwargs = {"entropy_coef": 0.1}
    out = torch.full_like(rows, NAN, dtype=into or torch.float32)
    expected = row_pass(rows, *policy, dlogits=out, **kwargs)
    for offset, extra in ((0, 11), (1, 0), (3, 5)):
        logits = cases.moved(rows, offset, extra)
        buffer = torch.full((2, 2501 + extra + 2), 42.0, dtype=out.dtype, device=device)
        view = buffer[:, 2 : 2 + 2501]
        assert_bitwise(row_pass(logits, *policy, dlogits=view, **kwargs), expected)
        assert (buffer[:, :2] == 42).all() and (buffer[:, 2 + 2501 :] == 42).all()
    # A buffer for more rows, with NaN in the rest.
    chunk = torch.full((5, 2501 + 27), NAN, device=device)
    chunk[:2, :2501] = rows
    if into is None:
        assert_bitwise(
            row_pass(chunk[:2, :2501], *policy, dlogits=chunk[:2, :2501], **kwargs), expected
        )
        assert chunk[2:].isnan().all() and chunk[:, 2501:].isnan().all()


def in_double(logits, targets, advantages, old_logprob, options, entropy_coef, eager=False):
    """(dL/dlogits, logprob, entropy) by autograd in float64, or eager in the given dtype."""
    kwargs = cases.OPTIONS[options]((len(logits),), logits.device)
    policy = {"advantages": advantages, "old_logprob": old_logprob}
    if not eager:
        logits, targets = logits.double().cpu(), targets.cpu()
        kwargs = cases.to_double(kwargs)
        policy = {k: v if v is None else v.double().cpu() for k, v in policy.items()}
    x = logits.detach().requires_grad_()
    loss, logprob = loss_cases.eager(x, targets, **policy, dual_clip=3.0, scale=0.3, **kwargs)
    z = x if "softcap" not in kwargs else kwargs["softcap"] * torch.tanh(x / kwargs["softcap"])
    temperature = kwargs.get("temperature", 1.0)
    per_row = isinstance(temperature, torch.Tensor)
    logp = torch.log_softmax(z / (temperature.unsqueeze(-1) if per_row else temperature), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    entropy = entropy if "mask" not in kwargs else entropy * kwargs["mask"]
    total = loss.sum() - 0.3 * entropy_coef * entropy.sum()
    return torch.autograd.grad(total, x)[0], logprob, entropy.detach()


@triton
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("options", ["plain", "temperature", "all"])
def test_against_float64(backend, options, given):
    """L = sum of scale * (token_loss - entropy_coef * entropy), for each form of the loss."""
    device = DEVICE[backend]
    settings = settings_of(options, 6, device)
    for dtype in (torch.float32, torch.float64):
        logits, targets, *policy = problem(6, 701, dtype, settings, device=device)
        policy = [x if keep else None for x, keep in zip(policy, given, strict=True)]
        kwargs = {"settings": settings, "entropy_coef": 0.1}
        ours = row_pass(logits, targets, *policy, **kwargs)[:3]
        truth = in_double(logits, targets, *policy, options, 0.1)
        if dtype == torch.float64:
            for o, t in zip(ours, truth, strict=True):
                torch.testing.assert_close(o.cpu(), t, rtol=1e-10, atol=1e-13)
            continue
        rounded = truth
        if given[1]:  # the ratio propagates the rounding error of the log-prob
            off = policy[1] - 2.0**-24 * truth[1].to(device)
            rounded = in_double(logits, targets, policy[0], off, options, 0.1)
        eager = in_double(logits, targets, *policy, options, 0.1, eager=True)
        for what, o, e, t, r in zip(
            ("dlogits", "logprob", "entropy"), ours, eager, truth, rounded, strict=True
        ):
            assert_near(o, e, t, what, r)


@triton
def test_large_and_tiny_vocabularies(backend):
    """More than 2^16 columns, one, and a few; no rows at all."""
    device = DEVICE[backend]
    for rows, width in ((2, 2**16 + 467), (3, 1), (3, 7), (0, 5)):
        logits, *policy = problem(rows, width, torch.float32, device=device)
        out = torch.full_like(logits, NAN, dtype=torch.bfloat16)
        kwargs = {"entropy_coef": 0.01}
        expected = in_parts(logits, *policy, into=out.dtype, **kwargs)
        got = row_pass(logits, *policy, dlogits=out, **kwargs)
        assert_bitwise(got, expected)
        if width == 1:  # p = 1: only the rounding error of max z remains
            assert all(x.abs().max() < 1e-7 for x in got[:3])


@triton
def test_rows_that_do_not_count(backend, poisoned):
    """Masked rows are not read and give 0. Rows with grad_logprob 0 have only the gradient of the entropy."""
    device = DEVICE[backend]
    mask = torch.tensor([1, 0, 1, 0, 1], device=device) > 0
    logits, targets, advantages, old_logprob = problem(5, 50, torch.float32, device=device)
    advantages[4] = 0.0
    logits[~mask], targets[~mask], old_logprob[~mask] = NAN, -100, NAN
    policy = targets, advantages, old_logprob
    kwargs = {"settings": (None, 1.0, 0.0, mask)}
    for dtype in (torch.float32, *NARROW):
        for entropy_coef in (0.0, 0.5):
            out = torch.full_like(logits, NAN, dtype=dtype)
            got = row_pass(logits, *policy, dlogits=out, entropy_coef=entropy_coef, **kwargs)
            _, logprob, entropy, grad_logprob = got
            for x in (logprob, entropy, grad_logprob, out):
                assert (x[~mask] == 0).all()
            assert (logprob[mask] != 0).all() and (entropy[mask] != 0).all()
            assert grad_logprob[2] == grad_logprob[4] == 0 and grad_logprob[0] != 0
            carries = (out != 0).any(-1)
            assert carries.tolist() == [True, False, entropy_coef > 0, False, entropy_coef > 0]
    # A scale of 0.
    got = row_pass(logits, *policy, scale=0.0, entropy_coef=0.5, **kwargs)
    assert (got[0] == 0).all() and (got[3] == 0).all() and (got[1][mask] != 0).all()


@triton
@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40])
def test_target_outside_the_vocabulary(backend, bad):
    """The row is NaN, except the entropy, which does not depend on the target."""
    logits, targets, *policy = problem(3, 7, torch.float32, device=DEVICE[backend])
    targets[1] = bad
    out = torch.full_like(logits, 42.0, dtype=torch.bfloat16)
    dlogits, logprob, entropy, grad_logprob = row_pass(
        logits, targets, *policy, dlogits=out, entropy_coef=0.1
    )
    for x in (logprob, grad_logprob, dlogits.float().sum(-1)):
        assert x.isnan().tolist() == [False, True, False]
    assert dlogits[1].isnan().all() and entropy.isfinite().all()


@triton
def test_nan_and_infinite_logits(backend):
    logits, *policy = problem(4, 50, torch.float32, device=DEVICE[backend])
    logits[0, 30:], logits[1, 20], logits[2, 3] = -INF, NAN, INF
    policy[0][:] = torch.arange(4, device=logits.device) + 5
    kwargs = {"entropy_coef": 0.1}
    got = row_pass(logits, *policy, **kwargs)
    for x in (got[0].sum(-1), *got[1:3]):
        assert x.isnan().tolist() == [False, True, True, False]
    assert (got[0][0, 30:] == 0).all()
    assert_bitwise(got, in_parts(logits, *policy, **kwargs))


@triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_backward_into_16_bits_rounds_once(backend, dtype, options):
    """token_logprob_bwd_ of fp32 logits into a 16-bit gradient: the fp32 gradient, rounded once."""
    device = DEVICE[backend]
    settings, fwd = settings_of(options, 5, device), token_logprob.FWD["triton"]
    logits, targets, g, h = problem(5, V, torch.float32, device=device)
    row_stats = fwd(logits, targets, *settings, True, False)[2]
    for grads in ((g, h), (g, None), (None, h)):
        wide = token_logprob.BWD["triton"](*grads, logits, targets, row_stats, *settings)
        buffer = torch.full((5, V + 3), 42.0, dtype=dtype, device=device)
        token_logprob.BWD_["triton"](*grads, logits, targets, row_stats, *settings, buffer[:, :V])
        assert torch.equal(buffer[:, :V], wide.to(dtype)) and (buffer[:, V:] == 42).all()


@triton
def test_bad_outputs_are_refused(backend):
    logits, *policy = problem(4, 33, torch.float32, device=DEVICE[backend])
    rows_, bwd_ = token_loss.ROWS_["triton"], token_logprob.BWD_["triton"]
    one, scale = torch.ones(4, device=logits.device), torch.ones((), device=logits.device)
    outputs = [torch.full_like(logits, 7.0), *(7.0 * one for _ in range(3))]

    def refused(match, entropy_coef=0.5, **changed):
        names = ("dlogits", "logprob", "entropy", "grad_logprob")
        given = [changed.get(n, x) for n, x in zip(names, outputs, strict=True)]
        with pytest.raises(ValueError, match=match):
            rows_(logits, *policy, *LIMITS, entropy_coef, *PLAIN, scale, *given)

    refused("entropy must be given where entropy_coef is not 0", entropy=None)
    refused(
        "grad_logprob must be contiguous",
        grad_logprob=torch.zeros(4, 2, device=logits.device)[:, 0],
    )
    refused("entropy must be contiguous, of torch.float32 and of the rows", entropy=one[:3])
    refused("logprob must be contiguous, of torch.float32", logprob=one.double())
    for name, wrong, match in (
        ("dtype", logits.double(), "torch.float32 .* cannot go into torch.float64"),
        ("shape", logits[:, :-1], "cannot go into"),
        ("strides", torch.empty(33, 4, device=logits.device).T, "unit last stride"),
    ):
        refused(match, dlogits=wrong), name
        with pytest.raises(ValueError, match=match):
            bwd_(one, None, logits, policy[0], torch.zeros(3, 4), *PLAIN, wrong)
    wide = logits.double()
    with pytest.raises(ValueError, match="cannot go into torch.bfloat16"):
        bwd_(one.double(), None, wide, policy[0], torch.zeros(3, 4), *PLAIN, logits.bfloat16())
    assert all((x == 7.0).all() for x in outputs)


@triton
def test_opcheck(backend):
    device = DEVICE[backend]
    logits, *policy = problem(3, 5, torch.float32, device=device)
    mask, scale = torch.tensor([1, 0, 1], device=device) > 0, torch.tensor(0.5, device=device)
    for half, wanted in ((torch.float32, True), (torch.bfloat16, False)):
        outputs = [torch.zeros_like(logits, dtype=half), *torch.zeros(3, 3, device=device)]
        if not wanted:
            outputs[2:] = None, None
        settings = (policy[1].abs() + 0.5, 1.0, 4.0, mask, scale)
        torch.library.opcheck(
            torch.ops.fastrlhf.token_loss_triton_rows_,
            (logits, *policy, *LIMITS, 0.1 * wanted, *settings, *outputs),
        )
