"""Fused kernels for RLHF, and a thin PyTorch trainer that runs InstructGPT on them.

Importing this package imports no other and touches no GPU. A public name is imported from its
op on first use, so `fastrlhf --help` prints at once.
"""

import importlib
import sys

__version__ = "0.1.0"
if sys.version_info < (3, 10):  # noqa: UP036  (pip is not the only way to get here)
    raise ImportError(
        f"fastrlhf {__version__} needs Python >= 3.10; this is {'.'.join(map(str, sys.version_info[:3]))}"
    )

from fastrlhf import _namespace

OLDEST_TORCH = (2, 10)
NEWEST_TORCH = (2, 13)  # that the tests have run with

# Public name -> the module that defines it.
_HOME = {
    "KLGAEOutput": "fastrlhf.ops.kl_gae",
    "LinearCrossEntropyOutput": "fastrlhf.ops.linear_cross_entropy",
    "LinearTokenLossOutput": "fastrlhf.ops.linear_token_loss",
    "PPOLossOutput": "fastrlhf.ops.ppo_loss",
    "backends": "fastrlhf.ops._backend",
    "gae": "fastrlhf.ops.gae",
    "group_advantage": "fastrlhf.ops.group_advantage",
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
    try:
        value = getattr(importlib.import_module(_HOME[name]), name)
    except (AttributeError, ImportError) as error:
        # The ops use parts of torch that a later release may rename.
        torch = sys.modules.get("torch")
        if torch is None or torch_release(torch.__version__) <= NEWEST_TORCH:
            raise
        raise ImportError(
            f"fastrlhf {__version__} does not work with torch {torch.__version__}: {error}. It needs "
            f"{_dotted(OLDEST_TORCH)} or later, and is tested up to {_dotted(NEWEST_TORCH)}"
        ) from error
    globals()[name] = value
    return value


def torch_release(version):
    """(major, minor)."""
    return tuple(int(part) for part in version.split(".")[:2])


def too_old(version):
    return (
        f"fastrlhf {__version__} needs torch >= {_dotted(OLDEST_TORCH)}; this is torch {version}. Upgrade it "
        "(https://pytorch.org/get-started/locally)"
    )


def _dotted(release):
    return ".".join(map(str, release))


def __dir__():
    return sorted(__all__)


_namespace.offer(set(_HOME.values()))
