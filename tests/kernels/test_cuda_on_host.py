"""The CUDA kernels on the CPU: the same .cu sources, built by g++ with AddressSanitizer (host_shim/build.py).

The op's test files run in a process where backend="cuda" is that library, on CPU tensors: values and gradients against
the reference, layouts, masks, empty inputs (not torch.compile, which tests the Python side). Every call runs twice,
with blocks and threads in another order, and must be bitwise reproducible. The end of this file tests the shim itself
on faults. The emulated device is sm_80; token_loss, which uses clusters on sm_90, also runs as sm_90. The shim cannot
run PTX: kernels use their plain C++ fallbacks, and PTX is tested on a GPU.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from _support.host_shim import build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
DEVICE_CODE = sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
FAULTS = ROOT / "tests" / "_support" / "host_shim" / "faults.cu"
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"host shim: {build.missing()}")


def op_tests(op):
    folder = ROOT / "tests"
    return [*folder.rglob(f"test_{op}.py"), *sorted(folder.rglob(f"test_{op}_*.py"))]


def run(libraries, *command, sm=80, ops=()):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=build.environment(libraries, sm, ops),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


CONFORMANCE = ROOT / "tests" / "ops" / "test_conformance.py"
CLUSTERS = ROOT / "tests" / "_support" / "host_shim" / "token_loss_clusters.py"
# Their limits are the same code on every device.
COVERING = f"{ROOT / 'tests' / 'ops' / 'test_policy_losses.py'}::test_equals_the_loops"
POLICY = [COVERING, ROOT / "tests" / "ops" / "test_policy_parts.py"]
# Emulated device -> the sources whose ops it runs, and more tests.
DEVICES = {80: (SOURCES, POLICY), 90: ([ROOT / "csrc" / "cuda" / "token_loss.cu"], [CLUSTERS])}
RUNS = [
    (source, op, sm)
    for sm, (sources, _) in DEVICES.items()
    for source in sources
    for op in build.ops_of(source)
]


@functools.cache
def libraries():
    """{source: its library, or the error of its build}."""
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count()))
    return build.build_all([*SOURCES, FAULTS], jobs)


def library_of(source):
    """Raises the error of the build."""
    found = libraries()[source]
    if not isinstance(found, Path):
        raise found
    return found


@functools.cache
def finished(sm):
    """The finished run of an emulated device's tests: one process, as imports take longer than a small op's tests."""
    # All libraries: tests and backwards call more than their own ops.
    built = {source: path for source, path in libraries().items() if isinstance(path, Path)}
    sources, more = DEVICES[sm]
    ops = [op for source in sources if source in built for op in build.ops_of(source)]
    files = dict.fromkeys(file for op in ops for file in op_tests(op))
    # --capture=sys, not fd: the sanitizer's report must outlive the process.
    options = ("-p", "shim_plugin", "-p", "no:cacheprovider", "--capture=sys", "-q", "-rpfE")
    command = ("-m", "pytest", *options, *files, CONFORMANCE, *more)
    return run(built.values(), *command, sm=sm, ops=ops)


@pytest.fixture(scope="module", autouse=True)
def built():
    """The builds, apart from the tests' own time."""
    libraries()


@pytest.mark.parametrize(("source", "op", "sm"), RUNS, ids=lambda p: str(getattr(p, "stem", p)))
def test_kernels(source, op, sm):
    """All of a device's tests pass, and those of this op are among them."""
    assert op_tests(op), f"{op} needs a test, test_{op}.py"
    assert library_of(source)
    done = finished(sm)
    passed = "\n".join(re.findall(r"^PASSED .*", done.stdout, re.MULTILINE))
    rest = re.sub(r"^PASSED .*\n", "", done.stdout, flags=re.MULTILINE)
    output = f"{rest[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, output
    assert f"test_{op}.py::" in passed, output
    assert f"[{op}-cuda" in passed, f"{op} has no conformance test\n{output}"
    assert not re.search(r"\d+ skipped", done.stdout), output


def kernels_run(source):
    """The kernels that the tests of a source's ops ran."""
    line = rf"^tests of {source.stem}: kernel ran: (\w+)"
    devices = [sm for sm, (sources, _) in DEVICES.items() if source in sources]
    return {k for sm in devices for k in re.findall(line, finished(sm).stdout, re.MULTILINE)}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_the_tests_of_a_file_run_its_kernels(source):
    assert build.ops_of(source), f"{source.name} registers no op"
    assert build.kernels_of(source) <= kernels_run(source)


def test_every_kernel_ran():
    """Also kernels in headers, which several ops share."""
    defined = {k for p in DEVICE_CODE for k in build.kernels_of(p)}
    ran = set().union(*map(kernels_run, SOURCES))
    assert len(defined) >= len(SOURCES) and defined <= ran, f"run by no test: {defined - ran}"


# Fault in host_shim/faults.cu -> expected message of the shim.
SEEN = {
    "read past the end": "heap-buffer-overflow",
    "write past the end": "heap-buffer-overflow",
    "shared past the end": "heap-buffer-overflow",
    "dynamic past the end": "heap-buffer-overflow",
    "misaligned": "misaligned address",
    "no barrier": "argument 1 depends on the order of blocks or threads",
    "block order": "argument 1 depends on the order of blocks or threads",
    "early exit": r"diverge: 1 returned, the first is thread 5; 63 wait at __syncthreads \(faults.cu:\d+\)",
    "other barrier": r"__syncthreads \(faults.cu:\d+\): others of its block wait at __syncthreads",
    "lane missing": r"diverge: 2 returned, the first is thread 31; 62 wait at __shfl_xor_sync",
    "lane outside": "it reads a lane that is not in its mask",
    "empty grid": "fault: invalid configuration argument",
    "too many threads": "fault: invalid configuration argument",
    "too much shared": "fault: invalid argument",
    "no cluster barrier": "argument 1 depends on the order of blocks or threads",
    "block not started": r"store_remote \(faults.cu:\d+\): that block has not started",
    "block has ended": r"store_remote \(faults.cu:\d+\): that block has ended",
    "rank outside": r"store_remote \(faults.cu:\d+\): its rank is not in the cluster",
    "not shared": r"store_remote \(faults.cu:\d+\): its address is not in shared memory",
    "wait without arrival": r"cluster_wait \(faults.cu:\d+\): it waits and has not arrived",
    "two arrivals": r"cluster_arrive \(faults.cu:\d+\): it arrives again and has not waited",
    "cluster thread missing": "the threads of the cluster diverge: 1 returned, the first is thread 5 of block 1; "
    r"127 wait at cluster_wait \(faults.cu:\d+\)",
    "grid of half a cluster": "fault: cluster misconfiguration",
    "no clusters in sm_80": "fault: cluster misconfiguration",
    "copy without barrier": "argument 1 depends on the order of blocks or threads",
    "misaligned copy": "misaligned address",
    "copy past the end": "heap-buffer-overflow",
}
# Fault -> elements of the output that must stay NaN.
POISONED = {
    "unwritten shared": range(0, 64, 2),
    "unwritten tensor": range(61),
    "copy without wait": range(60),
    "copy in an open group": range(60),
    "copy in no group": range(60),
}
SOUND = {
    "sound": [float(i) for i in range(61, 0, -1)],
    "sound cluster": [100.0 + i for i in range(64)],
    "sound copy": [*(float(i) for i in range(1, 61)), 0.0, 0.0, 0.0, 0.0],
}


@pytest.fixture(scope="module")
def faults():
    script = ROOT / "tests" / "_support" / "host_shim" / "try_faults.py"
    done = run([library_of(FAULTS)], script, *SOUND, *SEEN, *POISONED, sm=90)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_kernel_passes(kind, faults):
    assert faults[kind] == [SOUND[kind], ""]


@pytest.mark.parametrize("kind", SEEN)
def test_faults_are_seen(kind, faults):
    values, text = faults[kind]
    assert values is None and re.search(SEEN[kind], text), (values, text[:3000])
    if "depends" not in SEEN[kind] and not SEEN[kind].startswith("fault:"):
        assert "faults.cu:" in text, text[:3000]  # the source line is named


@pytest.mark.parametrize("kind", POISONED)
def test_unwritten_memory_is_nan(kind, faults):
    values, error = faults[kind]
    assert error == ""
    assert [i for i, value in enumerate(values) if value != value] == [*POISONED[kind]]


@pytest.mark.parametrize(
    ("source", "rewritten"),
    [
        ("#if __CUDA_ARCH__ >= 900", "#if SHIM_CUDA_ARCH >= 900"),
        (
            "STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m)",
            "STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m)",
        ),
        (
            "__shared__ Pair<A, B> x[2][3], y;",
            "typedef Pair<A, B> x_shared_t[2][3]; static const char x_site = 0; x_shared_t& x = "
            "*static_cast<x_shared_t*>(::shim::shared(&x_site, sizeof(x_shared_t))); "
            "typedef Pair<A, B> y_shared_t; static const char y_site = 0; y_shared_t& y = "
            "*static_cast<y_shared_t*>(::shim::shared(&y_site, sizeof(y_shared_t)));",
        ),
        (
            "extern __shared__ float x[];",
            "float* x = static_cast<float*>(::shim::dynamic_shared());",
        ),
        (
            "__global__ void __launch_bounds__(kWarps * (32))\n f_kernel(int a) { b(); }",
            " void __launch_bounds__(kWarps * (32))\n f_kernel(int a) "
            '{::shim::entered("f_kernel"); b(); }',
        ),
        ("__global__ void f_kernel(int a);  // a __global__ one", " void f_kernel(int a);  "),
    ],
)
def test_rewriting(source, rewritten):
    assert build.rewrite(source, "x.cu") == f'#line 1 "x.cu"\n{rewritten}'


def test_a_triple_bracket_launch_is_refused():
    with pytest.raises(ValueError, match=r"x.cu: start kernels through launch\(\)"):
        build.rewrite("f<<<1, 2>>>(3);", "x.cu")
