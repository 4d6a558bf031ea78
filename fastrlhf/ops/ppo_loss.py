"""ppo_loss: clipped policy loss, clipped value loss, entropy bonus and every metric in one pass.

Shapes: every tensor [...], one element per token, packed [N] or padded [B, T]; n unmasked tokens.
"""

import functools

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastrlhf import reference
from fastrlhf.ops import _checks, _metrics, _policy, _settings
from fastrlhf.ops._register import choose, register, trained
from fastrlhf.ops._settings import Settings
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


@_settings.shown(_settings.DEFAULTS)
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
    clip: float | tuple[float | None, float | None] = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
    **settings: Unpack[Settings],
) -> PPOLossOutput:
    """loss = scale * (policy + kl_coef * KL + value_coef * value - entropy_coef * entropy).

    Each term is aggregated over unmasked tokens. With A the advantage, l the log-prob, d = clamp(l -
    old_logprob, -20, 20), rho = exp(d), clip(rho) = clamp(rho, 1 - low, 1 + high) and sg the
    stop-gradient, `objective` names the policy term of a token:

    - "ppo" (arXiv:1707.06347; clip-higher is from DAPO, arXiv:2503.14476): max(-A rho, -A clip(rho));
      where A < 0, at most -A `dual_clip` (arXiv:1912.09729). Gradient in l: -A rho where the unclipped
      branch is taken, as on the edge of a clip; else 0. (OpenRLHF and TRL: the same; verl has a dual
      clip of 3 by default.)
    - "reinforce": -A l, gradient -A; old_logprob only enters rollout weights. (verl's gpg.)
    - "cispo" (MiniMax-M1, arXiv:2506.13585): -A sg(clip(rho)) l, gradient -A clip(rho), also outside of
      the clip. (verl: as here. TRL and Liger clip from above only: ``clip=(None, high)``, with their
      epsilon_high = 1 + high.)
    - "gspo" (arXiv:2507.18071): "ppo" with s_t = sg(s) pi_t / sg(pi_t), where s is exp of the mean of
      l - old_logprob over the sequence's unmasked tokens. Gradient as of "ppo" with s for rho. (verl:
      log s is at most 10. OpenRLHF and TRL: the gradient of s itself, which is the same after
      "seq-mean-token-mean" where all tokens of a sequence have one advantage.)
    - "sapo" (arXiv:2511.20347): -A (4 / tau) sigmoid(tau (rho - 1)), tau = `tau_pos` where A > 0, else
      `tau_neg`. Gradient -4 A sigmoid (1 - sigmoid) rho. (verl clamps d as here, TRL does not; both
      aggregate by "seq-mean-token-mean".)

    The gradient in l is 0 where d is clamped. The value term is 0.5 max((v - R)^2, (clamp(v, v_old -
    value_clip, v_old + value_clip) - R)^2); 0.5 (v - R)^2 if `value_clip` is None; none without `values`.

    `aggregation`, with n_s the unmasked tokens of sequence s (a sequence without one is left out):

    - "token-mean": sum of all tokens / `num_tokens`, by default their number; 0 if there is none.
    - "token-sum": sum of all tokens.
    - "seq-mean-token-sum": sum over sequences of their sums / `num_sequences`, by default their number.
    - "seq-mean-token-mean": of their means, sum / n_s.
    - "seq-mean-token-sum-norm": of their sums / `length` (Dr. GRPO, arXiv:2503.20783).

    Policy, KL and entropy take `aggregation`, the value term `value_aggregation` (None: the same). For
    gradient accumulation and data parallelism pass the counts of the whole batch: the losses of its parts
    then add up to its loss. Nothing is multiplied by the number of processes (verl's dp_size): use `scale`.

    Loss, gradients and metrics come from one pass with sums in a fixed order (bitwise the same for any
    number of threads); terms of a sequence add a pass over the tensors that they need. The backward only
    scales. Gradients flow to `logprob`, `values` and `entropy`, once; the other tensors are constants,
    and refused if they require grad.

    Args:
        logprob: [...], log-probability of each token under the policy, in nats. float32, bfloat16,
            float16, or float64; any strides. Sequences are the rows of [B, T], or packed in [N].
        old_logprob: the same shape, under the policy that sampled, from the same forward path. None:
            logprob.detach(), so that rho = 1.
        advantages: the same shape, whitened or not; or one a sequence, [S] or [S, 1].
        values, old_values, returns: the same shape, all in reward units; `returns` is needed with
            `values`, and `old_values` too unless `value_clip` is None.
        entropy: the same shape, in nats.
        mask: the same shape, bool or 0/1. Elsewhere nothing is used, and gradients are 0.
        clip: distances from 1: above 0, or (low, high), each above 0 or None for no limit on that side.
        dual_clip: above 1, or None.
        value_clip: above 0, in reward units, or None.
        value_coef, entropy_coef: numbers.
        cu_seqlens: int32 [S + 1], the offsets of packed sequences; needed where sequences matter.
        objective, tau_pos, tau_neg: see above. The taus are above 0.
        ref_logprob: the same shape, under the reference policy. With it the loss has a KL term.
        kl_coef: its coefficient; at 0, the default, the KL is only a metric.
        kl_estimator: with x = l - ref_logprob: "k1" x; "k2" x^2 / 2; "k3" e^-x - 1 + x; "abs" abs(x).
        kl_clamp: "k3" with x clamped to +-20 and the value to 10, as `kl_reward` and verl; False as TRL and
            Liger.
        kl_gradient: "estimator", its own derivative; "k2", its value with the gradient x (verl's "k1+",
            "k3+"; OpenRLHF's unbiased one); "ratio", of rho (s with "gspo") times the estimator (TRL's bias
            correction).
        rollout_weights: ready weights, the same shape or one a sequence.
        rollout_logprob: the same shape, from the engine that sampled: the weight of a token is
            exp(clamp(old_logprob - rollout_logprob, -20, 20)). Weights are constants and multiply the
            policy term only.
        rollout_level: "token"; "sequence", from the sum of the differences of a sequence's unmasked tokens;
            "sequence_mean", from their mean.
        rollout_mode: outside `rollout_bounds` a weight is moved to the bound ("truncate") or is 0 ("mask").
        rollout_bounds: (low, high), each a weight or None: no bound. (TRL's four modes are a level and a mode with
            a cap; verl's and OpenRLHF's gates on other statistics stay with them: pass their mask.)
        aggregation, value_aggregation, length, num_tokens, num_sequences: see above. The counts are above 0,
            numbers or 0-d tensors, which cost no sync; `length` is a number above 0.
        scale: a number or a 0-d tensor. Metrics are not scaled.
        backend: see `fastrlhf.backends`.

    Returns:
        PPOLossOutput(loss, metrics). loss: 0-d, float32 (float64 for float64 inputs). metrics: dict
        of 0-d detached float32 tensors, fractions and means over this call's unmasked tokens:

        - policy_loss: the aggregated policy term.
        - approx_kl: mean of rho - 1 - d. ratio_mean, ratio_max: of rho. With "gspo" rho is s, here and below.
          (Not "reinforce".)
        - clip_fraction: where the clip decides: the clipped term is the larger one ("cispo": rho is outside).
          clip_fraction_low, clip_fraction_high: at 1 - low, at 1 + high. (Not "reinforce", "sapo".)
        - dual_clip_fraction: where the dual clip decides. outside_fraction: where rho is outside the range,
          whether the clip decides or not. (As clip_fraction.)
        - value_loss: the aggregated value term. value_clip_fraction: where its clipped branch is larger.
          explained_variance: 1 - Var(R - v) / Var(R), 0 if Var(R) = 0. (With `values`.)
        - entropy: aggregated, with `entropy`. kl: the aggregated KL term, with `ref_logprob`.
        - rollout_weight_mean, rollout_weight_max: of the weights, after the bounds.
          rollout_outside_fraction: where the bounds acted, with `rollout_logprob`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, value or name, by argument name; a setting that
            the objective or the aggregation does not use; a term of sequences without `cu_seqlens` for [N].
            On a GPU the values of `mask` are not read, which would cost a sync.

    Source: the papers above; for the value clip Schulman et al. 2017 and Ouyang et al. 2022, C.4.

    >>> out = ppo_loss(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    >>> out.loss, out.metrics["ratio_max"]
    (tensor(-1.), tensor(1.))
    """
    if advantages is None:
        _checks.tensor(OP, "advantages", advantages)
    _checks.float_tensor(OP, "logprob", logprob)
    shape, dtype, device = logprob.shape, logprob.dtype, logprob.device
    policy = None
    per_token = len(shape) != 2 or _checks.has_shape(advantages, shape)
    plain = not settings and per_token and old_logprob is not None
    _checks.tokens_of(
        OP,
        "logprob",
        shape,
        dtype,
        device,
        old_logprob=old_logprob,
        advantages=advantages if plain else None,
        values=values,
        old_values=old_values,
        returns=returns,
        entropy=entropy,
    )
    if not plain:
        policy = _policy.check(
            OP,
            "logprob",
            shape,
            dtype,
            device,
            old_logprob=old_logprob,
            advantages=advantages,
            values=values is not None,
            clip=clip,
            dual_clip=dual_clip,
            **_settings.filled(OP, settings, _settings.DEFAULTS),
        )
    if mask is not None:
        mask = _checks.token_mask(OP, mask, logprob)
    numbers = _checks.ppo_settings(OP, clip, dual_clip, value_clip, value_coef, entropy_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"{OP}: entropy_coef={entropy_coef:g} needs entropy; got None")
    if values is not None or old_values is not None or returns is not None:
        _checks.ppo_values(OP, values, old_values, returns, value_clip)
    _checks.ppo_constants(OP, old_logprob, advantages, old_values, returns)
    factor = None
    if type(scale) is not float or scale != 1:
        factor = _checks.scale_argument(OP, scale, logprob.device, _checks.acc_dtype(logprob))
    chosen = choose(OP, backend, logprob, values, entropy)
    if chosen == "reference":
        *limits, value_clip, value_coef, entropy_coef = numbers
        return reference.ppo_loss(
            logprob,
            old_logprob,
            advantages,
            values=values,
            old_values=old_values,
            returns=returns,
            entropy=entropy,
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
    if len(shape) not in (1, 2):
        tokens = map(_checks.as_rows, tokens)
    factors = more = options = None
    if policy is None:
        names = PLAIN_NAMES[values is not None, entropy is not None]
    else:
        tokens, factors, more, options = _policy.beyond_plain(policy, tokens, chosen)
        numbers = (*policy.limits, *numbers[3:])
        names = names_of(values is not None, entropy is not None, policy)
    with_grad = trained(logprob, values, entropy)
    loss, metrics, _ = FWD[chosen](*tokens, factors, more, *numbers, options, with_grad)
    if factor is not None:
        loss = loss * factor
    return PPOLossOutput(loss, _metrics.named(names, metrics))


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


PLAIN_NAMES = {
    (values, entropy): _names(values, entropy, True, True, False, False, False)
    for values in (False, True)
    for entropy in (False, True)
}


def names_of(has_values: bool, has_entropy: bool, policy) -> tuple[str | None, ...]:
    """The name of each of the raw op's metrics; None for those that the call does not have."""
    given = policy.options
    ratio, clip = given["objective"] != "reinforce", given["objective"] in _policy.CLIPPED
    bounds = given["rollout_logprob"] is not None
    rollout = bounds or given["rollout_weights"] is not None
    has_kl = given["ref_logprob"] is not None
    # Dynamo warns of a cache.
    build = _names.__wrapped__ if torch.compiler.is_compiling() else _names
    return build(has_values, has_entropy, ratio, clip, has_kl, rollout, bounds)


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
    "Tensor? returns, Tensor? entropy, Tensor? mask, Tensor? factors, Tensor?[]? more, float low, float high, "
    "float dual_clip, float value_clip, float value_coef, float entropy_coef, float[]? options, bool with_grad) "
    "-> (Tensor loss, Tensor metrics, Tensor grads)",
    _fake,
    op=OP,
    triton="ppo_loss.forward",
    wrt=(0, 3, 6),  # logprob, values, entropy
    setup=_setup,
    backward=_backward,
)
