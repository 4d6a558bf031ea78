"""Device functions of masked statistics: count, mean and squared deviations, merged in fp64.

A program leaves one (count, mean, m2) in partials [3, P], P <= PROGRAMS. Whoever needs the total
reduces all of them in one fixed order: bitwise repeatable, without atomics.
"""

import triton
import triton.language as tl

PROGRAMS = 1024  # programs of a launch that leaves partials, at most; a power of two


@triton.jit
def reciprocal(count):
    """1 / count of an fp64 count of at least 1, by Newton: fp64 division is a call that needs a stack."""
    r = (1.0 / count.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - count * r)
    return r * (2.0 - count * r)


@triton.jit
def _pivot(x, keep):
    """The largest kept element, 0 if none is."""
    largest = tl.max(tl.where(keep, x, float("-inf")), axis=0)
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def block_moments(x, keep):
    """Moments of the kept elements of a block in two passes over registers.

    Of x - max(x), so that equal elements have that mean and no deviation, whatever their size.
    """
    count = tl.sum(keep.to(tl.int32), axis=0)
    share = reciprocal(tl.maximum(count, 1).to(tl.float64))
    pivot = _pivot(x, keep)
    x = tl.where(keep, x - pivot, 0.0)
    mean = tl.sum(x, axis=0) * share.to(x.dtype)
    d = tl.where(keep, x - mean, 0.0)
    # What rounding left in the mean goes into the fp64 mean, and out of the squares.
    drift = tl.sum(d, axis=0).to(tl.float64)
    m2 = tl.sum(d * d, axis=0).to(tl.float64) - drift * drift * share
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    return count.to(tl.float64), pivot.to(tl.float64) + (mean.to(tl.float64) + drift * share), m2


@triton.jit
def merge(count1, mean1, m21, count2, mean2, m22):
    """Chan et al. 1979; a count of 0 has mean and m2 0."""
    count = count1 + count2
    # Of nothing and something it is 1, which the reciprocal may miss by an ulp of the mean.
    share = tl.where(count1 > 0.0, count2 * reciprocal(tl.where(count > 0.0, count, 1.0)), 1.0)
    delta = mean2 - mean1
    return count, mean1 + delta * share, m21 + m22 + delta * delta * (count1 * share)


@triton.jit
def store_partial(partials_ptr, column, programs, first, count, mean, m2):
    """Rows first .. first + 2 of one column of partials [.., programs]."""
    place = partials_ptr + first * programs + column
    tl.store(place, count)
    tl.store(place + programs, mean)
    tl.store(place + 2 * programs, m2)


@triton.jit
def load_moments(partials_ptr, programs, first, PROGRAMS: tl.constexpr):
    """The total of rows first .. first + 2 of partials [.., programs]."""
    column = tl.arange(0, PROGRAMS)
    there = column < programs
    place = partials_ptr + first * programs + column
    counts = tl.load(place, mask=there, other=0.0)
    means = tl.load(place + programs, mask=there, other=0.0)
    m2s = tl.load(place + 2 * programs, mask=there, other=0.0)
    count = tl.sum(counts, axis=0)
    pivot = _pivot(means, counts > 0.0)
    d = tl.where(counts > 0.0, means - pivot, 0.0)
    mean = tl.sum(counts * d, axis=0) * reciprocal(tl.where(count > 0.0, count, 1.0))
    d -= mean
    return count, pivot + mean, tl.sum(m2s + counts * d * d, axis=0)
