"""Settings that every test runs under. Imported by pytest before any test module."""

import importlib.util
import os

import pytest
import torch

import fast_scan

# Read by Triton when a kernel is decorated, so it must be set before fastrlhf.kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        fast_scan.install()


@pytest.fixture
def poisoned():
    """Fresh memory, from Python and C++ alike, holds NaN: reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)
