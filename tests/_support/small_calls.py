"""One call of each op on small inputs, its backward with it: for tests and tools that ask how it ran, not what it gave.

B sequences, T steps, N tokens, V vocabulary, H hidden.
"""

import torch

import fastrlhf


def small_call(op, backend, device, dtype=torch.float32, steps=5, vocab=50, layout=None, **more):
    """Calls `op`, and its backward where it has one; `layout` is None, "mask" or "cu_seqlens".

    `more` goes to the op as it is.
    """
    generator = torch.Generator(device).manual_seed(steps + vocab)
    rows, width = 3, 8

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def leaf(*shape):
        return draw(*shape).requires_grad_()

    shape, options = (rows, steps), {}
    if layout == "mask":
        keep = torch.rand(shape, generator=generator, device=device) < 0.7
        options["mask"] = keep
    elif layout == "cu_seqlens":
        shape = (rows * steps,)
        ends = [0, 1, 1 + steps, rows * steps]  # lengths 1, T, 2T - 1
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    score = draw(rows)
    logit_rows = (rows, steps)
    targets = torch.randint(vocab, logit_rows, generator=generator, device=device)
    row_mask = {"mask": options["mask"]} if layout == "mask" else {}
    if op in ("token_logprob", "linear_logprob"):
        row_mask["return_entropy"] = True
    groups = torch.tensor([0, 1, rows * steps], dtype=torch.int32, device=device)
    tokens = lambda count: [draw(*shape) for _ in range(count)]  # noqa: E731
    head = lambda: (leaf(*logit_rows, width), leaf(vocab, width), targets)  # noqa: E731
    ranked = rows * steps
    arguments = {
        "token_logprob": lambda: ((leaf(*logit_rows, vocab), targets), row_mask),
        "token_loss": lambda: ((leaf(*logit_rows, vocab), targets), row_mask),
        "linear_logprob": lambda: (head(), row_mask),
        "linear_cross_entropy": lambda: (head(), {}),
        "linear_ppo_loss": lambda: (
            (*head(), draw(*logit_rows), draw(*logit_rows)),
            {**row_mask, "entropy_coef": 0.01},
        ),
        "linear_token_loss": lambda: (
            (*head(), lambda logprob, advantage: -advantage * logprob),
            {**row_mask, "per_token": {"advantage": draw(*logit_rows)}},
        ),
        "kl_reward": lambda: ((*tokens(2), score), {"beta": 0.1, **options}),
        "gae": lambda: (tokens(2), {"whiten": True, **options}),
        "kl_gae": lambda: (
            (*tokens(2), score, *tokens(1)),
            {"beta": 0.1, "whiten": True, **options},
        ),
        "masked_whiten": lambda: (tokens(1), options),
        "ppo_loss": lambda: (
            (leaf(*shape), *tokens(2)),
            {
                "values": leaf(*shape),
                "old_values": draw(*shape),
                "returns": draw(*shape),
                "entropy": leaf(*shape),
                "entropy_coef": 0.01,
                "dual_clip": 3.0,
                **({"mask": options["mask"]} if layout == "mask" else {}),
            },
        ),
        "ranking_loss": lambda: (
            (
                leaf(ranked),
                torch.randint(1, 4, (ranked,), generator=generator, device=device),
                groups,
            ),
            {},
        ),
        "group_advantage": lambda: ((draw(ranked), groups), {}),
    }
    if op not in arguments:
        raise ValueError(
            f"small_call: {op} has no arguments here; add them to tests/_support/small_calls.py"
        )
    positional, named = arguments[op]()
    out = getattr(fastrlhf, op)(*positional, **named, **more, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if wanted:
        sum(x.sum() for x in wanted).backward()
