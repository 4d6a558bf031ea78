"""transformers 5.23 and 5.24: causal-LM training without [B, T, V] logits.

Replaces `ForCausalLMLoss` and `PreTrainedModel.__call__`, and registers an attention implementation. See `patch`.

Shapes: logits [..., T, V], labels [..., T]; hidden [..., T, H], weight [V, H].
"""

import functools
import inspect
import logging
import threading

import torch
from torch import Tensor, nn

import fastrlhf
from fastrlhf.integrations import _common
from fastrlhf.integrations._lazy_logits import LazyLogits
from fastrlhf.integrations._patch import Integration, Patch
from fastrlhf.integrations._targets import Target, Unsupported

_log = logging.getLogger("fastrlhf.integrations")


def patch(backend: str = "auto", self_check: bool = True) -> Patch:
    """Trains any transformers causal LM through its own forward, without computing its logits.

    Replaced:

    - `PreTrainedModel.__call__`: for a call with `labels=` and gradients enabled, the head returns logits that are
      computed when they are read (`outputs.logits`). Evaluation (gradients disabled) and metrics see tensors.
    - `loss_utils.ForCausalLMLoss`: the same loss, by `linear_cross_entropy` of the hidden states with the model's logit
      scale and soft-cap. If the logits are a tensor, `token_logprob` reads them once, without an fp32 copy.

    `attn_implementation="fastrlhf_varlen"` is added, and remains after `unpatch`: packed batches (`cu_seq_lens_q`, as
    from DataCollatorWithFlattening) run a variable-length kernel; see `fastrlhf.integrations.attention`.

    The logits stay a tensor, and the reason is counted in `fallbacks`, if the head is not a plain `nn.Linear` (LoRA on
    the head, quantization), has hooks or a replaced forward, is sharded (DTensor, ZeRO-3), or is traced by
    torch.compile.

    The first call of each class and config that is served measures a small copy of the class against unpatched
    transformers: the loss, and with `fastrlhf_varlen` packed rows against each row alone in eager attention.

    TRL's trainers use a different head, which `fastrlhf.integrations.trl` serves.

    Args:
        backend: backend of the ops; see `fastrlhf.backends`.
        self_check: measure; a class without a small copy is logged as unmeasured.

    Returns:
        A handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `self_check` is no bool.
        PatchError: a function is missing or has other parameters; nothing is patched.
        RuntimeError: transformers is patched with another backend. Later, on the first read of
            `outputs.logits`: the head's weight has changed since the forward.
        fastrlhf.errors.UserError: later, from a call of a model whose copy computes something else.
    """
    if not isinstance(self_check, bool):
        raise TypeError(f"patch: self_check must be a bool; got {type(self_check).__name__}")
    return _INTEGRATION.patch(backend=backend, self_check=self_check)


def unpatch() -> None:
    """Restores transformers' functions and releases all handles."""
    _INTEGRATION.unpatch()


def calls() -> dict[str, int]:
    """transformers function -> number of calls that its replacement served in this process."""
    return _INTEGRATION.calls()


# ---- the loss ----


def _causal_lm_loss(original, backend, self_check):
    def causal_lm_loss(
        logits,
        labels,
        vocab_size,
        num_items_in_batch=None,
        ignore_index=-100,
        shift_labels=None,
        **kwargs,
    ):
        vocab = logits.shape[-1]
        if vocab != vocab_size:
            raise Unsupported("vocab_size is not the width of the logits")
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise Unsupported(f"logits of {logits.dtype}")
        if 0 <= ignore_index < vocab:
            raise Unsupported("ignore_index is a token of the vocabulary")
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        rows = logits.shape[:-1]
        if shift_labels.numel() != rows.numel():
            raise Unsupported("labels and logits differ in length")
        targets = shift_labels.to(logits.device).reshape(rows)
        kept = targets != ignore_index
        linear = logits.linear_loss_inputs() if isinstance(logits, LazyLogits) else None
        if linear is not None:
            hidden, weight, bias, temperature, softcap = linear
            total = fastrlhf.linear_cross_entropy(
                _common.to_autocast_dtype(hidden),
                _common.to_autocast_dtype(weight),
                targets,
                bias=bias,
                ignore_index=ignore_index,
                reduction="mean" if num_items_in_batch is None else "sum",
                temperature=temperature,
                softcap=softcap,
                backend=backend,
            )
        else:
            logits = logits.tensor() if isinstance(logits, LazyLogits) else logits
            safe = targets.masked_fill(~kept, 0)
            total = -fastrlhf.token_logprob(logits, safe, mask=kept, backend=backend).sum()
            if num_items_in_batch is None:
                total = total / kept.sum().clamp(min=1)
        if num_items_in_batch is not None:
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(total.device)
            return total / num_items_in_batch
        # torch's mean over zero targets is NaN, with gradient 0.
        return total + torch.where(kept.any(), 0.0, torch.nan)

    return causal_lm_loss


# ---- the forward ----


def _call(original, backend, self_check):
    from fastrlhf.integrations import _transformers_check

    def call(self, *args, **kwargs):
        checks = self_check and not (_INTEGRATION.is_uncounted or torch.compiler.is_compiling())
        if checks and self.config._attn_implementation == "fastrlhf_varlen":
            packed = kwargs.get("cu_seq_lens_q") is not None
            with _INTEGRATION.uncounted():
                _transformers_check.check_attention(self, "fastrlhf_varlen", packed, _log)
        head = _head(self, args, kwargs)
        if checks:
            with _INTEGRATION.uncounted():
                _transformers_check.check_loss(self, _INTEGRATION.suspended, _log)
        # nn.Linear.forward, because head.forward may be the replacement of another thread's call.
        own_forward, thread = functools.partial(nn.Linear.forward, head), threading.get_ident()

        def forward(hidden):
            weight, bias = head.weight, head.bias
            if threading.get_ident() != thread or not _are_plain_operands(hidden, weight):
                return own_forward(hidden)
            return LazyLogits(own_forward, hidden, weight, bias)

        head.__dict__["forward"] = forward
        try:
            return original(self, *args, **kwargs)
        finally:
            head.__dict__.pop("forward", None)

    return call


def _labels(model, args, kwargs):
    """The argument `labels` of a call of the model, passed by name or by position."""
    if len(args) < 2:  # at most input_ids
        return kwargs.get("labels")
    placed = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
    return placed.get("labels", kwargs.get("labels"))


def _head(model, args, kwargs) -> nn.Linear:
    """The head whose logits may be computed lazily; Unsupported if the call must run unchanged."""
    if _labels(model, args, kwargs) is None or not torch.is_grad_enabled():
        raise Unsupported("")  # not a training step
    compiled = model._compiled_call_impl or hasattr(model.forward, "_torchdynamo_orig_callable")
    if compiled or torch.compiler.is_compiling():
        raise Unsupported("torch.compile traces the model")
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        raise Unsupported("")  # not a language model
    kind = type(head).__name__
    if type(head) is not nn.Linear:
        raise Unsupported(
            f"the output head is a {kind}, not a plain torch.nn.Linear (LoRA, quantization?)"
        )
    if "forward" in vars(head):
        raise Unsupported(
            "the output head's forward is replaced (hooks of accelerate, another thread?)"
        )
    hooks = head._forward_hooks or head._backward_hooks or head._backward_pre_hooks
    if hooks or nn.modules.module._has_any_global_hook():
        raise Unsupported("the output head has hooks")
    if _common.is_sharded(head.weight):
        raise Unsupported("the output head's weight is sharded (DTensor or ZeRO-3)")
    return head


def _are_plain_operands(hidden, weight) -> bool:
    if not isinstance(hidden, Tensor) or hidden.device != weight.device or hidden.dim() < 2:
        return False
    if hasattr(hidden, "device_mesh") or hasattr(weight, "device_mesh"):
        return False
    same = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    return same and {hidden.dtype, weight.dtype} <= {torch.float32, torch.bfloat16, torch.float16}


# ---- attention ----


def _register_attention() -> None:
    from fastrlhf.integrations import attention  # noqa: F401  (registers the implementation, for good)


_INTEGRATION = Integration(
    "transformers",
    (
        Target(
            "transformers.loss.loss_utils",
            "ForCausalLMLoss",
            "linear_cross_entropy",
            _causal_lm_loss,
            (
                "logits",
                "labels",
                "vocab_size",
                "num_items_in_batch",
                "ignore_index",
                "shift_labels",
            ),
        ),
        Target(
            "transformers.modeling_utils",
            "PreTrainedModel.__call__",
            "a head whose logits are computed when they are read",
            _call,
            ("self",),
        ),
    ),
    unchanged={
        "PreTrainedModel.forward called directly": "computes its logits; its loss reads them once",
        "Trainer's label smoothing and compute_loss_func": "they read the logits",
    },
    prepare=_register_attention,
)
