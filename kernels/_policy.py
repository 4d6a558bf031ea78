"""The policy loss of a token in Triton, for ppo_loss and the row pass of token_loss: clipped surrogates, KL,
rollout weights, and weights per sequence.

The formulas are those of csrc/common/policy.h. Compiled variants hold the settings; numbers are arguments.

Shapes: N tokens in S sequences; sequences [5, S], cu_seqlens [S + 1].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._math import clamp, expm1, expm1_excess, kl_term

# In the order of _KERNEL_OBJECTIVES, KL_GRADIENTS and _ROLLOUT in fastrlhf/ops/_policy.py.
PPO, REINFORCE, CISPO, SAPO = (tl.constexpr(i) for i in range(4))
OF_ESTIMATOR, OF_K2, OF_RATIO = (tl.constexpr(i) for i in range(3))
NO_ROLLOUT, WEIGHTS, TRUNCATE, MASK = (tl.constexpr(i) for i in range(4))


@triton.jit
def sequence_of(token, cu_seqlens_ptr, S):
    """The last sequence that starts at or before each token: every token of a valid cu_seqlens has one.

    Reads only cu_seqlens[1 .. S - 1]: cu_seqlens is not checked on a GPU.
    """
    found = tl.zeros_like(token)
    count = tl.full((), S, tl.int32)
    while count > 1:
        half = count // 2
        start = tl.load(cu_seqlens_ptr + found + half)
        found = tl.where(start <= token, found + half, found)
        count -= half
    return found


@triton.jit
def policy_term(
    logprob, d, advantage, low, high, dual_clip, tau_pos, tau_neg, OBJECTIVE: tl.constexpr
):
    """(loss, d loss / d logprob, rho, rho - 1 - log rho, clipped, clipped low, dual clipped, outside) of a token.

    rho = e^clamp(d, -20, 20) of its log-ratio d, A its advantage:

    - ppo: max(-A rho, -A clip(rho, low, high)), where A < 0 at most -A dual_clip;
    - reinforce: -A logprob;
    - cispo: -A sg(clip(rho, low, high)) logprob;
    - sapo: -A (4 / tau) sigmoid(tau (rho - 1)), tau = tau_pos where A > 0, else tau_neg.

    clipped: the clipped term is the larger one (cispo: rho is outside); clipped low: at the lower limit; dual clipped:
    the dual clip decides; outside: rho is outside [low, high].
    """
    log_ratio = clamp(d, -20.0, 20.0)
    ratio = tl.exp(log_ratio)
    excess = expm1_excess(log_ratio)
    below = ratio < low
    outside = below | (ratio > high)
    nowhere = tl.zeros_like(below)
    if OBJECTIVE == REINFORCE:
        loss, grad = -advantage * logprob, -advantage
        return loss, grad, ratio, excess, nowhere, nowhere, nowhere, nowhere
    if OBJECTIVE == CISPO:
        grad = -advantage * clamp(ratio, low, high)
        return grad * logprob, grad, ratio, excess, outside, below, nowhere, outside
    if OBJECTIVE == SAPO:
        tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
        x = tau * (ratio - 1.0)
        # sigmoid(x) and 1 - sigmoid(x) without cancellation: one is `larger`, the other u * larger.
        u = tl.exp(-tl.abs(x))
        larger = 1.0 / (1.0 + u)
        loss = -4.0 * advantage * (tl.where(x < 0.0, u * larger, larger) / tau)
        grad = tl.where(log_ratio != d, 0.0, -4.0 * advantage * (u * larger * larger) * ratio)
        return loss, grad, ratio, excess, nowhere, nowhere, nowhere, nowhere
    unclipped = -advantage * ratio
    clipped = -advantage * clamp(ratio, low, high)
    is_clipped = clipped > unclipped
    larger = tl.where(is_clipped, clipped, unclipped)
    bound = tl.where(advantage < 0.0, -advantage, 1.0) * dual_clip
    bounded = (advantage < 0.0) & (bound < larger)
    loss = tl.where(bounded, bound, larger)
    grad = tl.where(is_clipped | bounded | (log_ratio != d), 0.0, unclipped)
    is_low = is_clipped & (advantage < 0.0)
    return loss, grad, ratio, excess, is_clipped, is_low, bounded, outside


@triton.jit
def kl_in_loss(
    logprob,
    ref_logprob,
    moving_ratio,
    ratio,
    ESTIMATOR: tl.constexpr,
    CLAMP: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """(kl, its gradient with respect to logprob) of a token, by `kl_term`.

    GRADIENT: the estimator's own; that of k2, d = logprob - ref_logprob; or that of ratio * kl, which then is the kl.
    moving_ratio: d ratio / d logprob.
    """
    d = logprob - ref_logprob
    kl = kl_term(logprob, ref_logprob, ESTIMATOR, CLAMP)
    if GRADIENT == OF_K2:
        return kl, d
    if ESTIMATOR == 0:
        grad = tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == 1:
        grad = d
    elif ESTIMATOR == 3:
        grad = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    elif CLAMP:
        grad = tl.where(kl >= 10.0, 0.0, 0.0 - expm1(clamp(-d, -20.0, 20.0)))  # NaN stays NaN
    else:
        grad = 0.0 - expm1(-d)
    if GRADIENT == OF_RATIO:
        # moving_ratio is ratio, or 0 beyond the clamp, where the KL may be infinite. The e^-d of k3 and of its slope
        # cancel: their sum would be rounded to the size of e^-d, or inf - inf.
        total = kl + grad
        if ESTIMATOR == 2:
            total = tl.where(kl < 10.0, d, total) if CLAMP else d
        return ratio * kl, tl.where(moving_ratio == 0.0, ratio * grad, moving_ratio * total)
    return kl, grad


@triton.jit
def rollout_weight(old_logprob, rollout, low, high, ROLLOUT: tl.constexpr, PER_TOKEN: tl.constexpr):
    """(weight of the policy loss, whether it was outside [low, high]) of a token.

    `rollout`: the weight itself (WEIGHTS); the rollout's log-prob (PER_TOKEN); or the weight before its bounds.
    """
    weight = rollout
    if ROLLOUT == WEIGHTS:
        return weight, tl.zeros_like(weight < low)
    if PER_TOKEN:
        weight = tl.exp(clamp(old_logprob - rollout, -20.0, 20.0))
    outside = (weight < low) | (weight > high)
    if ROLLOUT == MASK:
        return tl.where(outside, 0.0, weight), outside
    return clamp(weight, low, high), outside


@triton.jit
def policy_token(
    token,
    keep,
    logprob,
    old_logprob_ptr,
    advantages_ptr,
    ref_logprob_ptr,
    rollout_ptr,
    cu_seqlens_ptr,
    sequences_ptr,
    S,
    low,
    high,
    dual_clip,
    tau_pos,
    tau_neg,
    kl_coef,
    rollout_low,
    rollout_high,
    HAS_OLD: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_SEQUENCES: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_CLAMP: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    ROLLOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """What both kernels need of tokens, a block or one:

    (policy loss, kl, gradient of policy loss + kl_coef kl with respect to logprob, weight, value weight,
    the last six of `policy_term`, rollout weight, rollout outside). The first three lack the weight of the sequence.

    token: places among the tokens of cu_seqlens. keep: which are not masked; elsewhere all numbers are 0, and the marks
    mean nothing. The pointers of the per-token tensors are those of these tokens.
    """
    one = tl.full((), 1.0, ACC)
    weight, value_weight, advantage, d, rollout = one, one, one, one, one
    if HAS_SEQUENCES:
        row = sequences_ptr + sequence_of(token, cu_seqlens_ptr, S)
        weight = tl.load(row, mask=keep, other=0.0)
        value_weight = tl.load(row + S, mask=keep, other=0.0)
        advantage = tl.load(row + 2 * S, mask=keep, other=0.0)
        d = tl.load(row + 3 * S, mask=keep, other=0.0)
        rollout = tl.load(row + 4 * S, mask=keep, other=0.0)
    if HAS_ADVANTAGES:
        advantage = tl.load(advantages_ptr, mask=keep, other=0.0).to(ACC)
    old_logprob = logprob
    if HAS_OLD:
        old_logprob = tl.load(old_logprob_ptr, mask=keep, other=0.0).to(ACC)
    if not SEQUENCE_RATIO:
        d = logprob - old_logprob
    loss, grad, ratio, excess, is_clipped, is_low, is_dual, outside = policy_term(
        logprob,
        d,
        advantage,
        tl.full((), low, ACC),
        tl.full((), high, ACC),
        tl.full((), dual_clip, ACC),
        tl.full((), tau_pos, ACC),
        tl.full((), tau_neg, ACC),
        OBJECTIVE,
    )
    weighed, beyond = one, outside
    if ROLLOUT != NO_ROLLOUT:
        if HAS_ROLLOUT:
            rollout = tl.load(rollout_ptr, mask=keep, other=0.0).to(ACC)
        weighed, beyond = rollout_weight(
            old_logprob,
            rollout,
            tl.full((), rollout_low, ACC),
            tl.full((), rollout_high, ACC),
            ROLLOUT,
            HAS_ROLLOUT,
        )
        loss *= weighed
        grad *= weighed
        weighed = tl.where(keep, weighed, 0.0)
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        ref_logprob = tl.load(ref_logprob_ptr, mask=keep, other=0.0).to(ACC)
        moving_ratio = tl.where(tl.abs(d) <= 20.0, ratio, 0.0)
        kl, kl_grad = kl_in_loss(
            logprob, ref_logprob, moving_ratio, ratio, KL_ESTIMATOR, KL_CLAMP, KL_GRADIENT
        )
        grad += tl.full((), kl_coef, ACC) * kl_grad
    # Masked tokens load as 0, but their ratio is 1, and so may be the advantage and the gradient of the KL.
    loss, grad = tl.where(keep, loss, 0.0), tl.where(keep, grad, 0.0)
    ratio = tl.where(keep, ratio, 0.0)
    return (
        loss,
        kl,
        grad,
        weight,
        value_weight,
        ratio,
        excess,
        is_clipped,
        is_low,
        is_dual,
        outside,
        weighed,
        beyond,
    )


class Settings(NamedTuple):
    """`more` and `options` of the raw ops, as the kernels take them."""

    ref_logprob: torch.Tensor | None = None
    rollout: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    count: int = 0  # S
    first_row: int = 0
    numbers: tuple = (1.0, 1.0, 0.0, 0.0, 0.0)  # taus, kl_coef, bounds of the rollout weight
    flags: dict = {}

    @property
    def kl_coef(self):
        return self.numbers[2]


def settings(more, options, objective=PPO.value) -> Settings:
    """`objective`: where `options` is empty."""
    if not options:
        return Settings(flags={"OBJECTIVE": objective})
    ref_logprob, rollout, cu_seqlens, sequences = more or (None,) * 4
    (
        objective,
        sequence_ratio,
        tau_pos,
        tau_neg,
        kl_coef,
        estimator,
        kl_clamp,
        kl_gradient,
        *rest,
    ) = options
    kind, rollout_low, rollout_high, first_row = rest
    flags = {"OBJECTIVE": int(objective)}
    if ref_logprob is not None:
        flags |= {"HAS_REF": True, "KL_ESTIMATOR": int(estimator), "KL_CLAMP": bool(kl_clamp)}
        flags["KL_GRADIENT"] = int(kl_gradient)
    if kind:
        flags |= {"ROLLOUT": int(kind), "HAS_ROLLOUT": rollout is not None}
    if sequences is not None:
        flags |= {"HAS_SEQUENCES": True, "SEQUENCE_RATIO": bool(sequence_ratio)}
        cu_seqlens, sequences = cu_seqlens.contiguous(), sequences.contiguous()
    return Settings(
        ref_logprob,
        rollout if kind else None,
        cu_seqlens,
        sequences,
        0 if sequences is None else sequences.shape[1],
        int(first_row),
        (tau_pos, tau_neg, kl_coef, rollout_low, rollout_high),
        flags,
    )
