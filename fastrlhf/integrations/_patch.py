"""How a host's functions are replaced, and put back: one table a host, one `Host` object that applies it.

A replacement stands in the host's home module, in every module of the host that had imported the original by
value, and in the module-level dicts (registries) that hold it. Modules imported later take it from the home
module; `unpatch` finds those too. A copy of a replacement that someone kept calls the original once unpatched.
"""

import contextlib
import functools
import importlib
import inspect
import logging
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastrlhf.integrations import _hosts
from fastrlhf.ops import _backend

_log = logging.getLogger("fastrlhf.integrations")
_ABSENT = object()


class HostMoved(RuntimeError):
    """A host's function is not where, or not what, the table says."""


class Unserved(Exception):
    """Raised by a replacement for a call it cannot serve, before it has done anything: the host's own runs.

    The reason is counted, and logged once; an empty one marks calls that are none of its business.
    """


class LeftAlone(Exception):
    """Raised by a maker whose function is to stay the host's own, with the reason."""


class Target(NamedTuple):
    """One row of a host's table.

    `attribute` is a name in `module`, "Class.method", or an entry of a dict, "TABLE[key]" or "Class.TABLE[key]".
    `make(original, **options)` returns the function that takes its place; it may raise LeftAlone. `parameters`
    are the leading parameter names the replacement relies on. `new` rows add an entry that must be absent;
    their maker gets None, and may set `fallback`, a function of the host's, on what it returns. Without
    `by_value` only the named place is replaced.
    """

    module: str
    attribute: str
    op: str
    make: Callable
    parameters: tuple[str, ...] = ()
    new: bool = False
    by_value: bool = True

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"


class _Site(NamedTuple):
    """A place that holds a function: a key of a module's or registry's dict, or an attribute of a class."""

    holder: Any
    key: str

    def get(self):
        own = self.holder if isinstance(self.holder, dict) else vars(self.holder)
        return own.get(self.key, _ABSENT)

    def set(self, value) -> None:
        if isinstance(self.holder, dict):
            if value is _ABSENT:
                self.holder.pop(self.key, None)
            else:
                self.holder[self.key] = value
        elif value is _ABSENT:
            delattr(self.holder, self.key)
        else:
            setattr(self.holder, self.key, value)


class _Swap(NamedTuple):
    """A resolved row: what stood at home, what takes its place, and whether copies by value are looked for."""

    target: Target
    home: _Site
    before: Any
    after: Any
    by_value: bool


class Patch:
    """What `patch()` returns: holds the host patched until `unpatch()`, or the end of a `with` block.

    Several may hold the same host; its functions come back when the last one lets go, or when the host's own
    `unpatch()` lets go for all of them. `calls` and `fallbacks` count from the moment it was made.
    """

    def __init__(self, host: "Host"):
        self._host = host
        self._calls, self._fallbacks = host.calls(), host.fallbacks()

    def __enter__(self) -> "Patch":
        if not self._host.held_by(self):
            raise RuntimeError(
                f"this handle has let go of {self._host.name}, which would run unpatched; call patch() again"
            )
        return self

    def __exit__(self, *_) -> None:
        self.unpatch()

    def unpatch(self) -> None:
        """Let go of the host; does nothing the second time."""
        self._host.release(self)

    def suspended(self):
        """A `with` block in which the host's own functions run again, to compare; ours stay in place."""
        return self._host.suspended()

    @property
    def calls(self) -> dict[str, int]:
        """Host function -> calls that our op served (those traced by torch.compile do not count)."""
        return dict(Counter(self._host.calls()) - Counter(self._calls))

    @property
    def fallbacks(self) -> dict[tuple[str, str], int]:
        """(host function, reason) -> calls that the host's own function served."""
        return dict(Counter(self._host.fallbacks()) - Counter(self._fallbacks))

    @property
    def report(self) -> list[str]:
        """The lines that were logged when the host was patched."""
        return list(self._host.report)


class Host:
    """A package whose functions are replaced as one: all rows of `targets` or, after an error, none.

    Args:
        name: the package, and the distribution whose version is compared with the tested range.
        targets: the table.
        left_alone: host function -> why it stays as it is; for the report.
        prepare: called with no argument before anything is replaced; may import, register, raise.
    """

    def __init__(
        self,
        name: str,
        targets: tuple[Target, ...],
        left_alone: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self.name, self.targets, self.prepare = name, targets, prepare
        self.left_alone = left_alone or {}
        self.report: list[str] = []
        self._lock = threading.RLock()
        self._holders: set[Patch] = set()
        self._options: dict = {}
        self._swaps: list[_Swap] = []
        # Of one application, shared with its replacements: whether it stands, and how many suspend it.
        self._live = [False, 0]
        self._calls: Counter = Counter()
        self._fallbacks: Counter = Counter()

    @property
    def patched(self) -> bool:
        return bool(self._swaps)

    def calls(self) -> dict[str, int]:
        """Host function -> calls that our op served in this process."""
        with self._lock:
            return dict(self._calls)

    def fallbacks(self) -> dict[tuple[str, str], int]:
        """(host function, reason) -> calls that the host's own function served while patched."""
        with self._lock:
            return dict(self._fallbacks)

    def patch(self, **options) -> Patch:
        """Apply the table, unless it is applied already with these very options."""
        _backend.check_name(f"{self.name}.patch", options.get("backend", "auto"))
        with self._lock:
            if not self.patched:
                self._apply(options)
            elif options != self._options:
                raise RuntimeError(
                    f"{self.name} is patched with {self._options}; call unpatch() before patching it "
                    f"with {options}"
                )
            holder = Patch(self)
            self._holders.add(holder)
            return holder

    def held_by(self, holder: Patch) -> bool:
        with self._lock:
            return holder in self._holders

    def release(self, holder: Patch) -> None:
        with self._lock:
            if holder in self._holders:
                self._holders.remove(holder)
                if not self._holders:
                    self._undo()

    def unpatch(self) -> None:
        """Put the host's own functions back, whoever holds it patched; does nothing when none is replaced."""
        with self._lock:
            self._holders.clear()
            if self.patched:
                self._undo()

    @contextlib.contextmanager
    def suspended(self):
        """Run the host's own functions in a `with` block, in all threads, and leave ours in place: to compare."""
        live = self._live
        with self._lock:  # blocks of several threads overlap: the last one to end brings ours back
            live[1] += 1
        try:
            yield
        finally:
            with self._lock:
                live[1] -= 1

    # ---- apply and undo ----

    def _apply(self, options: dict) -> None:
        version = self._import()
        if self.prepare is not None:
            self.prepare()
        live, swaps, alone = [True, 0], [], dict(self.left_alone)
        for target in self.targets:
            try:
                swaps.append(self._resolve(target, version, options, live))
            except LeftAlone as reason:
                alone[target.name] = str(reason)
        copies = []
        self._live = live
        try:
            for swap in swaps:
                # Recorded before it is replaced: an error in between must find it.
                self._swaps.append(swap)
                swap.home.set(swap.after)
                copies.append(self._replace(swap.before, swap.after) if swap.by_value else 0)
        except BaseException:
            self._undo()
            raise
        self._options = options
        backend = options.get("backend", "auto")
        self.report = [
            f"{swap.target.name} runs {_runs(swap.target.op, backend)}"
            + (f"; also in {count} places that hold it by value" if count else "")
            for swap, count in zip(swaps, copies, strict=True)
        ] + [f"{name} is left alone: {reason}" for name, reason in alone.items()]
        for line in self.report:
            _log.info("%s %s: %s", self.name, version or "of unknown version", line)

    def _undo(self) -> None:
        self._live[0] = False
        for swap in reversed(self._swaps):
            held = swap.home.get()
            if held is swap.after:
                swap.home.set(swap.before)
            elif held is not swap.before:
                warnings.warn(
                    f"{swap.target.name} was replaced by someone else after fastrlhf patched it, and is "
                    "left as it is; where it calls ours, ours now calls the host's own",
                    stacklevel=4,
                )
            if swap.by_value:
                self._replace(swap.after, swap.before)
        self._swaps.clear()

    def _import(self) -> str | None:
        try:
            module = importlib.import_module(self.name)
        except ModuleNotFoundError as error:
            if error.name != self.name:
                raise
            raise ImportError(
                f"fastrlhf.integrations: {self.name} is not installed; pip install {self.name}"
            ) from None
        version = _hosts.installed(self.name) or getattr(module, "__version__", None)
        tested = _hosts.TESTED.get(self.name)
        if tested is not None and (version is None or not tested.holds(version)):
            warnings.warn(
                f"{self.name} {version or 'of unknown version'} is outside the range that fastrlhf was "
                f"tested with ({tested}); a function that has moved is an error",
                stacklevel=5,
            )
        return version

    def _resolve(self, target: Target, version, options: dict, live: list) -> _Swap:
        where = f"{self.name} {version or '(version unknown)'}"
        try:
            module = importlib.import_module(target.module)
        except ImportError as error:
            raise HostMoved(f"{where}: cannot import {target.module}: {error}") from error
        table = re.fullmatch(r"(.+)\[(.+)\]", target.attribute)
        path = table[1].split(".") if table else target.attribute.split(".")
        key = table[2] if table else path.pop()
        outer = module
        for name in path:
            outer = getattr(outer, name, _ABSENT)
            if outer is _ABSENT:
                raise HostMoved(f"{where} has no {target.module}.{'.'.join(path)}")
        method = bool(path) and not table
        home = _Site(outer if path else vars(module), key)
        before = home.get()
        # A method may be inherited: then the patch adds an attribute, and undoing it removes that.
        original = getattr(outer, key, _ABSENT) if method else before
        if (original is _ABSENT) != target.new:
            state = f"has {target.name} already" if target.new else f"has no {target.name}"
            raise HostMoved(f"{where} {state}")
        original = None if target.new else original
        if target.parameters:
            check_parameters(where, target.name, original, target.parameters)
        after = self._replacement(target, original, target.make(original, **options), live)
        if method and not inspect.isfunction(inspect.getattr_static(outer, key)):
            after = staticmethod(after)
        return _Swap(target, home, before, after, target.by_value and not (method or target.new))

    def _replacement(self, target: Target, original, ours: Callable, live: list) -> Callable:
        name, told, lock = target.name, set(), self._lock
        calls, fallbacks = self._calls, self._fallbacks
        named = original or ours
        original = original or getattr(ours, "fallback", None)

        def replacement(*args, **kwargs):
            if (live[1] or not live[0]) and original is not None:
                return original(*args, **kwargs)
            try:
                result = ours(*args, **kwargs)
            except Unserved as unserved:
                reason = str(unserved)
                if original is None:
                    raise ValueError(f"{name}: {reason}") from None
                if reason and not torch.compiler.is_compiling():
                    with lock:
                        fallbacks[name, reason] += 1
                    if reason and reason not in told:
                        told.add(reason)
                        _log.warning("%s runs the host's own function: %s", name, reason)
            else:
                if not torch.compiler.is_compiling():
                    with lock:
                        calls[name] += 1
                return result
            # Outside the handler: an error of the host's own must not drag ours along as its context.
            return original(*args, **kwargs)

        return functools.wraps(named)(replacement)

    def _replace(self, old, new) -> int:
        """Put `new` for `old` in the host's loaded modules and their dicts; how many places held it."""
        count = 0
        for name, module in list(sys.modules.items()):
            if name != self.name and not name.startswith(self.name + "."):
                continue
            # vars(), not getattr: a lazy module must not load anything because it was looked at.
            space = getattr(module, "__dict__", {})
            for key, value in list(space.items()):
                if value is old:
                    space[key] = new
                    count += 1
                elif type(value) is dict and key != "__builtins__":
                    for entry in [k for k, v in list(value.items()) if v is old]:
                        value[entry] = new
                        count += 1
        return count


def check_parameters(where: str, name: str, function: Callable, expected: tuple) -> None:
    """HostMoved unless the function's parameters start with the expected names."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise HostMoved(f"{where}: {name} has no signature: {error}") from error
    if names[: len(expected)] != expected:
        raise HostMoved(
            f"{where}: {name} takes {names}; fastrlhf expects it to start with {expected}"
        )


def _runs(op: str, backend: str) -> str:
    """ "<op>, backend <name>" as it will be chosen on this machine."""
    if op not in _backend.OPS:
        return op
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _backend.auto(op, device) if backend == "auto" else backend
    return f"{op}, backend {chosen}"
