"""Fused kernels for RLHF, and a thin PyTorch trainer that runs InstructGPT on them.

Importing this package loads neither Triton nor transformers and touches no GPU.
"""

import importlib

from fastrlhf.ops._backend import backends

__version__ = "0.1.0"

__all__ = ["__version__", "backends"]

for _op, _names in {
    "token_logprob": ("token_logprob",),
    "linear_logprob": ("linear_logprob",),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "kl_reward": ("kl_reward",),
    "gae": ("gae",),
    "kl_gae": ("kl_gae", "KLGAEOutput"),
    "masked_whiten": ("masked_whiten",),
    "ppo_loss": ("ppo_loss", "PPOLossOutput"),
    "ranking_loss": ("ranking_loss",),
}.items():
    try:
        _module = importlib.import_module(f"fastrlhf.ops.{_op}")
    except ModuleNotFoundError:
        continue
    for _name in _names:
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
