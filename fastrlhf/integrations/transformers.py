"""transformers' causal-LM loss from hidden states: no [B, T, V] logits in a training step.

with fastrlhf.integrations.transformers.patch():
    model(input_ids=ids, labels=ids).loss.backward()

Shapes: logits [..., T, V], labels [..., T]; hidden [..., T, H], weight [V, H].
"""

import functools
import inspect
import threading

import torch
from torch import Tensor, nn

from fastrlhf.integrations import _rows
from fastrlhf.integrations._lazy_logits import LazyLogits
from fastrlhf.integrations._patch import Host, Patch, Target, Unserved
from fastrlhf.ops import _checks
from fastrlhf.ops.linear_cross_entropy import linear_cross_entropy
from fastrlhf.ops.token_logprob import token_logprob


def patch(backend: str = "auto") -> Patch:
    """Train any transformers causal LM without its logits, through its own forward.

    - A model called with `labels=` and gradients on runs its own forward, whose head returns
      logits that are not built; the loss (`ForCausalLMLoss`) is `linear_cross_entropy` of the
      hidden states, with the model's scale and soft-cap. `outputs.logits` builds the logits when
      it is read, so evaluation (gradients off) and metrics work as ever.
    - Where the logits are there (evaluation; a head that is no plain nn.Linear, as under LoRA of
      the head itself, or is hooked or sharded), the loss reads them once (`token_logprob`), without
      an fp32 copy.
    - `attn_implementation="fastrlhf_varlen"` is registered, with its masks: packed batches
      (`cu_seq_lens_q`, as DataCollatorWithFlattening gives) run the variable-length kernel.

    The plain Trainer gains; so does whatever else calls the model with labels. TRL's trainers have
    a head of their own: `fastrlhf.integrations.trl` serves that.

    Args:
        backend: of the ops; see `fastrlhf.backends`.

    Returns:
        The handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: transformers is not installed.
        HostMoved: one of its functions is not where, or not what, it was; nothing is patched then.
        RuntimeError: patched already with another backend; or `outputs.logits` is first read after
            the head's weight has changed.
    """
    return _HOST.patch(backend=backend)


def unpatch() -> None:
    """Put transformers' own functions back, whoever holds it patched."""
    _HOST.unpatch()


def calls() -> dict[str, int]:
    """transformers function -> calls that ours served in this process."""
    return _HOST.calls()


# ---- the loss ----


def _causal_lm_loss(original, backend):
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
            raise Unserved("vocab_size is not the width of the logits")
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise Unserved(f"logits of {logits.dtype}")
        if 0 <= ignore_index < vocab:
            raise Unserved("ignore_index is a token")
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        rows = logits.shape[:-1]
        if shift_labels.numel() != rows.numel():
            raise Unserved("labels and logits differ in length")
        targets = shift_labels.to(logits.device).reshape(rows)
        kept = targets != ignore_index
        linear = logits.linear_loss_inputs() if isinstance(logits, LazyLogits) else None
        if linear is not None:
            hidden, weight, bias, temperature, softcap = linear
            if hidden.device.type != "cpu" and torch.is_autocast_enabled(hidden.device.type):
                # As the head's own GEMM would be; on CPU ours are fp32 anyway.
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            total = linear_cross_entropy(
                hidden,
                weight,
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
            total = -token_logprob(logits, safe, mask=kept, backend=backend).sum()
            if num_items_in_batch is None:
                total = total / kept.sum().clamp(min=1)
        if num_items_in_batch is not None:
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(total.device)
            return total / num_items_in_batch
        # torch's mean over no target is NaN, and its gradient 0.
        return total + torch.where(kept.any(), 0.0, torch.nan)

    return causal_lm_loss


# ---- the forward ----


def _call(original, backend):
    def call(self, *args, **kwargs):
        head = _head(self, args, kwargs)
        # Not head.forward, where another thread's call may have put its own by now.
        make, thread = functools.partial(nn.Linear.forward, head), threading.get_ident()

        def forward(hidden):
            weight, bias = head.weight, head.bias
            # The head of another thread's call, or operands that the head itself must judge.
            if threading.get_ident() != thread or not _plain_operands(hidden, weight):
                return make(hidden)
            return LazyLogits(make, hidden, weight, bias)

        head.__dict__["forward"] = forward
        try:
            return original(self, *args, **kwargs)
        finally:
            head.__dict__.pop("forward", None)

    return call


def _labels(model, args, kwargs):
    """What the model is given as `labels`, by name or by place."""
    if len(args) < 2:  # the first are its tokens
        return kwargs.get("labels")
    placed = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
    return placed.get("labels", kwargs.get("labels"))


def _head(model, args, kwargs) -> nn.Linear:
    """The head whose product need not be made; Unserved, with the reason, where the model runs as it is."""
    if _labels(model, args, kwargs) is None or not torch.is_grad_enabled():
        raise Unserved("")  # no loss is asked for, or no training: nothing to say
    compiled = model._compiled_call_impl or hasattr(model.forward, "_torchdynamo_orig_callable")
    if compiled or torch.compiler.is_compiling():
        raise Unserved("torch.compile traces the model")
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        raise Unserved("")  # no language model
    kind = type(head).__name__
    if type(head) is not nn.Linear:
        raise Unserved(
            f"the output head is a {kind}, not a plain torch.nn.Linear (LoRA, quantised?)"
        )
    if "forward" in vars(head):
        raise Unserved(
            "the output head's forward is replaced (hooks of accelerate, another thread?)"
        )
    hooks = head._forward_hooks or head._backward_hooks or head._backward_pre_hooks
    if hooks or nn.modules.module._has_any_global_hook():
        raise Unserved("the output head has hooks")
    if _rows.sharded(head.weight):
        raise Unserved("the output head's weight is sharded (DTensor or ZeRO-3)")
    return head


def _plain_operands(hidden, weight) -> bool:
    if not isinstance(hidden, Tensor) or hidden.device != weight.device or hidden.dim() < 2:
        return False
    if hasattr(hidden, "device_mesh") or hasattr(weight, "device_mesh"):
        return False
    same = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    return same and {hidden.dtype, weight.dtype} <= set(_checks.FLOAT_DTYPES) - {torch.float64}


# ---- attention ----


def _register_attention() -> None:
    from fastrlhf import attention  # noqa: F401  (loading it registers the implementation)


def _mask(original, backend):
    from fastrlhf.integrations import attention

    return attention.PendingMask


_HOST = Host(
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
            "a head whose logits are built when they are read",
            _call,
            ("self",),
        ),
        Target(
            "transformers.masking_utils",
            "AttentionMaskInterface._global_mapping[fastrlhf_varlen]",
            "masks built when they are read",
            _mask,
            new=True,
        ),
    ),
    left_alone={
        "PreTrainedModel.forward called directly": "the model keeps its logits; its loss reads them once",
        "Trainer's label smoothing and compute_loss_func": "they take the logits themselves",
    },
    prepare=_register_attention,
)
