"""Read a cubin without a GPU: code, registers and shared memory of its kernels, and their occupancy on sm_90."""

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sass import Code, SassError, parse

SYSTEM_SHARED = 1024  # bytes of shared memory per block that CUDA reserves on sm_90


def cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@dataclass(frozen=True)
class Function:
    """One kernel of a cubin. `shared`: static bytes without the reserved ones."""

    name: str  # demangled, without arguments: "token_logprob_fwd_kernel<float, false>"
    sass: str  # output of cuobjdump --dump-sass
    registers: int
    shared: int
    threads: int | None  # of __launch_bounds__
    spills: int  # bytes of stack and local memory per thread

    @cached_property
    def code(self) -> Code:
        return Code(parse(self.sass))


def functions(cubin: Path, pattern: str = "") -> dict[str, Function]:
    """Name -> kernel, for the kernels of a cubin whose name matches `pattern`."""

    def dump(what):
        command = [cuobjdump(), what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\S+):\s+(REG:.*)", dump("--dump-resource-usage")))
    sections = elf_sections(cubin.read_bytes())
    found = {}
    for piece in dump("--dump-sass").split("Function : ")[1:]:
        mangled, text = piece.split("\n", 1)
        name = plain_name(mangled.strip())
        if not re.search(pattern, name):
            continue
        used = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage[mangled.strip()])}
        shared = used["SHARED"]
        # Since CUDA 13 the shared section of an sm_90 kernel includes the reserved bytes.
        if ".nv.shared.reserved.0" in sections and shared >= SYSTEM_SHARED:
            shared -= SYSTEM_SHARED
        found[name] = Function(
            name=name,
            sass=text,
            registers=used["REG"],
            shared=shared,
            threads=launch_bounds(sections.get(".nv.info." + mangled.strip(), b"")),
            spills=used["STACK"] + used["LOCAL"],
        )
    return found


def plain_name(mangled: str) -> str:
    """Kernel name with template arguments, without namespaces and parameters."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        raise SassError("c++filt or cu++filt is needed to demangle kernel names")
    text = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\((?:\w+::)*\w+\)(?=\d)", "", text)  # (rl::Cap)1: the type of an enumerator
    found = re.search(
        r"(\w+(?:<[^(]*>)?)\s*(?:\(.*)?$", text.replace("(anonymous namespace)::", "")
    )
    return found[1] if found else text.strip()


def elf_sections(data: bytes) -> dict[str, bytes]:
    """Section name -> bytes of a 64-bit little-endian ELF file (empty for .bss-like sections)."""
    table, size, count, names = (
        struct.unpack_from("<Q", data, 40)[0],
        *struct.unpack_from("<HHH", data, 58),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + n * size) for n in range(count)]

    def content(header):
        return b"" if header[1] == 8 else data[header[4] : header[4] + header[5]]

    strings = content(headers[names])
    return {strings[h[0] : strings.index(b"\0", h[0])].decode(): content(h) for h in headers}


def launch_bounds(info: bytes) -> int | None:
    """Threads per block from EIATTR_MAX_THREADS or REQNTID in a kernel's .nv.info section; None if absent."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if form == 4 and attribute in (0x05, 0x10):
            x, y, z = struct.unpack_from("<III", info, at + 4)
            return x * y * z
        at += 4 + (size if form == 4 else 0)
    return None


# ---- occupancy of sm_90


def resident_blocks(registers: int, threads: int, shared: int) -> int:
    """Resident blocks per multiprocessor on sm_90. `shared`: static and dynamic bytes of a block.

    Limits: 64 K registers, allocated per warp in units of 256, a quarter for each of 4 schedulers; 2048 threads; 32
    blocks; 228 KB of shared memory in units of 128 bytes, with 1 KB per block reserved. Source: CUDA C++ programming
    guide, compute capability 9.0; CUDA occupancy calculator.
    """
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // 4 // a_warp * 4 // warps if registers <= 255 else 0
    a_block = -(-(shared + SYSTEM_SHARED) // 128) * 128
    return min(by_registers, 2048 // (warps * 32), 32, 228 * 1024 // a_block)
