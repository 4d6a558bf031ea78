"""The sequence packer of the trainer: C++ if it is built, else the Python reference."""

from collections.abc import Callable

import numpy as np

from cases import Case
from fastrlhf.train import packing


def problem(case: Case) -> tuple[str, Callable, str]:
    """(Provider, the call to time, why it must not be timed or ""): checked at a hundredth of the size."""
    lengths = np.random.default_rng(0).integers(1, 2049, case.sizes["n"])
    few, budget = lengths[: max(len(lengths) // 100, 1)], case.sizes["max_tokens"]
    expected = packing.pack_reference(few, budget, 1)
    same = [b.tolist() for b in packing.pack(few, budget)] == [b.tolist() for b in expected]
    reason = "" if same else "its batches differ from those of the reference"
    return (
        "cpu" if packing._C else "reference",
        lambda: packing.pack(lengths, budget),
        reason,
    )
