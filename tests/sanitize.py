"""Calls every op on one backend, forward and backward, over few shapes: the program that compute-sanitizer watches.

    python tests/sanitize.py [--backend cuda]

Each tensor gets memory of its own where PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set, so that a read past its end
is a read past an allocation. Prints what it called; an op without a kernel on the backend is named, with
the reason, and is no failure.
"""

import argparse
import sys

import torch

import fastrlhf
from _support.small_calls import small_call
from fastrlhf.ops import _backend

# Vocabularies around vector and block widths; steps around a warp, a block and a scan's chunk.
VOCABULARIES = (1, 7, 257, 4133)
STEPS = (1, 5, 33, 257, 1030)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda", choices=_backend.BACKENDS)
    backend = parser.parse_args().backend
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    called = 0
    for op in fastrlhf.backends():
        if reason := _backend.unavailable_reason(op, backend, device):
            print(f"{op}: not called: {reason}")
            continue
        before = _backend.calls[op, backend]
        of_logits = "logprob" in op or "cross_entropy" in op
        for dtype in DTYPES:
            if of_logits:
                for vocab in VOCABULARIES:
                    small_call(op, backend, device, dtype, steps=2, vocab=vocab)
                small_call(op, backend, device, dtype, vocab=257, layout="mask")
                continue
            for steps in STEPS:
                for layout in (None, "mask", "cu_seqlens"):
                    small_call(op, backend, device, dtype, steps=steps, layout=layout)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{op}: {_backend.calls[op, backend] - before} calls")
        called += 1
    if not called:
        print(f"no op has a kernel on {backend} here")
    return 0 if called else 1


if __name__ == "__main__":
    sys.exit(main())
