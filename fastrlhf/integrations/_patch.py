"""Replaces the functions of a third-party package and restores them.

An `Integration` is a package and its table of `Target`s. `Integration.patch()` works in this order:

1. Check. The package must be installed (ImportError), the options must be those of the current patch if there is
   one (RuntimeError), and every target must exist with the expected parameters (PatchError; see _targets.py). A
   version outside the tested range is a warning. If a check fails, nothing has changed.
2. Replace. Each function is replaced in its home module, in every loaded module of the package that imported it by
   name, and in module-level dicts (registries) that hold it. An error midway restores all of them. Modules that are
   imported later take the replacement from the home module.
3. Report. `Patch.report` lists what was replaced, by which op and backend, and what was left unchanged.

Each replacement calls the original for what it does not support (`Unsupported`) and while a patch is suspended. After
`unpatch()` every reference is restored, in modules imported meanwhile too. A replacement that user code still holds
then calls the original.
"""

import contextlib
import functools
import importlib
import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fastrlhf
from fastrlhf.integrations import _versions
from fastrlhf.integrations._targets import Located, NotReplaced, Target, Unsupported, locate
from fastrlhf.ops import _backend

_log = logging.getLogger("fastrlhf.integrations")


class _Swap(NamedTuple):
    """A located target and its replacement."""

    target: Target
    located: Located
    after: Any


class _State:
    """Shared by all replacements of one `_apply`: they call the originals unless active and not suspended."""

    __slots__ = ("active", "suspensions")

    def __init__(self):
        self.active, self.suspensions = True, 0


class Patch:
    """The handle that `patch()` returns; a context manager that unpatches at its end.

    Several handles may share one package: its functions are restored when the last handle is released, or at once by
    the integration's `unpatch()`. `calls` and `fallbacks` count from the creation of the handle.
    """

    def __init__(self, integration: "Integration"):
        self._integration = integration
        self._calls, self._fallbacks = integration.calls(), integration.fallbacks()

    def __enter__(self) -> "Patch":
        if not self._integration.is_held_by(self):
            raise RuntimeError(
                f"this handle of {self._integration.package} is already released, so the block would run "
                "unpatched; call patch() again"
            )
        return self

    def __exit__(self, *_) -> None:
        self.unpatch()

    def unpatch(self) -> None:
        """Releases this handle. A second call does nothing."""
        self._integration.release(self)

    def suspended(self):
        """A context manager: the original functions run in its block, for comparisons."""
        return self._integration.suspended()

    @property
    def calls(self) -> dict[str, int]:
        """Function -> number of calls that an op served. Calls traced by torch.compile are not counted."""
        return dict(Counter(self._integration.calls()) - Counter(self._calls))

    @property
    def fallbacks(self) -> dict[tuple[str, str], int]:
        """(function, reason) -> number of calls that the original served while patched."""
        return dict(Counter(self._integration.fallbacks()) - Counter(self._fallbacks))

    @property
    def report(self) -> list[str]:
        """The lines that patch() logged: what was replaced, and what was left unchanged."""
        return list(self._integration.report)


class Integration:
    """A package whose targets are replaced together: all of them, or none after an error.

    Args:
        package: the name of the package and of its distribution, whose version is compared with the tested range.
        targets: the functions to replace.
        unchanged: function -> why it is not replaced; for the report.
        prepare: called before anything is replaced. May import, register, or raise.
    """

    def __init__(
        self,
        package: str,
        targets: tuple[Target, ...],
        unchanged: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self.package, self.targets, self.prepare = package, targets, prepare
        self.unchanged = unchanged or {}
        self.report: list[str] = []
        self._lock = threading.RLock()
        self._handles: set[Patch] = set()
        self._options: dict = {}
        self._swaps: list[_Swap] = []
        self._state = _State()
        self._calls: Counter = Counter()
        self._fallbacks: Counter = Counter()
        self._uncounted = threading.local()

    @property
    def patched(self) -> bool:
        return bool(self._swaps)

    def calls(self) -> dict[str, int]:
        """Function -> number of calls that an op served in this process."""
        with self._lock:
            return dict(self._calls)

    def fallbacks(self) -> dict[tuple[str, str], int]:
        """(function, reason) -> number of calls that the original served while patched, in this process."""
        with self._lock:
            return dict(self._fallbacks)

    def patch(self, **options) -> Patch:
        """Replaces the targets, unless they are replaced already with the same options.

        Raises:
            ValueError: `backend` is not the name of a backend.
            ImportError: the package is not installed.
            PatchError: a target does not exist, or has other parameters.
            RuntimeError: the package is patched with other options.
        """
        _backend.check_name(f"{self.package}.patch", options.get("backend", "auto"))
        with self._lock:
            if not self.patched:
                self._apply(options)
            elif options != self._options:
                raise RuntimeError(
                    f"{self.package} is patched with {self._options}; call unpatch() before patching it "
                    f"with {options}"
                )
            handle = Patch(self)
            self._handles.add(handle)
            return handle

    def is_held_by(self, handle: Patch) -> bool:
        with self._lock:
            return handle in self._handles

    def release(self, handle: Patch) -> None:
        with self._lock:
            if handle in self._handles:
                self._handles.remove(handle)
                if not self._handles:
                    self._undo()

    def unpatch(self) -> None:
        """Restores the original functions and releases all handles. Does nothing if the package is not patched."""
        with self._lock:
            self._handles.clear()
            if self.patched:
                self._undo()

    @contextlib.contextmanager
    def suspended(self):
        """Runs the original functions in the block, in all threads. The replacements stay in place."""
        state = self._state
        with self._lock:  # a count, because the blocks of several threads may overlap
            state.suspensions += 1
        try:
            yield
        finally:
            with self._lock:
                state.suspensions -= 1

    @property
    def is_uncounted(self) -> bool:
        """Whether this thread is in a block of `uncounted`."""
        return getattr(self._uncounted, "on", False)

    @contextlib.contextmanager
    def uncounted(self):
        """Calls of this thread in the block are served, and not counted."""
        self._uncounted.on = True
        try:
            yield
        finally:
            self._uncounted.on = False

    # ---- check, replace, report ----

    def _apply(self, options: dict) -> None:
        version = self._import()
        where = f"{self.package} {version or '(version unknown)'}"
        if self.prepare is not None:
            self.prepare()
        state, swaps, unchanged = _State(), [], dict(self.unchanged)
        for target in self.targets:
            located = locate(target, where)
            try:
                ours = target.make(located.original, **options)
            except NotReplaced as reason:
                unchanged[target.name] = str(reason)
                continue
            after = self._wrap(target, located.original, ours, state)
            swaps.append(_Swap(target, located, staticmethod(after) if located.static else after))
        counts = []
        self._state = state
        try:
            for swap in swaps:
                self._swaps.append(swap)  # before the change, so that _undo sees it after an error
                swap.located.site.set(swap.after)
                counts.append(self._replace_references(swap.located.before, swap.after, swap))
        except BaseException:
            self._undo()
            raise
        self._options = options
        backend = options.get("backend", "auto")
        self.report = [
            f"{swap.target.name}{_replacement(swap.target.op, backend)}"
            + (f"; {count} imported references replaced" if count else "")
            for swap, count in zip(swaps, counts, strict=True)
        ] + [f"{name} is left unchanged: {reason}" for name, reason in unchanged.items()]
        for line in self.report:
            _log.info("%s: %s", where, line)

    def _import(self) -> str | None:
        """Imports the package and returns its version, with a warning outside the tested range."""
        try:
            module = importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            if error.name != self.package:
                raise
            raise ImportError(
                f"fastrlhf.integrations: {self.package} is not installed; pip install {self.package}"
            ) from None
        version = _versions.installed(self.package) or getattr(module, "__version__", None)
        tested = _versions.TESTED.get(self.package)
        if tested is not None and (version is None or not tested.contains(version)):
            warnings.warn(
                f"{self.package} {version or 'of unknown version'} is outside the tested range ({tested}); "
                "patching fails if a function has moved",
                stacklevel=5,
            )
        return version

    def _wrap(self, target: Target, original, ours: Callable, state: _State) -> Callable:
        """`ours` with the counts, the fallback to the original, and the state of this patch."""
        name, logged, lock = target.name, set(), self._lock
        calls, fallbacks = self._calls, self._fallbacks
        named = original or ours
        original = original or getattr(ours, "fallback", None)

        def replacement(*args, **kwargs):
            if original is not None and (state.suspensions or not state.active):
                return original(*args, **kwargs)
            try:
                result = ours(*args, **kwargs)
            except Unsupported as unsupported:
                reason = str(unsupported)
                if original is None:
                    raise ValueError(f"{name}: {reason}") from None
                if reason and not torch.compiler.is_compiling() and not self.is_uncounted:
                    with lock:
                        fallbacks[name, reason] += 1
                    if reason not in logged:
                        logged.add(reason)
                        _log.warning("%s falls back to the original function: %s", name, reason)
            else:
                if not torch.compiler.is_compiling() and not self.is_uncounted:
                    with lock:
                        calls[name] += 1
                return result
            # Outside the handler, so that an error of the original does not carry Unsupported as its context.
            return original(*args, **kwargs)

        return functools.wraps(named)(replacement)

    # ---- restore ----

    def _undo(self) -> None:
        self._state.active = False
        for swap in reversed(self._swaps):
            site, before = swap.located.site, swap.located.before
            held = site.get()
            if held is swap.after:
                site.set(before)
            elif held is not before:
                warnings.warn(
                    f"{swap.target.name} was replaced by other code after fastrlhf patched it and is not "
                    "restored; fastrlhf's function, if still called, runs the original",
                    stacklevel=4,
                )
            self._replace_references(swap.after, before, swap)
        self._swaps.clear()

    def _replace_references(self, old, new, swap: _Swap) -> int:
        """Replaces `old` by `new` in the package's loaded modules and their dicts; returns the number of places."""
        if not swap.located.references:
            return 0
        count = 0
        for name, module in list(sys.modules.items()):
            if name != self.package and not name.startswith(self.package + "."):
                continue
            # __dict__ and not getattr, which would make a lazy module load its submodules.
            namespace = getattr(module, "__dict__", {})
            for key, value in list(namespace.items()):
                if value is old:
                    namespace[key] = new
                    count += 1
                elif type(value) is dict and key != "__builtins__":
                    for entry in [k for k, v in list(value.items()) if v is old]:
                        value[entry] = new
                        count += 1
        return count


def _replacement(op: str, backend: str) -> str:
    """ " runs <op>, backend <name>" with the backend that "auto" takes here, or ": <what is done>" without an op."""
    row = fastrlhf.backends().get(op)
    if row is None:
        return f": {op}"
    return f" runs {op}, backend {row['auto'] if backend == 'auto' else backend}"
