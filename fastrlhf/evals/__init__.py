"""Evaluations, one file each; `fastrlhf eval` runs those that its files allow."""

from fastrlhf.evals.run import EvalConfig, main

__all__ = ["EvalConfig", "main"]
