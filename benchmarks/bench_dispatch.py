"""Dispatch overhead of a call: each op on tensors so small that only Python, autograd and the dispatcher count.

    python benchmarks/bench_dispatch.py

A ratio is the thread CPU time of a call over that of F.cross_entropy forward + backward on [8, 50], sampled
round-robin in one process. Outputs of shape [N] get `.backward(g)` with a g made beforehand. The backend is "cpu":
checks, autograd and metrics of the GPU backends are the same; kernel launches are not included.
"""

import json
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional

import fastrlhf

ROWS, VOCAB, WIDTH = 8, 50, 16
# Upper bounds, checked by tests/ops/test_host_path.py.
TARGETS = {
    "gae": 0.85,
    "kl_gae": 0.85,
    "masked_whiten": 0.85,
    "kl_reward": 0.85,
    "group_advantage": 0.85,
    "ppo_loss forward": 1.0,
    "ppo_loss": 2.2,
    "token_loss": 2.0,
    "token_logprob": 2.0,
    "ranking_loss": 2.0,
    "linear_ppo_loss": 4.0,
}


def calls():
    """Name -> one call: forward and backward, or forward only for ops without gradients and "ppo_loss forward"."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape)  # noqa: E731
    leaf = lambda *shape: torch.randn(shape, requires_grad=True)  # noqa: E731
    targets, ready = torch.randint(VOCAB, (ROWS,)), draw(ROWS)
    logits, logprob, values, scores = leaf(ROWS, VOCAB), leaf(ROWS), leaf(ROWS), leaf(ROWS)
    old, advantages, old_values, returns = (draw(ROWS) for _ in range(4))
    tokens = [draw(2, 4) for _ in range(3)]
    score, hidden, weight = draw(2), leaf(ROWS, WIDTH), leaf(VOCAB, WIDTH)
    ranks, groups = torch.arange(1, ROWS + 1), torch.tensor([0, ROWS], dtype=torch.int32)
    critic = {"old_values": old_values, "returns": returns}

    def trained(call, *leaves):
        def both():
            for x in leaves:
                x.grad = None
            call()

        return both

    ppo = lambda: fastrlhf.ppo_loss(logprob, old, advantages, values=values, **critic)  # noqa: E731
    head = (hidden, weight, targets, old, advantages)
    return {
        "F.cross_entropy": trained(
            lambda: functional.cross_entropy(logits, targets).backward(), logits
        ),
        "gae": lambda: fastrlhf.gae(*tokens[:2]),
        "kl_gae": lambda: fastrlhf.kl_gae(*tokens[:2], score, tokens[2], beta=0.1),
        "masked_whiten": lambda: fastrlhf.masked_whiten(tokens[0]),
        "kl_reward": lambda: fastrlhf.kl_reward(*tokens[:2], score, beta=0.1),
        "group_advantage": lambda: fastrlhf.group_advantage(ready, groups),
        "ppo_loss forward": ppo,
        "ppo_loss": trained(lambda: ppo().loss.backward(), logprob, values),
        "token_loss": trained(
            lambda: fastrlhf.token_loss(logits, targets, advantages)[0].backward(ready), logits
        ),
        "token_logprob": trained(
            lambda: fastrlhf.token_logprob(logits, targets).backward(ready), logits
        ),
        "ranking_loss": trained(
            lambda: fastrlhf.ranking_loss(scores, ranks, groups).backward(), scores
        ),
        "linear_ppo_loss": trained(
            lambda: fastrlhf.linear_ppo_loss(*head).loss.backward(), hidden, weight
        ),
    }


def ratios(rounds=20, warm=12, samples=6):
    """(Name -> ratio to F.cross_entropy, microseconds of F.cross_entropy).

    A ratio is the median over rounds of the ratio of medians. Each round discards its first `warm` calls, since
    other processes on the core leave cold caches.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = calls()
        taken = {name: [] for name in made}
        for _ in range(rounds):
            for name, call in made.items():
                for _ in range(warm):
                    call()
                taken[name].append(statistics.median(_seconds(call) for _ in range(samples)))
    finally:
        torch.set_num_threads(threads)
    base = taken.pop("F.cross_entropy")
    found = {
        name: statistics.median(a / b for a, b in zip(times, base, strict=True))
        for name, times in taken.items()
    }
    return found, 1e6 * statistics.median(base)


def _seconds(call, each=3):
    start = time.thread_time()
    for _ in range(each):
        call()
    return (time.thread_time() - start) / each


def show(console_print=print):
    """Measure and print the ratios; return them by name."""
    found, base = ratios()
    console_print(
        f"dispatch: F.cross_entropy forward + backward on [{ROWS}, {VOCAB}] takes {base:.1f} us; ratios to it:"
    )
    for name, ratio in found.items():
        console_print(f"{name:>20} {ratio:5.2f} (at most {TARGETS[name]:.2f})")
    return found


def alone(console_print=print):
    """`show` in a new process, without the workers of torch.compile and spinning threads of this one."""
    done = subprocess.run(
        [sys.executable, __file__, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    *lines, found = done.stdout.splitlines()
    console_print("\n".join(lines))
    return json.loads(found)


if __name__ == "__main__":
    ratios_found = show()
    if "--json" in sys.argv[1:]:
        print(json.dumps(ratios_found))
