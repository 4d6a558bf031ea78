"""Softmax of a row of logits in base 2: row statistics in one pass, and the gradient.

Shapes: a row of V logits x, processed in tiles [R, L] of R * L consecutive logits. Sums are kept per column of a tile,
in row order, so they depend neither on the register layout nor on the alignment of the row.

z = u * factor / temperature, where (factor, u) is (1, x) without a soft-cap, else (softcap, tanh(x / softcap)), or
(2 softcap, (tanh(x / softcap) - 1) / 2): the same z up to a constant, which the softmax ignores, without the
cancellation of a saturated tanh.

With c = log2(e) factor / temperature and one rounded b near c max(u), e_j = 2^(c u_j - b) takes one FMA, whose rounding
error is relative to the difference and not to the logits. The rounding error of b is corrected at the end.

Far rows: if |max z| exceeds 2^30 (2^60 in fp64), an ulp of b exceeds the range of the exponent. There e_j is 1 if
z_j = max z, else 0. A z of -inf has probability 0, and is the initial value of the maximum.
"""

import triton
import triton.language as tl

from ._math import expm1

FAR_FP32, FAR_FP64 = tl.constexpr(2.0**30), tl.constexpr(2.0**60)
LEAST = tl.constexpr(-1e4)  # 2^LEAST is 0; finite, so that e * a is 0 for a logit of -inf
# CAP: how tanh(x / softcap) is computed.
NO_CAP = tl.constexpr(0)
FAST_CAP = tl.constexpr(1)  # absolute error 1e-7, which the softcap multiplies
EXACT_CAP = tl.constexpr(2)  # relative error of a few ulp
LARGEST_FAST_CAP = 32.0


def cap_kind(softcap, double):
    """CAP for a softcap (0: none); `double`: fp64 logits."""
    if softcap <= 0:
        return NO_CAP.value
    return FAST_CAP.value if softcap <= LARGEST_FAST_CAP and not double else EXACT_CAP.value


def constant_of_z(softcap, double):
    """What the z of the kernels leaves out, times the temperature: softcap tanh(x / softcap) is that much larger."""
    return softcap if cap_kind(softcap, double) == FAST_CAP.value else 0.0


@triton.jit
def _log2_e(ACC: tl.constexpr):
    """log2(e) as high + low."""
    if ACC == tl.float64:
        return tl.full((), 1.4426950408889634, ACC), tl.full((), 2.0355273740931033e-17, ACC)
    return tl.full((), 1.4426950216293335, ACC), tl.full((), 1.9259629911266175e-08, ACC)


@triton.jit
def _ln_2(ACC: tl.constexpr):
    """log(2) as high + low."""
    if ACC == tl.float64:
        return tl.full((), 0.6931471805599453, ACC), tl.full((), 2.3190468138462996e-17, ACC)
    return tl.full((), 0.6931471824645996, ACC), tl.full((), -1.904654299957768e-09, ACC)


@triton.jit
def logit_scale(
    row,
    row_temperature_ptr,
    temperature,
    softcap,
    HAS_ROW_T: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Constants of a row: (c, relative error of c, dz/du, rounding error of dz/du, 1 / temperature).

    dz/du = factor / temperature, c = log2(e) dz/du.
    """
    if HAS_ROW_T:
        t = tl.load(row_temperature_ptr + row)
    else:
        t = tl.full((), temperature, tl.float64)
    rounded = t.to(ACC)
    inverse = 1.0 / rounded
    error = tl.fma(-inverse, rounded, tl.full((), 1.0, ACC))
    error -= inverse * (t - rounded.to(t.dtype)).to(ACC)
    scale, scale_low = inverse, inverse * error
    if CAP != 0:
        factor = softcap * (2.0 if CAP == 1 else 1.0)
        scale = inverse * factor
        scale_low = tl.fma(inverse, factor, -scale) + scale_low * factor
    log2_e, log2_e_low = _log2_e(ACC)
    low = tl.fma(log2_e, scale_low, log2_e_low * scale)
    c = tl.fma(log2_e, scale, low)
    return c, -(tl.fma(log2_e, scale, -c) + low) / c, scale, scale_low, inverse


@triton.jit
def _inverse(d):
    """1 / d for 1 <= d < 2^126. A division would also handle other ranges, at every logit."""
    if d.dtype == tl.float64:
        return 1.0 / d
    else:
        r = tl.rsqrt(d)
        r *= r
        return r * tl.fma(-d, r, 2.0)


@triton.jit
def _fast_cap(x, softcap):
    """(u, 1 - tanh^2) with E = e^(2 x / softcap): u = (tanh - 1) / 2 = -1 / (E + 1), 1 - tanh^2 = 4 E / (E + 1)^2."""
    log2_e, log2_e_low = _log2_e(softcap.dtype)
    k = 2.0 * log2_e / softcap
    k += (tl.fma(-k, softcap, 2.0 * log2_e) + 2.0 * log2_e_low) / softcap
    y = x * k
    e = tl.exp2(tl.minimum(y, 100.0, propagate_nan=tl.PropagateNan.ALL))
    r = _inverse(e + 1.0)
    return -r, 4.0 * (e * r) * r


@triton.jit
def _exact_cap(x, softcap):
    """(tanh, 1 - tanh^2) without cancellation: odd polynomial near 0, 1 - 2 / (e^2|y| + 1) elsewhere."""
    bounded = tl.minimum(tl.abs(x), 20.0 * softcap, propagate_nan=tl.PropagateNan.ALL)
    # |x| / softcap, correctly rounded
    inverse = 1.0 / softcap
    y = bounded * inverse
    y = tl.fma(tl.fma(-y, softcap, bounded), inverse, y)
    s = y * y
    if x.dtype == tl.float64:
        near = y * (1.0 - s / 3.0 * (1.0 - s * 0.4))
        limit = 1e-4
    else:
        p = tl.fma(s, -5.70498872745e-3, 2.06390887954e-2)
        p = tl.fma(p, s, -5.37397155531e-2)
        p = tl.fma(p, s, 1.33314422036e-1)
        p = tl.fma(p, s, -3.33332819422e-1)
        near = tl.fma(y * s, p, y)
        limit = 0.625
    u = 2.0 * _inverse(tl.exp(2.0 * y) + 1.0)
    t = tl.where(y < limit, near, 1.0 - u)
    return tl.where(x < 0.0, -t, t), u * (2.0 - u)


@triton.jit
def capped(x, softcap, CAP: tl.constexpr):
    """(u, 1 - tanh^2(x / softcap)) of logits in the accumulator's dtype; the second is not used with NO_CAP."""
    if CAP == 0:
        return x, x
    elif CAP == 1:
        return _fast_cap(x, softcap)
    else:
        return _exact_cap(x, softcap)


@triton.jit
def _is_near(z):
    return tl.abs(z) < (FAR_FP64 if z.dtype == tl.float64 else FAR_FP32)


@triton.jit
def _is_far(z):
    return (not _is_near(z)) & (tl.abs(z) < float("inf"))


@triton.jit
def _halves(x):
    """The upper and the lower half of the rows of x [R, L]."""
    return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))


@triton.jit
def _sum_of_rows(x):
    if x.shape[0] == 1:
        return tl.reshape(x, (x.shape[1],))
    else:
        upper, lower = _halves(x)
        return _sum_of_rows(upper + lower)


@triton.jit
def _fold(top, base, total, weighted, u, c, scale, WITH_MEAN: tl.constexpr):
    """Folds a tile u [R, L] into max u, b and, per column, total = sum e and weighted = sum e a (a = log2 e).

    While there is no finite maximum, b is inf and every e is 0.
    """
    most = tl.max(tl.max(u, axis=0), axis=0)
    if most > top:
        now = tl.where(_is_near(most * scale), most * c, float("inf"))
        known = tl.maximum(base, now) < float("inf")
        moved = tl.where(known, base - now, 0.0)
        keep = tl.where(known, tl.exp2(moved), 0.0)  # 0 * NaN stays NaN
        if WITH_MEAN:
            weighted = keep * tl.fma(total, moved, weighted)
        total *= keep
        top = most
        base = now
    a = tl.fma(u, c, -base)
    e = tl.exp2(a)
    total += _sum_of_rows(e)
    if WITH_MEAN:
        a, a_lower = _halves(tl.maximum(a, LEAST))
        e, e_lower = _halves(e)
        weighted += _sum_of_rows(tl.fma(e, a, e_lower * a_lower))
    return top, base, total, weighted


@triton.jit
def _sum_of_columns(x):
    """Sum of x [L] by halves: the order is that of the columns, not that of the registers."""
    if x.shape[0] == 2:
        left, right = tl.split(x)
        return left + right
    else:
        left, right = tl.split(tl.trans(tl.reshape(x, (2, x.shape[0] // 2))))
        return _sum_of_columns(left + right)


@triton.jit
def row_statistics(
    row_ptr,
    V,
    c,
    scale,
    scale_low,
    softcap,
    WITH_MEAN: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    STAGES: tl.constexpr,
    POLICY: tl.constexpr,
):
    """(max u, row_max, shifted_lse, max_error, shifted_mean) of a row; see csrc/common/softmax.h.

    row_max = max z rounded, max_error = max z - row_max. shifted_lse and shifted_mean are relative to the exact max z.
    """
    top = tl.full((), float("-inf"), ACC)
    base = tl.full((), float("inf"), ACC)
    total = tl.zeros((L,), ACC)
    weighted = tl.zeros((L,), ACC)
    column = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    whole = V - V % (R * L)
    for start in tl.range(0, whole, R * L, num_stages=STAGES):
        x = tl.load(row_ptr + start + column, eviction_policy=POLICY)
        u = capped(x.to(ACC), softcap, CAP)[0]
        top, base, total, weighted = _fold(top, base, total, weighted, u, c, scale, WITH_MEAN)
    for start in tl.range(whole, V, R * L, num_stages=1):
        there = start + column < V
        x = tl.load(row_ptr + start + column, mask=there, other=0.0, eviction_policy=POLICY)
        u = tl.where(there, capped(x.to(ACC), softcap, CAP)[0], float("-inf"))
        top, base, total, weighted = _fold(top, base, total, weighted, u, c, scale, WITH_MEAN)
    row_max = top * scale
    base_error = tl.fma(top, c, -base)  # c max(u) - b
    max_error = tl.fma(top, scale, -row_max) + top * scale_low
    if _is_far(row_max):
        base_error, max_error = 0.0 * top, 0.0 * top
        for start in tl.range(0, V, L, num_stages=1):
            at = start + tl.arange(0, L)
            x = tl.load(row_ptr + at, mask=at < V, other=float("nan"))
            total += (capped(x.to(ACC), softcap, CAP)[0] * scale == row_max).to(ACC)
    if row_max == float("-inf"):  # all probabilities are 0: log sum e is -inf
        top, base_error, max_error = row_max, 0.0 * c, 0.0 * c
    sum_e = _sum_of_columns(total)
    ln_2, _ = _ln_2(ACC)
    shifted_lse = tl.fma(-ln_2, base_error, tl.log(sum_e))
    shifted_mean = shifted_lse
    if WITH_MEAN:
        shifted_mean = ln_2 * (_sum_of_columns(weighted) / sum_e - base_error)
    return top, row_max, shifted_lse, max_error, shifted_mean


@triton.jit
def log_softmax(u, top, shifted_lse, scale, scale_low):
    """(u - top) * scale - shifted_lse, rounded once at the magnitude of the result.

    The rounding errors of the difference (Dekker's two-sum) and of the scale are added to the smaller term first.
    """
    distance = u - top
    back = distance - u
    error = (u - (distance - back)) - (top + back)
    correction = tl.fma(distance, scale_low, error * scale)
    logprob = tl.fma(distance, scale, correction - shifted_lse)
    return tl.where(distance > float("-inf"), logprob, distance - shifted_lse)


@triton.jit
def row_logprob(
    row_ptr,
    V,
    target,
    c,
    scale,
    scale_low,
    softcap,
    WITH_MEAN: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    STAGES: tl.constexpr,
    POLICY: tl.constexpr,
):
    """(logprob of the target, entropy, row_max, shifted_lse, shifted_mean) of a row.

    shifted_lse and shifted_mean are relative to row_max as stored. Entropy and shifted_mean are 0 without WITH_MEAN. A
    target outside [0, V) is not read and its logprob is NaN. The reductions synchronise the threads after the target's
    logit is read, so the caller may overwrite the row.
    """
    inside = (target >= 0) & (target < V)
    x_target = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(ACC)
    u_target, _ = capped(x_target, softcap, CAP)
    top, row_max, shifted_lse, max_error, shifted_mean = row_statistics(
        row_ptr, V, c, scale, scale_low, softcap, WITH_MEAN, CAP, ACC, R, L, STAGES, POLICY
    )
    logprob = log_softmax(u_target, top, shifted_lse, scale, scale_low)
    entropy = tl.zeros((), ACC)
    if WITH_MEAN:
        entropy = shifted_lse - shifted_mean
        shifted_mean += max_error
    else:
        shifted_mean = tl.zeros((), ACC)
    return logprob, entropy, row_max, shifted_lse + max_error, shifted_mean


@triton.jit
def exp_scalar(x):
    """e^x, corrected for the rounding error of x log2(e)."""
    log2_e, log2_e_low = _log2_e(x.dtype)
    ln_2, _ = _ln_2(x.dtype)
    y = x * log2_e
    error = tl.fma(x, log2_e, -y) + x * log2_e_low
    e = tl.exp2(y)
    return tl.where(tl.abs(y) < 1000.0, tl.fma(e * error, ln_2, e), e)


@triton.jit
def _exponentials(u, row_max, base, c, scale, FAR_ROW: tl.constexpr):
    """(e, a = log2 e, at least LEAST) of a block. FAR_ROW: e is 1 if z = row_max, else 0."""
    if FAR_ROW:
        e = tl.where(u == u, (u * scale == row_max).to(u.dtype), u)
        return e, tl.where(e > 0.0, 0.0 * e, LEAST)
    else:
        a = tl.fma(u, c, -base)
        return tl.exp2(a), tl.maximum(a, LEAST)


@triton.jit
def _write_others(
    row_ptr,
    out_ptr,
    start,
    V,
    terms,
    FAR_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_H: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block of the gradient as if it did not contain the target."""
    row_max, base, c, scale, cap, coef_e, coef_ea = terms
    column = start + tl.arange(0, BLOCK)
    there = None
    if MASKED:
        there = column < V
    x = tl.load(row_ptr + column, mask=there, eviction_policy="evict_first").to(ACC)
    u, dtanh = capped(x, cap, CAP)
    e, a = _exponentials(u, row_max, base, c, scale, FAR_ROW)
    if HAS_H:
        grad = e * tl.fma(a, coef_ea, coef_e)
    else:
        grad = e * coef_e
    if CAP != 0:
        grad *= dtanh
    tl.store(out_ptr + column, grad.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def write_zeros(out_ptr, V, first, step, BLOCK: tl.constexpr):
    for start in range(first * BLOCK, V, step * BLOCK):
        column = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
        tl.store(out_ptr + column, zeros, mask=column < V)


@triton.jit
def write_gradient(
    row_ptr,
    out_ptr,
    V,
    first,
    step,
    target,
    g,
    h,
    row_max,
    shifted_lse,
    shifted_mean,
    c,
    c_error,
    scale,
    inverse,
    cap,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes blocks first, first + step, ... of a row's gradient for g = dL/dlogprob and h = dL/dentropy:

        dL/dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + entropy)) dz_j/dx_j

    Blocks are counted from the end of the row, which was read last and may still be cached. out may be the row itself:
    a block is read and written by one program, and all threads read the target's logit before any of them writes.
    """
    log2_e, _ = _log2_e(ACC)
    ln_2, ln_2_low = _ln_2(ACC)
    # z_j - row_max = ln(2) (c u_j - b) + offset
    far = _is_far(row_max)
    base = row_max * log2_e
    offset = tl.fma(base, ln_2, -row_max) + base * (ln_2_low - ln_2 * c_error)
    offset = tl.where(far, 0.0, offset)
    weight = -inverse * exp_scalar(offset - shifted_lse)
    coef_e = weight * h * (offset - shifted_mean)
    coef_ea = weight * h * ln_2
    blocks = tl.cdiv(V, BLOCK)
    if HAS_G:
        mine = (target >= 0) & (target < V) & ((blocks - 1 - target // BLOCK) % step == first)
        x = tl.load(row_ptr + target, mask=mine, other=0.0).to(ACC)
        tl.debug_barrier()
        u, dtanh = capped(x, cap, CAP)
        if far:
            e, a = _exponentials(u, row_max, base, c, scale, True)
        else:
            e, a = _exponentials(u, row_max, base, c, scale, False)
        # g (1 - p) by expm1, without cancellation
        log_p = tl.fma(a, ln_2, offset - shifted_lse)
        own = -inverse * g * expm1(tl.where(log_p < -800.0, -800.0, log_p))
        if HAS_H:
            own += e * tl.fma(a, coef_ea, coef_e)
        if CAP != 0:
            own *= capped(x, cap, EXACT_CAP)[1]
        coef_e += weight * g
    terms = row_max, base, c, scale, cap, coef_e, coef_ea
    if far:
        for i in range(first, blocks, step):
            for part in range(8):
                _write_others(
                    row_ptr,
                    out_ptr,
                    (blocks - 1 - i) * BLOCK + part * (BLOCK // 8),
                    V,
                    terms,
                    True,
                    True,
                    HAS_H,
                    CAP,
                    ACC,
                    BLOCK // 8,
                )
    else:
        if (V % BLOCK != 0) & (first == 0):
            _write_others(
                row_ptr,
                out_ptr,
                (blocks - 1) * BLOCK,
                V,
                terms,
                False,
                True,
                HAS_H,
                CAP,
                ACC,
                BLOCK,
            )
        for i in range(tl.where((V % BLOCK != 0) & (first == 0), step, first), blocks, step):
            _write_others(
                row_ptr,
                out_ptr,
                (blocks - 1 - i) * BLOCK,
                V,
                terms,
                False,
                False,
                HAS_H,
                CAP,
                ACC,
                BLOCK,
            )
    if HAS_G:
        tl.debug_barrier()
        tl.store(out_ptr + target, own.to(out_ptr.dtype.element_ty), mask=mine)
