"""Device functions of a softmax that sees its row once: running maximum, sum e^d and sum d e^d.

With d = z - max: log-sum-exp = max + log(sum e^d) and entropy = log(sum e^d) - (sum d e^d) / (sum e^d).
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Odd polynomial near 0, 1 - 2 / (e^2|x| + 1) elsewhere; NaN stays NaN."""
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    if x.dtype == tl.float64:
        near = x * (1.0 - s / 3.0 * (1.0 - s * 0.4))
        limit = 1e-4
    else:
        near = x + x * s * p
        limit = 0.625
    bounded = tl.where(tl.abs(x) > 20.0, 20.0, tl.abs(x))
    far = 1.0 - 2.0 / (tl.exp(2.0 * bounded) + 1.0)
    return tl.where(tl.abs(x) < limit, near, tl.where(x < 0, -far, far))


@triton.jit
def sech2(x):
    """1 - tanh(x)^2 = u (2 - u), u = 1 - tanh|x|: no cancellation at large |x|."""
    bounded = tl.where(tl.abs(x) > 40.0, 40.0, tl.abs(x))
    u = 2.0 / (tl.exp(2.0 * bounded) + 1.0)
    return u * (2.0 - u)


@triton.jit
def row_scale(row, row_temperature_ptr, temperature, HAS_ROW_T: tl.constexpr, ACC: tl.constexpr):
    """1 / temperature of the row."""
    if HAS_ROW_T:
        return 1.0 / tl.load(row_temperature_ptr + row).to(ACC)
    return 1.0 / tl.full((), temperature, ACC)


@triton.jit
def scaled_logits(x, scale, softcap, HAS_CAP: tl.constexpr):
    """z = softcap * tanh(x / softcap) * scale."""
    if HAS_CAP:
        x = softcap * tanh(x / softcap)
    return x * scale


@triton.jit
def update(top, total, weighted, z):
    """Folds the block z [BLOCK] into the running maximum (scalar) and the per-lane sums [BLOCK].

    Lanes are summed once, after the row, so that a block costs one reduction. Until a finite logit
    is seen 0 stands for the maximum: e^-inf is 0, and a NaN stays a NaN.
    """
    new_top = tl.maximum(top, tl.max(z, axis=0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shift = tl.where(top == float("-inf"), 0.0, top - base)
    factor = tl.where(top == float("-inf"), 0.0, tl.exp(shift))
    # Below the floor e^d is 0 whatever d: a finite d keeps 0 * inf away.
    raw = z - base
    d = tl.where(raw < -800.0, -800.0, raw)
    e = tl.exp(d)
    weighted = factor * (weighted + total * shift) + e * d
    total = factor * total + e
    return new_top, total, weighted
