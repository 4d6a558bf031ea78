"""Tensors and numbers that no op can take: a TypeError or ValueError that names the argument, on every backend."""

import pytest
import torch

import fastrlhf

TARGETS, V = torch.tensor([0, 1, 2]), torch.ones(3, 5)
BACKENDS = ("reference", "cpu", "triton")
ODD = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch.sparse_csr": lambda x: x.to_sparse_csr(),
    "torch._mkldnn": lambda x: x.to_mkldnn(),
    "a nested tensor": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ODD)
def test_layouts(kind, backend):
    odd = ODD[kind](V)
    message = r" must be a dense tensor \(torch.strided\); got " + kind
    with pytest.raises(TypeError, match=f"token_logprob: logits{message}"):
        fastrlhf.token_logprob(odd, TARGETS, backend=backend)
    with pytest.raises(TypeError, match=f"gae: values{message}"):
        fastrlhf.gae(V, odd, backend=backend)
    with pytest.raises(TypeError, match=f"ppo_loss: logprob{message}"):
        fastrlhf.ppo_loss(odd, V, V, backend=backend)
    with pytest.raises(TypeError, match=f"masked_whiten: mask{message}"):
        fastrlhf.masked_whiten(V, mask=odd, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_masks(backend):
    mask = torch.ones(3, 5, dtype=torch.complex64)
    with pytest.raises(TypeError, match="gae: mask must be bool, or 0 and 1; got torch.complex64"):
        fastrlhf.gae(V, V, mask=mask, backend=backend)


@pytest.mark.parametrize("beta", [10**400, -(10**400), float("inf"), float("nan")])
def test_numbers_beyond_a_float(beta):
    with pytest.raises(ValueError, match="kl_reward: beta must be a finite number of at least 0"):
        fastrlhf.kl_reward(V, V, torch.zeros(3), beta=beta)
