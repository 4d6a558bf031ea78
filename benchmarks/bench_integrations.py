"""Functions of trl, transformers, verl and openrlhf, original and replaced: time, extra memory, error against fp64.

    python benchmarks/bench_integrations.py --package trl [--only selective] [--out FILE.json]

A row times the original function and its replacement in turns, in one process, on the same tensors. The Trainer row
runs each variant in its own process, which trains the same model for some steps, and reports the peaks of torch's
allocator and of the resident set. tests/_support/unpacked.py loads verl and OpenRLHF.
Shapes: B sequences, T tokens, V vocabulary, H hidden.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import harness

ONLY = ""  # prefix of the names of the functions to measure
WIDTHS = {"B": 8, "T": 256, "V": 32000}


def errors(function, truth, inputs, upstream):
    """The largest error of each output and each gradient of a float input, over the largest true value."""
    found = []
    for call, cast in ((function, lambda x: x), (truth, torch.Tensor.double)):
        arguments = [
            cast(x).detach().clone().requires_grad_() if x.is_floating_point() else x
            for x in inputs
        ]
        out = call(*arguments)
        out = out if isinstance(out, tuple) else (out,)
        outputs = [x for x in out if x is not None and x.requires_grad]
        (sum((x.double() * upstream).sum() for x in outputs)).backward()
        found.append(
            [x.detach() for x in outputs] + [x.grad for x in arguments if x.grad is not None]
        )
    pairs = zip(*found, strict=True)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def compare(name, ours, original, truth, inputs, device, seconds, **facts):
    """Two rows: forward alone, and forward with backward."""
    if not name.startswith(ONLY):
        return
    torch.manual_seed(0)
    upstream = torch.randn(inputs[0].shape[:-1], device=device)
    our_errors = errors(ours, truth, inputs, upstream)
    original_errors = errors(original, truth, inputs, upstream)
    eps = torch.finfo(inputs[0].dtype).eps
    ratio = max(a / max(b, eps) for a, b in zip(our_errors, original_errors, strict=True))
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]

    def forward(function):
        return lambda: function(*leaves)

    def full(function):
        def step():
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            sum((x * upstream).sum() for x in out if x is not None and x.requires_grad).backward()
            for x in leaves:
                x.grad = None

        return step

    for direction, bind in (("forward", forward), ("forward+backward", full)):
        functions = {"original": bind(original), "fastrlhf": bind(ours)}
        taken = harness.times(functions, device, seconds)
        seconds_of = {k: statistics.median(v) for k, v in taken.items()}
        held = {k: harness.peak_bytes(f, device) for k, f in functions.items()}
        yield {
            "function": name,
            "direction": direction,
            **facts,
            "dtype": str(inputs[0].dtype)[6:],
            "ms": {k: v * 1e3 for k, v in seconds_of.items()},
            "times_faster": seconds_of["original"] / seconds_of["fastrlhf"],
            "extra_bytes": held,
            "times_less_memory": held["original"] / max(held["fastrlhf"], 1),
            "error_ratio": ratio,
        }


def unpatched(function, patched):
    """`function` with the original functions of the package, while the replacements stay in place."""

    def call(*arguments):
        with patched.suspended():
            return function(*arguments)

    return call


def trl_rows(device, dtype, seconds, sizes):
    """TRL's log-prob, entropy and chunked head, as its trainers call them."""
    from fastrlhf.integrations import trl as integration

    utils = importlib.import_module("trl.trainer.utils")
    shape = (sizes["B"], sizes["T"], sizes["V"])
    torch.manual_seed(0)
    logits = (2 * torch.randn(shape, device=device)).to(dtype)
    index = torch.randint(shape[-1], shape[:-1], device=device)
    facts = {"package": "trl", "shape": list(shape)}
    calls = {
        "selective_log_softmax": (logits, index),
        "entropy_from_logits": (logits,),
        "selective_log_softmax_and_entropy": (logits, index),
    }
    in_place = {"selective_log_softmax": calls["selective_log_softmax"]}
    for inplace, functions in ((False, calls), (True, in_place)):
        with integration.patch(inplace_backward=inplace) as patched:
            for name, inputs in functions.items():
                ours = getattr(utils, name)
                original = unpatched(ours, patched)
                label = f"{name}, in-place backward" if inplace else name
                yield from compare(
                    label, ours, original, original, inputs, device, seconds, **facts
                )
    del logits, inputs, calls, in_place, functions
    rows, width = sizes["B"] * sizes["T"] // 2, 256
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = (torch.randn(shape[-1], width, device=device) / width**0.5).to(dtype)
    targets = index.flatten()[:rows]
    facts = {"package": "trl", "shape": [rows, width, shape[-1]]}

    def truth(h, w):
        logp = (h @ w.T).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy

    with integration.patch() as patched:
        for outputs in (("entropy",), ("entropy", "mean_logits", "is_top1")):

            def ours(h, w, outputs=outputs):
                settings = (1.0, 32768, None, 1.0, outputs)
                return utils._ChunkedLogProbFunction.apply(h, w, None, targets, *settings)[:2]

            pair = ours, unpatched(ours, patched)
            name = f"ChunkedLogProbFunction, {' '.join(outputs)}"
            inputs = (hidden, weight)
            yield from compare(name, *pair, truth, inputs, device, seconds, **facts)


def train(patched: bool, device: str, sizes: dict, steps: int) -> dict:
    """`steps` steps of transformers' Trainer on a 2-layer Llama: seconds per step and peaks of memory."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from fastrlhf.integrations import transformers as integration

    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=sizes["V"], hidden_size=256, **layers))
    ids = torch.randint(sizes["V"], ((steps + 1) * sizes["B"], sizes["T"]))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run(steps):
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                use_cpu=device == "cpu",
                per_device_train_batch_size=sizes["B"],
                max_steps=steps,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            return Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss

    if patched:
        integration.patch()
    start = time.perf_counter()
    loss = run(steps)
    took = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.zero_grad()
    allocated = harness.peak_bytes(lambda: run(1), device) + weights
    return {
        "seconds": took / steps,
        "resident_bytes": resident,
        "peak_bytes": allocated,
        "loss": loss,
    }


def transformers_rows(device, dtype, seconds, sizes):
    """A training step of the plain Trainer, each variant in its own process."""
    steps = 3
    runs = {}
    for name in ("original", "fastrlhf"):
        arguments = ["--train", name, "--device", device, "--steps", str(steps)]
        arguments += [f"--{key}={value}" for key, value in sizes.items()]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        )
        runs[name] = json.loads(done.stdout.splitlines()[-1])
    original, ours = runs["original"], runs["fastrlhf"]
    yield {
        "package": "transformers",
        "function": "Trainer step, 2-layer Llama, H 256",
        "direction": "forward+backward",
        "shape": [sizes["B"], sizes["T"], sizes["V"]],
        "dtype": "float32",
        "ms": {k: v["seconds"] * 1e3 for k, v in runs.items()},
        "times_faster": original["seconds"] / ours["seconds"],
        "peak_bytes": {k: v["peak_bytes"] for k, v in runs.items()},
        "peak_over_original": ours["peak_bytes"] / original["peak_bytes"],
        "resident_bytes": {k: v["resident_bytes"] for k, v in runs.items()},
        "loss_difference": abs(ours["loss"] - original["loss"]),
    }


def gae_rows(package, module, name, attribute, device, seconds, masks):
    """A GAE function, which has no gradients, on [512, 1024] fp32 steps for each of `masks`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from _support import unpacked

    integration = importlib.import_module(f"fastrlhf.integrations.{package}")
    with (
        unpacked.installed(getattr(unpacked, package)()) as modules,
        integration.patch() as patched,
    ):
        torch.manual_seed(0)
        rewards, values = torch.randn(2, 512, 1024, device=device).unbind()
        lengths = torch.randint(512, 1025, (512, 1), device=device)
        keep = torch.arange(1024, device=device) < lengths
        for label, arguments in masks(rewards, values, keep).items():
            if not name.startswith(ONLY):
                return

            def ours(arguments=arguments):
                return attribute(modules[module])(*arguments)

            def original(arguments=arguments):
                with patched.suspended():
                    return attribute(modules[module])(*arguments)

            doubles = [
                x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
            ]
            truth = original(doubles)
            relative_errors = [
                max(
                    ((a - b).abs().max() / b.abs().max()).item()
                    for a, b in zip(x, truth, strict=True)
                )
                for x in (ours(), original())
            ]
            taken = harness.times({"original": original, "fastrlhf": ours}, device, seconds)
            seconds_of = {k: statistics.median(v) for k, v in taken.items()}
            held = {
                k: harness.peak_bytes(f, device)
                for k, f in (("original", original), ("fastrlhf", ours))
            }
            yield {
                "function": f"{name}, {label}",
                "direction": "forward",
                "package": package,
                "shape": [512, 1024],
                "dtype": "float32",
                "ms": {k: v * 1e3 for k, v in seconds_of.items()},
                "times_faster": seconds_of["original"] / seconds_of["fastrlhf"],
                "extra_bytes": held,
                "times_less_memory": held["original"] / max(held["fastrlhf"], 1),
                "error_ratio": relative_errors[0]
                / max(relative_errors[1], torch.finfo(torch.float32).eps),
            }


def verl_rows(device, dtype, seconds, sizes):
    """verl's GAE with an int64 response mask, as in its trainer."""
    yield from gae_rows(
        "verl",
        "verl.trainer.ppo.core_algos",
        "compute_gae_advantage_return",
        lambda module: module.compute_gae_advantage_return,
        device,
        seconds,
        lambda r, v, keep: {"int64 mask": (r, v, keep.long(), 1.0, 0.95)},
    )


def openrlhf_rows(device, dtype, seconds, sizes):
    """OpenRLHF's GAE with a bool action mask, and without a mask."""
    yield from gae_rows(
        "openrlhf",
        "openrlhf.trainer.ppo_utils.experience_maker",
        "get_advantages_and_returns",
        lambda module: lambda *x: module.RemoteExperienceMaker.get_advantages_and_returns(None, *x),
        device,
        seconds,
        lambda r, v, keep: {
            "bool mask": (v, r, keep, 1.0, 0.95),
            "no mask": (v, r, None, 1.0, 0.95),
        },
    )


ROWS = {
    "trl": trl_rows,
    "transformers": transformers_rows,
    "verl": verl_rows,
    "openrlhf": openrlhf_rows,
}


def line(row: dict) -> str:
    ms = row["ms"]
    text = f"{row['package']} {row['function']} {row['shape']} {row['dtype']} {row['direction']}: "
    text += f"{ms['original']:.1f} -> {ms['fastrlhf']:.1f} ms ({row['times_faster']:.1f}x)"
    if "extra_bytes" in row:
        mib = {k: v / 2**20 for k, v in row["extra_bytes"].items()}
        text += f", extra {mib['original']:.1f} -> {mib['fastrlhf']:.1f} MiB"
        return (
            text + f" ({row['times_less_memory']:.1f}x less), error ratio {row['error_ratio']:.2f}"
        )
    mib = {k: v / 2**20 for k, v in row["peak_bytes"].items()}
    text += f", peak {mib['original']:.0f} -> {mib['fastrlhf']:.0f} MiB ({row['peak_over_original']:.2f}x)"
    resident = {k: v / 2**20 for k, v in row["resident_bytes"].items()}
    return text + f", resident +{resident['original']:.0f} -> +{resident['fastrlhf']:.0f} MiB"


def save(path: Path, device: str, rows: list[dict]) -> None:
    """Writes the rows; rows of other functions in the file stay."""
    key = lambda row: (row["package"], row["function"], row["direction"], row["dtype"])  # noqa: E731
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    merged = {key(row): row for row in [*kept, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": harness.machine(device), "rows": list(merged.values())}
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    global ONLY
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", choices=ROWS, action="append", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=3.0, help="per comparison")
    for key, value in WIDTHS.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument(
        "--only", default="", help="prefix of the names of the functions to measure"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file that the rows are written to; rows of other functions in it stay",
    )
    parser.add_argument("--train", choices=("original", "fastrlhf"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ONLY = args.only
    sizes = {key: getattr(args, key) for key in WIDTHS}
    if args.train:
        print(json.dumps(train(args.train == "fastrlhf", args.device, sizes, args.steps)))
        return
    rows = []
    for package in args.package or ROWS:
        dtype = getattr(torch, args.dtype)
        for row in ROWS[package](args.device, dtype, args.seconds, sizes):
            print(line(row), flush=True)
            rows.append(row)
            if args.out:
                save(args.out, args.device, rows)


if __name__ == "__main__":
    main()
