"""Attention over packed sequences: one implementation name, with a kernel for each device.

Shapes: N packed tokens, B sequences, T longest sequence, h query heads, k key heads, D head width.

A packed batch is one row of N tokens; `cu_seqlens` [B+1] holds the start of each sequence. Tokens attend within their
own sequence only. `plan` chooses the kernel:

- flash-attn, where it is installed, for 16-bit tensors on CUDA (transformers' own `flash_attention_2/3`);
- torch's variable-length flash kernel (`torch.nn.attention.varlen.varlen_attn`), for 16-bit tensors on CUDA;
- SDPA otherwise, on sequences right-padded to [B, T]. Under a causal mask no real query attends to the padding, so the
  result is exact without an explicit mask. The padding rows are dropped afterwards.

The trainer (fastrlhf.train) and the transformers integration both use it. With `use_cache=True` transformers ignores
packed `position_ids` and attends across sequences, so callers pass `cu_seqlens` and `use_cache=False`.
"""

import importlib.util
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import sdpa_mask

NAME = "fastrlhf_varlen"


@dataclass(frozen=True)
class PaddedLayout:
    """The index of each packed token in a right-padded [B, T] grid; computed once per batch, for all layers."""

    slot: torch.Tensor  # [N] int64, token -> b*T + t
    batch: int
    width: int


@dataclass(frozen=True)
class AttentionPlan:
    """The `attn_implementation` to load a model with, and a description of the kernel that will run."""

    implementation: str
    kernel: str


def plan(device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """The attention path for `device` and `dtype`: flash-attn, torch's varlen kernel, or SDPA."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for module, name in (
            ("flash_attn_interface", "flash_attention_3"),
            ("flash_attn", "flash_attention_2"),
        ):
            if importlib.util.find_spec(module) is not None:
                return AttentionPlan(name, f"{name} ({module})")
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            return AttentionPlan(
                NAME, "torch.nn.attention.varlen.varlen_attn (flash kernel in torch)"
            )
    return AttentionPlan(NAME, f"SDPA, causal, no mask ({device.type})")


def padded_layout(cu_seqlens: torch.Tensor, max_seqlen: int, total: int) -> PaddedLayout:
    """The right-padded layout of a packed batch.

    Args:
        cu_seqlens: int32 [B+1].
        max_seqlen, total: T and N, as Python ints.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=total
    )
    offset = torch.arange(total, device=cu_seqlens.device) - starts[sequence]
    return PaddedLayout(sequence * max_seqlen + offset, len(lengths), max_seqlen)


def _repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _sdpa(query, key, value, *, mask=None, causal=False, dropout=0.0, scale=None):
    repeats = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query,
        _repeat_heads(key, repeats),
        _repeat_heads(value, repeats),
        attn_mask=mask,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
    )


def _packed_sdpa(query, key, value, layout: PaddedLayout, dropout: float, scale: float | None):
    # [1, h, N, D] -> grid [B, h, T, D] -> SDPA -> [N, h, D]
    def grid(x):
        heads, width = x.shape[1], x.shape[3]
        flat = x.new_zeros(layout.batch * layout.width, heads, width)
        flat = flat.index_copy(0, layout.slot, x[0].transpose(0, 1))
        return flat.view(layout.batch, layout.width, heads, width).transpose(1, 2)

    out = _sdpa(grid(query), grid(key), grid(value), causal=True, dropout=dropout, scale=scale)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.slot)


def _packed_flash(query, key, value, cu_seqlens, max_seqlen: int, scale: float | None):
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 and 2.11 take `is_causal`; later releases take a window.
    names = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (
        x[0].transpose(0, 1).contiguous()
        for x in (query, _repeat_heads(key, repeats), _repeat_heads(value, repeats))
    )
    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, **causal
    )


class PendingMask:
    """The arguments of transformers' mask function. The mask is built on first use; packed batches need none."""

    def __init__(self, **arguments):
        self._arguments, self._built = arguments, ()

    def build(self) -> torch.Tensor | None:
        """The mask that transformers passes to SDPA: bool [B, 1, q, k], or None for a plain causal mask."""
        if not self._built:
            self._built = (sdpa_mask(**self._arguments),)
        return self._built[0]


def attention(
    module,
    query: torch.Tensor,  # [1, h, N, D] packed, or [B, h, q, D] while decoding
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PendingMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    layout: PaddedLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
):
    """The attention function that transformers calls for `attn_implementation=NAME`.

    Returns:
        (output [batch, q, h, D], None): attention weights are not available.

    Raises:
        ValueError: a soft-cap, or a sliding window shorter than the sequence.
    """
    packed = cu_seq_lens_q is not None
    longest = max_length_q if packed else key.shape[2]
    mask = attention_mask
    if isinstance(mask, PendingMask):
        mask = None if packed else mask.build()
    windowed = sliding_window is not None and longest > sliding_window and (packed or mask is None)
    if softcap is not None or windowed:
        raise ValueError(
            f"{NAME}: attention soft-cap, and sliding windows shorter than the sequence, are not supported "
            f"(softcap={softcap}, sliding_window={sliding_window}, longest sequence {longest}); "
            "install flash-attn and use a CUDA device"
        )
    if not packed:
        causal = mask is None and query.shape[2] > 1
        out = _sdpa(query, key, value, mask=mask, causal=causal, dropout=dropout, scale=scaling)
        return out.transpose(1, 2), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        out = _packed_flash(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    else:
        if layout is None:
            layout = padded_layout(cu_seq_lens_q, max_length_q, query.shape[2])
        out = _packed_sdpa(query, key, value, layout, dropout, scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attention)
