"""A fake CUDA clock for the timing code of benchmarks/: events, streams and graphs of torch.cuda without a GPU.

The device is a clock. `work` advances it, as a kernel would, or adds to the graph under capture; a flush of the caches
advances it by FLUSH; events read it.
"""

import contextlib
import types

import torch

CACHE, FLUSH = 2**20, 1.0


def install(replace, harness) -> types.SimpleNamespace:
    """Replace torch.cuda's functions and `harness.flush` by `replace(object, name, value)`; return the device."""
    device = types.SimpleNamespace(
        now=0.0, capturing=None, graphs=[], sync_mode=0, stream=None, syncs=0
    )

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        def __init__(self):
            self.seconds, self.replays = 0.0, 0
            device.graphs.append(self)

        def capture_begin(self):
            assert device.stream is not None, "a capture needs a side stream"
            device.capturing = self

        def capture_end(self):
            device.capturing = None

        def replay(self):
            self.replays += 1
            device.now += self.seconds

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(which):
        device.stream = which
        yield
        device.stream = None

    def synchronize():
        assert device.capturing is None
        device.syncs += 1

    def flush(on):
        assert on == "cuda" and device.capturing is None
        device.now += FLUSH

    def work(seconds):
        """A kernel: advances the clock, or becomes part of the graph under capture."""
        if device.capturing is not None:
            device.capturing.seconds += seconds
        else:
            device.now += seconds

    cuda = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
        "synchronize": synchronize,
        "current_device": lambda: 0,
        "get_device_name": lambda: "fake",
        "get_device_properties": lambda index: types.SimpleNamespace(L2_cache_size=CACHE),
        "get_sync_debug_mode": lambda: device.sync_mode,
        "set_sync_debug_mode": lambda mode: setattr(device, "sync_mode", mode),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 7,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, value in cuda.items():
        replace(torch.cuda, name, value)
    replace(harness, "flush", flush)
    device.work = work
    return device
