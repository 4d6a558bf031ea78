"""The extras of this package and what they install, read from the installed package's metadata.

pyproject.toml is the one list. A source tree that was never installed has no metadata: it reports no extras, and a
missing package shows as an ImportError.
"""

import importlib.metadata
import re

from fastrlhf.errors import UserError


def packages(extra: str) -> list[str]:
    """Names of the distributions that `extra` adds to the base install, sorted."""
    try:
        requirements = importlib.metadata.requires("fastrlhf") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = set()
    for requirement in requirements:
        # A requirement reads like: fastrlhf[train]>=1; extra == "demo".
        text, _, marker = requirement.partition(";")
        if not re.search(rf"""extra == ["']{re.escape(extra)}["']""", marker):
            continue
        name, included = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?", text).groups()
        if name == "fastrlhf":
            found.update(*map(packages, re.findall(r"[\w-]+", included)))
        else:
            found.add(name)
    return sorted(found)


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(extra: str) -> list[str]:
    """The packages of `extra` that are not installed."""
    return [name for name in packages(extra) if version(name) is None]


def how_to_install(extra: str) -> str:
    """How to install `extra`, for messages. fastrlhf is on no package index."""
    return f"in a clone of fastrlhf, pip install --no-build-isolation '.[{extra}]'"


def require(extra: str) -> None:
    """UserError unless every package of `extra` is installed."""
    if absent := missing(extra):
        raise UserError(
            f"needs the extra [{extra}]: {how_to_install(extra)} (missing: {', '.join(absent)})"
        )
