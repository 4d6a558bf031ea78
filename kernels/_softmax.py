"""The softmax of a row of logits in base 2: its statistics in one walk, and tiles of its gradient.

Shapes: a row of V logits x, walked in tiles [R, L] of R * L consecutive ones. Sums are kept for each of the L columns
of a tile, in the order of the row, so that their bits depend on neither the layout of registers nor the alignment of
the row. z = factor * u / temperature with factor = 1 and u = x; softcap and tanh(x / softcap); or, up to a constant
that the softmax does not see, 2 softcap and (tanh(x / softcap) - 1) / 2, which has the digits that saturation leaves.

With c = log2(e) factor / temperature and one rounded b near c max(u), e_j = 2^(c u_j - b) takes one fused product,
whose rounding is at the size of the distance, whatever the size of the logits. What b lost is taken out again.

Where max z is far from 0 (2^30; 2^60 in fp64), an ulp of b would exceed the range of the exponent, and one of z that
of the softmax: there e_j is 1 where z_j = max z and 0 elsewhere. A z of -inf has probability 0, and stands for "nothing
yet" as a maximum.
"""

import triton
import triton.language as tl

from ._math import expm1

FAR_FP32, FAR_FP64 = tl.constexpr(2.0**30), tl.constexpr(2.0**60)
LEAST = tl.constexpr(-1e4)  # 2^LEAST is 0, and finite: e * a is 0 for a logit of -inf, not 0 * inf
# CAP: how tanh(x / softcap) is made.
NO_CAP = tl.constexpr(0)  # not at all
FAST_CAP = tl.constexpr(1)  # with an error of 1e-7 near 0 too, which softcap enlarges
EXACT_CAP = tl.constexpr(2)  # to the last digits, near 0 too
LARGEST_FAST_CAP = 32.0


def cap_kind(softcap, double):
    """CAP of a call."""
    if softcap <= 0:
        return NO_CAP.value
    return FAST_CAP.value if softcap <= LARGEST_FAST_CAP and not double else EXACT_CAP.value


@triton.jit
def _log2_e(ACC: tl.constexpr):
    """log2(e) in two parts."""
    if ACC == tl.float64:
        return tl.full((), 1.4426950408889634, ACC), tl.full((), 2.0355273740931033e-17, ACC)
    return tl.full((), 1.4426950216293335, ACC), tl.full((), 1.9259629911266175e-08, ACC)


@triton.jit
def _ln_2(ACC: tl.constexpr):
    """log(2) in two parts."""
    if ACC == tl.float64:
        return tl.full((), 0.6931471805599453, ACC), tl.full((), 2.3190468138462996e-17, ACC)
    return tl.full((), 0.6931471824645996, ACC), tl.full((), -1.904654299957768e-09, ACC)


@triton.jit
def row_slope(
    row,
    row_temperature_ptr,
    temperature,
    softcap,
    HAS_ROW_T: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """(c, relative error of c, factor / temperature, what its rounding left, 1 / temperature) of a row."""
    if HAS_ROW_T:
        t = tl.load(row_temperature_ptr + row)
    else:
        t = tl.full((), temperature, tl.float64)
    rounded = t.to(ACC)
    inverse = 1.0 / rounded
    missed = tl.fma(-inverse, rounded, tl.full((), 1.0, ACC))
    missed -= inverse * (t - rounded.to(t.dtype)).to(ACC)
    scale, scale_low = inverse, inverse * missed
    if CAP != 0:
        factor = softcap * (2.0 if CAP == 1 else 1.0)
        scale = inverse * factor
        scale_low = tl.fma(inverse, factor, -scale) + scale_low * factor
    log2_e, log2_e_low = _log2_e(ACC)
    rest = tl.fma(log2_e, scale_low, log2_e_low * scale)
    c = tl.fma(log2_e, scale, rest)
    return c, -(tl.fma(log2_e, scale, -c) + rest) / c, scale, scale_low, inverse


@triton.jit
def _inverse(d):
    """1 / d of 1 <= d < 2^126; a division would look for other ranges at every logit."""
    if d.dtype == tl.float64:
        return 1.0 / d
    else:
        r = tl.rsqrt(d)
        r *= r
        return r * tl.fma(-d, r, 2.0)


@triton.jit
def _fast_cap(x, softcap):
    """(u, 1 - tanh^2) with E = e^(2 x / softcap): -1 / (E + 1), which is (tanh - 1) / 2, and 4 E / (E + 1)^2."""
    log2_e, log2_e_low = _log2_e(softcap.dtype)
    grad_logprob = 2.0 * log2_e / softcap
    grad_logprob += (tl.fma(-grad_logprob, softcap, 2.0 * log2_e) + 2.0 * log2_e_low) / softcap
    y = x * grad_logprob
    e = tl.exp2(tl.minimum(y, 100.0, propagate_nan=tl.PropagateNan.ALL))
    r = _inverse(e + 1.0)
    return -r, 4.0 * (e * r) * r


@triton.jit
def _exact_cap(x, softcap):
    """(tanh, 1 - tanh^2), both without cancellation: an odd polynomial near 0, 1 - 2 / (e^2|y| + 1) elsewhere."""
    bounded = tl.minimum(tl.abs(x), 20.0 * softcap, propagate_nan=tl.PropagateNan.ALL)
    # |x| / softcap to the last digit
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
    rest = 2.0 * _inverse(tl.exp(2.0 * y) + 1.0)
    t = tl.where(y < limit, near, 1.0 - rest)
    return tl.where(x < 0.0, -t, t), rest * (2.0 - rest)


@triton.jit
def capped(x, softcap, CAP: tl.constexpr):
    """(u, d tanh(y) / dy at y = x / softcap) of logits in the accumulator's dtype."""
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
    """Folds a tile u [R, L] into the maximum, its b and, for each column, sum e and sum e a (a = log2 e).

    Without a maximum to go by b is inf, and every e 0.
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
    """The sum of x [L] by halves: its order is that of the columns, not that of the registers."""
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
    """(max u, max z rounded, log sum e^(z - max z), what rounding left of max z, mean of z - max z)."""
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
    z = top * scale
    lost = tl.fma(top, c, -base)  # of c max u in b
    left = tl.fma(top, scale, -z) + top * scale_low
    if _is_far(z):
        lost, left = 0.0 * top, 0.0 * top
        for start in tl.range(0, V, L, num_stages=1):
            at = start + tl.arange(0, L)
            x = tl.load(row_ptr + at, mask=at < V, other=float("nan"))
            total += (capped(x.to(ACC), softcap, CAP)[0] * scale == z).to(ACC)
    if z == float("-inf"):  # nothing has a probability: log sum e is -inf
        top, lost, left = z, 0.0 * c, 0.0 * c
    sum_e = _sum_of_columns(total)
    ln_2, _ = _ln_2(ACC)
    shifted_lse = tl.fma(-ln_2, lost, tl.log(sum_e))
    mean = shifted_lse
    if WITH_MEAN:
        mean = ln_2 * (_sum_of_columns(weighted) / sum_e - lost)
    return top, z, shifted_lse, left, mean


@triton.jit
def log_softmax(u, top, shifted_lse, scale, scale_low):
    """(u - top) scale - shifted_lse with one rounding at the size of the result.

    What the difference (Dekker's sum of two) and the scale lost is added to the small term first.
    """
    distance = u - top
    back = distance - u
    lost = (u - (distance - back)) - (top + back)
    missed = tl.fma(distance, scale_low, lost * scale)
    z = tl.fma(distance, scale, missed - shifted_lse)
    return tl.where(distance > float("-inf"), z, distance - shifted_lse)


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
    """(log-prob of the target, entropy, max z rounded, log sum e^(z - max z), mean of z - max z): each kernel's row.

    The sum and the mean are with respect to what was rounded. Entropy and mean are 0 without WITH_MEAN. A target
    outside [0, V) is not read, and its log-prob is NaN. Every thread has the target's logit when this returns: the
    reductions hold it until then, so the caller may write over the row.
    """
    inside = (target >= 0) & (target < V)
    x_target = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(ACC)
    u_target, _ = capped(x_target, softcap, CAP)
    top, z, shifted_lse, left, mean = row_statistics(
        row_ptr, V, c, scale, scale_low, softcap, WITH_MEAN, CAP, ACC, R, L, STAGES, POLICY
    )
    logprob = log_softmax(u_target, top, shifted_lse, scale, scale_low)
    entropy = tl.zeros((), ACC)
    if WITH_MEAN:
        entropy = shifted_lse - mean
        mean += left
    else:
        mean = tl.zeros((), ACC)
    return logprob, entropy, z, shifted_lse + left, mean


@triton.jit
def exp_scalar(x):
    """e^x, where the rounding of x log2(e) is put back."""
    log2_e, log2_e_low = _log2_e(x.dtype)
    ln_2, _ = _ln_2(x.dtype)
    y = x * log2_e
    missed = tl.fma(x, log2_e, -y) + x * log2_e_low
    e = tl.exp2(y)
    return tl.where(tl.abs(y) < 1000.0, tl.fma(e * missed, ln_2, e), e)


@triton.jit
def _exponentials(u, z, base, c, scale, FAR_ROW: tl.constexpr):
    """(e, a = log2 e, bounded from below) of a row whose maximum is z = scale max u."""
    if FAR_ROW:
        e = tl.where(u == u, (u * scale == z).to(u.dtype), u)
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
    """A block of the gradient as if no logit in it were the target's."""
    z, base, c, scale, cap, of_e, of_ea = terms
    column = start + tl.arange(0, BLOCK)
    there = None
    if MASKED:
        there = column < V
    x = tl.load(row_ptr + column, mask=there, eviction_policy="evict_first").to(ACC)
    u, grad_logprob = capped(x, cap, CAP)
    e, a = _exponentials(u, z, base, c, scale, FAR_ROW)
    if HAS_H:
        grad = e * tl.fma(a, of_ea, of_e)
    else:
        grad = e * of_e
    if CAP != 0:
        grad *= grad_logprob
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
    z,
    shifted_lse,
    mean,
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
    """dL/dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + entropy)) dz/dx_j of blocks first, first + step, ...

    z, shifted_lse, mean: of the row. Blocks count from the end of the row: what a walk read last may still be in
    a cache. out may be the row itself: a block is read and written by one program, its target's logit by all threads
    before anyone writes.
    """
    log2_e, _ = _log2_e(ACC)
    ln_2, ln_2_low = _ln_2(ACC)
    # e^(z_u - z) = 2^(c u - b) e^left
    far = _is_far(z)
    base = z * log2_e
    left = tl.fma(base, ln_2, -z) + base * (ln_2_low - ln_2 * c_error)
    left = tl.where(far, 0.0, left)
    weight = -inverse * exp_scalar(left - shifted_lse)
    of_e = weight * h * (left - mean)
    of_ea = weight * h * ln_2
    blocks = tl.cdiv(V, BLOCK)
    if HAS_G:
        mine = (target >= 0) & (target < V) & ((blocks - 1 - target // BLOCK) % step == first)
        x = tl.load(row_ptr + target, mask=mine, other=0.0).to(ACC)
        tl.debug_barrier()
        u, grad_logprob = capped(x, cap, CAP)
        if far:
            e, a = _exponentials(u, z, base, c, scale, True)
        else:
            e, a = _exponentials(u, z, base, c, scale, False)
        # g (1 - p) without cancellation
        log_p = tl.fma(a, ln_2, left - shifted_lse)
        own = -inverse * g * expm1(tl.where(log_p < -800.0, -800.0, log_p))
        if HAS_H:
            own += e * tl.fma(a, of_ea, of_e)
        if CAP != 0:
            own *= capped(x, cap, EXACT_CAP)[1]
        of_e += weight * g
    terms = z, base, c, scale, cap, of_e, of_ea
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
