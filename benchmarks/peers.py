"""Third-party implementations of our ops: torch, TRL, Liger, cut-cross-entropy, quack, and a Python loop.

Each provider takes the arguments of our op and returns its tensors, or converts the layout (`Provider.lay_out`).
TRL's functions are called as its trainers call them. On a CPU they compute in the dtype of the logits, so for
16-bit logits they are also timed on `logits.float()`.
B sequences, T steps, N tokens, V vocabulary, H hidden size.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os

import torch
import torch.nn.functional as F

from fastrlhf import reference
from harness import Provider, copy_of

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
_missing: dict[str, str] = {}  # "module.name" -> import error


def available() -> dict[str, str]:
    """Package -> version or "not installed"; function -> import error."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions | _missing


def _import(module: str, name: str):
    """The function, or None if its import raises anything: a broken peer must not stop the others."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        _missing[f"{module}.{name}"] = f"{type(error).__name__}: {error}"[:300]
        return None


def _runs_triton(tensor) -> bool:
    return tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def python_loop_gae(rewards, values, *, mask, gamma=1.0, lam=0.95, whiten=False):
    """GAE as a Python loop over T on [B, T], as in TRL, verl and OpenRLHF. Masks must have no holes."""
    rewards, values = rewards * mask, values * mask
    last, steps = 0.0, rewards.shape[1]
    advantages = [None] * steps
    for t in range(steps - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < steps else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        advantages[t] = last
    advantages = torch.stack(advantages, 1) * mask
    returns = advantages + values
    if whiten:
        count = mask.sum()
        mean = advantages.sum() / count
        variance = (((advantages - mean) * mask) ** 2).sum() / (count - 1)
        advantages = (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask
    return advantages, returns


def python_loop_kl_gae(logprob, ref_logprob, score, values, *, beta, mask, **options):
    """KL rewards with the score on the last token, then the loop. Masks must have no holes."""
    kl = (logprob - ref_logprob) * mask
    rewards = -beta * kl
    rows = torch.arange(mask.shape[0], device=mask.device)
    rewards[rows, mask.sum(1) - 1] += score
    advantages, returns = python_loop_gae(rewards, values, mask=mask, **options)
    return advantages, returns, rewards, kl


def _cross_entropy(logits, targets, *, return_entropy):
    assert not return_entropy
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def _trl(logits, upcast):
    """Imported at the first call, since it takes seconds: an error of the import rejects the provider in the gate."""
    if importlib.util.find_spec("trl") is None:
        return None
    # On a GPU the trainers call the kernel; importing it needs fewer packages than importing them.
    home = "trl.kernels" if logits.device.type == "cuda" else "trl.trainer.utils"
    names = {True: "selective_log_softmax_and_entropy"}
    names[False] = "selective_log_softmax" if home == "trl.trainer.utils" else names[True]
    functions = {}

    def token_logprob(logits, targets, *, return_entropy):
        if not functions:
            loaded = {entropy: _import(home, name) for entropy, name in names.items()}
            if None in loaded.values():
                raise ImportError(next(v for k, v in _missing.items() if k.startswith(home)))
            functions.update(loaded)
        out = functions[return_entropy](logits.float() if upcast else logits, targets)
        return out if return_entropy or not isinstance(out, tuple) else out[0]

    return Provider(token_logprob)


SEQUENCES = 8  # B of Liger's [B, T + 1, V] layout; 1 if N is not a multiple of it


def _with_a_row_between(logits):
    """[N, V] -> [B, T + 1, V]: Liger takes logits at T + 1 positions for T targets."""
    sequences = SEQUENCES if len(logits) % SEQUENCES == 0 else 1
    return F.pad(logits.view(sequences, -1, logits.shape[-1]), (0, 0, 0, 1))


def _liger_token_logprob():
    function = _import("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax")
    if function is None:
        return None

    def lay_out(args):
        logits = _with_a_row_between(args["logits"])
        return {"logits": logits, "targets": args["targets"].view(len(logits), -1)}

    return Provider(
        lambda logits, targets: function(logits, targets, 1.0),
        forward_only=True,
        lay_out=lay_out,
        read=lambda results: [results[0].flatten()],
    )


def _only(found):
    return {name: provider for name, provider in found.items() if provider is not None}


def token_logprob(logits, return_entropy):
    """Name -> provider that can run here and returns the requested outputs."""
    found = {} if return_entropy else {"F.cross_entropy": Provider(_cross_entropy)}
    found["TRL"] = _trl(logits, upcast=False)
    if logits.dtype != torch.float32 and logits.device.type == "cpu":
        found["TRL on .float()"] = _trl(logits, upcast=True)
    if _runs_triton(logits) and not return_entropy:
        found["Liger"] = _liger_token_logprob()
    return _only(found)


def _liger_grpo():
    """In place over the logits, as Liger's trainer calls it; one advantage per sequence."""
    function = _import("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    if function is None:
        return None

    def lay_out(args):
        logits = _with_a_row_between(args["logits"])
        rows = lambda x: x.view(len(logits), -1)  # noqa: E731
        return {
            "logits": logits,
            "targets": rows(args["targets"]),
            "old_logprob": rows(args["old_logprob"]),
            # It has no `scale`; fold it into the advantages.
            "advantages": args["scale"] * rows(args["advantages"])[:, 0].contiguous(),
        }

    def call(logits, targets, old_logprob, advantages):
        same = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.2, "inplace": True}
        return function(logits, old_logprob, None, targets, advantages, **same)[0]

    return Provider(
        call,
        lay_out=lay_out,
        gives=(0,),
        read=lambda results: [results[0].flatten(), results[1][:, :-1].flatten(0, 1)],
    )


def _mean_alone(call):
    """A cross entropy that returns the mean over rows, our sum at scale 1 / N. The gate compares its gradient.

    `call(logits, targets)` may overwrite the logits.
    """
    return Provider(
        lambda logits, targets, scale: call(logits, targets),
        gives=(),
        lay_out=copy_of("logits"),
        read=lambda results: results[1:],
    )


def _liger_cross_entropy():
    function = _import("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
    if function is None:
        return None
    options = (None, -100, 0.0, 0.0, "mean")
    return _mean_alone(lambda logits, targets: function.apply(logits, targets, *options)[0])


def _quack_cross_entropy():
    function = _import("quack.cross_entropy", "cross_entropy")
    return None if function is None else _mean_alone(function)


def token_loss(logits, policy):
    """The clipped policy loss, or the cross entropy if `policy` is 0."""
    on_gpu = _runs_triton(logits)
    if policy:
        return _only({"Liger, in place": _liger_grpo() if on_gpu else None})
    return _only(
        {
            "F.cross_entropy": _mean_alone(F.cross_entropy),
            "Liger, in place": _liger_cross_entropy() if on_gpu else None,
            "quack": _quack_cross_entropy() if logits.device.type == "cuda" else None,
        }
    )


def _heads(hidden):
    """Name -> function (hidden [N, H], weight [V, H], targets [N]) -> log-prob [N], without whole logits."""
    found = {}
    chunked = _import("trl.kernels", "ChunkedLogProbFunction")
    if chunked is not None:  # 32768 columns per chunk, as TRL's trainers set
        found["TRL"] = lambda hidden, weight, targets: chunked.apply(
            hidden, weight, None, targets, 1.0, 32768
        )[0]
    if not _runs_triton(hidden) or hidden.dtype == torch.float32:
        return found
    cut = _import("cut_cross_entropy", "linear_cross_entropy")
    if cut is not None:
        found["cut-cross-entropy"] = lambda hidden, weight, targets: (
            -cut(hidden, weight, targets, reduction="none")
        )
    home = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    scaled = _import(home, "LigerFusedLinearScaledCrossEntropyFunction")
    if scaled is not None:  # CuTe kernels, which need an NVIDIA package
        found["Liger CuTe"] = lambda hidden, weight, targets: -scaled.apply(hidden, weight, targets)
    portable = _import(home, "_FusedLinearPPOFallbackFunction")
    if portable is not None:
        found["Liger"] = lambda hidden, weight, targets: (
            -portable.apply(hidden, weight, targets, 1.0, -100, False)
        )
    return found


@contextlib.contextmanager
def tf32():
    """fp32 products on tensor cores with operands rounded to TF32 (GPU only)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def plain_heads(hidden):
    """Name -> (head in plain PyTorch on whole logits, its context manager).

    16-bit operands: either multiply in their dtype and cast the logits to fp32, or cast both operands first (as an
    `fp32_lm_head` flag does).
    """

    def whole(hidden, weight, targets):
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    def cast(hidden, weight, targets):
        return whole(hidden.float(), weight.float(), targets)

    if hidden.dtype.itemsize > 2:
        return {"whole logits": (whole, contextlib.nullcontext)}
    own = "bf16 head" if hidden.dtype == torch.bfloat16 else "fp16 head"
    found = {own: (whole, contextlib.nullcontext), "fp32 head": (cast, contextlib.nullcontext)}
    if hidden.device.type == "cuda":
        found["fp32 head, TF32"] = (cast, tf32)
    return found


def linear_logprob(hidden, side_by_side=True):
    """Third-party heads; with `side_by_side`, for 16-bit operands also the plain PyTorch heads."""
    found = {name: Provider(call) for name, call in _heads(hidden).items()}
    if side_by_side and hidden.dtype.itemsize == 2:
        for name, (head, within) in plain_heads(hidden).items():
            found[name] = Provider(head, within=within)
    return found


def linear_cross_entropy(hidden, side_by_side=True):
    """F.linear_cross_entropy (torch >= 2.13), Liger and quack."""
    found = {}
    if hasattr(F, "linear_cross_entropy"):
        chunking = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = lambda hidden, weight, targets: F.linear_cross_entropy(
            hidden, weight, targets, options=chunking
        )
    if _runs_triton(hidden):
        home = "liger_kernel.ops.fused_linear_cross_entropy"
        liger = _import(home, "LigerFusedLinearCrossEntropyFunction")
        if liger is not None:
            found["Liger"] = lambda hidden, weight, targets: liger.apply(hidden, weight, targets)[0]
    if hidden.device.type == "cuda":
        quack = _import("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
        if quack is not None:
            found["quack"] = quack
    return {name: Provider(call) for name, call in found.items()}


def linear_ppo_loss(hidden, side_by_side=True):
    """The loss in plain PyTorch on third-party heads; with `side_by_side` also on the plain PyTorch heads."""
    found = {}
    for name, (head, within) in (plain_heads(hidden) if side_by_side else {}).items():
        found[name] = Provider(_with_ppo_loss(head), within=within)
    return found | {name: Provider(_with_ppo_loss(head)) for name, head in _heads(hidden).items()}


def _with_ppo_loss(head):
    def call(hidden, weight, targets, old_logprob, advantages, clip, mask=None):
        logprob = head(hidden, weight, targets)
        options = {"entropy": torch.zeros_like(old_logprob), "clip": clip, "mask": mask}
        return reference.ppo_loss(logprob.float(), old_logprob, advantages, **options).loss

    return call


def linear_token_loss(hidden, side_by_side=True):
    return {}
