"""Per-token RL maths, the formulas of csrc/common/math.h: x is fp32 or fp64, NaN stays NaN."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def expm1_excess(x):
    """e^x - 1 - x for |x| <= 88 without cancellation: its Taylor series where |x| < 1/2."""
    terms: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    p = x * 0.0 + 1.0
    for k in tl.static_range(3, terms + 1):
        p = p * x * (1.0 / (terms + 3 - k)) + 1.0
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * p, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 for |x| <= 800 without cancellation."""
    return tl.where(tl.abs(x) < 0.5, x + expm1_excess(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(u):
    """log(1 + u) for 0 <= u <= 1 as 2 artanh(z), z = u / (2 + u) <= 1/3: no logarithm of nearly 1."""
    terms: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    z = u / (u + 2.0)
    s = z * z
    p = s * 0.0
    for k in tl.static_range(terms):
        p = p * s + 1.0 / (2 * terms - 1 - 2 * k)
    return 2.0 * z * p


@triton.jit
def kl_term(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
    """Estimate of KL(pi | ref) from one sampled token; 0 k1, 1 k2, 2 k3, 3 abs."""
    d = logprob - ref_logprob
    if ESTIMATOR == 0:
        return d
    if ESTIMATOR == 1:
        return 0.5 * d * d
    if ESTIMATOR == 3:
        return tl.abs(d)
    kl = expm1_excess(clamp(-d, -20.0, 20.0))
    return tl.where(kl > 10.0, 10.0, kl)


@triton.jit
def policy_term(logprob, old_logprob, advantage, low, high, dual_clip):
    """(loss, d loss / d logprob, ratio, rho - 1 - log rho, whether the clip decides)."""
    d = logprob - old_logprob
    log_ratio = clamp(d, -20.0, 20.0)
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * clamp(ratio, low, high)
    decided = clipped > unclipped
    larger = tl.where(decided, clipped, unclipped)
    # A dual clip of infinity is none.
    bound = tl.where(advantage < 0.0, -advantage, 1.0) * dual_clip
    bounded = (advantage < 0.0) & (bound < larger)
    loss = tl.where(bounded, bound, larger)
    free = tl.where(decided | bounded | (log_ratio != d), 0.0, unclipped)
    return loss, free, ratio, expm1_excess(log_ratio), decided


@triton.jit
def value_term(value, old_value, target, clip):
    """(half the larger squared error, d / d value, whether the clip decides); infinity is no clip."""
    error = value - target
    clipped_error = clamp(value, old_value - clip, old_value + clip) - target
    decided = clipped_error * clipped_error > error * error
    chosen = tl.where(decided, clipped_error, error)
    return 0.5 * chosen * chosen, tl.where(decided, 0.0, error), decided


@triton.jit
def neg_log_sigmoid(x):
    """-log sigmoid(x), and its derivative sigmoid(x) - 1."""
    u = tl.exp(-tl.abs(x))
    return log1p(u) - tl.where(x < 0.0, x, 0.0), tl.where(x < 0.0, -1.0, -u) / (1.0 + u)
