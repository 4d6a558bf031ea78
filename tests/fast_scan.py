"""tl.associative_scan for the interpreter in log2(n) vector steps; its own takes n steps of Python.

The sums are grouped as on a GPU, by doubling; what an associative function gives does not change.
"""

import numpy as np

one_by_one = None  # the interpreter's own


def install():
    from triton.runtime.interpreter import ScanOps

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
