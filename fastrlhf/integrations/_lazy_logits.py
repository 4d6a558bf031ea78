"""LazyLogits: the output of a language-model head that is computed when it is read.

Shapes: hidden [..., H], weight [V, H], bias [V]; the logits are [..., V].

A model's forward receives a LazyLogits in place of its logits. Multiplication and division by a number, tanh and
casts are recorded, because models apply them between the head and the loss, and the linear ops can compute them.
Every other operation computes the logits, with their autograd graph, and continues with that tensor.
"""

import torch
from torch import Tensor


class LazyLogits:
    """gain * y, or outer * tanh(gain * y), of y = hidden @ weight.T + bias; not computed yet.

    Args:
        head: hidden -> y, the head's own forward.
        hidden, weight, bias: the head's operands.
    """

    def __init__(self, head, hidden, weight, bias):
        self._head, self._inputs = head, (hidden, weight, bias)
        # `outer` is None before a tanh. `steps` replays the recorded operations on the computed head output.
        self._gain, self._outer, self._steps = 1.0, None, ()
        self._computed: Tensor | None = None
        device = hidden.device.type
        self._autocast = None
        if torch.is_autocast_enabled(device):
            self._autocast = torch.get_autocast_dtype(device)
        self._grad = torch.is_grad_enabled()
        self._versions = self._input_versions()
        self.dtype = self._autocast or hidden.dtype
        self.device = hidden.device
        self.shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))

    def _input_versions(self) -> list[int]:
        return [x._version for x in self._inputs if x is not None]

    def linear_loss_inputs(self):
        """(hidden, weight, bias, temperature, softcap) for the linear ops; None once the logits are computed.

        The ops compute softcap * tanh(y / softcap) / temperature.
        """
        if self._computed is not None:
            return None
        if self._outer is None:
            return (*self._inputs, 1.0 / self._gain, None)
        softcap = 1.0 / self._gain
        return (*self._inputs, softcap / self._outer, softcap)

    def tensor(self) -> Tensor:
        """The logits as a tensor, computed on the first call under the grad and autocast modes of the forward."""
        if self._computed is None:
            if self._input_versions() != self._versions:
                raise RuntimeError(
                    "the logits were not computed in the forward, and the head's weight has changed since (an "
                    "optimizer step?): read outputs.logits before that, or call "
                    "fastrlhf.integrations.transformers.unpatch()"
                )
            autocast = torch.autocast(
                self.device.type, dtype=self._autocast, enabled=self._autocast is not None
            )
            with autocast, torch.set_grad_enabled(self._grad):
                out = self._head(self._inputs[0])
                for step in self._steps:
                    out = step(out)
            self._computed = out
        return self._computed

    # ---- recorded operations ----

    def _record(self, step, gain=1.0, outer=None, dtype=None) -> "LazyLogits":
        """A copy with one more step: the function to replay, and its effect on gain, outer and dtype."""
        copy = object.__new__(LazyLogits)
        copy.__dict__.update(self.__dict__, _steps=(*self._steps, step), dtype=dtype or self.dtype)
        copy._gain, copy._outer = self._gain * gain, outer
        return copy

    def _record_scale(self, factor: float, step) -> "LazyLogits":
        if self._outer is None:
            return self._record(step, gain=factor)
        return self._record(step, outer=self._outer * factor)

    def __mul__(self, other):
        if _is_positive_number(other) and self._computed is None:
            return self._record_scale(other, lambda x: x * other)
        return self.tensor() * _as_tensor(other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        if _is_positive_number(other) and self._computed is None:
            return self._record_scale(1.0 / other, lambda x: x / other)
        return self.tensor() / _as_tensor(other)

    def tanh(self):
        if self._outer is None and self._computed is None:
            return self._record(torch.tanh, outer=1.0)
        return torch.tanh(self.tensor())

    def to(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and self._computed is None:
            (target,) = args
            if isinstance(target, torch.dtype) and target.is_floating_point:
                return self._record(lambda x: x.to(target), outer=self._outer, dtype=target)
            if isinstance(target, (str, torch.device)) and torch.device(target) == self.device:
                return self
        return self.tensor().to(*args, **kwargs)

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self if self._computed is None else self._computed.contiguous()

    # ---- everything else computes the logits ----

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
        kwargs = {key: _as_tensor(value) for key, value in (kwargs or {}).items()}
        return function(*map(_as_tensor, args), **kwargs)

    def __reduce_ex__(self, protocol):
        return self.tensor().__reduce_ex__(protocol)  # a pickle must load without this package

    def __repr__(self) -> str:
        state = "not computed" if self._computed is None else "computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"


def _is_positive_number(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _as_tensor(value):
    if isinstance(value, LazyLogits):
        return value.tensor()
    if isinstance(value, (list, tuple)) and any(isinstance(x, LazyLogits) for x in value):
        return type(value)(map(_as_tensor, value))
    return value


def _forward(name: str):
    def method(self, *args):
        return getattr(self.tensor(), name)(*map(_as_tensor, args))

    method.__name__ = name
    return method


# Python looks up operators on the class and does not call __getattr__ for them.
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs"),
    *("getitem", "setitem", "len", "iter", "eq", "ne", "lt", "le", "gt", "ge"),
    *("floordiv", "rfloordiv", "mod", "rmod", "rpow"),
    *("and", "or", "invert", "bool", "float", "int"),
)
for _name in _OPERATORS:
    setattr(LazyLogits, f"__{_name}__", _forward(f"__{_name}__"))
LazyLogits.__hash__ = object.__hash__
