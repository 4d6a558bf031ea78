"""Device functions of the sequence ops: sequence bounds, and the GAE recurrence as an associative scan.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B + 1].
Blocks are counted from the start of a sequence, so packed and right-padded inputs give bitwise identical results.
"""

import triton
import triton.language as tl

BLOCK = 1024  # steps per scan; a sequence takes as many scans as it needs
WARPS = 8  # four steps per thread


@triton.jit
def bounds(b, cu_seqlens_ptr, T, N, PACKED: tl.constexpr):
    """(first token within the row, number of steps) of sequence b."""
    if PACKED:
        # cu_seqlens is not checked on a GPU. Clamping keeps invalid values from reading out of bounds.
        start = tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), N)
        return start, tl.maximum(end - start, 0)
    return tl.zeros((), tl.int64), tl.full((), T, tl.int64)


@triton.jit
def kept(mask_ptr, t, steps, stride_mask_col, HAS_MASK: tl.constexpr):
    """Whether step t of the row at mask_ptr exists and is not masked."""
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
    """(advantages of a block, next_value, next_advantage): the last two are the carries for the block before it.

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, over the unmasked steps.

    value_after, keep_after: values and mask of steps t + 1.
    next_advantage: A of the first unmasked step after the block.
    next_value: V of the first unmasked step after those of value_after; the bootstrap if there is none.
    """
    if HAS_MASK:
        # V_{t+1} is the value of the next unmasked step.
        value_after, found = tl.associative_scan(
            (value_after, keep_after.to(tl.int32)), 0, _nearest, reverse=True
        )
        value_after = tl.where(found != 0, value_after, next_value)
        next_value = first_lane(value_after)
    else:
        value_after = tl.where(keep_after, value_after, next_value)
    # Each step is an affine map of A_{t+1}; a masked step is the identity.
    delta = tl.where(keep, reward + gamma * value_after - value, 0.0)
    scale = tl.where(keep, gamma_lam, 1.0)
    scale, shift = tl.associative_scan((scale, delta), 0, _affine, reverse=True)
    advantage = shift + scale * next_advantage
    return advantage, next_value, first_lane(advantage)


@triton.jit
def last_kept(t, keep, known):
    """Last unmasked step of a sequence. `known`: the result of later blocks, -1 if they have none."""
    return tl.where(known >= 0, known, tl.max(tl.where(keep, t, -1), axis=0))
