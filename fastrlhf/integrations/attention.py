"""Attention over packed sequences and over a sampler's cache, for transformers models: one implementation name.

Shapes: N packed tokens, B sequences, T longest sequence, K cache slots, h query heads, k key heads, D head width.

A packed batch is one row of N tokens; `cu_seqlens` [B+1] holds the start of each sequence. Tokens attend within their
own sequence only, as if each sequence ran alone under `attn_implementation="eager"`. Served: causal attention, full,
in a sliding window or in chunks, with soft-capped scores, attention sinks, grouped heads, and values of a width of
their own. The kernel depends on the device and on the layer:

- a flash kernel for 16-bit tensors on CUDA: flash-attn 3 or 2 where one is installed, else
  `torch.nn.attention.varlen.varlen_attn`;
- SDPA on sequences right-padded to [B, T] for other dtypes and devices, for chunks, and where the flash kernel lacks
  windows or dropout. Under a causal mask no real query attends to the padding, so the result is exact without an
  explicit mask, unless a window or chunk is shorter than T. The padding rows are dropped afterwards;
- plain operations with an fp32 softmax for sinks, and for soft-caps that the flash kernel lacks. They keep
  [B, h, T, T] weights in fp32 for the backward.

What a layer may see comes from transformers itself: each layer receives the mask that the model asked transformers for,
which is a `LayerMask` under this implementation. It also carries the batch of `running`, so a model that passes no
keyword arguments to its attention layers is served too.
"""

import contextlib
import contextvars
import functools
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastrlhf.errors import UserError
from fastrlhf.integrations import _attention_kernels as kernels
from fastrlhf.integrations._attention_kernels import Scoring

NAME = "fastrlhf_varlen"

_BIDIRECTIONAL = f"{NAME}: bidirectional attention in a packed batch is not supported"
# Arguments of attention functions that change the result and that no kernel here implements: relative positions,
# sparse selections of keys, sinks that are keys and values.
_UNSERVED = ("position_bias", "alibi", "indices", "block_indices", "score_mask", "sinks")


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel for plain layers on `device` in `dtype`."""
    module = kernels.flash_module()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and module is not None:
        return f"{module}.{kernels.FLASH[module]} (flash kernel)"
    return f"SDPA, causal ({device.type})"


@dataclass(frozen=True)
class Pattern:
    """The keys that a query sees: those not after it, in the last `window` positions, in its own chunk."""

    window: int | None = None
    chunk: int | None = None

    def within(self, longest: int) -> "Pattern":
        """The same pattern for sequences of at most `longest` tokens, without limits that hide nothing there."""
        return Pattern(
            *(x if x is not None and x < longest else None for x in (self.window, self.chunk))
        )

    @property
    def is_causal(self) -> bool:
        """Whether it hides the future only."""
        return self.window is None and self.chunk is None

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether queries see keys, by their positions in the sequence, which broadcast."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key // self.chunk == query // self.chunk)
        return seen


@dataclass(eq=False)
class PackedRow:
    """One forward of a packed row of N tokens.

    Args:
        cu_seqlens: int32 [B+1].
        longest, total: T and N, as Python ints.
        cache: filled with each layer's keys and values by `cache.fill(layer, key, value)`.
    """

    cu_seqlens: torch.Tensor
    longest: int
    total: int
    cache: object = None
    layers: set[nn.Module] = field(default_factory=set)  # attention layers that ran
    masks: dict[Pattern, torch.Tensor] = field(default_factory=dict)  # [T, T] bool; for all layers

    @functools.cached_property
    def layout(self) -> kernels.PaddedLayout:
        return kernels.padded_layout(self.cu_seqlens, self.longest, self.total)

    def attend(self, layer, query, key, value, scoring: Scoring, pattern: Pattern):
        """[1, h, N, D] queries -> [1, N, h, E]."""
        if self.cache is not None:
            if layer in self.layers:
                raise UserError(
                    f"{type(layer).__name__}: an attention layer that runs twice in a forward cannot be sampled from"
                )
            self.cache.fill(layer, key, value)
        self.layers.add(layer)
        pattern = pattern.within(self.longest)
        if torch.is_autocast_enabled(query.device.type):  # as autocast does for SDPA
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        kernel = kernels.flash_kernel(query) if pattern.chunk is None else None
        width = max(query.shape[3], value.shape[3])
        if kernel is not None and kernels.flash_serves(kernel, width, scoring, pattern.window):
            out = kernels.packed_flash(
                kernel, query, key, value, self.cu_seqlens, self.longest, scoring, pattern.window
            )
        else:
            if not pattern.is_causal and pattern not in self.masks:
                positions = torch.arange(self.longest, device=query.device)
                self.masks[pattern] = pattern.visible(positions[:, None], positions)
            grids = (self.layout.pad(x) for x in (query, key, value))
            mask = self.masks.get(pattern)
            out = self.layout.unpad(kernels.dense(*grids, scoring, mask, causal=mask is None))
        return out.unsqueeze(0)

    def check(self, body: nn.Module) -> None:
        """After a forward of `body`: raise UserError if a layer mixes tokens without this module's attention."""
        config = body.config.get_text_config()
        if config._attn_implementation != NAME:
            return
        if len(self.layers) < config.num_hidden_layers:
            raise UserError(
                f"{type(body).__name__} is not supported: {len(self.layers)} of its {config.num_hidden_layers} layers "
                "use transformers' attention functions; the others (recurrent, convolutional, or with attention code "
                "in the model) would mix the sequences of a packed batch"
            )
        if body not in _without_convolutions:
            _check_convolutions(body, self.layers)
            _without_convolutions.add(body)


@dataclass(eq=False)
class DecodeStep:
    """One forward of one new token per row, over a cache with slot = position.

    Args:
        position: [B] int64, the position of each new token in its row.
        used: slots [0, used) hold all keys so far, the new ones included.
        cache: `cache.append(layer, key, value, position)` stores new keys and values and returns all, [B, k, K, D].
    """

    position: torch.Tensor
    used: int
    cache: object
    masks: dict[Pattern, torch.Tensor] = field(
        default_factory=dict
    )  # [B, 1, 1, used] bool; for all layers

    def attend(self, layer, query, key, value, scoring: Scoring, pattern: Pattern):
        """[B, h, 1, D] queries -> [B, 1, h, E]."""
        if pattern not in self.masks:
            slots = torch.arange(self.used, device=self.position.device)
            visible = pattern.within(self.used).visible(self.position[:, None], slots)
            self.masks[pattern] = visible[:, None, None]
        stored = self.cache.append(layer, key, value, self.position)
        key, value = (x[:, :, : self.used] for x in stored)
        return kernels.dense(query, key, value, scoring, self.masks[pattern]).transpose(1, 2)


_without_convolutions: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_convolutions(body: nn.Module, layers: set[nn.Module]) -> None:
    # Beside attention, in the same decoder layer: hybrids such as Falcon-H1. Other towers have convolutions too.
    for name, module in body.named_modules():
        if module not in layers:
            continue
        for other in body.get_submodule(name.rpartition(".")[0]).modules():
            if isinstance(other, nn.Conv1d) and other.kernel_size[0] > 1:
                raise UserError(
                    f"{type(body).__name__} is not supported: its layers have convolutions over tokens beside the "
                    "attention, which would mix the sequences of a packed batch"
                )


_running: contextvars.ContextVar[PackedRow | DecodeStep | None] = contextvars.ContextVar(
    "fastrlhf_attention", default=None
)


@contextlib.contextmanager
def running(batch: PackedRow | DecodeStep):
    """Within the block, forwards of models with this implementation run `batch`.

    The model needs `use_cache=False` and the positions in each sequence as `position_ids`, and no attention mask.
    """
    token = _running.set(batch)
    try:
        yield batch
    finally:
        _running.reset(token)


class UnsupportedMask(UserError, AttributeError):
    """The model computes with its attention mask itself. An AttributeError, so that `hasattr` is False."""

    def __init__(self, action: str):
        super().__init__(
            f"{NAME}: the model {action} its attention mask; only models that pass the mask to transformers' "
            "attention functions are supported"
        )


class LayerMask:
    """The mask of one kind of layer: the arguments of transformers' mask function, and the batch that runs.

    transformers creates one for each kind of layer in each forward, and passes it to those layers as
    `attention_mask`. A tensor is built on first use; packed batches and decoding need none.
    """

    def __init__(self, **arguments):
        self._arguments, self.batch = arguments, _running.get()

    @functools.cached_property
    def tensor(self) -> torch.Tensor | None:
        """The mask that transformers passes to SDPA: bool [B, 1, q, k], or None for a plain causal mask."""
        return sdpa_mask(**self._arguments)

    @functools.cached_property
    def pattern(self) -> Pattern:
        """What the layer may see, apart from padding, which packed batches and caches do not have.

        Raises:
            UserError: an `attention_mask` hides tokens, the layer sees the future, or the model adds a mask function
                that is not a window or a chunk.
        """
        found, config = self._arguments, self._arguments["config"]
        padding = found.get("attention_mask")
        if padding is not None and not padding.all():
            raise UserError(
                f"{NAME}: attention_mask hides tokens of a packed batch, which has no padding"
            )
        if "allow_is_bidirectional_skip" in found:
            raise UserError(_BIDIRECTIONAL)
        if found.get("use_vmap"):
            raise UserError(f"{NAME}: the model's own mask function is not supported")
        size = found.get("local_size")
        if size is None:
            return Pattern()
        window = getattr(config, "sliding_window", None) == size
        chunk = getattr(config, "attention_chunk_size", None) == size
        if window == chunk:
            raise UserError(
                f"{NAME}: a layer sees {size} tokens, and the config does not say whether as a window or in chunks"
            )
        return Pattern(window=size) if window else Pattern(chunk=size)

    def __getattr__(self, name: str):
        raise UnsupportedMask(f"reads .{name} of")

    def __getitem__(self, index):
        raise UnsupportedMask("slices")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise UnsupportedMask(f"calls {getattr(function, '__name__', function)} on")


def attention(
    module,
    query: torch.Tensor,  # [1, h, N, D] packed, or [B, h, q, D]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | LayerMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others,
):
    """The attention function that transformers calls for `attn_implementation=NAME`.

    The batch is that of `running`, else the packed row that `cu_seq_lens_q` and `max_length_q` describe, else
    unpacked. `sliding_window` counts only without a mask: transformers' masks include the window.

    Args:
        s_aux: [h], the attention sinks.

    Returns:
        (output [batch, q, h, E], None): attention weights are not available.

    Raises:
        UserError: an argument or mask that changes the result and is not supported.
    """
    for name in _UNSERVED:
        if others.get(name) is not None:
            raise UserError(f"{NAME}: {type(module).__name__} uses {name}, which is not supported")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, softcap, s_aux, dropout)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask, batch, pattern = attention_mask, None, Pattern(window=sliding_window)
    if isinstance(mask, LayerMask):
        batch = mask.batch
    elif _running.get() is not None:
        raise UserError(
            f"{NAME}: {type(module).__name__} does not receive the mask that transformers creates"
        )
    if batch is None and cu_seq_lens_q is not None:
        batch = PackedRow(cu_seq_lens_q, int(max_length_q), query.shape[2])
        if isinstance(mask, LayerMask):
            mask.batch = batch  # for the other layers
    if batch is not None:
        if isinstance(mask, LayerMask):
            pattern = mask.pattern
        elif not is_causal:
            raise UserError(_BIDIRECTIONAL)
        return batch.attend(module, query, key, value, scoring, pattern), None
    if isinstance(mask, LayerMask):
        mask = mask.tensor
    elif mask is None and not pattern.within(key.shape[2]).is_causal:
        positions = torch.arange(key.shape[2], device=query.device)
        mask = pattern.visible(positions[-query.shape[2] :, None], positions)
    causal = mask is None and is_causal and query.shape[2] > 1
    return kernels.dense(query, key, value, scoring, mask, causal).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, LayerMask)
