"""The metrics of a loss by name. Its kernel writes all of them to one tensor."""

import functools
from collections import OrderedDict

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.compiler import is_compiling


class _Metrics(dict):
    """A dict that splits `stacked` into views on first access.

    Nine views cost as much time as the kernel's whole call, and most steps are not logged. It is copied and pickled as
    an OrderedDict, which torch.load reads with weights_only=True.
    """

    _names: tuple[str | None, ...] = ()
    _stacked: Tensor | None = None

    def _fill(self) -> None:
        stacked = self._stacked  # another thread may set it to None
        if stacked is not None:
            dict.update(self, _by_name(self._names, stacked))
            self._stacked = None

    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self.items())


def _filling(name):
    method = getattr(dict, name)

    def call(self, *args, **kwargs):
        self._fill()
        return method(self, *args, **kwargs)

    call.__name__ = name
    return call


# All methods that read or write a dict. (`update` and `|` of other dicts read through `keys` and `__getitem__`.) Not
# __len__, which is right from the start: torch.compile calls it between two reads of the values, which must not change.
_LOOKS = (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__"),
    *("__ne__", "__or__", "__repr__", "__reversed__", "__ror__", "__setitem__", "clear", "copy"),
    *("get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"),
)
for _name in _LOOKS:
    setattr(_Metrics, _name, _filling(_name))
pytree.register_pytree_node(
    _Metrics,
    lambda d: (list(d.values()), list(d)),
    lambda x, names: dict(zip(names, x, strict=True)),
)


def _by_name(names, stacked):
    pairs = zip(names, stacked.unbind(), strict=True)
    return {name: x for name, x in pairs if name is not None}


@functools.cache
def _empty(names):
    """Each name with None: C code, such as json's, reads the size of a dict without calling __len__."""
    return {name: None for name in names if name is not None}


def named(names: tuple[str | None, ...], stacked: Tensor) -> dict[str, Tensor]:
    """{name: 0-d tensor} of a 1-d tensor, without the elements whose name is None.

    In eager mode the views are made when the dict is first read.
    """
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return _by_name(names, stacked)
    metrics = _Metrics(_empty(names))
    metrics._names, metrics._stacked = names, stacked
    return metrics
