"""Targets: the functions that an integration replaces, and the checks that each must pass first.

`locate` runs all checks of one target and changes nothing. `Integration` (_patch.py) replaces functions only after
every target of its table has passed.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastrlhf.integrations import PatchError

ABSENT = object()


class Unsupported(Exception):
    """Raised by a replacement, before any side effect, for a call that it cannot compute.

    The original function then runs. The reason is counted in `fallbacks` and logged once. An empty reason marks a
    call that the replacement does not concern; it is neither counted nor logged.
    """


class NotReplaced(Exception):
    """Raised by `Target.make` to leave the original in place; the message is the reason."""


class Target(NamedTuple):
    """One function to replace: a row of an integration's table."""

    module: str
    # A name in `module`, "Class.method", or an entry of a dict: "TABLE[key]", "Class.TABLE[key]".
    attribute: str
    op: str  # the fastrlhf op that serves it; for the report
    # make(original, **options) -> the replacement. May raise NotReplaced.
    make: Callable
    # The leading parameter names that the replacement relies on. For `apply` of an autograd.Function: of `forward`.
    parameters: tuple[str, ...] = ()
    # Add an entry that must not exist yet. `make` gets original=None; it may set `fallback`, a function of the
    # package, on the replacement.
    new: bool = False
    # Also replace references that other modules of the package hold after `from module import name`.
    references: bool = True

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"


class Site(NamedTuple):
    """A place that holds a function: a key of a module's or a registry's dict, or an attribute of a class."""

    holder: Any
    key: str

    def get(self):
        own = self.holder if isinstance(self.holder, dict) else vars(self.holder)
        return own.get(self.key, ABSENT)

    def set(self, value) -> None:
        if isinstance(self.holder, dict):
            if value is ABSENT:
                self.holder.pop(self.key, None)
            else:
                self.holder[self.key] = value
        elif value is ABSENT:
            delattr(self.holder, self.key)
        else:
            setattr(self.holder, self.key, value)


class Located(NamedTuple):
    """A target that passed its checks."""

    site: Site
    before: Any  # what the site holds; ABSENT for an inherited method or a new entry
    original: Callable | None  # what a fallback calls; None for a new entry
    static: bool  # the replacement must be a staticmethod
    references: bool


def locate(target: Target, package: str) -> Located:
    """Finds the target in the installed package.

    Args:
        package: name and version, for messages.

    Raises:
        PatchError: the module, a class on the way or the attribute does not exist; a new entry exists already; or
            the leading parameter names are not `target.parameters`.
    """
    try:
        module = importlib.import_module(target.module)
    except ImportError as error:
        raise PatchError(f"{package}: cannot import {target.module}: {error}") from error
    entry = re.fullmatch(r"(.+)\[(.+)\]", target.attribute)
    path = entry[1].split(".") if entry else target.attribute.split(".")
    key = entry[2] if entry else path.pop()
    owner = module
    for name in path:
        owner = getattr(owner, name, ABSENT)
        if owner is ABSENT:
            raise PatchError(f"{package} has no {target.module}.{'.'.join(path)}")
    is_method = bool(path) and not entry
    site = Site(owner if path else vars(module), key)
    before = site.get()
    # An inherited method is found by getattr only. The patch then adds an attribute, and unpatch() removes it.
    original = getattr(owner, key, ABSENT) if is_method else before
    if target.new:
        if original is not ABSENT:
            raise PatchError(f"{package} has {target.name} already")
        original = None
    elif original is ABSENT:
        raise PatchError(f"{package} has no {target.name}")
    if target.parameters:
        _check_parameters(package, target.name, original, target.parameters)
    static = is_method and not inspect.isfunction(inspect.getattr_static(owner, key))
    return Located(
        site, before, original, static, target.references and not (is_method or target.new)
    )


def _check_parameters(package: str, name: str, function: Callable, expected: tuple) -> None:
    """PatchError unless the function's parameter names start with `expected`."""
    cls = getattr(function, "__self__", None)
    if isinstance(cls, type) and issubclass(cls, torch.autograd.Function):
        function = cls.forward  # autograd gives `apply` no useful signature
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise PatchError(f"{package}: {name} has no signature: {error}") from error
    if names[: len(expected)] != expected:
        raise PatchError(f"{package}: {name} takes {names}; expected names that start {expected}")
