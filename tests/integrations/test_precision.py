"""What patching changes in 16 bits: log-probs that are rounded right, and entropies nearer to fp64. The figures are in
docs/integrations.md.

In fp32 the tests of each integration hold the results to the host's rounding. 128 rows of 32,000 logits.
"""

import contextlib
import importlib
import re
from pathlib import Path

import pytest
import torch

from _support import unpacked
from _support.logit_cases import randint, randn

ROWS, V = (4, 32), 32_000
PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UTILS = {"verl": "verl.utils.torch_functional", "OpenRLHF": "openrlhf.models.utils"}
# A row of the page's table: the host, dtype, temperature, log-probs rounded right, largest error of an entropy.
FIGURES = re.findall(
    r"^\| (TRL|verl|OpenRLHF) \| (\w+) \| ([\d.]+) \| (\d+) → (\d+) \| (\S+) → (\S+) \|$", PAGE.read_text(), re.M
)  # fmt: skip


@contextlib.contextmanager
def host(package):
    """(log-probs of (logits, labels, temperature), entropies of logits, patch), which call what is patched."""
    integration = importlib.import_module(f"fastrlhf.integrations.{package.lower()}")
    if package == "TRL":
        utils = pytest.importorskip("trl.trainer.utils")
        yield (
            lambda *given: utils.selective_log_softmax(*given),
            lambda x: utils.entropy_from_logits(x),
            integration.patch,
        )
        return
    with unpacked.installed(getattr(unpacked, package.lower())()) as modules:
        module = modules[UTILS[package]]
        name = "logprobs_from_logits" if package == "verl" else "log_probs_from_logits"
        entropy = "entropy_from_logits" if package == "verl" else "compute_entropy"
        with torch.compiler.set_stance("force_eager"):
            yield (
                lambda x, labels, _: getattr(module, name)(x.clone(), labels),
                lambda x: getattr(module, entropy)(x),
                integration.patch,
            )
        integration.unpatch()


def measured(log_probs, entropies, logits, labels, temperature):
    """(rows whose log-prob is the fp64 one rounded once, largest error of an entropy)."""
    exact = torch.log_softmax(logits.double() / temperature, -1)
    right = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1).to(logits.dtype)
    scaled = logits / temperature  # entropies have no temperature: the caller divides
    log_p = torch.log_softmax(scaled.double(), -1)
    error = entropies(scaled).double() + (log_p.exp() * log_p).sum(-1)
    same = log_probs(logits, labels, temperature) == right
    return int(same.sum()), float(error.abs().max())


def test_the_page_has_every_host():
    assert {(package, dtype) for package, dtype, *_ in FIGURES} == {
        (package, dtype) for package in ("TRL", *UTILS) for dtype in DTYPES
    }


def test_the_figures_of_the_readme_are_those_of_the_page():
    text = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    found = re.search(
        r"of 128 bf16 log-probs (\d+) are rounded right, against TRL's (\d+) \((\d+) at temp\w+ ([\d.]+)\)",
        text,
    )
    ours, theirs, scaled, temperature = found.groups()
    rows = {row[2]: row[3:5] for row in FIGURES if row[:2] == ("TRL", "bf16")}
    assert rows == {"1": (theirs, ours), temperature: (scaled, ours)}


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: "-".join(row[:3]))
def test_figures_of_the_page(row):
    """Ours exactly; the host's vary with torch's vector instructions, by less than the lead of ours."""
    package, dtype, temperature, host_right, our_right, host_error, our_error = row
    logits = randn(*ROWS, V, seed=0, scale=4.0).to(DTYPES[dtype])
    labels = randint(V, ROWS, seed=1)
    with host(package) as (log_probs, entropies, patch):
        theirs = measured(log_probs, entropies, logits, labels, float(temperature))
        with patch() as patched:
            ours = measured(log_probs, entropies, logits, labels, float(temperature))
        assert len(patched.calls) == 2 and not patched.fallbacks
    print(
        f"| {package} | {dtype} | {temperature} | {theirs[0]} → {ours[0]} | {theirs[1]:.1e} → {ours[1]:.1e} |"
    )
    assert ours[0] == int(our_right) == 128
    assert ours[1] == pytest.approx(float(our_error), rel=0.05)
    assert abs(theirs[0] - int(host_right)) <= 4
    assert theirs[1] == pytest.approx(float(host_error), rel=0.3) and theirs[1] > 2 * ours[1]
