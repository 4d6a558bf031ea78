"""fastrlhf doctor: what is installed, which backend runs each op here, and why the others do not.

The hosts whose functions `fastrlhf.integrations` can replace are looked for, not imported. The exit
status is 0 on every machine where the package does its work, however slowly, and 1 only where the
install is broken: a requirement that is missing, or an extension that was built but does
not load.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import dataclass

from fastrlhf.integrations import _hosts

REQUIREMENTS = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
)
OLDEST_TORCH = (2, 10)
FLASH_ATTENTION = {"flash_attn_interface": "flash-attn 3", "flash_attn": "flash-attn 2"}


@dataclass
class DoctorConfig:
    """Report what works on this machine."""

    json: bool = False  # print one JSON object instead of tables


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict:
    """The kernel library's build facts, or why the C++ ops are unavailable."""
    from fastrlhf.ops import _library

    if reason := _library.load():
        broken = {"broken": True} if _library.PATH.is_file() else {}
        return {
            "present": False,
            "reason": f"{reason}; the reference backend serves every op",
            **broken,
        }
    return {"present": True, **_library.build_info()}


def _attention(device: str) -> dict:
    """Which flash attention is installed, and the path a packed batch would take on `device`."""
    import torch

    found = [n for m, n in FLASH_ATTENTION.items() if importlib.util.find_spec(m) is not None]
    report = {"flash_attention": found}
    try:
        from fastrlhf.integrations import attention
    except ImportError as error:
        return {**report, "path": f"unknown: {error}", "broken": True}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    path = attention.plan(torch.device(device), dtype).kernel
    return {**report, "dtype": str(dtype).removeprefix("torch."), "path": path}


def examine() -> dict:
    """Everything doctor knows, as plain data; `problems` is empty unless the install is broken."""
    versions = {name: _version(name) for name in REQUIREMENTS}
    report = {
        "fastrlhf": importlib.import_module("fastrlhf").__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "hosts": _hosts.found(),
        "problems": [
            f"{name} is not installed"
            for name, version in versions.items()
            if version is None and (name != "triton" or platform.system() == "Linux")
        ],
    }
    try:
        import torch
    except ImportError as error:
        report["problems"].append(f"torch does not load: {error}")
        return report
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    report["torch"] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_devices": [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(i)),
            }
            for i in range(torch.cuda.device_count() if cuda else 0)
        ],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    report["extension"] = _extension()
    if report["extension"].pop("broken", False):
        report["problems"].append(f"extension {report['extension']['reason']}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        report["problems"].append(f"torch {torch.__version__} is older than {oldest}")
    from fastrlhf.ops import _backend

    report["device"] = device
    report["ops"] = _backend.backends()
    report["auto"] = {
        op: {
            "order": list(_backend.AUTO[op, device].order),
            "measured": _backend.measured(op, device),
        }
        for op in _backend.OPS
    }
    report["attention"] = _attention(device)
    if report["attention"].pop("broken", False) and versions["transformers"]:
        path = report["attention"]["path"].removeprefix("unknown: ")
        report["problems"].append(f"transformers does not load: {path}")
    return report


def _facts(report: dict) -> list[tuple[str, str]]:
    """The report's head as (name, text) rows."""
    rows = [
        ("fastrlhf", f"{report['fastrlhf']}, Python {report['python']}, {report['platform']}"),
        ("packages", ", ".join(f"{k} {v or 'MISSING'}" for k, v in report["versions"].items())),
        ("hosts", ", ".join(_host(name, entry) for name, entry in report["hosts"].items())),
    ]
    if "torch" not in report:
        return rows
    torch_, extension = report["torch"], report["extension"]
    devices = ", ".join(f"{d['name']} ({d['capability']})" for d in torch_["cuda_devices"])
    build = f"built for CUDA {torch_['cuda_build']}" if torch_["cuda_build"] else "a CPU build"
    rows += [
        ("torch", f"{torch_['version']}, {build}"),
        ("GPU", devices or "none found"),
        ("CPU", f"torch uses {torch_['cpu_capability']}, {torch_['threads']} threads"),
    ]
    if extension["present"]:
        archs = ", ".join(extension["cuda_archs"]) or "none (built without CUDA)"
        target, compiled = extension["torch_target_version"], extension["cpu_isa_compiled"]
        running = f"{extension['cpu_isa_running']} runs, of {', '.join(compiled)}"
        asked = os.environ.get("FASTRLHF_CPU_ISA")
        if asked and asked not in compiled:
            running += f"; FASTRLHF_CPU_ISA={asked} is none of these and does nothing"
        rows += [
            ("extension", f"present, {extension['compiler']}, serves torch >= {target}"),
            ("CPU kernels", running),
            ("CUDA archs", archs),
        ]
    else:
        rows.append(("extension", f"absent: {extension['reason']}"))
    attention = report["attention"]
    rows += [
        ("flash-attn", ", ".join(attention["flash_attention"]) or "not installed"),
        ("attention", f"{attention['path']}"),
    ]
    return rows


def _host(name: str, entry: dict) -> str:
    if entry["version"] is None:
        return f"{name} not installed"
    inside = "in" if entry["in_tested_range"] else "OUTSIDE"
    return f"{name} {entry['version']} ({inside} the tested range {entry['tested']})"


def show(report: dict) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(report):
        facts.add_row(Text(name, "bold"), Text(text))
    console.print(facts)
    if "ops" in report:
        ops = Table(title=f"backend of each op, auto on {report['device']}", title_justify="left")
        ops.add_column("op")
        ops.add_column("auto")
        ops.add_column("available")
        for op, table in report["ops"].items():
            ready = [backend for backend, state in table.items() if state == "available"]
            ops.add_row(op, table["auto"], ", ".join(ready))
        console.print(ops)
        console.print(Text("how auto's order was decided", "bold"))
        for measured, names in _measured(report["auto"]).items():
            console.print(Text(f"  {measured} ({', '.join(names)})"), soft_wrap=True)
        console.print(Text("unavailable, and why", "bold"))
        for reason, pairs in _reasons(report["ops"]).items():
            console.print(Text(f"  {pairs}: {reason}"), soft_wrap=True)
    for problem in report["problems"]:
        console.print(Text(f"broken install: {problem}", "bold red"), soft_wrap=True)


def _measured(auto: dict) -> dict[str, list[str]]:
    """Order and its measurement -> the ops that share them."""
    grouped: dict[str, list[str]] = {}
    for op, entry in auto.items():
        text = f"{' before '.join(entry['order'])}: {entry['measured']}"
        grouped.setdefault(text, []).append(op)
    return grouped


def _reasons(ops: dict) -> dict[str, str]:
    """Group (backend, ops) by the reason that stops them, so that no line repeats."""
    grouped: dict[str, dict[str, list[str]]] = {}
    for op, table in ops.items():
        for backend, state in table.items():
            if backend != "auto" and state != "available":
                grouped.setdefault(state, {}).setdefault(backend, []).append(op)
    return {
        reason: "; ".join(
            f"{backend} ({'every op' if len(names) == len(ops) else ', '.join(names)})"
            for backend, names in backends.items()
        )
        for reason, backends in grouped.items()
    }


def main(cfg: DoctorConfig) -> int:
    """Print the report; 0, or 1 for a broken install."""
    report = examine()
    if cfg.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 1 if report["problems"] else 0
