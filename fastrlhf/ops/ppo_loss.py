"""ppo_loss: clipped policy loss, clipped value loss, entropy bonus and every metric in one pass.

Shapes: every tensor [...], one element per token, packed [N] or padded [B, T]; n unmasked tokens.
"""

import functools

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks, _metrics, _policy
from fastrlhf.ops._register import choose, register, trained
from fastrlhf.reference import PPOLossOutput

OP = "ppo_loss"

# In the order of Metric in csrc/common/ppo.h.
_CLIP_METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "outside_fraction",
)
_VALUE_METRICS = ("value_loss", "value_clip_fraction", "explained_variance")
_ROLLOUT_METRICS = ("rollout_weight_mean", "rollout_weight_max", "rollout_outside_fraction")
METRICS = (
    "policy_loss",
    "approx_kl",
    *_CLIP_METRICS,
    "ratio_mean",
    "ratio_max",
    *_VALUE_METRICS,
    "entropy",
    "kl",
    *_ROLLOUT_METRICS,
)


def ppo_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: str = "ppo",
    clip: float | tuple[float | None, float | None] = 0.2,
    dual_clip: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: bool = True,
    kl_gradient: str = "estimator",
    rollout_weights: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    rollout_level: str = "token",
    rollout_mode: str = "truncate",
    rollout_bounds: tuple[float | None, float | None] = (None, None),
    aggregation: str = "token-mean",
    value_aggregation: str | None = None,
    length: float | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
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
    if advantages is None:
        _checks.tensor(OP, "advantages", advantages)
    _checks.float_tensor(OP, "logprob", logprob)
    kind = (logprob.shape, logprob.dtype, logprob.device)
    given = {"values": values, "old_values": old_values, "returns": returns, "entropy": entropy}
    policy = None
    chosen_settings = (objective, aggregation, tau_pos, tau_neg, kl_coef, kl_estimator, kl_gradient,
                       rollout_level, rollout_mode, rollout_bounds)  # fmt: skip
    if (
        _checks.plain_policy(chosen_settings, PLAIN, advantages, logprob.shape)
        and kl_clamp is True
        and cu_seqlens is ref_logprob is rollout_weights is rollout_logprob is None
        and value_aggregation is length is num_tokens is num_sequences is None
        and old_logprob is not None
    ):  # the common case, which looks at nothing more
        _checks.tokens_of(
            OP, "logprob", *kind, old_logprob=old_logprob, advantages=advantages, **given
        )
    else:
        _checks.tokens_of(OP, "logprob", *kind, old_logprob=old_logprob, **given)
        policy = _policy.check(
            OP,
            "logprob",
            *kind,
            old_logprob=old_logprob,
            advantages=advantages,
            cu_seqlens=cu_seqlens,
            aggregation=aggregation,
            value_aggregation=value_aggregation,
            values=values is not None,
            length=length,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            objective=objective,
            clip=clip,
            dual_clip=dual_clip,
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            ref_logprob=ref_logprob,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_clamp=kl_clamp,
            kl_gradient=kl_gradient,
            rollout_weights=rollout_weights,
            rollout_logprob=rollout_logprob,
            rollout_level=rollout_level,
            rollout_mode=rollout_mode,
            rollout_bounds=rollout_bounds,
        )
    if mask is not None:
        mask = _checks.token_mask(OP, mask, logprob)
    settings = _checks.ppo_settings(OP, clip, dual_clip, value_clip, value_coef, entropy_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"{OP}: entropy_coef={entropy_coef:g} needs entropy; got None")
    _checks.ppo_values(OP, values, old_values, returns, value_clip)
    _checks.ppo_constants(OP, old_logprob, advantages, old_values, returns)
    factor = None
    if type(scale) is not float or scale != 1:
        factor = _checks.scale_argument(OP, scale, logprob.device, _checks.acc_dtype(logprob))
    chosen = choose(OP, backend, logprob, values, entropy)
    if chosen == "reference":
        *limits, value_clip, value_coef, entropy_coef = settings
        return reference.ppo_loss(
            logprob,
            old_logprob,
            advantages,
            **given,
            mask=mask,
            value_clip=None if value_clip == _checks.UNLIMITED else value_clip,
            value_coef=value_coef,
            entropy_coef=entropy_coef,
            scale=1.0 if factor is None else factor,
            **_policy.reference_options(policy, limits, clip),
        )
    tokens = (logprob, old_logprob, advantages, values, old_values, returns, entropy, mask)
    if value_clip is None:
        tokens = (*tokens[:4], None, *tokens[5:])
    if logprob.dim() not in (1, 2):
        tokens = map(_checks.as_rows, tokens)
    more = _NOTHING_MORE
    if policy is not None:
        tokens, more = _policy.beyond_plain(policy, tokens, chosen)
        settings = (*policy.limits, *settings[3:])
    with_grad = trained(logprob, values, entropy)
    loss, metrics, _ = FWD[chosen](*tokens, *more[:2], *settings, more[2], with_grad)
    if factor is not None:
        loss = loss * factor
    return PPOLossOutput(
        loss, _metrics.named(names(values is not None, entropy is not None, policy), metrics)
    )


PLAIN = ("ppo", "token-mean", 1.0, 1.05, 0.0, "k3", "estimator", "token", "truncate", (None, None))
_NOTHING_MORE = None, [], []  # factors, more, options


@functools.cache
def _names(has_values, has_entropy, has_ratio, has_clip, has_kl, has_rollout, has_bounds):
    absent = set() if has_values else set(_VALUE_METRICS)
    absent |= set() if has_entropy else {"entropy"}
    absent |= set() if has_ratio else {"approx_kl", "ratio_mean", "ratio_max"}
    absent |= set() if has_clip else set(_CLIP_METRICS)
    absent |= set() if has_kl else {"kl"}
    absent |= set() if has_rollout else set(_ROLLOUT_METRICS[:2])
    absent |= set() if has_bounds else set(_ROLLOUT_METRICS[2:])
    return tuple(None if name in absent else name for name in METRICS)


def names(has_values: bool, has_entropy: bool, policy=None) -> tuple[str | None, ...]:
    """The name of each of the raw op's metrics; None for those that the call does not have."""
    if policy is None:
        return _names(has_values, has_entropy, True, True, False, False, False)
    given = policy.options
    ratio, clip = given["objective"] != "reinforce", given["objective"] in ("ppo", "gspo", "cispo")
    bounds = given["rollout_logprob"] is not None
    rollout = bounds or given["rollout_weights"] is not None
    has_kl = given["ref_logprob"] is not None
    return _names(has_values, has_entropy, ratio, clip, has_kl, rollout, bounds)


# ---- registration -------------------------------------------------------------------------------


def _fake(logprob, old_logprob, advantages, values, old_values, returns, entropy, *rest):
    given = 1 + (values is not None) + (entropy is not None)
    return (
        logprob.new_empty((), dtype=_checks.acc_dtype(logprob)),
        logprob.new_empty(len(METRICS), dtype=torch.float32),
        _checks.empty_stacked(logprob, given if rest[-1] else 0),
    )


def _setup(ctx, arguments, outputs):
    logprob, _, _, values, _, _, entropy, *_ = arguments
    ctx.dtypes = (
        logprob.dtype,
        None if values is None else values.dtype,
        None if entropy is None else entropy.dtype,
    )
    ctx.save_for_backward(outputs[2])


def _backward(ctx, grad_loss):
    (grads,) = ctx.saved_tensors
    found = (grads * grad_loss).unbind()
    logprob, values, entropy = ctx.dtypes
    return (
        _as(found[0], logprob),
        None if values is None else _as(found[1], values),
        None if entropy is None else _as(found[-1], entropy),
    )


def _as(x, dtype):
    return x if x.dtype == dtype else x.to(dtype)


# A clip that is None is UNLIMITED (the lower one -UNLIMITED). `factors` [2], `more` and `options`: see _policy.py.
# `grads` [k, ...]: dL/dlogprob, and dL/dvalues and dL/dentropy where these are given; k = 0 unless `with_grad`.
FWD = register(
    "ppo_loss_fwd(Tensor logprob, Tensor? old_logprob, Tensor? advantages, Tensor? values, Tensor? old_values, "
    "Tensor? returns, Tensor? entropy, Tensor? mask, Tensor? factors, Tensor?[] more, float low, float high, "
    "float dual_clip, float value_clip, float value_coef, float entropy_coef, float[] options, bool with_grad) "
    "-> (Tensor loss, Tensor metrics, Tensor grads)",
    _fake,
    op=OP,
    triton="ppo_loss.forward",
    wrt=(0, 3, 6),  # logprob, values, entropy
    setup=_setup,
    backward=_backward,
)
