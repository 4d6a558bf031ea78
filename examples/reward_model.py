"""A reward model trained on rankings of 2 to 6 completions per prompt, ties included.

    python examples/reward_model.py

`RankingLoss` takes the scores and ranks of all completions, grouped by prompt, and the start of each group
(`cu_groups`). Groups may differ in size.
"""

import torch
from transformers import LlamaConfig, LlamaModel

from fastrlhf.nn import RankingLoss

torch.manual_seed(0)
VOCAB, LENGTH, SIZE, PROMPTS = 24, 10, 32, 16
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2,
)  # fmt: skip
backbone, head = LlamaModel(config), torch.nn.Linear(SIZE, 1, bias=False)
ranking_loss = RankingLoss()
optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=3e-3)


def rankings(prompts):
    """Tokens [M, LENGTH], ranks [M] (1 is best) and cu_groups [P+1]. Fewer odd tokens are better."""
    sizes = torch.randint(2, 7, (prompts,))
    tokens = torch.randint(VOCAB, (int(sizes.sum()), LENGTH))
    odd = (tokens % 2).sum(1)
    ranks = torch.cat(
        [1 + group.unique(return_inverse=True)[1] for group in odd.split(sizes.tolist())]
    )
    cu_groups = torch.cat([torch.zeros(1), sizes.cumsum(0)]).int()
    return tokens, ranks, cu_groups


def scores_of(tokens):
    return head(backbone(tokens).last_hidden_state[:, -1]).squeeze(-1)


def accuracy(scores, ranks, cu_groups):
    """The fraction of pairs of different rank that the scores put in the right order."""
    right = []
    for start, stop in zip(cu_groups[:-1], cu_groups[1:], strict=True):
        s, r = scores[start:stop], ranks[start:stop]
        right.append((s[:, None] > s)[r[:, None] < r])
    return torch.cat(right).float().mean()


held_out = rankings(200)
for step in range(121):
    tokens, ranks, cu_groups = rankings(PROMPTS)
    loss = ranking_loss(scores_of(tokens), ranks, cu_groups)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        with torch.no_grad():
            right = accuracy(scores_of(held_out[0]), *held_out[1:])
        print(f"step {step:3} loss {loss:.3f} held-out pairs in order {right:.3f}")
