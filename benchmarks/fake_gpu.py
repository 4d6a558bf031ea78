"""A fake CUDA device: runs the CUDA path of an op on CPU or meta tensors and counts what it would do.

Inside `FakeGpu` every tensor reports a CUDA device, so the unmodified ops take their CUDA path. A dispatch mode
intercepts each tensor operation, runs it on the real device (CPU: correct results; meta: shapes only), and counts
bytes, launches, host syncs and live memory. Products of 16-bit operands with fp32 results, which only CUDA has, are
computed in fp32. Streams carry vector clocks: two unordered uses of a storage, one of them a write, are a race.

Bytes are the minimum traffic: an operation reads each operand once and writes each result once.
"""

import contextlib
import math
import weakref
from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastrlhf.ops import _backend, _gemms, _register

DEVICE = torch.device("cuda", 0)
# Shared memory of a cluster of eight blocks on sm_90. A row of logits that fits is read once.
ON_CHIP = 8 * 227 * 1024

_aten = torch.ops.aten
_ANSWERS = {
    Tensor.device.__get__: DEVICE,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
}
_PLAIN_GEMMS = {
    _aten.linear.default,
    _aten.mm.default,
    _aten.mm.out,
    _aten.addmm.default,
    _aten.addmm.out,
    _aten.addmm_.default,
}
_WIDE_GEMMS = {_aten.mm.dtype, _aten.mm.dtype_out, _aten.addmm.dtype, _aten.addmm.dtype_out}
_ALLOCATES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
# Read only the shape of their operand.
_FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# Write their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_", "index_copy_", "index_put_", "scatter_"}
# Arguments of our ops that are written without being read.
_RESULTS = {"out", "dlogits", "logprob", "entropy", "grad_logprob"}
_PICKS = {"index_select", "index", "gather"}  # read as many bytes of argument 0 as they write
_SYNCS = {
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
}
# With an upstream gradient of ones they return after reading it.
_LOOKS_ONLY = {"token_loss_bwd_"}
# Read a row twice if it does not fit into shared memory, or if its soft-cap or dtype takes the general kernel.
_READS_A_ROW_TWICE = {"token_loss_rows_", "token_loss_fwd_"}


class Race(AssertionError):
    """Two unordered uses of a storage, at least one of them a write."""


class FakeGpu(contextlib.AbstractContextManager):
    """Args:
    vocab, width: V and H. They classify tensors: [V, H] weight, [.., V] logits, [.., H] hidden states, else rows.
    meta: the tensors are on meta; else on the CPU.
    counted, carrying: on meta tensors, the number of unmasked rows, and of rows that `pack` finds.
    offsets: on meta tensors, the result of tolist(): where the sequences of the unmasked rows begin and end.
    capturing: the current stream reports a capture, during which a host sync is an error.
    adds_in_place: a GEMM of 16-bit operands can accumulate into an fp32 tensor; older torch cannot.
    """

    def __init__(
        self,
        vocab,
        width,
        *,
        meta=False,
        counted=0,
        carrying=0,
        offsets=(),
        capturing=False,
        adds_in_place=True,
    ):
        self.vocab, self.width = vocab, width
        self.lies_on = torch.device("meta" if meta else "cpu")
        self.counted, self.carrying, self.offsets = counted, carrying, list(offsets)
        self.capturing, self.adds_in_place = capturing, adds_in_place
        self.streams = [Stream(self, 0)]
        self.host, self.current = {}, self.streams[0]
        self._live: dict[int, _Memory] = {}
        self._early: list[str] = []  # storages freed while another stream might still use them
        self.reset()

    def reset(self) -> None:
        """Reset the counters; live memory stays live."""
        self.read, self.written = Counter(), Counter()  # by kind, outside the GEMMs
        # GEMMs by kind of result: the rows of each; bytes written, and read where they accumulate.
        self.gemm_rows: dict[str, list[int]] = {}
        self.gemm_moved = Counter()
        self.passes: list[tuple[str, str, int, int]] = []  # operation, kind, bytes read and written
        self.where: list[tuple[str, int]] = []  # per launch: operation, stream number
        self.syncs = self.largest = 0
        self.copies = 0  # operands whose strides cuBLAS cannot take
        self.row_bytes: set[int] = set()  # row strides of logits and dlogits
        live = Counter()
        for memory in self._live.values():
            live[memory.kind] += memory.size
        self.live, self.peak_of = live, Counter(live)
        self.peak = live.total()

    def __enter__(self):
        kernels = _backend.kernels
        as_cuda = lambda op: kernels(op) | {"cuda"} if "cpu" in kernels(op) else kernels(op)  # noqa: E731
        on_cuda = mock.patch.multiple(_backend, kernels=as_cuda, _chosen={})
        streams = mock.patch.multiple(
            torch.cuda,
            Stream=lambda device, priority=0: self.new_stream(),
            current_stream=lambda device=None: self.current,
            stream=self.on_stream,
            is_current_stream_capturing=lambda: self.capturing,
        )
        self._open = contextlib.ExitStack()
        self._open.enter_context(on_cuda)
        self._open.enter_context(streams)
        self._open.enter_context(mock.patch.dict(_gemms.SideStream._streams, clear=True))
        # Replaces the result of the probe, which cannot run on meta tensors.
        probed = {(DEVICE, x): self.adds_in_place for x in (torch.bfloat16, torch.float16)}
        self._open.enter_context(mock.patch.dict(_gemms._adds_in_place, probed, clear=True))
        # Ops call their Python body directly, as they do when no dispatch mode is active.
        at_once = mock.patch.object(_register, "_unobserved", lambda *arguments: True)
        self._open.enter_context(at_once)
        on_device = self._open.enter_context(_OnDevice(self))
        self._open.enter_context(_Recorder(self))
        # The autograd engine runs backward nodes without the active TorchFunctionMode.
        node_apply = BackwardCFunction.apply

        def apply(node, *grads):
            with on_device:
                return node_apply(node, *grads)

        self._open.enter_context(mock.patch.object(BackwardCFunction, "apply", apply))
        return self

    def __exit__(self, *error):
        self._open.__exit__(*error)
        if self._early and error[0] is None:
            raise Race(self._early[0])

    # ---- streams ---------------------------------------------------------------------------------

    def new_stream(self) -> "Stream":
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    # ---- called by the recorder -----------------------------------------------------------------------

    def kind(self, x: Tensor) -> str:
        shape = tuple(x.shape)
        if shape == (self.vocab, self.width) or (
            shape == (self.width, self.vocab) and x.stride(0) == 1
        ):
            return "weight"
        if shape and self._is_vocab(shape[-1]):
            return "logits"
        return "hidden" if len(shape) > 1 and shape[-1] == self.width else "rows"

    def _is_vocab(self, size: int) -> bool:
        """True for V, and for V padded to a row stride that is a multiple of 16."""
        return size in (self.vocab, -(-self.vocab // 16) * 16)

    def launch(self, name: str, reads: list, writes: list) -> None:
        """Record an operation; `reads`, `writes`: (tensor, bytes) pairs."""
        stream = self.current
        self.where.append((name, stream.number))
        stream.catch_up(self.host)
        stream.tick()
        for x, _ in reads:
            self._memory(x).use(name, stream, False)
        for x, _ in writes:
            self._memory(x).use(name, stream, True)

    def move(self, name: str, reads: list, writes: list) -> None:
        """Record an operation that is not a GEMM, with its bytes."""
        self.launch(name, reads, writes)
        per_kind = {}
        for which, pairs in enumerate((reads, writes)):
            for x, size in pairs:
                per_kind.setdefault(self.kind(x), [0, 0])[which] += size
        for kind, (read, written) in per_kind.items():
            self.read[kind] += read
            self.written[kind] += written
            self.passes.append((name, kind, read, written))

    def multiply(self, name: str, a: Tensor, b: Tensor, total: Tensor | None, out: Tensor) -> None:
        for x in (a, b):
            if not _blas_reads(x):
                self.copies += 1
                self.move("copy for " + name, [(x, nbytes(x))], [(x, nbytes(x))])
        for x in (a, out):
            if self.kind(x) == "logits":
                self.row_bytes.add(x.stride(0) * x.element_size())
        added = [] if total is None else [(total, nbytes(total))]
        self.launch(name, [(a, nbytes(a)), (b, nbytes(b)), *added], [(out, nbytes(out))])
        self.gemm_rows.setdefault(self.kind(out), []).append(out.shape[0])
        self.gemm_moved[self.kind(out)] += nbytes(out) + sum(size for _, size in added)

    @property
    def gemms(self) -> Counter:
        return Counter({kind: len(rows) for kind, rows in self.gemm_rows.items()})

    @property
    def launches(self) -> int:
        return len(self.where)

    def sync(self, name: str) -> None:
        if self.capturing:
            raise AssertionError(f"{name}: a host sync while a CUDA graph is captured")
        self.syncs += 1
        _merge(self.host, self.current.clock)

    def allocated(self, x: Tensor) -> None:
        self._memory(x, fresh=True)

    def _memory(self, x: Tensor, fresh: bool = False) -> "_Memory":
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            size = storage.nbytes() if fresh else 0  # operands are not counted
            memory = _Memory(self.kind(x), size, self.current if fresh else None)
            self._live[key] = memory
            weakref.finalize(storage, self._freed, key).atexit = False
            self.live[memory.kind] += size
            self.largest = max(self.largest, size)
            self.peak = max(self.peak, self.live.total())
            self.peak_of[memory.kind] = max(self.peak_of[memory.kind], self.live[memory.kind])
        return self._live[key]

    def _freed(self, key: int) -> None:
        memory = self._live.pop(key)
        self.live[memory.kind] -= memory.size
        # The allocator may reuse the memory at once for work on its home stream.
        if memory.home is not None:
            memory.home.catch_up(self.host)
            if early := memory.unordered(memory.home, writes=True):
                self._early.append(
                    f"a {memory.kind} tensor is freed on {memory.home} while {early}"
                )

    # ---- totals ------------------------------------------------------------------------------------

    def bytes_a_logit(self, rows: int) -> float:
        """Bytes per logit of rows x V: the write of the first GEMM and the traffic outside the GEMMs, except
        operands, dX and dW. Reads by the second and third GEMM do not count.
        """
        beside = sum(self.read[k] + self.written[k] for k in ("logits", "rows"))
        return (beside + self.gemm_moved["logits"]) / (rows * self.vocab)

    def passes_over(self, kind: str) -> list[tuple[str, int, int]]:
        """(operation, bytes read, bytes written) outside the GEMMs."""
        return [(name, read, written) for name, of, read, written in self.passes if of == kind]


class Stream:
    """A fake torch.cuda.Stream with its events. `clock`: vector clock, i.e. the time of each stream it has seen."""

    def __init__(self, gpu: FakeGpu, number: int):
        self.gpu, self.number, self.clock = gpu, number, Counter()

    def __str__(self) -> str:
        return f"stream {self.number}"

    def tick(self) -> None:
        self.clock[self.number] += 1

    def catch_up(self, clock) -> None:
        _merge(self.clock, clock)

    def wait_stream(self, other: "Stream") -> None:
        self.catch_up(other.clock)

    def record_event(self) -> Counter:
        return Counter(self.clock)

    def wait_event(self, event: Counter) -> None:
        self.catch_up(event)


class _Memory:
    """A storage: its last uses, and the stream that allocated it (None: it existed before)."""

    def __init__(self, kind: str, size: int, home: Stream | None):
        self.kind, self.size, self.home = kind, size, home
        self.wrote: tuple[int, int, str] | None = None
        self.readers: dict[int, tuple[int, str]] = {}

    def unordered(self, stream: Stream, writes: bool) -> str:
        """A use that `stream` must wait for but has not: an earlier write, or before a write also a read."""
        before = [] if self.wrote is None else [self.wrote]
        if writes:
            before += [(number, time, who) for number, (time, who) in self.readers.items()]
        for number, time, who in before:
            if stream.clock[number] < time:
                return f"{who} on stream {number} may still use it"
        return ""

    def use(self, name: str, stream: Stream, writes: bool) -> None:
        if early := self.unordered(stream, writes):
            does = "writes" if writes else "reads"
            raise Race(f"{name} on {stream} {does} a {self.kind} tensor while {early}")
        now = stream.clock[stream.number]
        if writes:
            self.wrote, self.readers = (stream.number, now, name), {}
        else:
            self.readers[stream.number] = (now, name)


def _merge(clock, other) -> None:
    for number, time in other.items():
        clock[number] = max(clock.get(number, 0), time)


class _OnDevice(TorchFunctionMode):
    """Tensors report the CUDA device; allocations on it go to `lies_on`."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func is Tensor.data_ptr and args[0].is_meta:  # unique addresses instead of 0
            x = args[0]
            return (x.untyped_storage()._cdata << 32) + x.storage_offset() * x.element_size()
        if func is Tensor.tolist:
            self.gpu.sync("tolist")
            if args[0].is_meta:
                return self.gpu.offsets
        kwargs = kwargs or {}
        if kwargs.get("device") == DEVICE:
            kwargs = kwargs | {"device": self.gpu.lies_on}
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self._run(func, func._schema.name.split("::")[1], args, kwargs or {})

    def _run(self, func, name, args, kwargs):
        gpu = self.gpu
        if func in _WIDE_GEMMS or func in _PLAIN_GEMMS:
            return self._gemm(func, name, args, kwargs)
        if name in _SYNCS or (name in ("index", "index_put_") and _has_bool_index(args)):
            gpu.sync(name)
        out = self._compute(func, name, args, kwargs)
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        given = list(_arguments(func, args, kwargs))
        known = {x.untyped_storage()._cdata for _, x in given}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in known]
        for x in fresh:
            gpu.allocated(x)
        written = [x for argument, x in given if _is_written(argument)]
        if (
            not (fresh or written)
            or name in _ALLOCATES
            or not any(x.numel() for x in fresh + written)
        ):
            return out
        reads = []
        for argument, x in given:
            result = (
                argument.name in _RESULTS if func.namespace == "fastrlhf" else name in _OVERWRITES
            )
            if not (_is_written(argument) and (argument.kwarg_only or result)):
                reads.append((x, nbytes(x)))
        writes = [(x, nbytes(x)) for x in fresh + written]
        if name in _FILLS:
            reads = []
        if name in _PICKS:
            reads[0] = (reads[0][0], nbytes(outputs[0]))
        if name in ("index_copy_", "index_put_", "scatter_"):
            # They write as many bytes as their last argument holds.
            writes = [(written[0], nbytes(given[-1][1]))]
        if name in _LOOKS_ONLY:
            reads, writes = reads[1:], [(x, 0) for x, _ in writes]
        if name in _READS_A_ROW_TWICE and _twice(**_by_name(func, args, kwargs)):
            reads.append(reads[0])
        gpu.move(name, reads, writes)
        return out

    def _compute(self, func, name, args, kwargs):
        gpu, first = self.gpu, args[0] if args else None
        if not (isinstance(first, Tensor) and first.is_meta):
            return func(*args, **kwargs)
        if name == "nonzero":
            return first.new_empty((gpu.counted, first.dim()), dtype=torch.int64)
        if name == "nonzero_static":
            return first.new_empty((kwargs["size"], first.dim()), dtype=torch.int64)
        if name in ("item", "_local_scalar_dense"):
            return gpu.carrying
        return func(*args, **kwargs)

    def _gemm(self, func, name, args, kwargs):
        """mm(a, b), addmm(total, a, b) and their variants; linear(a, b.T, total)."""
        out, rest = kwargs.get("out"), list(args)
        total = rest.pop(0) if name.startswith("addmm") else None
        if name == "linear":
            total, rest[1] = rest[2] if len(rest) > 2 else None, rest[1].t()
        a, b = rest[:2]
        wide = func in _WIDE_GEMMS
        if wide:
            dtype = rest[2] if len(rest) > 2 else kwargs["out_dtype"]
            self._check_wide(a, b, total, out, dtype)
        else:
            dtype = a.dtype
            assert b.dtype == dtype, f"{name} of {a.dtype} and {b.dtype}"
        assert a.device.type == b.device.type
        if func is _aten.addmm_.default:
            out = total
        if out is None:
            out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype, device=a.device)
            self.gpu.allocated(out)
        assert out.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
        self.gpu.multiply(name, a, b, total, out)
        if not out.is_meta:
            product = a.to(dtype) @ b.to(dtype)
            out.copy_(product if total is None else total + product)
        return out

    def _check_wide(self, a, b, total, out, dtype):
        """The preconditions of the CUDA kernel."""
        assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16), (a.dtype, b.dtype)
        assert dtype == torch.float32, dtype
        assert total is None or total.dtype in (dtype, a.dtype), total.dtype
        assert out is None or out.dtype == dtype, out.dtype
        if total is not None and not self.gpu.adds_in_place:
            raise RuntimeError("addmm: out_dtype is not implemented")


def nbytes(x: Tensor) -> int:
    """Bytes of the distinct elements (strides of 0 count once)."""
    if not x.numel():
        return 0
    steps = zip(x.shape, x.stride(), strict=True)
    return math.prod(size for size, stride in steps if stride) * x.element_size()


def _blas_reads(x: Tensor) -> bool:
    """True if cuBLAS takes the matrix as it is: one stride is 1 and the other spans a whole row or column."""
    (rows, columns), (down, along) = x.shape, x.stride()
    if x.is_contiguous():
        return True
    return (along == 1 and down >= max(1, columns)) or (down == 1 and along >= max(1, rows))


def _arguments(func, args, kwargs):
    """(schema argument, tensor) pairs; tensor lists are flattened."""
    for i, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if i >= len(args) else args[i]
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, Tensor):
                yield argument, x


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _has_bool_index(args) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _by_name(func, args, kwargs) -> dict:
    return dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs


def _twice(logits, softcap, **others) -> bool:
    """True if the row pass with gradients reads a row twice; the conditions are those of csrc/cuda/token_loss.cu."""
    fits = logits.shape[-1] * logits.element_size() <= ON_CHIP
    return logits.dtype == torch.float64 or softcap > 64 or not fits
