"""docs/integrations.md: its snippets run, and its tables agree with the integrations and with the results file.

verl and OpenRLHF cannot be installed beside fastrlhf. Their snippets run on the modules that _support.unpacked loads.
"""

import importlib
import json
import re
from pathlib import Path

import pytest

from _support import unpacked
from fastrlhf.integrations import _versions

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", PAGE, re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results" / "integrations" / "amd-epyc-2026-11-26.json"


@pytest.fixture(autouse=True)
def clean():
    yield
    for package in _versions.TESTED:
        importlib.import_module(f"fastrlhf.integrations.{package}").unpatch()


def run(package: str) -> dict:
    """The namespace after the page's blocks, in order: those without a marker, and those that need `package`."""
    namespace = {}
    for needs, code in BLOCKS:
        if needs in ("", package):
            exec(code, namespace)
    return namespace


def test_snippet_of_transformers():
    assert run("")["handle"].calls


def test_snippet_of_trl():
    pytest.importorskip("trl", reason="trl is not installed; `make test` installs it")
    assert run("trl")["handle"].calls


@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_snippets_on_unpacked_modules(package):
    with unpacked.installed(getattr(unpacked, package)()):
        assert run(package)["handle"].calls
        importlib.import_module(f"fastrlhf.integrations.{package}").unpatch()


@pytest.mark.parametrize("package", _versions.TESTED)
def test_tested_versions_and_targets(package):
    assert f"| {package} | {_versions.TESTED[package]} |" in PAGE
    integration = importlib.import_module(f"fastrlhf.integrations.{package}")._INTEGRATION
    for target in integration.targets:
        table, _, entry = target.attribute.removesuffix("]").partition("[")
        name = table.removesuffix("._global_mapping")
        assert f"`{name}`" in PAGE, name
        assert not entry or f"`{entry}`" in PAGE, entry


def test_figures_are_those_of_the_results_file():
    rows = {f"{row['ms']['original']:.1f}": row for row in json.loads(RESULTS.read_text())["rows"]}
    number = r"([\d.]+)"
    pattern = rf"\| {number} \| {number} \| {number} \| {number} → {number} \| ([\d.]*) \|$"
    found = re.findall(pattern, PAGE, re.MULTILINE)
    assert len(found) == 8
    for original, ours, faster, memory, our_memory, ratio in found:
        row = rows[original]
        held = row.get("extra_bytes") or row["peak_bytes"]
        assert f"{row['ms']['fastrlhf']:.1f}" == ours
        assert f"{row['times_faster']:.1f}" == faster
        assert [f"{held[k] / 2**20:.0f}" for k in ("original", "fastrlhf")] == [memory, our_memory]
        assert ratio == (f"{row['error_ratio']:.2f}" if "error_ratio" in row else "")
