"""A constant that requires grad is a ValueError, on every backend: its gradient would be lost without a word."""

import pytest
import torch

import fastrlhf

N, V = 3, 5
TARGETS, ROWS, HEAD = torch.arange(N), torch.linspace(-2, -1, N), torch.eye(V)
PPO = {"old_logprob": ROWS, "advantages": ROWS, "old_values": ROWS, "returns": ROWS}


def ppo_loss(x, **given):
    given = PPO | given
    return fastrlhf.ppo_loss(x[:, 0], values=x[:, 1], **given).loss


def linear_ppo_loss(x, **given):
    given = PPO | given
    return fastrlhf.linear_ppo_loss(x, HEAD, TARGETS, values=x[:, 1], **given).loss


def token_loss(x, **given):
    given = {"advantages": ROWS, "old_logprob": ROWS} | given
    return fastrlhf.token_loss(x, TARGETS, **given)[0].sum()


def linear_cross_entropy(x, **given):
    return fastrlhf.linear_cross_entropy(x, HEAD, TARGETS, **given)


def linear_token_loss(x, backend, **per_token):
    out = fastrlhf.linear_token_loss(
        x, HEAD, TARGETS, lambda logprob, a: -logprob * a, per_token=per_token, backend=backend
    )
    return out.loss


CASES = [
    *((ppo_loss, name) for name in PPO),
    *((linear_ppo_loss, name) for name in (*PPO, "scale", "temperature")),
    *((token_loss, name) for name in ("advantages", "old_logprob", "scale", "temperature")),
    *((linear_cross_entropy, name) for name in ("scale", "temperature")),
    (linear_token_loss, "a"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("call", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_constants(call, name, backend):
    x = torch.randn(N, V, requires_grad=True)
    value = torch.ones(()) if name in ("scale", "temperature") else ROWS.clone()
    call(x, backend=backend, **{name: value}).backward()
    value.requires_grad_()
    message = (
        rf"{call.__name__}: .*{name}.* must be a constant, .* \(detach it\); got a tensor that"
    )
    with pytest.raises(ValueError, match=message):
        call(x, backend=backend, **{name: value})
    with torch.no_grad():  # no gradient is asked for
        call(x, backend=backend, **{name: value})
