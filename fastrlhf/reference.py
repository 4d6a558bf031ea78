"""Every op in plain PyTorch: the specification, the eager baseline, the backend that runs anywhere.

Shapes: B sequences, T steps, N tokens (packed), H hidden, V vocabulary.
Bytes are per element (token or logit) of size s, with fp32 outputs; what PyTorch's temporaries read
and write on top is what the fused backends save. Sequences come packed, `[N]` with `cu_seqlens`
`[B+1]`, or padded, `[B, T]` with an optional `mask`. Maths is fp32, or fp64 where an input is fp64.
Nothing is checked here: `fastrlhf.ops` does that first. The ops of sequences and groups are in
`reference_sequences`, which this module passes on. Both import torch alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrlhf.reference_sequences import (  # noqa: F401
    LOG_RATIO_LIMIT,
    KLGAEOutput,
    gae,
    group_advantage,
    kl_gae,
    kl_reward,
    kl_term,
    masked_whiten,
    ranking_loss,
    upcast,
)

_CHUNK_BYTES = {"compact": 2**28, "fast": 2**30}  # fp32 logits held at a time


class PPOLossOutput(NamedTuple):
    """`loss` is a 0-d differentiable tensor, `metrics` a dict of 0-d detached fp32 tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


class LinearCrossEntropyOutput(NamedTuple):
    """`loss` is differentiable; lse [...] is detached."""

    loss: Tensor
    lse: Tensor


class LinearTokenLossOutput(NamedTuple):
    """`loss` is differentiable; logprob and entropy [...] (or None), metrics {name: [...]} are detached."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]


# ---------------------------------------------------------------------------------------------
# losses


OBJECTIVES = ("ppo", "reinforce", "cispo", "gspo", "sapo")
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def _clamped(x):
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _policy_term(objective, logprob, log_ratio, a, clip, dual_clip, tau_pos, tau_neg):
    """(loss, ratio, {metric: where}) of each token. `log_ratio` is clamped; a limit of `clip` may be None."""
    ratio = torch.exp(log_ratio)
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    if objective == "reinforce":
        return -a * logprob, ratio, {}
    if objective == "sapo":
        tau = torch.full_like(a, tau_neg).masked_fill(a > 0, tau_pos)
        return -a * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), ratio, {}
    low, high = clip
    below = nowhere if low is None else ratio < low
    above = nowhere if high is None else ratio > high
    limited = ratio.clamp(low, high) if clip != (None, None) else ratio
    if objective == "cispo":
        loss, binding, dual = -a * limited.detach() * logprob, below | above, nowhere
        down = below
    else:
        unclipped, clipped = -a * ratio, -a * limited
        binding = clipped > unclipped
        loss, dual, down = torch.where(binding, clipped, unclipped), nowhere, binding & (a < 0)
        if dual_clip is not None:
            bound = -a * dual_clip
            dual = (a < 0) & (bound < loss)
            loss = torch.where(dual, bound, loss)
    return (
        loss,
        ratio,
        {
            "clip_fraction": binding,
            "clip_fraction_low": down,
            "clip_fraction_high": binding & ~down,
            "dual_clip_fraction": dual,
            "outside_fraction": below | above,
        },
    )


def _kl_in_loss(logprob, ref_logprob, ratio, estimator, clamp, gradient):
    """KL of each token, with the gradient of the estimator, of k2, or of ratio * estimator."""
    d = logprob - ref_logprob
    kl = (
        torch.expm1(-d) + d
        if estimator == "k3" and not clamp
        else kl_term(logprob, ref_logprob, estimator)
    )
    if gradient == "k2":
        k2 = 0.5 * d * d
        return kl.detach() + (k2 - k2.detach())
    return ratio * kl if gradient == "ratio" else kl


class _Sequences:
    """Which sequence each token belongs to, and sums over the tokens that count, per sequence [S]."""

    def __init__(self, keep: Tensor, cu_seqlens: Tensor | None):
        self.keep = keep
        if cu_seqlens is None:
            rows = keep.reshape(keep.shape[:-1].numel(), keep.shape[-1] if keep.dim() else 1)
            self.count = rows.shape[0]
            self.of_token = torch.arange(self.count, device=keep.device).unsqueeze(1)
            self.of_token = self.of_token.expand(rows.shape).reshape(keep.shape)
        else:
            self.count = cu_seqlens.numel() - 1
            each = torch.arange(self.count, device=keep.device)
            self.of_token = each.repeat_interleave(cu_seqlens.diff().long())

    def sum(self, x: Tensor) -> Tensor:
        """In fp64, so that a mean does not depend on the order."""
        x = x.detach().double().masked_fill(~self.keep, 0.0)
        return x.new_zeros(self.count).index_add(0, self.of_token.reshape(-1), x.reshape(-1))

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.sum(self.keep).clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """Per token, of one number a sequence [S]."""
        return x[self.of_token]

    def per_token(self, x: Tensor) -> Tensor:
        """An argument, which may have one number a sequence, [S] or [S, 1]. Numbers per token stay."""
        if x.shape == self.keep.shape and x.shape != (self.count, 1):
            return x
        return self.spread(x.reshape(-1))


def _token_weights(sequences, aggregation, length, num_tokens, num_sequences):
    """The weight of each token's loss, whose sum is the aggregate."""
    keep = sequences.keep
    counts = sequences.sum(keep)
    tokens = counts.sum().clamp(min=1) if num_tokens is None else num_tokens
    if aggregation in ("token-mean", "token-sum"):
        weights = keep.double() / (tokens if aggregation == "token-mean" else 1)
    else:
        number = (counts > 0).sum().clamp(min=1) if num_sequences is None else num_sequences
        each = torch.ones_like(counts)
        if aggregation == "seq-mean-token-mean":
            each = 1 / counts.clamp(min=1)
        elif aggregation == "seq-mean-token-sum-norm":
            each = each / length
        weights = keep * (each / number)[sequences.of_token]
    return weights


def _rollout(old, rollout_logprob, sequences, level, mode, bounds):
    """(weight, outside the bounds) of each token."""
    d = old - rollout_logprob
    if level != "token":
        d = sequences.spread(sequences.sum(d) if level == "sequence" else sequences.mean(d)).to(
            old.dtype
        )
    weight = torch.exp(_clamped(d))
    low, high = bounds
    outside = torch.zeros_like(weight, dtype=torch.bool)
    outside = outside if low is None else outside | (weight < low)
    outside = outside if high is None else outside | (weight > high)
    if mode == "mask":
        return weight.masked_fill(outside, 0.0), outside
    return (weight if bounds == (None, None) else weight.clamp(low, high)), outside


def _policy(
    logprob, old_logprob, advantages, sequences, load, *, objective, clip, dual_clip, tau_pos, tau_neg,
    ref_logprob, kl_coef, kl_estimator, kl_clamp, kl_gradient,
    rollout_weights, rollout_logprob, rollout_level, rollout_mode, rollout_bounds,
):  # fmt: skip
    """(policy loss, KL or None) of each token, and what the metrics need: ratio, log ratio, marks, rollout weights."""
    del kl_coef
    spread = lambda x: load(sequences.per_token(x.detach()))  # noqa: E731
    lp = load(logprob)
    old = lp.detach() if old_logprob is None else load(old_logprob.detach())
    clip = clip if isinstance(clip, tuple) else (clip, clip)
    limits = tuple(
        None if c is None else 1 + sign * c for sign, c in zip((-1, 1), clip, strict=True)
    )
    log_ratio = lp - old
    if objective == "gspo":
        mean = sequences.spread(sequences.mean(log_ratio)).to(lp.dtype)
        moving = (lp - lp.detach()).masked_fill(lp.isinf(), 0.0)  # inf - inf is NaN
        log_ratio = mean + moving
    log_ratio = _clamped(log_ratio)
    a = spread(advantages)
    base = "ppo" if objective == "gspo" else objective
    loss, ratio, marks = _policy_term(base, lp, log_ratio, a, limits, dual_clip, tau_pos, tau_neg)
    kl = None
    if ref_logprob is not None:
        kl = _kl_in_loss(lp, load(ref_logprob.detach()), ratio, kl_estimator, kl_clamp, kl_gradient)
    weight = outside = None
    if rollout_weights is not None:
        weight = spread(rollout_weights)
    elif rollout_logprob is not None:
        rest = (sequences, rollout_level, rollout_mode, rollout_bounds)
        weight, outside = _rollout(old, load(rollout_logprob.detach()), *rest)
    return (loss if weight is None else weight * loss), kl, ratio, log_ratio, marks, weight, outside


# The settings of the policy loss beyond plain PPO, with their defaults, as ppo_loss, token_loss and linear_ppo_loss
# take them.
POLICY_DEFAULTS = {
    "objective": "ppo",
    "clip": 0.2,
    "dual_clip": None,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "ref_logprob": None,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "kl_clamp": True,
    "kl_gradient": "estimator",
    "rollout_weights": None,
    "rollout_logprob": None,
    "rollout_level": "token",
    "rollout_mode": "truncate",
    "rollout_bounds": (None, None),
}


def ppo_loss(
    logprob,
    old_logprob,
    advantages,
    *,
    values=None,
    old_values=None,
    returns=None,
    entropy=None,
    mask=None,
    cu_seqlens=None,
    value_clip=0.2,
    value_coef=0.5,
    entropy_coef=0.0,
    aggregation="token-mean",
    value_aggregation=None,
    length=None,
    num_tokens=None,
    num_sequences=None,
    scale=1.0,
    **settings,
):
    """scale * (policy loss + kl_coef * KL + value_coef * value loss - entropy_coef * entropy), each aggregated.

    `settings`: see POLICY_DEFAULTS. Gradients flow to `logprob`, `values` and `entropy`; everything else is a constant.
    Plain PPO reads up to 7*s (+1), writes up to 12 (the gradients) per token.
    """
    settings = {**POLICY_DEFAULTS, **settings}
    keep = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    count = keep.sum().clamp(min=1)
    sequences = _Sequences(keep, cu_seqlens)

    def load(x):
        return upcast(x).masked_fill(~keep, 0.0)

    def mean(x):
        return x.masked_fill(~keep, 0.0).sum() / count

    def largest(x):
        return x.masked_fill(~keep, 0.0).max() if x.numel() else x.sum()

    def variance(x):
        """Of x - max(x): equal elements have none, whatever their size."""
        d = x - x.masked_fill(~keep, -torch.inf).max() if x.numel() else x
        return mean((d - mean(d)) ** 2)

    def aggregate_by(how):
        if how == "token-mean" and num_tokens is None:
            return mean
        weights = _token_weights(sequences, how, length, num_tokens, num_sequences)
        return lambda x: (x.masked_fill(~keep, 0.0) * weights.to(x.dtype)).sum()

    aggregate = aggregate_by(aggregation)
    per_token, per_kl, ratio, log_ratio, marks, weight, outside = _policy(
        logprob, old_logprob, advantages, sequences, load, **settings
    )
    policy_loss = aggregate(per_token)
    loss, metrics = policy_loss, {"policy_loss": policy_loss}
    if settings["objective"] != "reinforce":
        metrics["approx_kl"] = mean(torch.expm1(log_ratio) - log_ratio)
        metrics |= {name: mean(where.to(ratio.dtype)) for name, where in marks.items()}
        metrics["ratio_mean"], metrics["ratio_max"] = mean(ratio), largest(ratio)
    if values is not None:
        v, target = load(values), load(returns.detach())
        error = v - target
        square = error * error
        value_clipped = torch.zeros_like(keep)
        if value_clip is not None:
            old = load(old_values.detach())
            clipped_error = v.clamp(old - value_clip, old + value_clip) - target
            value_clipped = clipped_error * clipped_error > square
            square = torch.where(value_clipped, clipped_error * clipped_error, square)
        value_loss = aggregate_by(value_aggregation or aggregation)(0.5 * square)
        loss = loss + value_coef * value_loss
        noise, total = variance(error.detach()), variance(target)
        metrics["value_loss"] = value_loss
        metrics["value_clip_fraction"] = mean(value_clipped.to(v.dtype))
        metrics["explained_variance"] = torch.where(total > 0, 1 - noise / total, 0.0)
    if entropy is not None:
        mean_entropy = aggregate(load(entropy))
        loss = loss - entropy_coef * mean_entropy
        metrics["entropy"] = mean_entropy
    if per_kl is not None:
        metrics["kl"] = aggregate(per_kl)
        loss = loss + settings["kl_coef"] * metrics["kl"]
    if weight is not None:
        metrics["rollout_weight_mean"], metrics["rollout_weight_max"] = (
            mean(weight),
            largest(weight),
        )
    if outside is not None:
        metrics["rollout_outside_fraction"] = mean(outside.to(weight.dtype))
    return PPOLossOutput(scale * loss, {name: x.detach().float() for name, x in metrics.items()})


def _nan_where(wrong: Tensor, x: Tensor) -> Tensor:
    """x, with NaN for values and gradients where `wrong`."""
    return x * torch.where(wrong, torch.nan, 1.0).to(x.dtype)


def token_logprob(
    logits,
    targets,
    *,
    temperature=1.0,
    softcap=None,
    mask=None,
    return_entropy=False,
    inplace_backward=False,
):
    """log softmax(z)[target] with z = softcap * tanh(logits / softcap) / temperature; NaN for a target outside [0, V).

    Reads V*s per row, writes 4 (8 with the entropy); the backward reads and writes V*s per row.
    """
    del inplace_backward  # autograd cannot reuse the memory of the logits
    wanted = {"with_entropy": return_entropy}
    found = _row_numbers(logits, targets, temperature, softcap, mask, **wanted)
    return found[:2] if return_entropy else found[0]


def _row_numbers(
    logits,
    targets,
    temperature,
    softcap,
    mask,
    *,
    with_entropy=False,
    with_lse=False,
    with_spread=False,
    class_weight=None,
):
    """(logprob, entropy, lse, spread) of each row, None for what is not wanted; 0 where the mask is 0."""
    z = upcast(logits)
    targets = targets.long()
    if mask is not None:
        mask = mask.bool()
        z = z.masked_fill(~mask.unsqueeze(-1), 0.0)
        targets = targets.masked_fill(~mask, 0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        z = z / temperature.to(z.dtype).expand(targets.shape).unsqueeze(-1)
    elif temperature != 1.0:
        z = z / temperature
    logp = torch.log_softmax(z, dim=-1)
    wrong = (targets < 0) | (targets >= z.shape[-1])  # a gather there would crash a GPU
    logprob = logp.gather(-1, targets.masked_fill(wrong, 0).unsqueeze(-1)).squeeze(-1)
    logprob = _nan_where(wrong, logprob)
    entropy = lse = spread = None
    if with_entropy:
        # A logit of -inf has p = 0 and adds nothing; its log p is replaced so that 0 * inf never appears.
        entropy = -(torch.exp(logp) * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    if with_lse:
        lse = torch.logsumexp(z, dim=-1)
        lse = _nan_where(lse == torch.inf, lse)  # as the log-prob of such a row
    if with_spread:
        spread = (logp if class_weight is None else class_weight.to(logp.dtype) * logp).sum(-1)
    found = (logprob, entropy, lse, spread)
    return found if mask is None else tuple(_masked(x, mask) for x in found)


def _masked(x: Tensor | None, mask: Tensor) -> Tensor | None:
    return x if x is None else x.masked_fill(~mask, 0.0)


def _linear(x, w, b):
    """x @ w.T + b in the operands' dtype, forward and backward, whether or not autocast is on."""
    if torch.is_autocast_enabled(x.device.type):
        return _WideLinear.apply(x, w, b)
    return F.linear(x, w, b)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return grad @ w, grad.t() @ x, grad.sum(0) if ctx.needs_input_grad[2] else None


def linear_logprob(
    hidden,
    weight,
    targets,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    return_entropy=False,
    return_lse=False,
    num_rows=None,
    process_group=None,
    workspace="fast",
):
    """`token_logprob` of hidden @ weight.T + bias, and log sum_j e^z_j, by chunks of rows that the backward recomputes.

    Holds one chunk of fp32 logits; dX and dW are summed in fp32 and rounded once. If `num_rows` is not the number of
    rows that the mask counts, their results are NaN.
    Reads H*s + 4 per row, V*H*s per chunk, writes 4 to 12 per row; 2*N*H*V FLOP, 8*N*H*V trained.
    """
    if process_group is not None:
        raise ValueError("process_group: a vocab-sharded weight is not supported; expected None")
    logprob, entropy, lse, _ = linear_rows(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        num_rows=num_rows,
        workspace=workspace,
        with_entropy=return_entropy,
        with_lse=return_lse,
    )
    if not (return_entropy or return_lse):
        return logprob
    return logprob, *([entropy] if return_entropy else []), *([lse] if return_lse else [])


def linear_rows(
    hidden,
    weight,
    targets,
    *,
    bias,
    temperature,
    softcap,
    mask,
    num_rows,
    workspace,
    **wanted,
):
    """(logprob, entropy, lse, spread) of `linear_logprob`, as `_row_numbers` gives them.

    spread = sum_j class_weight_j log p_j, with 1 for each without weights.
    """
    shape, (vocab, width) = targets.shape, weight.shape
    acc = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    x, w = hidden.to(acc).reshape(-1, width), weight.to(acc)
    b = None if bias is None else bias.to(acc)
    rows = [x, targets.reshape(-1)]
    rows.append(mask.reshape(-1) if mask is not None else None)
    if isinstance(temperature, Tensor):
        rows.append(temperature.expand(shape).reshape(-1))
        temperature = None
    else:
        rows.append(None)

    def chunk_logprob(x, targets, mask, row_temperature, w, b):
        if mask is not None:  # dW must not see what is in a masked row
            x = x.masked_fill(~mask.bool().unsqueeze(-1), 0.0)
        settings = (temperature if row_temperature is None else row_temperature, softcap, mask)
        return _row_numbers(_linear(x, w, b), targets, *settings, **wanted)

    size = max(1, _CHUNK_BYTES[workspace] // (w.element_size() * max(1, vocab)))
    outputs = []
    for start in range(0, max(x.shape[0], 1), size):
        chunk = [None if row is None else row[start : start + size] for row in rows]
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            out = checkpoint(
                chunk_logprob, *chunk, w, b, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = chunk_logprob(*chunk, w, b)
        outputs.append(out)
    joined = [
        None if parts[0] is None else torch.cat(parts).reshape(shape)
        for parts in zip(*outputs, strict=True)
    ]
    if num_rows is not None:
        wrong = mask.bool() & (mask.bool().sum() != num_rows)
        joined = [x if x is None else _nan_where(wrong, x) for x in joined]
    return tuple(joined)


def linear_cross_entropy(
    hidden,
    weight,
    targets,
    *,
    bias=None,
    ignore_index=-100,
    reduction="mean",
    temperature=1.0,
    softcap=None,
    num_rows=None,
    process_group=None,
    workspace="fast",
    class_weight=None,
    label_smoothing=0.0,
    z_loss=0.0,
    return_lse=False,
):
    """-`linear_logprob`, 0 at `ignore_index`; "mean" is over the tokens that count (0 if none).

    With c = class_weight (1 each): -(1 - label_smoothing) c[target] log p[target] - label_smoothing / V
    sum_j c_j log p_j, its mean divided by the sum of c[target]; plus z_loss * lse^2, its mean divided by the number of
    tokens. Bytes and FLOP as `linear_logprob`.
    """
    if process_group is not None:
        raise ValueError("process_group: a vocab-sharded weight is not supported; expected None")
    counted = targets != ignore_index
    logprob, _, lse, spread = linear_rows(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=counted,
        num_rows=num_rows,
        workspace=workspace,
        with_lse=return_lse or z_loss != 0,
        with_spread=label_smoothing != 0,
        class_weight=class_weight,
    )
    loss = -logprob
    share = counted.to(loss.dtype)
    if class_weight is not None:
        clamped = targets.long().clamp(0, weight.shape[0] - 1)
        share = class_weight.to(loss.dtype)[clamped].masked_fill(~counted, 0.0)
        loss = loss * share
    if label_smoothing != 0:
        loss = (1 - label_smoothing) * loss - label_smoothing / weight.shape[0] * spread
    z = None if z_loss == 0 else z_loss * lse.square()
    if reduction == "none":
        loss = loss if z is None else loss + z
    else:
        total = share.sum() if reduction == "mean" else torch.ones_like(share.sum())
        loss = loss.sum() / total.masked_fill(total == 0, torch.inf)
        if z is not None:
            loss = loss + z.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)
    return LinearCrossEntropyOutput(loss, lse.detach()) if return_lse else loss


def linear_token_loss(
    hidden,
    weight,
    targets,
    loss_fn,
    *,
    per_token=None,
    with_entropy=False,
    bias=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    reduction="mean",
    scale=1.0,
    accumulate_into=None,
    compact_rows=False,
    num_rows=None,
    workspace="fast",
):
    """scale * mean, sum or rows of loss_fn(logprob, [entropy,] **per_token) -> LinearTokenLossOutput.

    `loss_fn` gets [N] tensors of the rows that count. 8*N*H*V FLOP, as `linear_logprob`.
    """
    del accumulate_into, compact_rows  # they do not change the result
    logprob, entropy = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        return_entropy=True,
        num_rows=num_rows,
        workspace=workspace,
    )
    keep = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    leaves = (logprob[keep], entropy[keep]) if with_entropy else (logprob[keep],)
    out = loss_fn(*leaves, **{name: x[keep] for name, x in (per_token or {}).items()})
    loss, metrics = out if isinstance(out, tuple) else (out, {})

    def scatter(x):
        return torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_scatter(keep, x)

    if reduction != "none":
        total = loss.sum()
        loss = total / keep.sum().clamp(min=1) if reduction == "mean" else total
    else:
        loss = scatter(loss)
    return LinearTokenLossOutput(
        scale * loss,
        logprob.detach(),
        entropy.detach() if with_entropy else None,
        {name: scatter(x.detach()) for name, x in metrics.items()},
    )


def linear_ppo_loss(
    hidden,
    weight,
    targets,
    old_logprob,
    advantages,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    scale=1.0,
    accumulate_into=None,
    compact_rows=False,
    num_rows=None,
    workspace="fast",
    **options,
):
    """scale * `ppo_loss` of `linear_logprob`'s log-probs and entropies; the metrics are not scaled.

    8*N*H*V FLOP; the op saves the recomputation of the logits. `options`: as `ppo_loss`.
    """
    del accumulate_into, compact_rows  # they do not change the result
    logprob, entropy = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        return_entropy=True,
        num_rows=num_rows,
        workspace=workspace,
    )
    out = ppo_loss(logprob, old_logprob, advantages, entropy=entropy, mask=mask, **options)
    return PPOLossOutput(scale * out.loss, out.metrics)


def token_loss(
    logits,
    targets,
    advantages=None,
    *,
    old_logprob=None,
    objective=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    cu_seqlens=None,
    aggregation=None,
    length=None,
    num_tokens=None,
    num_sequences=None,
    scale=1.0,
    inplace_backward=False,
    **settings,
):
    """scale * policy loss of each row (+ kl_coef * KL), and `token_logprob`, detached -> (loss, logprob).

    `settings` as in `ppo_loss`; without an `objective` and `old_logprob`: -A * logprob (A = 1 without `advantages`).
    With `aggregation` each row has its weight in it. Forward and backward together read V*s and write V*s per row.
    """
    del inplace_backward  # as in `token_logprob`
    objective = objective or ("reinforce" if old_logprob is None else "ppo")
    settings = {**POLICY_DEFAULTS, **settings, "objective": objective}
    logprob = token_logprob(logits, targets, temperature=temperature, softcap=softcap, mask=mask)
    keep = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    sequences = _Sequences(keep, cu_seqlens)
    a = torch.ones_like(logprob) if advantages is None else advantages
    load = lambda x: upcast(x).masked_fill(~keep, 0.0)  # noqa: E731
    loss, kl, *_ = _policy(logprob, old_logprob, a, sequences, load, **settings)
    loss = loss if kl is None else loss + settings["kl_coef"] * kl
    if aggregation is not None:
        given = (aggregation, length, num_tokens, num_sequences)
        loss = loss * _token_weights(sequences, *given).to(loss.dtype)
    return (scale * loss).masked_fill(~keep, 0.0), logprob.detach()
