"""fastrlhf doctor: what is installed, which backend runs each op here, and why the others do not.

It needs the base install alone, and looks for trainers to patch without importing them. The exit
status is 1 only where the install is broken: a missing requirement, or a compiled part that was
built but does not load. A slow or partial install is not broken.
"""

import importlib.util
import json
import os
import platform

import fastrlhf
from fastrlhf import _compiled, extras
from fastrlhf.errors import UserError, did_you_mean
from fastrlhf.integrations import _versions

USAGE = """usage: fastrlhf doctor [--json]

Show what is installed, which backend runs each op on this machine, and why the others do not.

  --json  print one JSON object instead of tables"""

REQUIREMENTS = ("torch", "triton")
EXTRAS = ("train", "eval", "report", "demo", "bench")
FLASH_ATTENTION = {"flash_attn_interface": "flash-attn 3", "flash_attn": "flash-attn 2"}


def _kernels() -> dict:
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


def _packer() -> dict:
    """Which sequence packer runs, C++ or Python; both give the same result."""
    module, reason = _compiled.packer()
    if module is not None:
        return {"runs": "C++"}
    if reason:
        return {"runs": "Python", "reason": reason, "broken": True}
    reason = f"fastrlhf._C is not built for Python {platform.python_version()}"
    return {"runs": "Python", "reason": reason}


def _attention(device: str) -> dict:
    """Which flash attention is installed, and the path a packed batch would take on `device`."""
    import torch

    found = [n for m, n in FLASH_ATTENTION.items() if importlib.util.find_spec(m) is not None]
    report = {"flash_attention": found}
    if extras.version("transformers") is None:
        return {**report, "path": "none: transformers is not installed (extra [train])"}
    try:
        from fastrlhf.integrations import attention
    except ImportError as error:
        return {**report, "path": f"unknown: {error}", "broken": True}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    path = attention.kernel_name(torch.device(device), dtype)
    return {**report, "dtype": str(dtype).removeprefix("torch."), "path": path}


def examine() -> dict:
    """The whole report as plain data; `problems` is empty unless the install is broken."""
    names = sorted({name for extra in EXTRAS for name in extras.packages(extra)})
    versions = {name: extras.version(name) for name in (*REQUIREMENTS, *names)}
    report = {
        "fastrlhf": fastrlhf.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        # extra -> the packages that it needs and that are missing
        "extras": {extra: extras.missing(extra) for extra in EXTRAS if extras.packages(extra)},
        "integrations": _versions.status(),
        "problems": [
            f"{name} is not installed"
            for name in REQUIREMENTS
            if versions[name] is None and (name != "triton" or platform.system() == "Linux")
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
    if fastrlhf.torch_release(torch.__version__) < fastrlhf.OLDEST_TORCH:
        report["problems"].append(fastrlhf.too_old(torch.__version__))
        return report
    try:
        from fastrlhf.ops import _backend

        ops = _backend.backends()
    except (ImportError, AttributeError) as error:
        report["problems"].append(f"the ops do not load: {error}")
        return report
    report["kernels"], report["packer"] = _kernels(), _packer()
    for part in (report["kernels"], report["packer"]):
        if part.pop("broken", False):
            report["problems"].append(part["reason"])
    built_for = report["kernels"].get("version", report["fastrlhf"])
    if built_for != report["fastrlhf"]:
        report["problems"].append(f"the kernel library is of fastrlhf {built_for}: build it again")
    report["device"] = device
    report["ops"] = ops
    report["auto"] = {
        op: {
            "order": list(_backend.order(op, device)),
            "measured": _backend.measured(op, device),
        }
        for op in _backend.OPS
    }
    report["attention"] = _attention(device)
    if report["attention"].pop("broken", False):
        path = report["attention"]["path"].removeprefix("unknown: ")
        report["problems"].append(f"transformers does not load: {path}")
    return report


def _facts(report: dict) -> list[tuple[str, str]]:
    """The report's head as (name, text) rows."""
    versions = report["versions"]
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    rows = [
        ("fastrlhf", f"{report['fastrlhf']}, Python {report['python']}, {report['platform']}"),
        ("packages", ", ".join(installed) or "none"),
        *_extras(report["extras"]),
        ("trainers", ", ".join(_trainer(*entry) for entry in report["integrations"].items())),
    ]
    if "torch" not in report:
        return rows
    torch_ = report["torch"]
    devices = ", ".join(f"{d['name']} ({d['capability']})" for d in torch_["cuda_devices"])
    build = f"built for CUDA {torch_['cuda_build']}" if torch_["cuda_build"] else "a CPU build"
    rows += [
        ("torch", f"{torch_['version']}, {build}"),
        ("GPU", devices or "none found"),
        ("CPU", f"torch uses {torch_['cpu_capability']}, {torch_['threads']} threads"),
    ]
    if "kernels" not in report:
        return rows
    kernels = report["kernels"]
    if kernels["present"]:
        archs = ", ".join(kernels["cuda_archs"]) or "none (built without CUDA)"
        target, compiled = kernels["torch_target_version"], kernels["cpu_isa_compiled"]
        running = f"{kernels['cpu_isa_running']} (compiled: {', '.join(compiled)})"
        asked = os.environ.get("FASTRLHF_CPU_ISA")
        if asked and asked not in compiled:
            running += f"; FASTRLHF_CPU_ISA={asked} is not one of these and is ignored"
        rows += [
            ("kernels", f"present, {kernels['compiler']}, for torch >= {target} and any Python"),
            ("CPU kernels", running),
            ("CUDA kernels", archs),
        ]
    else:
        rows.append(("kernels", f"absent: {kernels['reason']}"))
    packer, attention = report["packer"], report["attention"]
    rows += [
        ("packer", packer["runs"] + (f" ({packer['reason']})" if "reason" in packer else "")),
        ("flash-attn", ", ".join(attention["flash_attention"]) or "not installed"),
        ("attention", attention["path"]),
    ]
    return rows


def _extras(report: dict) -> list[tuple[str, str]]:
    if not report:
        return [("extras", "unknown: this source tree is not installed")]
    rows = []
    for name, absent in report.items():
        fix = f"lacks {', '.join(absent)}: {extras.how_to_install(name)}"
        rows.append(("" if rows else "extras", f"[{name}] {fix if absent else 'installed'}"))
    return rows


def _trainer(name: str, entry: dict) -> str:
    if entry["version"] is None:
        return f"{name} not installed"
    inside = "in" if entry["in_tested_range"] else "OUTSIDE"
    return f"{name} {entry['version']} ({inside} the tested range {entry['tested']})"


def _print_columns(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def show(report: dict) -> None:
    """Print the report as tables."""
    _print_columns(_facts(report))
    if "ops" in report:
        rows = [("op", "auto", "available")]
        for op, table in report["ops"].items():
            ready = [backend for backend, state in table.items() if state == "available"]
            rows.append((op, table["auto"], ", ".join(ready)))
        print(f"\nBackend of each op; auto for tensors on {report['device']}")
        _print_columns(rows)
        print("\nMeasurement behind the order of auto")
        for measured, names in _measured(report["auto"]).items():
            print(f"  {measured} ({', '.join(names)})")
        print("\nUnavailable backends")
        for reason, pairs in _reasons(report["ops"]).items():
            print(f"  {pairs}: {reason}")
    for problem in report["problems"]:
        print(f"broken install: {problem}")


def _measured(auto: dict) -> dict[str, list[str]]:
    """An order with its measurement -> the ops that share it."""
    grouped: dict[str, list[str]] = {}
    for op, entry in auto.items():
        text = f"{' before '.join(entry['order'])}: {entry['measured']}"
        grouped.setdefault(text, []).append(op)
    return grouped


def _reasons(ops: dict) -> dict[str, str]:
    """A reason -> the backends and ops that it makes unavailable, as text."""
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


def main(arguments: list[str]) -> int:
    """Print the report; 0, or 1 for a broken install."""
    for argument in arguments:
        if argument != "--json":
            raise UserError(f"unknown option '{argument}'{did_you_mean(argument, ['--json'])}")
    report = examine()
    if arguments:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 1 if report["problems"] else 0
