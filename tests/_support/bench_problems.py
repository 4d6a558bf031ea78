"""Small problems for the tests of benchmarks/. `harness` is the fixture of that name."""

import importlib
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"N": 8, "V": 8192, "entropy": 0}


def token_problem(harness, **sizes):
    case = harness[1].Case("token_logprob", "t", "float32", {**SIZES, **sizes})
    return case, importlib.import_module("bench_token_logprob").token_logprob


def problem_with_little_time(problem):
    problem.seconds = 0.01
    return problem
