"""Kernels that compute causal attention, and what each of them can do.

Shapes: N packed tokens, B sequences, T longest sequence, h query heads, k key heads, D head width (keys), E head
width (values), q queries, s keys.

    scores = scale * Q K^T                        [h, q, s]
    scores = softcap * tanh(scores / softcap)     with a soft-cap (Gemma 2)
    weights = softmax(visible scores)             [h, q, s]; with sinks (gpt-oss) the softmax includes one more score
                                                  per head, the sink, whose weight is dropped
    output = weights V                            [h, q, E]
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Module -> function of the variable-length flash kernels, in order of preference.
FLASH = {
    "flash_attn_interface": "flash_attn_varlen_func",
    "flash_attn": "flash_attn_varlen_func",
    "torch.nn.attention.varlen": "varlen_attn",
}
_FLASH_WIDTH = 256  # widest head of these kernels
_SCORES = 1 << 28  # scores that `explicit` computes at a time


@dataclass(frozen=True)
class Scoring:
    """How a layer turns queries and keys into weights."""

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [h]
    dropout: float = 0.0

    @property
    def explicit(self) -> bool:
        """Whether SDPA lacks a part of it."""
        return self.softcap is not None or self.sinks is not None


@dataclass(frozen=True)
class PaddedLayout:
    """The index of each packed token in a right-padded [B, T] grid; computed once per batch, for all layers."""

    slot: torch.Tensor  # [N] int64, token -> b*T + t
    batch: int
    width: int

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, N, width] -> [B, heads, T, width], zeros in the padding."""
        heads, width = x.shape[1], x.shape[3]
        flat = x.new_zeros(self.batch * self.width, heads, width)
        flat = flat.index_copy(0, self.slot, x[0].transpose(0, 1))
        return flat.view(self.batch, self.width, heads, width).transpose(1, 2)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, width] -> [N, heads, width]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slot)


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


def dense(query, key, value, scoring: Scoring, visible=None, causal: bool = False):
    """Attention of [B, h, q, D] queries: SDPA, or `explicit` where SDPA lacks the scoring.

    Args:
        visible: a bool mask, True where a query sees a key, or a float mask that is added to the scores; broadcasts
            to [B, h, q, s].
        causal: a causal mask instead of `visible`.

    Returns:
        [B, h, q, E].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, repeats), _repeat_heads(value, repeats)
    if scoring.explicit:
        if causal:
            rows, columns = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
            visible = columns <= rows[:, None]
        return explicit(query, key, value, scoring, visible)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=causal,
        dropout_p=scoring.dropout,
        scale=scoring.scale,
    )


def explicit(query, key, value, scoring: Scoring, visible=None):
    """Attention in plain operations with an fp32 softmax, for soft-caps and sinks; arguments as in `dense`.

    Its backward keeps the weights, [B, h, q, s] in fp32. Without gradients, the batch is split into parts of at most
    2^28 scores.
    """
    batch, heads, queries, _ = query.shape
    rows = max(1, _SCORES // max(1, heads * queries * key.shape[2]))
    parts = []
    for start in range(0, batch, rows):
        part = slice(start, start + rows)
        scores = torch.matmul(query[part], key[part].transpose(2, 3)).float() * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if visible is not None:
            mask = visible[part] if visible.dim() == 4 and visible.shape[0] > 1 else visible
            if (
                mask.dtype == torch.bool
            ):  # a finite minimum: a padding row that sees no key must not become NaN
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
        if scoring.sinks is not None:
            sink = scoring.sinks.float().view(1, heads, 1, 1).expand(len(scores), heads, queries, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        weights = F.dropout(weights, scoring.dropout)
        parts.append(torch.matmul(weights.to(value.dtype), value[part]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def flash_module() -> str | None:
    """The module of the variable-length flash kernel to use on CUDA, without importing it."""
    for module in FLASH:
        if _is_installed(module):
            return module
    return None


def flash_kernel(query: torch.Tensor) -> Callable | None:
    """The variable-length flash kernel for these queries; None on other devices than CUDA and for other dtypes."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    module = flash_module()
    return getattr(importlib.import_module(module), FLASH[module]) if module else None


def flash_serves(kernel: Callable, width: int, scoring: Scoring, window: int | None) -> bool:
    """Whether a flash kernel can compute attention with heads of `width`, this scoring and this window."""
    names = inspect.signature(kernel).parameters
    return (
        width <= _FLASH_WIDTH
        and scoring.sinks is None
        and (scoring.softcap is None or "softcap" in names)
        and (scoring.dropout == 0 or "dropout_p" in names)
        and (window is None or "window_size" in names)
    )


def packed_flash(kernel, query, key, value, cu_seqlens, longest: int, scoring, window: int | None):
    """Attention of a packed row [1, h, N, D] with a kernel that `flash_serves`.

    The kernels require one head width, a multiple of 8, for queries, keys and values. Zeros that widen queries and keys
    change no score; those that widen the values are cut from the output.

    Returns:
        [N, h, E].
    """
    names = inspect.signature(kernel).parameters
    options = {"softmax_scale" if "softmax_scale" in names else "scale": scoring.scale}
    for causal in ("causal", "is_causal"):  # else causality comes from the window alone
        if causal in names:
            options[causal] = True
    if "window_size" in names:  # tokens to the left and right, beside the token itself
        options["window_size"] = (-1 if window is None else window - 1, 0)
    if scoring.softcap is not None:
        options["softcap"] = scoring.softcap
    if scoring.dropout:
        options["dropout_p"] = scoring.dropout
    width = -(-max(query.shape[3], value.shape[3]) // 8) * 8
    repeats = 1 if "softmax_scale" in names else query.shape[1] // key.shape[1]
    q, k, v = (
        F.pad(x[0].transpose(0, 1), (0, width - x.shape[3])).contiguous()
        for x in (query, _repeat_heads(key, repeats), _repeat_heads(value, repeats))
    )
    out = kernel(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    out = out[0] if isinstance(out, tuple) else out  # some releases also return the log-sum-exp
    return out[..., : value.shape[3]]


def _repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
