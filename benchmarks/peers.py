"""What others run for the same op: torch's and TRL's functions where they import, and the Python loop.

Each takes our op's arguments and gives our op's tensors. TRL's are called as its trainers call them, and
once more on fp32 logits where the logits are 16-bit, because it computes in the type that it is given.
B sequences, T steps, N tokens, V vocabulary, H hidden.
"""

import torch
import torch.nn.functional as F

from fastrlhf import reference


def python_loop_gae(rewards, values, *, mask, gamma=1.0, lam=0.95, whiten=False):
    """GAE step by step over [B, T], as TRL, verl and OpenRLHF run it. For masks without holes."""
    rewards, values = rewards * mask, values * mask
    last, steps = 0.0, rewards.shape[1]
    advantages = [None] * steps
    for t in range(steps - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < steps else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        advantages[t] = last
    advantages = torch.stack(advantages, 1) * mask
    returns = advantages + values
    if whiten:
        count = mask.sum()
        mean = advantages.sum() / count
        variance = (((advantages - mean) * mask) ** 2).sum() / (count - 1)
        advantages = (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask
    return advantages, returns


def python_loop_kl_gae(logprob, ref_logprob, score, values, *, beta, mask, **options):
    """KL rewards with the score on the last token, then the loop. For masks without holes."""
    kl = (logprob - ref_logprob) * mask
    rewards = -beta * kl
    rows = torch.arange(mask.shape[0], device=mask.device)
    rewards[rows, mask.sum(1) - 1] += score
    advantages, returns = python_loop_gae(rewards, values, mask=mask, **options)
    return advantages, returns, rewards, kl


def _cross_entropy(logits, targets, *, return_entropy):
    assert not return_entropy
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def _trl(upcast):
    try:
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy
    except ImportError:
        return None

    def token_logprob(logits, targets, *, return_entropy):
        function = selective_log_softmax_and_entropy if return_entropy else selective_log_softmax
        return function(logits.float() if upcast else logits, targets)

    return token_logprob


def token_logprob(logits, return_entropy):
    """Name -> function, of those that can be called here and give what is asked for."""
    found = {} if return_entropy else {"F.cross_entropy": _cross_entropy}
    found["TRL"] = _trl(upcast=False)
    if logits.dtype != torch.float32:
        found["TRL on .float()"] = _trl(upcast=True)
    return {name: function for name, function in found.items() if function is not None}


def linear_logprob():
    """TRL's chunked head, with the chunk of 32,768 words that its trainers set."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return {}

    def chunked(hidden, weight, targets):
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768)[0]

    return {"TRL": chunked}


def linear_cross_entropy():
    """torch's own fused head, which torch has from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    chunking = torch.nn.LinearCrossEntropyOptions()

    def fused(hidden, weight, targets):
        return F.linear_cross_entropy(hidden, weight, targets, options=chunking)

    return {"F.linear_cross_entropy": fused}


def linear_ppo_loss():
    """The head and the loss in plain PyTorch on whole logits: three products, and all of the memory."""

    def whole(hidden, weight, targets, old_logprob, advantages, clip, mask=None):
        logits = F.linear(hidden, weight).float()
        entropy = torch.zeros_like(old_logprob)
        logprob = -F.cross_entropy(logits, targets, reduction="none")
        options = {"entropy": entropy, "clip": clip, "mask": mask}
        return reference.ppo_loss(logprob, old_logprob, advantages, **options).loss

    return {"whole logits": whole}


def linear_token_loss():
    return {}
