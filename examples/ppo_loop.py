"""A PPO loop on fastrlhf's ops: a tiny random model learns to generate small token ids.

python examples/ppo_loop.py
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastrlhf
from fastrlhf.nn import PPOLoss

torch.manual_seed(0)
VOCAB, EOS, PROMPT, STEPS, BATCH, SIZE = 32, 0, 4, 12, 64, 32
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, pad_token_id=EOS, eos_token_id=EOS,
)  # fmt: skip
policy, value_head = LlamaForCausalLM(config), torch.nn.Linear(SIZE, 1)
reference = copy.deepcopy(policy).requires_grad_(False)
ppo_loss = PPOLoss(clip=0.2, value_coef=0.5, entropy_coef=0.01)
parameters = [*policy.parameters(), *value_head.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)


def sample():
    tokens = torch.randint(1, VOCAB, (BATCH, PROMPT))
    for _ in range(STEPS):
        logits = policy(tokens).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def score(model, tokens):
    """(log-prob, entropy, hidden) of each response token. The logits are never stored."""
    hidden = model.model(tokens[:, :-1]).last_hidden_state[:, PROMPT - 1 :]
    head, targets = model.lm_head.weight, tokens[:, PROMPT:]
    return *fastrlhf.linear_logprob(hidden, head, targets, return_entropy=True), hidden


for step in range(30):
    with torch.no_grad():
        tokens = sample()
        response = tokens[:, PROMPT:]
        ended = (response == EOS).long().cumsum(1)
        mask = (ended == 0) | (
            (ended == 1) & (response == EOS)
        )  # up to and including the first EOS
        reward = ((response < 8) & mask).sum(1) / STEPS
        old_logprob, _, hidden = score(policy, tokens)
        old_values = value_head(hidden)[..., 0]
        ref_logprob, *_ = score(reference, tokens)
        batch = fastrlhf.kl_gae(
            old_logprob, ref_logprob, reward, old_values, beta=0.01, mask=mask, whiten=True
        )
    for _ in range(4):
        logprob, entropy, hidden = score(policy, tokens)
        out = ppo_loss(
            logprob, old_logprob, batch.advantages, values=value_head(hidden)[..., 0],
            old_values=old_values, returns=batch.returns, entropy=entropy, mask=mask,
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    kl, clipped = out.metrics["approx_kl"], out.metrics["clip_fraction"]
    print(f"step {step:2} reward {reward.mean():.3f} approx_kl {kl:.4f} clipped {clipped:.2f}")
