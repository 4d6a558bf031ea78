"""Scalar maths of the kernels in fp32 or fp64. NaN stays NaN.

The formulas are those of csrc/common/math.h, csrc/common/ppo.h and csrc/common/sequence.h.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def expm1_excess(x):
    """e^x - 1 - x for |x| <= 88, by its Taylor series where |x| < 1/2: no cancellation."""
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
    """log(1 + u) for 0 <= u <= 1 as 2 artanh(z), z = u / (2 + u) <= 1/3: accurate for small u."""
    terms: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    z = u / (u + 2.0)
    s = z * z
    p = s * 0.0
    for k in tl.static_range(terms):
        p = p * s + 1.0 / (2 * terms - 1 - 2 * k)
    return 2.0 * z * p


@triton.jit
def kl_term(logprob, ref_logprob, ESTIMATOR: tl.constexpr, CLAMP: tl.constexpr = True):
    """Estimate of KL(pi | ref) from one sampled token, d = logprob - ref_logprob.

    ESTIMATOR: 0 k1 = d, 1 k2 = d^2 / 2, 2 k3 = e^-d - 1 + d, 3 abs = |d|. CLAMP: k3 is at most 10.
    """
    d = logprob - ref_logprob
    if ESTIMATOR == 0:
        return d
    if ESTIMATOR == 1:
        return 0.5 * d * d
    if ESTIMATOR == 3:
        return tl.abs(d)
    if not CLAMP:
        return expm1_excess(-d)
    kl = expm1_excess(clamp(-d, -20.0, 20.0))
    return tl.where(kl > 10.0, 10.0, kl)


@triton.jit
def value_term(value, old_value, target, clip):
    """(loss, d loss / d value, clipped) of one token; an infinite clip disables clipping.

    loss = max((v - target)^2, (clip(v, old - clip, old + clip) - target)^2) / 2.
    """
    error = value - target
    clipped_error = clamp(value, old_value - clip, old_value + clip) - target
    is_clipped = clipped_error * clipped_error > error * error
    chosen = tl.where(is_clipped, clipped_error, error)
    return 0.5 * chosen * chosen, tl.where(is_clipped, 0.0, error), is_clipped


@triton.jit
def neg_log_sigmoid(x):
    """(-log sigmoid(x), its derivative sigmoid(x) - 1)."""
    u = tl.exp(-tl.abs(x))
    return log1p(u) - tl.where(x < 0.0, x, 0.0), tl.where(x < 0.0, -1.0, -u) / (1.0 + u)
