"""What the tests mend of Triton's interpreter.

tl.associative_scan in log2(n) vector steps; its own takes n steps of Python. The sums are grouped as on a GPU, by
doubling; what an associative function gives does not change. tl.fma rounds once, which older interpreters
(3.6) do twice: the kernels rely on it, and compiled code has it. And fp32 is rounded to bf16 as on a GPU, to the
nearest, which the interpreter cuts off.
"""

from pathlib import Path

import numpy as np
import torch

one_by_one = None  # the interpreter's own


def install():
    from triton.runtime import interpreter

    if "fma_fp32" not in Path(interpreter.__file__).read_text():
        interpreter.InterpreterBuilder.create_fma = _fused
    interpreter.InterpreterBuilder.create_fp_trunc = _rounded
    _install_scan(interpreter.ScanOps)


def _fused(self, x, y, z):
    """In a wider type, where a product is exact (fp32) or nearly so (fp64)."""
    from triton.runtime.interpreter import TensorHandle

    dtype = x.data.dtype
    wide = np.float64 if dtype.itemsize <= 4 else np.longdouble
    exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    return TensorHandle(exact.astype(dtype), z.dtype.scalar)


def _rounded(self, x, dtype):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return self.cast_impl(x, dtype)
    nearest = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16).numpy()
    return TensorHandle(nearest.view(np.uint16), tl.bfloat16)


def _install_scan(ScanOps):
    global one_by_one
    one_by_one = ScanOps.generic_scan

    def by_doubling(self, input):
        arrays = [x.handle.data.copy() for x in input]
        if arrays[0].ndim != 1:
            return one_by_one(self, input)
        for step in (1 << k for k in range((arrays[0].size - 1).bit_length())):
            rolled = [
                self.to_tensor(np.roll(a, step), x.dtype)
                for a, x in zip(arrays, input, strict=True)
            ]
            here = [self.to_tensor(a, x.dtype) for a, x in zip(arrays, input, strict=True)]
            both = self.combine_fn.fn(*rolled, *here)
            both = both if isinstance(both, tuple) else (both,)
            for a, b in zip(arrays, both, strict=True):
                # What was rolled around the end has nothing before it.
                a[step:] = b.handle.data[step:]
        return [self.to_tensor(a, x.dtype) for a, x in zip(arrays, input, strict=True)]

    ScanOps.generic_scan = by_doubling
