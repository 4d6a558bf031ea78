"""torch.ops.fastrlhf, filled on demand.

A program saved by torch.export names our ops, and the process that loads it may have imported nothing but fastrlhf,
which imports neither torch nor its own ops. So the namespace imports them when torch looks one up.
"""

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder

_thread = threading.local()


@contextlib.contextmanager
def defining():
    """In here a name that is looked up is about to be defined: torch checks first whether it exists."""
    _thread.defining = True
    try:
        yield
    finally:
        _thread.defining = False


def offer(homes: Iterable[str]) -> None:
    """Puts the namespace into torch.ops now, or when torch is imported. `homes`: the modules that define the ops."""
    if "torch" in sys.modules:
        _fill(homes)
    else:
        sys.meta_path.insert(0, _AfterTorch(homes))


def _fill(homes):
    torch = sys.modules["torch"]

    class Namespace(torch._ops._OpNamespace):
        __module__ = (
            torch._ops._OpNamespace.__module__
        )  # torch.export stores it in the names of ops

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or getattr(_thread, "defining", False):
                    raise
            for home in homes:
                importlib.import_module(home)
            return super().__getattr__(name)

    torch.ops.fastrlhf = Namespace("fastrlhf")


class _AfterTorch(MetaPathFinder, Loader):
    """Lets the next finder find torch, and fills the namespace when torch is imported."""

    def __init__(self, homes):
        self.homes = homes

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _fill(self.homes)
