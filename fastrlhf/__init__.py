"""Fused kernels for RLHF, and a thin PyTorch trainer that runs InstructGPT on them.

Importing this package imports nothing else and touches no GPU. A public name is imported from its
op on first use, so `fastrlhf --help` prints at once.
"""

import importlib

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    "KLGAEOutput": "fastrlhf.ops.kl_gae",
    "LinearTokenLossOutput": "fastrlhf.ops.linear_token_loss",
    "PPOLossOutput": "fastrlhf.ops.ppo_loss",
    "backends": "fastrlhf.ops._backend",
    "gae": "fastrlhf.ops.gae",
    "kl_gae": "fastrlhf.ops.kl_gae",
    "kl_reward": "fastrlhf.ops.kl_reward",
    "linear_cross_entropy": "fastrlhf.ops.linear_cross_entropy",
    "linear_logprob": "fastrlhf.ops.linear_logprob",
    "linear_ppo_loss": "fastrlhf.ops.linear_ppo_loss",
    "linear_token_loss": "fastrlhf.ops.linear_token_loss",
    "masked_whiten": "fastrlhf.ops.masked_whiten",
    "ppo_loss": "fastrlhf.ops.ppo_loss",
    "ranking_loss": "fastrlhf.ops.ranking_loss",
    "token_logprob": "fastrlhf.ops.token_logprob",
    "token_loss": "fastrlhf.ops.token_loss",
}

__all__ = ["__version__", "nn", *_HOME]


def __getattr__(name):
    if name == "nn":
        return importlib.import_module("fastrlhf.nn")
    if name not in _HOME:
        raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
