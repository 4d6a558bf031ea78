"""libfastrlhf.so: no Python symbols, and no binding to one Python version."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fastrlhf.ops import _backend, _library

needs_library = pytest.mark.skipif(
    bool(_backend._extension_error), reason="the kernel library is not built"
)


def dynamic_symbols(path: Path) -> dict[str, bool]:
    """The dynamic symbols of a 64-bit ELF file -> whether the file defines them; `nm -D` in Python."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02", f"{path} is no 64-bit ELF file"
    order = "<" if data[5] == 1 else ">"
    table, size, count = (
        struct.unpack_from(f"{order}Q", data, 40)[0],
        *struct.unpack_from(f"{order}HH", data, 58),
    )
    # Section header: name, type, flags, address, offset, size, link, info, alignment, entry size.
    sections = [
        struct.unpack_from(f"{order}IIQQQQIIQQ", data, table + i * size) for i in range(count)
    ]
    found = {}
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], section[9]):
            name, _, _, index = struct.unpack_from(f"{order}IBBH", data, at)
            start = names + name
            found[data[start : data.index(b"\0", start)].decode()] = index != 0
    return found


@needs_library
def test_library_has_no_python_symbols():
    symbols = dynamic_symbols(_library.PATH)
    undefined = {name for name, defined in symbols.items() if not defined}
    assert any(name.startswith("aoti_torch_") for name in undefined)  # the reader sees symbols
    assert [name for name in symbols if name.startswith(("Py", "_Py"))] == []
    assert {"fastrlhf_build_info", "fastrlhf_poison_fresh_memory"} <= symbols.keys() - undefined


def test_packer_module_has_python_symbols():
    """The same reader finds the symbols where they are: in the module of one Python version."""
    _C = pytest.importorskip("fastrlhf._C")
    symbols = dynamic_symbols(Path(_C.__file__))
    assert [name for name in symbols if name.startswith(("Py", "_Py"))]


@needs_library
def test_a_library_of_other_schemas_is_refused():
    """The build stores a checksum of each schema; without this check a swapped argument gives wrong numbers."""
    assert {"gae", "token_loss_fwd_"} <= _library._schemas.keys()
    code = (
        "from fastrlhf.ops import _library; load = _library.load\n"
        "def changed():\n"
        "    found = load(); _library._schemas['gae'] = '00000000'; return found\n"
        "_library.load = changed\n"
        "import fastrlhf; fastrlhf.kl_reward\n"
        "try:\n    fastrlhf.gae\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "built for another version of fastrlhf::gae: build it again" in done.stdout, done.stderr
