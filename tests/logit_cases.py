"""Inputs, options and bars for the tests of token_logprob, linear_logprob and linear_cross_entropy."""

import pytest
import torch

from fastrlhf.ops import _backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
DEVICE = {"reference": "cpu", "cpu": "cpu", "triton": TRITON_DEVICE, "cuda": "cuda"}


def interpreted(backend):
    """Whether kernels run under Triton's interpreter, where a row takes some 10 ms: fewer cases then."""
    return backend == "triton" and DEVICE[backend] == "cpu"


def each_backend(op, names=("reference", "cpu", "triton", "cuda")):
    """Parametrises `backend`; one that cannot run here is skipped and says why."""
    params = []
    for name in names:
        reason = _backend.unavailable_reason(op, name, DEVICE[name])
        if not reason and DEVICE[name] == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        marks = pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}")
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("backend", params)


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


def assert_near(ours, eager, truth, what="", rounded=None):
    """Our error <= 2 x eager's error + 2 eps of our dtype at the size of the truth.

    `rounded`: the truth with an intermediate (that everyone rounds to fp32) off by half an ulp. How far that
    alone moves the result is measured and added.
    """
    truth = truth.detach().double().cpu()
    ours_error = (ours.detach().double().cpu() - truth).abs().max()
    eager_error = (eager.detach().double().cpu() - truth).abs().max()
    floor = 2 * torch.finfo(ours.dtype).eps * max(1e-3, float(truth.abs().max()))
    if rounded is not None:
        floor += float((rounded.detach().double().cpu() - truth).abs().max())
    assert not torch.isnan(ours).any(), f"{what}: NaN"
    assert ours_error <= 2 * eager_error + floor, (
        f"{what}: error {ours_error:.3g}, eager {eager_error:.3g}, floor {floor:.3g}"
    )


def half_an_ulp_off(problem, name):
    """(tensors, targets, rows) with rows[name] in fp64, moved by half an fp32 ulp."""
    tensors, targets, rows = problem
    return tensors, targets, {**rows, name: rows[name].double() * (1 + 2.0**-24)}


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
