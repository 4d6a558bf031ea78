"""Memory traffic, peak memory, launches and host syncs of the linear ops on CUDA, against budgets, without a GPU.

Runs each op forward and backward on full-size meta tensors inside `FakeGpu` (see fake_gpu.py for what is counted) and
prints measured / budget. The exit status is 1 if a budget is exceeded. `make traffic`; tests/kernels/test_traffic.py
checks the table.

Columns: B/logit: bytes per logit of the unmasked rows, i.e. the write of the first GEMM and all traffic outside the
GEMMs except operands, dX and dW. dW GEMMs B: bytes per element of dW inside GEMMs (fp32: 4 for the first, 8 for each
that accumulates). dW B, dX B: bytes per element outside GEMMs (6 for the final cast of dW). workspace MiB: peak memory
of logits and dlogits. beyond GB: peak live memory without operands and returned gradients. largest GB: the largest
allocation (dW in fp32). launches: GEMMs and all other operations. syncs: host waits for the device.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from fake_gpu import FakeGpu

import fastrlhf

N, H, V = 8192, 4096, 128256  # Llama-3-8B
MIB, GB = 1 << 20, 1e9


class Found(NamedTuple):
    logit: float
    dw_gemms: float
    dw: float
    dx: float
    workspace: float
    beyond: float
    largest: float
    launches: int
    syncs: int


class Case(NamedTuple):
    """`rows`: unmasked rows of N. `loss`: called with a `Problem` and `options`. `budget`: upper bounds.

    `lengths`: of the sequences of the N rows, if they matter.
    """

    name: str
    loss: Callable
    budget: Found
    rows: int = N
    masked: bool = False
    options: dict = {}
    backward: bool = True
    into: bool = False
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = ()


class Problem:
    """Arguments with N rows on the meta device."""

    def __init__(self, case: Case, n: int, h: int, v: int):
        options = {"dtype": case.dtype, "device": "meta", "requires_grad": case.backward}
        self.hidden, self.weight = torch.empty(n, h, **options), torch.empty(v, h, **options)
        self.bias = torch.empty(v, **options) if case.bias else None
        self.targets = torch.empty(n, dtype=torch.int64, device="meta")
        self.old, self.advantages = torch.empty(2, n, device="meta")
        self.mask = torch.empty(n, dtype=torch.bool, device="meta") if case.masked else None
        self.cu_seqlens = None
        if case.lengths:
            self.cu_seqlens = torch.empty(len(case.lengths) + 1, dtype=torch.int32, device="meta")
        self.into = torch.empty(v, h, device="meta") if case.into else None


def _ppo(p: Problem, **options):
    arguments = (p.hidden, p.weight, p.targets, p.old, p.advantages)
    given = {"bias": p.bias, "mask": p.mask, "cu_seqlens": p.cu_seqlens}
    return fastrlhf.linear_ppo_loss(*arguments, **given, **options).loss


def _cross_entropy(p: Problem, **options):
    return fastrlhf.linear_cross_entropy(p.hidden, p.weight, p.targets, **options)


def _reinforce(logprob, advantages):
    return -logprob * advantages


def _token_loss(p: Problem, **options):
    per_token = {"advantages": p.advantages}
    arguments = (p.hidden, p.weight, p.targets, _reinforce)
    return fastrlhf.linear_token_loss(*arguments, per_token=per_token, mask=p.mask, **options).loss


def _logprob(p: Problem, **options):
    return fastrlhf.linear_logprob(p.hidden, p.weight, p.targets, mask=p.mask, **options)


COMPACT = {"workspace": "compact"}
GSPO = {"objective": "gspo", "aggregation": "seq-mean-token-mean"}
SOME = N * 2 // 5  # 60 % of the rows are masked
# logit, dw_gemms, dw, dx, workspace, beyond, largest, launches, syncs
CASES = [
    Case("linear_ppo_loss", _ppo, Found(10.01, 12, 6, 6, 1536, 3.0, 2.11, 28, 0)),
    Case(
        "linear_ppo_loss compact",
        _ppo,
        Found(10.01, 124, 6, 6, 256, 2.4, 2.11, 104, 0),
        options=COMPACT,
    ),
    Case(
        "linear_ppo_loss 60 % masked",
        _ppo,
        Found(10.01, 4, 6, 17, 1536, 3.0, 2.11, 34, 1),
        SOME,
        True,
    ),
    Case(
        "linear_ppo_loss 60 % masked, num_rows",
        _ppo,
        Found(10.01, 4, 6, 17, 1536, 3.0, 2.11, 43, 0),
        SOME,
        True,
        {"num_rows": SOME},
    ),
    Case(
        "linear_ppo_loss into fp32", _ppo, Found(10.01, 16, 0, 6, 1536, 3.0, 1.08, 28, 0), into=True
    ),
    # Adding the bias reads and writes the logits again; its gradient reads dlogits.
    Case("linear_ppo_loss, bias", _ppo, Found(20.02, 12, 6, 6, 1536, 3.0, 2.11, 44, 0), bias=True),
    # In fp32 dlogits overwrite the logits.
    Case(
        "linear_ppo_loss fp32",
        _ppo,
        Found(12.01, 28, 0, 0, 1024, 1.2, 2.11, 22, 0),
        dtype=torch.float32,
    ),
    # A ratio of sequences: statistics of a chunk, then its dlogits, read the logits once each.
    Case(
        "linear_ppo_loss gspo",
        _ppo,
        Found(14.01, 12, 6, 6, 1536, 3.0, 2.11, 143, 1),
        options=GSPO,
        lengths=(1024,) * 8,
    ),
    # Sequences longer than a chunk: their logits are computed twice, and read once each time.
    Case(
        "linear_ppo_loss gspo, longer than a chunk",
        _ppo,
        Found(18.01, 12, 6, 6, 1536, 3.0, 2.11, 107, 1),
        options=GSPO,
        lengths=(4096, 4096),
    ),
    Case("linear_cross_entropy", _cross_entropy, Found(10.01, 12, 6, 6, 1536, 3.0, 2.11, 35, 1)),
    Case(
        "linear_cross_entropy compact",
        _cross_entropy,
        Found(10.01, 124, 6, 6, 256, 2.4, 2.11, 111, 1),
        options=COMPACT,
    ),
    Case(
        "linear_cross_entropy num_rows",
        _cross_entropy,
        Found(10.01, 12, 6, 6, 1536, 3.0, 2.11, 36, 0),
        options={"num_rows": N},
    ),
    Case("linear_token_loss", _token_loss, Found(14.01, 12, 6, 6, 1536, 3.0, 2.11, 93, 0)),
    Case(
        "linear_token_loss compact",
        _token_loss,
        Found(14.01, 124, 6, 6, 256, 2.4, 2.11, 361, 0),
        options=COMPACT,
    ),
    Case(
        "linear_logprob forward",
        _logprob,
        Found(8.01, 0, 0, 0, 1024, 1.1, 0.54, 42, 0),
        backward=False,
    ),
    Case(
        "linear_logprob forward compact",
        _logprob,
        Found(8.01, 0, 0, 0, 256, 0.3, 0.14, 162, 0),
        options=COMPACT,
        backward=False,
    ),
    Case("linear_logprob", _logprob, Found(18.01, 12, 6, 6, 1536, 3.0, 2.11, 72, 0)),
    Case(
        "linear_logprob compact",
        _logprob,
        Found(18.01, 124, 6, 6, 256, 2.4, 2.11, 292, 0),
        options=COMPACT,
    ),
]


def measure(case: Case, n: int = N, h: int = H, v: int = V) -> Found:
    problem = Problem(case, n, h, v)
    options = case.options | ({"accumulate_into": problem.into} if case.into else {})
    offsets = itertools.accumulate(case.lengths, initial=0)
    with FakeGpu(v, h, meta=True, counted=case.rows, offsets=offsets) as gpu:
        out = case.loss(problem, **options)
        if case.backward:
            out.backward(torch.empty_like(out))
    gradients = [x.grad for x in (problem.hidden, problem.weight) if x.grad is not None]
    returned = sum(x.numel() * x.element_size() for x in gradients)
    outside = [
        sum(size for _, *both in gpu.passes_over(kind) for size in both)
        for kind in ("weight", "hidden")
    ]
    return Found(
        gpu.bytes_a_logit(case.rows),
        gpu.gemm_moved["weight"] / (v * h),
        outside[0] / (v * h),
        outside[1] / (n * h),
        gpu.peak_of["logits"] / MIB,
        (gpu.peak - returned) / GB,
        gpu.largest / GB,
        gpu.launches,
        gpu.syncs,
    )


def over(found: Found, budget: Found) -> list[str]:
    """The fields that exceed their budget."""
    pairs = zip(Found._fields, found, budget, strict=True)
    return [
        f"{name}: {is_:.4g}, {allowed:g} allowed" for name, is_, allowed in pairs if is_ > allowed
    ]


def _cell(value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    only = parser.parse_args(arguments).only
    titles = (
        "B/logit",
        "dW GEMMs B",
        "dW B",
        "dX B",
        "workspace MiB",
        "beyond GB",
        "largest GB",
        "launches",
        "syncs",
    )
    print(f"{N} x {H} x {V}: measured / budget; bf16 unless noted\n")
    print("| op | " + " | ".join(titles) + " |\n|---|" + "---|" * len(titles))
    bad = []
    for case in CASES:
        if only not in case.name:
            continue
        found = measure(case)
        cells = (f"{_cell(a)} / {_cell(b)}" for a, b in zip(found, case.budget, strict=True))
        print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)
        bad += [f"{case.name}: {line}" for line in over(found, case.budget)]
    print("\nColumns: " + __doc__.partition("Columns: ")[2].replace("\n", " ").strip())
    print("\n" + ("\n".join(bad) or "All within their budgets."))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
