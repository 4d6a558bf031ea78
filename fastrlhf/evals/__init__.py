"""Evaluations of a model, one file each. `fastrlhf eval` runs those that it is given data for."""

from fastrlhf.evals.run import EvalConfig, main

__all__ = ["EvalConfig", "main"]
