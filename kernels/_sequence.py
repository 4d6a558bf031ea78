"""Device functions of the sequence ops: where a sequence lies, and the GAE recurrence as a scan.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B + 1].
Blocks are counted from the start of a sequence, so packed and right-padded give the same bits.
"""

import triton
import triton.language as tl

BLOCK = 1024  # steps of one scan; a sequence is as many of them as it needs
WARPS = 8  # four steps a thread


@triton.jit
def bounds(b, cu_seqlens_ptr, T, N, PACKED: tl.constexpr):
    """(first token of the row that b reads, steps) of sequence b."""
    if PACKED:
        # On a GPU nobody has checked cu_seqlens: wrong ones give wrong numbers, but reach no memory.
        start = tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), N)
        return start, tl.maximum(end - start, 0)
    return tl.zeros((), tl.int64), tl.full((), T, tl.int64)


@triton.jit
def kept(mask_ptr, t, steps, stride_mask_col, HAS_MASK: tl.constexpr):
    """Whether step t of the row at mask_ptr exists and counts."""
    keep = t < steps
    if HAS_MASK:
        keep &= tl.load(mask_ptr + t * stride_mask_col, mask=keep, other=0) != 0
    return keep


@triton.jit
def first_lane(x):
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == 0, x, 0.0), axis=0)


@triton.jit
def _nearest(value_later, found_later, value, found):
    return tl.where(found != 0, value, value_later), found | found_later


@triton.jit
def _affine(scale_later, shift_later, scale, shift):
    return scale * scale_later, shift + scale * shift_later


@triton.jit
def gae_block(
    reward,
    value,
    value_after,
    keep,
    keep_after,
    next_value,
    next_advantage,
    gamma,
    gamma_lam,
    HAS_MASK: tl.constexpr,
):
    """Advantages of a block, and the two carries for the block before it.

    value_after and keep_after belong to step t + 1. next_advantage is A of the first unmasked step
    behind the block; next_value is V of the first one behind all those of value_after.
    """
    if HAS_MASK:
        # V_{t+1} is that of the next unmasked step, however far away.
        value_after, found = tl.associative_scan(
            (value_after, keep_after.to(tl.int32)), 0, _nearest, reverse=True
        )
        value_after = tl.where(found != 0, value_after, next_value)
        next_value = first_lane(value_after)
    else:
        value_after = tl.where(keep_after, value_after, next_value)
    # A_t = delta_t + gamma lam A_{t+1}; a masked step is the identity.
    delta = tl.where(keep, reward + gamma * value_after - value, 0.0)
    scale = tl.where(keep, gamma_lam, 1.0)
    scale, shift = tl.associative_scan((scale, delta), 0, _affine, reverse=True)
    advantage = shift + scale * next_advantage
    return advantage, next_value, first_lane(advantage)


@triton.jit
def last_kept(t, keep, known):
    """The last kept step of a sequence, given what the blocks behind this one know (-1: none yet)."""
    return tl.where(known >= 0, known, tl.max(tl.where(keep, t, -1), axis=0))
