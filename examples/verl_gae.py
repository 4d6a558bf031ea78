"""GAE with verl's semantics on your [B, T] tensors: the usual loop over T, and one call of fastrlhf.gae.

    python examples/verl_gae.py

The mask is 1 at response tokens. Masked tokens (prompt, tool output, padding) are skipped: the successor of a token is
the next unmasked one. The advantages are whitened over all unmasked tokens.
"""

import time

import torch

import fastrlhf

B, T, GAMMA, LAM = 256, 512, 1.0, 0.95


def loop(rewards, values, mask):
    next_value = next_advantage = torch.zeros(len(rewards))
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        on = mask[:, t].bool()
        next_advantage = torch.where(on, delta + GAMMA * LAM * next_advantage, next_advantage)
        next_value = torch.where(on, values[:, t], next_value)
        advantages[:, t] = next_advantage * on
    returns = (advantages + values) * mask
    kept = advantages[mask.bool()]
    whitened = (advantages - kept.mean()) * torch.rsqrt(kept.var() + 1e-8) * mask
    return whitened, returns


def one_call(rewards, values, mask):
    return fastrlhf.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask, whiten=True)


def milliseconds(function, *inputs, repeats):
    function(*inputs)
    start = time.perf_counter()
    for _ in range(repeats):
        function(*inputs)
    return (time.perf_counter() - start) / repeats * 1e3


torch.manual_seed(0)
lengths = torch.randint(1, T + 1, (B,))
mask = (torch.arange(T) < lengths[:, None]) & (torch.rand(B, T) < 0.9)  # ragged, with holes
mask[:, 0] = True
rewards, values = 0.1 * torch.randn(B, T) * mask, torch.randn(B, T) * mask

pairs = zip(one_call(rewards, values, mask), loop(rewards, values, mask), strict=True)
difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
old = milliseconds(loop, rewards, values, mask, repeats=3)
new = milliseconds(one_call, rewards, values, mask, repeats=20)
print(f"GAE of {B} x {T}: largest difference {difference:.1e}")
print(f"loop {old:.1f} ms, fastrlhf.gae {new:.2f} ms: {old / new:.0f} x")
