"""Options and checks of `pytest benchmarks/` (test_ops.py)."""

import gc
import os

import pytest
import torch

import harness
from fastrlhf import extras

# The collection only adds objects, which the garbage collector would walk again and again.
gc.disable()


def pytest_addoption(parser):
    group = parser.getgroup("fastrlhf benchmarks")
    group.addoption(
        "--size",
        choices=("tiny", "default", "full"),
        default="default",
        help="tiny: capped shapes and few rounds, to see the benchmarks run; default: on a GPU the cases of "
        "`make gpu-quick`, on a CPU all; full: all cases of the device",
    )
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    group.addoption("--device", choices=devices, default=devices[0])
    group.addoption(
        "--no-compile",
        action="store_true",
        help="do not time torch.compile(eager); tiny never does",
    )


def pytest_configure(config):
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(
            "benchmarks/ does not run under pytest-xdist, which disables the timing: pass -n 0"
        )
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError(
            f"benchmarks/ needs pytest-benchmark: {extras.how_to_install('test')}"
        )


def pytest_collection_finish():
    gc.enable()


def pytest_report_header(config):
    facts = harness.machine(config.getoption("device"))
    load = facts["load_average"]
    busy = f"; load average {load:.1f}: other processes distort the times" if load > 0.5 else ""
    return (
        f"fastrlhf benchmarks: {facts['name']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"size {config.getoption('size')}{busy}"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Software and device, so that --benchmark-compare warns where they differ."""
    facts = harness.machine(config.getoption("device"))
    del facts["load_average"]  # differs between any two runs
    machine_info["fastrlhf"] = facts
    machine_info["environment"] = {
        k: os.environ[k] for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if k in os.environ
    }
