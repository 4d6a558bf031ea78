"""The tested versions of each package that `fastrlhf.integrations` patches; `fastrlhf doctor` reports them.

Imports neither the packages nor torch: versions come from the metadata of the installed distributions.
"""

import importlib.metadata
import re
from typing import NamedTuple


class TestedRange(NamedTuple):
    """The oldest and the newest tested release line, each "major.minor"."""

    oldest: str
    newest: str

    def __str__(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def contains(self, version: str) -> bool:
        """Whether `version` is in a tested release line, at any patch level."""
        return _line(self.oldest) <= _line(version) <= _line(self.newest)


TESTED = {
    "trl": TestedRange("1.16", "1.16"),
    "transformers": TestedRange("5.23", "5.24"),
    "verl": TestedRange("0.9", "0.9"),
    "openrlhf": TestedRange("0.11", "0.11"),
}


def _line(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return tuple((numbers + [0, 0])[:2])


def installed(package: str) -> str | None:
    """The version of the installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def status() -> dict[str, dict]:
    """Package -> its installed version (None: not installed), the tested range, and whether the version is in it."""
    table = {}
    for package, tested in TESTED.items():
        version = installed(package)
        table[package] = {
            "version": version,
            "tested": str(tested),
            "in_tested_range": version is not None and tested.contains(version),
        }
    return table
