"""The metrics of a loss by name, from the one tensor that its kernel writes."""

import functools
from collections import OrderedDict

import torch.utils._pytree as pytree
from torch import Tensor


class _Metrics(dict):
    """A dict that takes `stacked` apart when somebody first looks.

    Nine views of a few bytes cost as much as the kernel's whole call, and not every step is logged.
    What is copied or pickled of it is an OrderedDict, which torch.load reads with weights_only=True.
    """

    _names: tuple[str | None, ...] = ()
    _stacked: Tensor | None = None

    def _fill(self) -> None:
        stacked = self._stacked  # another thread may fill it meanwhile
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


# Whatever reads or writes a dict; `update` and `|` of others read by `keys` and `__getitem__`. Not its length, which
# is right before: torch.compile asks for it between two looks at the values, and fails if they change.
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
    """Each name with None: C code (json's, say) asks for the size of a dict past its methods."""
    return {name: None for name in names if name is not None}


def named(names: tuple[str | None, ...], stacked: Tensor, lazy: bool) -> dict[str, Tensor]:
    """{name: 0-d tensor} of a 1-d tensor, without the elements whose name is None.

    `lazy`: when somebody looks; not for what is traced.
    """
    if not lazy:
        return _by_name(names, stacked)
    metrics = _Metrics(_empty(names))
    metrics._names, metrics._stacked = names, stacked
    return metrics
