"""Device functions of masked statistics: count, mean and sum of squared deviations (m2), merged in fp64.

Each program writes one (count, mean, m2) to partials [3, P], P <= PROGRAMS. A consumer reduces all of them in a fixed
order: bitwise reproducible, without atomics.
"""

import triton
import triton.language as tl

PROGRAMS = 1024  # maximum programs of a launch that writes partials; a power of two


@triton.jit
def reciprocal(count):
    """1 / count for an fp64 count >= 1, by Newton iteration: an fp64 division is a call that needs a stack."""
    r = (1.0 / count.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - count * r)
    return r * (2.0 - count * r)


@triton.jit
def _pivot(x, keep):
    """Maximum of the unmasked elements; 0 if there are none."""
    largest = tl.max(tl.where(keep, x, float("-inf")), axis=0)
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def block_moments(x, keep):
    """(count, mean, m2) of the unmasked elements of a block, in two passes over registers.

    Computed on x - max(x): equal elements give exactly that mean and m2 = 0, at any magnitude.
    """
    count = tl.sum(keep.to(tl.int32), axis=0)
    share = reciprocal(tl.maximum(count, 1).to(tl.float64))
    pivot = _pivot(x, keep)
    x = tl.where(keep, x - pivot, 0.0)
    mean = tl.sum(x, axis=0) * share.to(x.dtype)
    d = tl.where(keep, x - mean, 0.0)
    # Corrects the fp64 mean and m2 for the rounding error of the mean.
    drift = tl.sum(d, axis=0).to(tl.float64)
    m2 = tl.sum(d * d, axis=0).to(tl.float64) - drift * drift * share
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    return count.to(tl.float64), pivot.to(tl.float64) + (mean.to(tl.float64) + drift * share), m2


@triton.jit
def merge(count1, mean1, m21, count2, mean2, m22):
    """Merges two (count, mean, m2): Chan et al. 1979. A count of 0 has mean and m2 0."""
    count = count1 + count2
    # Exactly 1 if count1 is 0: the reciprocal could be off by an ulp.
    share = tl.where(count1 > 0.0, count2 * reciprocal(tl.where(count > 0.0, count, 1.0)), 1.0)
    delta = mean2 - mean1
    return count, mean1 + delta * share, m21 + m22 + delta * delta * (count1 * share)


@triton.jit
def store_partial(partials_ptr, column, programs, first, count, mean, m2):
    """Writes (count, mean, m2) to rows first .. first + 2 of a column of partials [.., programs]."""
    place = partials_ptr + first * programs + column
    tl.store(place, count)
    tl.store(place + programs, mean)
    tl.store(place + 2 * programs, m2)


@triton.jit
def load_moments(partials_ptr, programs, first, PROGRAMS: tl.constexpr):
    """(count, mean, m2) over all columns of rows first .. first + 2 of partials [.., programs]."""
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
