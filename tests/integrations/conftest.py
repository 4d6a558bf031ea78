"""The hosts' modules, as tests/_support/unpacked.py loads them, importable during the test and unpatched after it."""

import pytest
import torch

from _support import unpacked
from fastrlhf.integrations import openrlhf as openrlhf_integration
from fastrlhf.integrations import verl as verl_integration


@pytest.fixture
def verl():
    with unpacked.installed(unpacked.verl()) as modules:
        yield modules
        verl_integration.unpatch()


@pytest.fixture
def openrlhf():
    """OpenRLHF compiles `compute_entropy`; here it runs uncompiled, which saves minutes of compilation."""
    with unpacked.installed(unpacked.openrlhf()) as modules:
        with torch.compiler.set_stance("force_eager"):
            yield modules
        openrlhf_integration.unpatch()
