"""Inputs of ppo_loss, and its oracle: a loop over Python floats that shares no code with the package."""

import math

import torch

from _support import sequence_cases as cases
from fastrlhf.ops import ppo_loss

NAMES = ("logprob", "old_logprob", "advantages", "values", "old_values", "returns", "entropy")
# Of a call without settings beyond plain PPO, with values and entropy.
METRICS = tuple(name for name in ppo_loss.PLAIN_NAMES[True, True] if name is not None)
TRAINED = ("logprob", "values", "entropy")


def batch(shape, dtype=torch.float64, seed=0, spread=0.3):
    """Tokens by name; log-ratios on both sides of the clip, advantages of both signs and of 0."""
    draws = dict(zip(NAMES, cases.randn((7, *shape), seed), strict=True))
    draws["old_logprob"] = draws["logprob"] + spread * draws["old_logprob"]
    draws["old_values"] = draws["values"] + 0.3 * draws["old_values"]
    draws["entropy"] = draws["entropy"].abs()
    draws["advantages"].flatten()[::7] = 0.0
    return {name: x.to(dtype) for name, x in draws.items()}


def split(tensors):
    """Positional and keyword tensors of a call, the trained ones as fresh leaves."""
    leaves = {
        name: x.detach().clone().requires_grad_() if name in TRAINED else x
        for name, x in tensors.items()
    }
    positional = [leaves[name] for name in NAMES[:3]]
    return positional, {n: leaves[n] for n in NAMES[3:] if n in leaves}, leaves


def run(function, tensors, upstream=1.0, **options):
    """(loss, metrics, gradients by name) with a given gradient of the loss."""
    positional, keywords, leaves = split(tensors)
    loss, metrics = function(*positional, **keywords, **options)
    names = [name for name in TRAINED if name in tensors]
    grads = torch.autograd.grad(loss * upstream, [leaves[name] for name in names])
    return loss.detach(), metrics, dict(zip(names, grads, strict=True))


def naive(tensors, mask, clip, dual_clip, value_clip, value_coef, entropy_coef):
    """The same from lists of floats: (loss, metrics, gradients)."""
    kept = mask.flatten().nonzero().flatten().tolist()
    count = max(len(kept), 1)
    flat = {name: x.double().flatten().tolist() for name, x in tensors.items()}
    grads = {name: torch.zeros(mask.numel(), dtype=torch.float64) for name in TRAINED}
    sums, ratios, errors = dict.fromkeys(METRICS, 0.0), [], []
    for i in kept:
        log_ratio = flat["logprob"][i] - flat["old_logprob"][i]
        ratio, advantage = math.exp(log_ratio), flat["advantages"][i]
        clipped_ratio = min(max(ratio, 1 - clip), 1 + clip)
        branches = [(-advantage * ratio, -advantage * ratio), (-advantage * clipped_ratio, 0.0)]
        loss, grad = branches[1] if branches[1][0] > branches[0][0] else branches[0]
        binding = branches[1][0] > branches[0][0]
        sums["clip_fraction"] += binding
        sums["clip_fraction_low"] += binding and ratio < 1 - clip
        sums["clip_fraction_high"] += binding and ratio > 1 + clip
        sums["outside_fraction"] += not 1 - clip <= ratio <= 1 + clip
        if dual_clip is not None and advantage < 0 and -advantage * dual_clip < loss:
            loss, grad = -advantage * dual_clip, 0.0
            sums["dual_clip_fraction"] += 1
        sums["policy_loss"] += loss
        grads["logprob"][i] = grad / count
        sums["approx_kl"] += ratio - 1 - log_ratio
        ratios.append(ratio)
        value, target = flat["values"][i], flat["returns"][i]
        old_value, half = flat["old_values"][i], 0.5 * (value - target) ** 2
        errors.append(target - value)
        grad = value - target
        if value_clip is not None:
            near = min(max(value, old_value - value_clip), old_value + value_clip)
            if 0.5 * (near - target) ** 2 > half:
                half, grad = 0.5 * (near - target) ** 2, 0.0
                sums["value_clip_fraction"] += 1
        sums["value_loss"] += half
        grads["values"][i] = value_coef * grad / count
        sums["entropy"] += flat["entropy"][i]
        grads["entropy"][i] = -entropy_coef / count
    metrics = {name: total / count for name, total in sums.items()}
    metrics["ratio_mean"], metrics["ratio_max"] = sum(ratios) / count, max(ratios, default=0.0)
    targets = torch.tensor([flat["returns"][i] for i in kept], dtype=torch.float64)
    errors = torch.tensor(errors, dtype=torch.float64)
    spread = float(targets.var(correction=0)) if kept else 0.0
    noise = float(errors.var(correction=0)) if kept else 0.0
    metrics["explained_variance"] = 1 - noise / spread if spread > 0 else 0.0
    loss = metrics["policy_loss"] + value_coef * metrics["value_loss"]
    return loss - entropy_coef * metrics["entropy"], metrics, grads
