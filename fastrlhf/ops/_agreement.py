"""Errors of ops with a process group: what one rank raises before the first collective, all ranks raise.

Otherwise the ranks without an error would wait in that collective. On CPU the op's first collective is preceded by one
of a few numbers a rank: whether the rank has failed, and the shapes and dtypes that the ranks must share. A rank that
fails takes part in it, and a second collective hands its message round. On a GPU reading those numbers is a host sync:
the ranks compare each shape once, and a rank that fails ends the others when it exits.
"""

import threading
from collections.abc import Callable

import torch

_NUMBERS = 6  # of the collective; the first is 1 on a rank that has failed
_BYTES = 1024  # of a message
_thread = threading.local()  # .call: the innermost `_Call` under way


class _Call:
    """A call of an op; `settle` runs the comparison of the ranks that `before_collectives` has left for it."""

    def __init__(self):
        self.outer = getattr(_thread, "call", None)
        self.comparison: Callable[[], None] | None = None
        self.settled = False

    def settle(self) -> None:
        if self.outer is not None:
            self.outer.settle()
        if self.comparison is not None and not self.settled:
            self.settled = True
            self.comparison()

    def calls(self):
        return [self, *(self.outer.calls() if self.outer is not None else ())]


def agreed(function, group, arguments, options):
    """`function(*arguments, **options)`, an op of the ranks of `group`; raises on all ranks if it raises on one."""
    _thread.call = this = _Call()
    try:
        result = function(*arguments, **options)
        this.settle()
        return result
    except Exception as error:
        if not this.settled and _on_cpu(group, (*arguments, *options.values())):
            for open_call in this.calls():
                open_call.settled = True
            gather(torch.ones(_NUMBERS, dtype=torch.int64), group)
            _messages(group, error)
        raise
    finally:
        _thread.call = this.outer


def before_collectives(comparison: Callable[[], None]) -> None:
    """Run `comparison`, whose first act is `compared`, before the call's first collective."""
    call = getattr(_thread, "call", None)
    if call is None:
        comparison()
    else:
        call.comparison = comparison


def settle() -> None:
    """To be called before a collective of an op."""
    call = getattr(_thread, "call", None)
    if call is not None:
        call.settle()


def compared(numbers: tuple[int, ...], device: torch.device, group) -> list[tuple[int, ...]]:
    """The five numbers of each rank, in rank order; ValueError if a rank has failed, with its message."""
    every = gather(torch.tensor((0, *numbers), device=device), group).tolist()
    if any(failed for failed, *_ in every):
        number, text = next((n, t) for n, t in enumerate(_messages(group, None)) if t)
        raise ValueError(f"{text} (raised on rank {number} of process_group)")
    return [tuple(found) for _, *found in every]


def gather(mine: torch.Tensor, group) -> torch.Tensor:
    """[W, ...]: the tensors of all ranks, in rank order."""
    every = mine.new_empty((group.size(), *mine.shape))
    torch.distributed.all_gather(list(every.unbind(0)), mine, group=group)
    return every


def _messages(group, error: Exception | None) -> list[str]:
    text = b"" if error is None else (str(error) or type(error).__name__).encode()[:_BYTES]
    mine = torch.tensor(list(text.ljust(_BYTES, b"\0")), dtype=torch.uint8)
    return [
        bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in gather(mine, group)
    ]


def _on_cpu(group, values) -> bool:
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    return (
        isinstance(group, torch.distributed.ProcessGroup)
        and "gloo" in torch.distributed.get_backend(group)
        and bool(tensors)
        and all(x.device.type == "cpu" for x in tensors)
    )
