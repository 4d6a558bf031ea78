"""Inputs, options and bars for the tests of token_logprob, linear_logprob and linear_cross_entropy."""

import mmap

import pytest
import torch

from fastrlhf.ops import _backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
DEVICE = {"reference": "cpu", "cpu": "cpu", "triton": TRITON_DEVICE, "cuda": "cuda"}


def interpreted(backend):
    """Whether Triton's interpreter runs the kernels. A program takes about 5 ms there, so tests take fewer rows."""
    return backend == "triton" and DEVICE[backend] == "cpu"


def emulated(backend):
    """Whether a GPU's kernels run on the CPU: interpreted, or in the host shim, some 10 us per token."""
    return backend in ("triton", "cuda") and DEVICE[backend] == "cpu"


def backend_params(op, names=("reference", "cpu", "triton", "cuda")):
    """The backends as pytest parameters; one that cannot run here is skipped and says why."""
    params = []
    for name in names:
        reason = _backend.unavailable_reason(op, name, DEVICE[name])
        if not reason and DEVICE[name] == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        marks = pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}")
        params.append(pytest.param(name, marks=marks))
    return params


def each_backend(op, names=("reference", "cpu", "triton", "cuda")):
    """Parametrises `backend` over the backends of an op."""
    return pytest.mark.parametrize("backend", backend_params(op, names))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed, dtype=torch.float32, scale=1.0, device="cpu"):
    values = scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def randint(high, shape, seed, dtype=torch.int64, device="cpu"):
    return torch.randint(high, shape, generator=generator(seed)).to(dtype).to(device)


# Option sets of the row maths; each is a function of (shape of the rows, device).
OPTIONS = {
    "plain": lambda shape, device: {},
    "temperature": lambda shape, device: {"temperature": 0.7},
    "row_temperature": lambda shape, device: {
        "temperature": (0.5 + torch.rand(shape, generator=generator(7))).to(device)
    },
    "softcap": lambda shape, device: {"softcap": 3.0},
    "mask": lambda shape, device: {
        "mask": (torch.rand(shape, generator=generator(8)) < 0.6).to(device)
    },
    "all": lambda shape, device: {
        "temperature": (0.5 + torch.rand(shape, generator=generator(7))).to(device),
        "softcap": 5.0,
        "mask": (torch.rand(shape, generator=generator(8)) < 0.6).to(device),
    },
}


def to_double(options):
    """The same options for a float64 truth on CPU."""
    out = {}
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            value = value.cpu() if value.dtype == torch.bool else value.cpu().double()
        out[name] = value
    return out


LOWEST = ("-inf", "finfo.min")
TEMPERATURES = (0.3, 0.7, 1.3)


def rows_of_the_lowest(kind, dtype, backend):
    """[5, V] 16-byte aligned rows, and targets above the lowest logit. V holds many batches of a thread or a block.

    Runs of the lowest logit (-inf or finfo.min, with which trainers mask) fill whole batches: before the rest, behind
    it, on both sides, in every second run of 16 columns; the last row has none.
    """
    device, width = DEVICE[backend], 12003 if interpreted(backend) else 66003
    rows = torch.empty(5, width + 45, dtype=dtype, device=device)[:, :width]
    rows.copy_(randn(5, width, seed=0, dtype=dtype, scale=3))
    column = torch.arange(width, device=device)
    low = torch.zeros(5, width, dtype=torch.bool, device=device)
    low[0, :-1000], low[1, 700:], low[2] = True, True, (column - width // 2).abs() > 40
    low[3] = column // 16 % 2 == 0
    rows.masked_fill_(low, -torch.inf if kind == "-inf" else torch.finfo(dtype).min)
    targets = torch.tensor([width - 500, 13, width // 2 + 1, 50 * 32 + 17, 9], device=device)
    assert not low.gather(1, targets[:, None]).any()
    return rows, targets


def shifted(shift, device):
    """([4, 5003] fp32 logits, the same + shift, without rounding); the maximum moves with every block."""
    logits = randn(4, 5003, seed=0, scale=3) + torch.linspace(-9, 9, 5003)
    logits[1::2] = logits[1::2].flip(1)
    logits = ((logits * 256).round() / 256).to(device)  # an ulp at 1e4 is 2^-10
    assert torch.equal((logits + shift) - shift, logits)
    return logits, logits + shift


def moved(rows, offset, extra):
    """A copy of rows [n, V] that begins `offset` elements behind a 16-byte boundary; stride V + extra."""
    count, width = rows.shape
    buffer = torch.full((offset + count * (width + extra),), torch.nan, dtype=rows.dtype)
    view = buffer.to(rows.device)[offset:].as_strided((count, width), (width + extra, 1))
    return view.copy_(rows)


def untouched(count, dtype, device):
    """Memory of `count` elements, of which only the pages that a test writes cost anything.

    Not from malloc on the CPU: there a sanitizer marks every byte.
    """
    if device != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def compiled(function):
    """torch.compile(fullgraph=True) without the minutes of a code generator."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def profiled(function):
    """(result, multiplications in all GEMMs, bytes of the largest allocation) of a call."""
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profile:
        result = function()
    multiplications = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first = 0 if event.name == "aten::mm" else 1
            (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
            multiplications += rows * inner * columns
    return result, multiplications, max(e.self_cpu_memory_usage for e in profile.events())
