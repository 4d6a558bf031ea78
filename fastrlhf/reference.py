"""Every op in plain PyTorch: the specification, the eager baseline, the backend that runs anywhere.

Shapes: B sequences, T steps, N tokens (packed), H hidden, V vocabulary, M completions of P prompts.
Bytes are per element (token or logit) of size s, with fp32 outputs; what PyTorch's temporaries read
and write on top is what the fused backends save. Sequences come packed, `[N]` with `cu_seqlens`
`[B+1]`, or padded, `[B, T]` with an optional `mask`. Maths is fp32, or fp64 where an input is fp64.
Nothing is checked here: `fastrlhf.ops` does that first. Leaf module: imports torch alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WHITEN_EPS = 1e-8  # added to the variance
LOG_RATIO_LIMIT = 20.0  # |log rho| and |log ratio of k3| are clamped here: exp stays finite
K3_LIMIT = 10.0  # largest value of the k3 estimator
_CHUNK_BYTES = {"compact": 2**28, "fast": 2**30}  # fp32 logits held at a time


class KLGAEOutput(NamedTuple):
    """Outputs of `kl_gae`, each in the layout of the inputs and 0 where the mask is 0."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor


class PPOLossOutput(NamedTuple):
    """`loss` is a 0-d differentiable tensor, `metrics` a dict of 0-d detached fp32 tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


class LinearTokenLossOutput(NamedTuple):
    """`loss` is differentiable; logprob and entropy [...] (or None), metrics {name: [...]} are detached."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]


def upcast(x: Tensor) -> Tensor:
    """fp64 stays; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------
# sequences


class _Padded:
    """Packed tensors as [B, T] and back; padded ones pass through. Makes the mask explicit."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None):
        self.index = None
        if cu_seqlens is None:
            self.mask = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
            return
        start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        steps = int(length.max()) if length.numel() else 0
        position = torch.arange(steps, device=like.device)
        self.mask = position < length.unsqueeze(1)
        self.index = (start.unsqueeze(1) + position).clamp(max=like.numel())

    def pad(self, x: Tensor) -> Tensor:
        x = upcast(x)
        if self.index is not None:
            x = F.pad(x, (0, 1))[self.index]  # one more, so that there is one to index
        return x.masked_fill(~self.mask, 0.0)

    def unpad(self, x: Tensor) -> Tensor:
        x = x.masked_fill(~self.mask, 0.0)
        return x if self.index is None else x[self.mask]


def _kl(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    d = logprob - ref_logprob
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d * d
    log_ratio = (-d).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=K3_LIMIT)


def kl_reward(logprob, ref_logprob, score, *, beta, estimator="k1", cu_seqlens=None, mask=None):
    """r_t = -beta * kl_t, plus score[b] on the last unmasked token of sequence b -> (rewards, kl).

    Reads 2*s (+1 for the mask), writes 8 per token.
    """
    layout = _Padded(logprob, cu_seqlens, mask)
    kl = _kl(layout.pad(logprob), layout.pad(ref_logprob), estimator)
    # The last unmasked step is the one with no unmasked step after it.
    after = layout.mask.flip(1).cumsum(1).flip(1)
    last = layout.mask & (after == 1)
    rewards = -beta * kl
    rewards = torch.where(last, rewards + upcast(score).unsqueeze(1), rewards)
    return layout.unpad(rewards), layout.unpad(kl)


def gae(
    rewards,
    values,
    *,
    gamma=1.0,
    lam=0.95,
    cu_seqlens=None,
    mask=None,
    bootstrap=None,
    whiten=False,
):
    """A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}, R_t = A_t + V_t -> (A, R).

    A masked step is carried through: t+1 is the next *unmasked* step; after the last one stands
    `bootstrap[b]` (default 0). Reads 2*s (+1), writes 8 per token; whitening 8 more.
    """
    layout = _Padded(rewards, cu_seqlens, mask)
    r, v = layout.pad(rewards), layout.pad(values)
    next_advantage = r.new_zeros(r.shape[0])
    next_value = next_advantage if bootstrap is None else bootstrap.to(r.dtype)
    steps = []
    for t in reversed(range(r.shape[1])):
        real = layout.mask[:, t]
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + (gamma * lam) * next_advantage
        steps.append(advantage)
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, v[:, t], next_value)
    advantages = torch.stack(steps[::-1], dim=1) if steps else torch.zeros_like(r)
    returns = layout.unpad(advantages + v)
    advantages = layout.unpad(advantages)
    if whiten:
        advantages = masked_whiten(advantages, cu_seqlens=cu_seqlens, mask=mask)
    return advantages, returns


def kl_gae(
    logprob,
    ref_logprob,
    score,
    values,
    *,
    beta,
    estimator="k1",
    gamma=1.0,
    lam=0.95,
    whiten=False,
    cu_seqlens=None,
    mask=None,
):
    """`kl_reward`, then `gae` of its rewards. Reads 3*s (+1), writes 16 per token."""
    layout = {"cu_seqlens": cu_seqlens, "mask": mask}
    rewards, kl = kl_reward(logprob, ref_logprob, score, beta=beta, estimator=estimator, **layout)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam, whiten=whiten, **layout)
    return KLGAEOutput(advantages, returns, rewards, kl)


def masked_whiten(x, *, cu_seqlens=None, mask=None, shift_mean=True, unbiased=True):
    """(x - mean) * rsqrt(var + 1e-8) over all unmasked elements (+ mean if not `shift_mean`).

    The unbiased variance divides by n - 1, and by 1 where n < 2. Reads s (+1) twice, writes 4.
    """
    del cu_seqlens  # a packed tensor has no padding: every element counts
    x = upcast(x)
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    count = keep.sum()
    mean = x.masked_fill(~keep, 0.0).sum() / count.clamp(min=1)
    if (
        x.numel()
    ):  # equal elements are their mean, whatever their size; the sum would round, or overflow
        smallest = x.masked_fill(~keep, torch.inf).min()
        mean = torch.where(smallest == x.masked_fill(~keep, -torch.inf).max(), smallest, mean)
    centered = (x - mean).masked_fill(~keep, 0.0)
    variance = (centered * centered).sum() / (count - int(unbiased)).clamp(min=1)
    out = centered * torch.rsqrt(variance + WHITEN_EPS)
    return (out if shift_mean else out + mean).masked_fill(~keep, 0.0)


# ---------------------------------------------------------------------------------------------
# losses


def _policy_loss(log_ratio, a, clip, dual_clip):
    """Clipped policy loss of each token, its ratio, and where the clip decides."""
    ratio = torch.exp(log_ratio)
    unclipped, clipped = -a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.where(clipped > unclipped, clipped, unclipped)
    if dual_clip is not None:
        bound = -a * dual_clip
        loss = torch.where((a < 0) & (bound < loss), bound, loss)
    return loss, ratio, clipped > unclipped


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
    clip=0.2,
    dual_clip=None,
    value_clip=0.2,
    value_coef=0.5,
    entropy_coef=0.0,
):
    """Clipped policy loss + value_coef * clipped value loss - entropy_coef * mean entropy.

    Gradients flow to `logprob`, `values` and `entropy`; everything else is a constant.
    Reads up to 7*s (+1), writes up to 12 (the gradients) per token.
    """
    keep = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    count = keep.sum().clamp(min=1)

    def load(x):
        return upcast(x).masked_fill(~keep, 0.0)

    def mean(x):
        return x.masked_fill(~keep, 0.0).sum() / count

    def variance(x):
        """Of x - max(x): equal elements have none, whatever their size."""
        d = x - x.masked_fill(~keep, -torch.inf).max() if x.numel() else x
        return mean((d - mean(d)) ** 2)

    a = load(advantages.detach())
    log_ratio = load(logprob) - load(old_logprob.detach())
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    per_token, ratio, clipped = _policy_loss(log_ratio, a, clip, dual_clip)
    policy_loss = mean(per_token)
    loss = policy_loss
    metrics = {
        "policy_loss": policy_loss,
        "approx_kl": mean(torch.expm1(log_ratio) - log_ratio),
        "clip_fraction": mean(clipped.to(ratio.dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": ratio.masked_fill(~keep, 0.0).max() if ratio.numel() else ratio.sum(),
    }
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
        value_loss = mean(0.5 * square)
        loss = loss + value_coef * value_loss
        noise, total = variance(error.detach()), variance(target)
        metrics["value_loss"] = value_loss
        metrics["value_clip_fraction"] = mean(value_clipped.to(v.dtype))
        metrics["explained_variance"] = torch.where(total > 0, 1 - noise / total, 0.0)
    if entropy is not None:
        mean_entropy = mean(load(entropy))
        loss = loss - entropy_coef * mean_entropy
        metrics["entropy"] = mean_entropy
    return PPOLossOutput(loss, {name: x.detach().float() for name, x in metrics.items()})


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
    if mask is not None:
        logprob = logprob.masked_fill(~mask, 0.0)
    if not return_entropy:
        return logprob
    # A logit of -inf has p = 0 and adds nothing; its log p is replaced so that 0 * inf never appears.
    entropy = -(torch.exp(logp) * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    if mask is not None:
        entropy = entropy.masked_fill(~mask, 0.0)
    return logprob, entropy


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
    num_rows=None,
    process_group=None,
    workspace="fast",
):
    """`token_logprob` of hidden @ weight.T + bias, by chunks of rows that the backward recomputes.

    Holds one chunk of fp32 logits; dX and dW are summed in fp32 and rounded once. If `num_rows` is not the number of
    rows that the mask counts, their results are NaN.
    Reads H*s + 4 per row, V*H*s per chunk, writes 4 (8) per row; 2*N*H*V FLOP, 8*N*H*V trained.
    """
    if process_group is not None:
        raise ValueError("process_group: a vocab-sharded weight is not supported; expected None")
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
        logits = _linear(x, w, b)
        return token_logprob(
            logits,
            targets,
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap,
            mask=mask,
            return_entropy=return_entropy,
        )

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
        outputs.append(out if return_entropy else (out,))
    joined = [torch.cat(parts).reshape(shape) for parts in zip(*outputs, strict=True)]
    if num_rows is not None:
        wrong = mask.bool() & (mask.bool().sum() != num_rows)
        joined = [_nan_where(wrong, x) for x in joined]
    return tuple(joined) if return_entropy else joined[0]


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
):
    """-`linear_logprob`, 0 at `ignore_index`; "mean" is over the tokens that count (0 if none).

    Bytes and FLOP as `linear_logprob`.
    """
    counted = targets != ignore_index
    loss = -linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=counted,
        num_rows=num_rows,
        process_group=process_group,
        workspace=workspace,
    )
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


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
    clip=0.2,
    dual_clip=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    scale=1.0,
    inplace_backward=False,
):
    """scale * policy loss of each row, and `token_logprob`, detached -> (loss, logprob).

    -A * logprob without `old_logprob` (A = 1 without `advantages`), else the clipped loss of
    `ppo_loss`. Forward and backward together read V*s and write V*s per row.
    """
    del inplace_backward  # as in `token_logprob`
    logprob = token_logprob(logits, targets, temperature=temperature, softcap=softcap, mask=mask)
    keep = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()

    def load(x):
        return upcast(x.detach()).masked_fill(~keep, 0.0)

    a = torch.ones_like(logprob) if advantages is None else load(advantages)
    if old_logprob is None:
        loss = -a * logprob
    else:
        log_ratio = (logprob - load(old_logprob)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        loss = _policy_loss(log_ratio, a, clip, dual_clip)[0]
    return (scale * loss).masked_fill(~keep, 0.0), logprob.detach()


def ranking_loss(scores, ranks, cu_groups):
    """Mean over prompts of mean over strict pairs of -log sigmoid(s_better - s_worse).

    Ties are dropped; a prompt without a strict pair is not counted; 0 if no prompt has one.
    Reads 8 + s, writes 4 (the gradient) per completion.
    """
    layout = _Padded(scores, cu_groups, None)
    s, rank = layout.pad(scores), layout.pad(ranks.double())  # exact to 2^53
    both = layout.mask.unsqueeze(2) & layout.mask.unsqueeze(1)
    pairs = both & (rank.unsqueeze(2) < rank.unsqueeze(1))  # [P, better, worse]
    # Masked before logsigmoid too, whose backward multiplies a NaN by the gradient 0.
    difference = (s.unsqueeze(2) - s.unsqueeze(1)).masked_fill(~pairs, 0.0)
    pair_loss = -F.logsigmoid(difference).masked_fill(~pairs, 0.0)
    pair_count = pairs.sum((1, 2))
    prompt_loss = pair_loss.sum((1, 2)) / pair_count.clamp(min=1)
    return prompt_loss.sum() / (pair_count > 0).sum().clamp(min=1)
