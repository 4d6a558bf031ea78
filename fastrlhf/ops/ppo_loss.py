"""ppo_loss: clipped policy loss, clipped value loss, entropy bonus and every metric in one pass.

Shapes: every tensor [...], one element a token, packed [N] or padded [B, T]; n unmasked tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _autograd, _backend, _checks, _metrics, _sequence
from fastrlhf.ops._register import plain, register
from fastrlhf.reference import PPOLossOutput

OP = "ppo_loss"

# In the order of Metric in csrc/common/ppo.h.
_POLICY_METRICS = ("policy_loss", "approx_kl", "clip_fraction", "ratio_mean", "ratio_max")
_VALUE_METRICS = ("value_loss", "value_clip_fraction", "explained_variance")
METRICS = (*_POLICY_METRICS, *_VALUE_METRICS, "entropy")


def ppo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    clip: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    backend: str = "auto",
) -> PPOLossOutput:
    """loss = policy + value_coef * value - entropy_coef * mean(entropy), over unmasked tokens.

    With rho = exp(clamp(logprob - old_logprob, -20, 20)):

    - policy = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)); with `dual_clip`, where A < 0, at
      most -A dual_clip;
    - value = mean of 0.5 max((v - R)^2, (clip(v, v_old - value_clip, v_old + value_clip) - R)^2);
      0.5 (v - R)^2 if `value_clip` is None; no value term without `values`.

    On the edge of a clip the unclipped branch is taken, with its gradient. The mean is over the n
    unmasked tokens of this call (0 if n = 0): rescale micro-batches yourself. Loss, gradients and
    metrics come from one pass with sums in a fixed order (bitwise the same for any number of
    threads); the backward only scales. Gradients flow to `logprob`, `values` and `entropy`, once;
    the other tensors are constants, and refused if they require grad.

    Args:
        logprob: [...], log-probability of each token under the policy, in nats. float32, bfloat16,
            float16, or float64; any strides.
        old_logprob: the same shape, under the policy that sampled, from the same forward path.
        advantages: the same shape, whitened or not.
        values, old_values, returns: the same shape, all in reward units; `returns` is needed with
            `values`, and `old_values` too unless `value_clip` is None.
        entropy: the same shape, in nats.
        mask: the same shape, bool or 0/1. Elsewhere nothing is used, and gradients are 0.
        clip: above 0. The paper uses 0.2.
        dual_clip: above 1, or None.
        value_clip: above 0, in reward units, or None.
        value_coef, entropy_coef: numbers.
        backend: see `fastrlhf.backends`.

    Returns:
        PPOLossOutput(loss, metrics). loss: 0-d, float32 (float64 for float64 inputs). metrics: dict
        of 0-d detached float32 tensors: policy_loss, approx_kl = mean(rho - 1 - log rho),
        clip_fraction, ratio_mean, ratio_max; with `values` also value_loss, value_clip_fraction and
        explained_variance = 1 - Var(R - v) / Var(R) (0 if Var(R) = 0); with `entropy` its mean.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `mask` are not read, which would cost a sync.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7 and 9; Ouyang et al. 2022, C.4; the dual
        clip is from Ye et al. 2020 (arXiv:1912.09729).

    >>> out = ppo_loss(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    >>> out.loss, out.metrics["ratio_max"]
    (tensor(-1.), tensor(1.))
    """
    _sequence.same_tokens(
        OP,
        "logprob",
        logprob,
        old_logprob=old_logprob,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        entropy=entropy,
    )
    if mask is not None:
        mask = _sequence.mask(OP, mask, logprob)
    settings = check_settings(OP, clip, dual_clip, value_clip, value_coef, entropy_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"{OP}: entropy_coef={entropy_coef:g} needs entropy; got None")
    check_value_tensors(OP, values, old_values, returns, value_clip)
    check_constants(OP, old_logprob, advantages, old_values, returns)
    chosen = _backend.choose(OP, backend, logprob, values, entropy)
    if chosen == "reference":
        return reference.ppo_loss(
            logprob,
            old_logprob,
            advantages,
            values=values,
            old_values=old_values,
            returns=returns,
            entropy=entropy,
            mask=mask,
            clip=clip,
            dual_clip=dual_clip,
            value_clip=value_clip,
            value_coef=value_coef,
            entropy_coef=entropy_coef,
        )
    tokens = (logprob, old_logprob, advantages, values, old_values, returns, entropy, mask)
    if value_clip is None:
        tokens = (*tokens[:4], None, *tokens[5:])
    if logprob.dim() not in (1, 2):
        tokens = map(_sequence.rows, tokens)
    with_grad = _autograd.trained(logprob, values, entropy)
    fwd, lazy = ops(chosen), plain()
    loss, metrics, *_ = (fwd.kernel if lazy else fwd)(*tokens, *settings, with_grad)
    given = (values is not None, entropy is not None)
    return PPOLossOutput(loss, named_metrics(metrics, *given, lazy=lazy))


def named_metrics(metrics: Tensor, has_values: bool, has_entropy: bool, lazy: bool):
    """The metrics [9] of the raw op by name, without those of tensors that were not given."""
    return _metrics.named(_GIVEN[has_values, has_entropy], metrics, lazy)


_GIVEN = {
    (has_values, has_entropy): (
        *_POLICY_METRICS,
        *(name if has_values else None for name in _VALUE_METRICS),
        "entropy" if has_entropy else None,
    )
    for has_values in (False, True)
    for has_entropy in (False, True)
}


def check_settings(op, clip, dual_clip, value_clip, value_coef, entropy_coef):
    """The five numbers of the loss as the raw op takes them: infinite for a clip that is None."""
    return (
        _checks.number(op, "clip", clip, low=0, strict=True),
        math.inf
        if dual_clip is None
        else _checks.number(op, "dual_clip", dual_clip, low=1, strict=True),
        math.inf
        if value_clip is None
        else _checks.number(op, "value_clip", value_clip, low=0, strict=True),
        _checks.number(op, "value_coef", value_coef),
        _checks.number(op, "entropy_coef", entropy_coef),
    )


def check_value_tensors(op, values, old_values, returns, value_clip):
    if values is None:
        for name, given in (("old_values", old_values), ("returns", returns)):
            if given is not None:
                raise ValueError(f"{op}: {name} must come with values; got values=None")
        return
    if returns is None:
        raise ValueError(f"{op}: returns must be given with values; got None")
    if old_values is None and value_clip is not None:
        raise ValueError(
            f"{op}: old_values must be given with values, or value_clip=None; got None"
        )


def check_constants(op, old_logprob, advantages, old_values, returns):
    constants = (old_logprob, advantages, old_values, returns)
    for x in constants:
        if x is not None and x.requires_grad:
            names = ("old_logprob", "advantages", "old_values", "returns")
            _checks.constants(op, **dict(zip(names, constants, strict=True)))


# ---- registration -------------------------------------------------------------------------------


def _fake(logprob, old_logprob, advantages, values, old_values, returns, entropy, *rest):
    given = 1 + (values is not None) + (entropy is not None)
    return (
        logprob.new_empty((), dtype=_sequence.acc_dtype(logprob)),
        logprob.new_empty(len(METRICS), dtype=torch.float32),
        _sequence.empty_stacked(logprob, given if rest[-1] else 0),
    )


_WRT = (0, 3, 6)  # logprob, values and entropy


def _setup(ctx, arguments, outputs):
    logprob, _, _, values, _, _, entropy, *_ = arguments
    ctx.dtypes = (
        logprob.dtype,
        None if values is None else values.dtype,
        None if entropy is None else entropy.dtype,
    )
    ctx.save_for_backward(*outputs[2:])


def _backward(ctx, grad_loss):
    # The Triton op leaves its gradients without 1 / n, which stands before them.
    *factor, grads = ctx.saved_tensors
    scale = grad_loss * factor[0] if factor else grad_loss
    found = (grads * scale).unbind()
    logprob, values, entropy = ctx.dtypes
    return (
        _as(found[0], logprob),
        None if values is None else _as(found[1], values),
        None if entropy is None else _as(found[-1], entropy),
    )


def _as(x, dtype):
    return x if x.dtype == dtype else x.to(dtype)


_AUTOGRAD = {"op": OP, "wrt": _WRT, "setup": _setup, "backward": _backward}
_CPP = None
if OP in _backend._CPU_OPS | _backend._CUDA_OPS:
    _CPP = register("ppo_loss_fwd", _fake, **_AUTOGRAD)


def _triton_fwd(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    clip: float,
    dual_clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastrlhf.kernels import ppo_loss as kernels  # imported when the op first runs

    tensors = (logprob, old_logprob, advantages, values, old_values, returns, entropy)
    options = (clip, dual_clip, value_clip, value_coef, entropy_coef, with_grad)
    return kernels.forward(tensors, mask, *options)


def _triton_fake(*inputs):
    loss, metrics, grads = _fake(*inputs)
    return loss, metrics, torch.empty_like(loss), grads


_TRITON = register("ppo_loss_triton_fwd", _triton_fake, body=_triton_fwd, **_AUTOGRAD)


def ops(backend: str) -> Callable:
    """The raw op of a fused backend."""
    return _TRITON if backend == "triton" else _CPP
