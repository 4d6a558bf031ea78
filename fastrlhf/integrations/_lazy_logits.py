"""The product of a language-model head that is not made until somebody needs it.

Shapes: hidden [..., H], weight [V, H], bias [V]; stands for logits [..., V].

A model's own forward runs with this in the logits' place. What models do to logits on their way to the loss
(a scale, a soft-cap, a change of dtype) is written down; anything else makes the real logits, with their graph,
and goes on with them.
"""

import torch
from torch import Tensor


class LazyLogits:
    """outer * tanh(gain * y) (outer None: gain * y) of y = hidden @ weight.T + bias, not yet computed."""

    def __init__(self, make, hidden, weight, bias):
        self._make, self._inputs = make, (hidden, weight, bias)
        self._gain, self._outer, self._steps = 1.0, None, ()
        self._made: Tensor | None = None
        device = hidden.device.type
        self._autocast = None
        if torch.is_autocast_enabled(device):
            self._autocast = torch.get_autocast_dtype(device)
        self._grad = torch.is_grad_enabled()
        self._versions = self._count_writes()
        self.dtype = self._autocast or hidden.dtype
        self.device = hidden.device
        self.shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))

    def _count_writes(self) -> list[int]:
        return [x._version for x in self._inputs if x is not None]

    def _then(self, step, gain=1.0, outer=None, dtype=None) -> "LazyLogits":
        """Self with one more step: as a function to replay, and as what it does to gain and outer."""
        after = object.__new__(LazyLogits)
        after.__dict__.update(self.__dict__, _steps=(*self._steps, step), dtype=dtype or self.dtype)
        after._gain, after._outer = self._gain * gain, outer
        return after

    def linear_loss_inputs(self):
        """(hidden, weight, bias, temperature, softcap) for the linear ops; None once the logits are there."""
        if self._made is not None:
            return None
        if self._outer is None:
            return (*self._inputs, 1.0 / self._gain, None)
        softcap = 1.0 / self._gain
        return (*self._inputs, softcap / self._outer, softcap)

    def tensor(self) -> Tensor:
        """The logits: made once, as the head and the steps after it would have made them."""
        if self._made is None:
            if self._count_writes() != self._versions:
                raise RuntimeError(
                    "these logits were never built, and the head's weight has changed since (an optimizer "
                    "step?): read outputs.logits before, or under fastrlhf.integrations.transformers.unpatch()"
                )
            cast = torch.autocast(
                self.device.type, dtype=self._autocast, enabled=self._autocast is not None
            )
            with cast, torch.set_grad_enabled(self._grad):
                out = self._make(self._inputs[0])
                for step in self._steps:
                    out = step(out)
            self._made = out
        return self._made

    # ---- what is written down ----

    def _scaled(self, factor: float, step) -> "LazyLogits":
        if self._outer is None:
            return self._then(step, gain=factor)
        return self._then(step, outer=self._outer * factor)

    def __mul__(self, other):
        if _plain(other) and self._made is None:
            return self._scaled(other, lambda x: x * other)
        return self.tensor() * _real(other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        if _plain(other) and self._made is None:
            return self._scaled(1.0 / other, lambda x: x / other)
        return self.tensor() / _real(other)

    def tanh(self):
        if self._outer is None and self._made is None:
            return self._then(torch.tanh, outer=1.0)
        return torch.tanh(self.tensor())

    def to(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and self._made is None:
            (target,) = args
            if isinstance(target, torch.dtype) and target.is_floating_point:
                return self._then(lambda x: x.to(target), outer=self._outer, dtype=target)
            if isinstance(target, (str, torch.device)) and torch.device(target) == self.device:
                return self
        return self.tensor().to(*args, **kwargs)

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self if self._made is None else self._made.contiguous()

    # ---- everything else: the real logits ----

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        kwargs = {key: _real(value) for key, value in (kwargs or {}).items()}
        return function(*map(_real, args), **kwargs)

    def __reduce_ex__(self, protocol):
        return self.tensor().__reduce_ex__(protocol)  # what is saved is read without this package

    def __repr__(self) -> str:
        state = "not built" if self._made is None else "built"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"


def _plain(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _real(value):
    if isinstance(value, LazyLogits):
        return value.tensor()
    if isinstance(value, (list, tuple)) and any(isinstance(x, LazyLogits) for x in value):
        return type(value)(map(_real, value))
    return value


def _forward(name: str):
    def method(self, *args):
        return getattr(self.tensor(), name)(*map(_real, args))

    method.__name__ = name
    return method


# Python looks these up on the class, where __getattr__ is not asked.
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs"),
    *("getitem", "setitem", "len", "iter", "eq", "ne", "lt", "le", "gt", "ge"),
    *("floordiv", "rfloordiv", "mod", "rmod", "rpow"),
    *("and", "or", "invert", "bool", "float", "int"),
)
for _name in _OPERATORS:
    setattr(LazyLogits, f"__{_name}__", _forward(f"__{_name}__"))
LazyLogits.__hash__ = object.__hash__
