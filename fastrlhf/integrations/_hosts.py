"""The hosts that can be patched and the versions they were tested with; `fastrlhf doctor` reads this.

Nothing here imports a host, nor torch: versions come from the installed distributions' metadata.
"""

import importlib.metadata
import re
from typing import NamedTuple


class Tested(NamedTuple):
    """Oldest and newest release line, "major.minor", that the tests have run against."""

    oldest: str
    newest: str

    def __str__(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def holds(self, version: str) -> bool:
        """Whether `version` belongs to a tested release line; its patch level does not matter."""
        return _line(self.oldest) <= _line(version) <= _line(self.newest)


TESTED = {
    "trl": Tested("1.16", "1.16"),
    "transformers": Tested("5.23", "5.24"),
    "verl": Tested("0.9", "0.9"),
    "openrlhf": Tested("0.11", "0.11"),
}


def _line(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return tuple((numbers + [0, 0])[:2])


def installed(host: str) -> str | None:
    """The version of the installed distribution, or None."""
    try:
        return importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:
        return None


def found() -> dict[str, dict]:
    """For each host its version here (None: not installed), the tested range, and whether it lies in it."""
    table = {}
    for host, tested in TESTED.items():
        version = installed(host)
        table[host] = {
            "version": version,
            "tested": str(tested),
            "in_tested_range": version is not None and tested.holds(version),
        }
    return table
