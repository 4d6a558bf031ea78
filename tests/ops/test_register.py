"""What fastrlhf/ops/_register.py promises for every op, and metrics that are split on first access."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf
import fastrlhf.reference
from _support.small_calls import small_call
from fastrlhf.ops import _backend, _checks, _metrics, _register

HAS_CPU = not _backend.unavailable_reason("gae", "cpu")
FUSED = pytest.mark.skipif(not HAS_CPU, reason="the C++ extension is not built")


class Seen(TorchDispatchMode):
    """The names of the ops that pass."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@FUSED
@pytest.mark.parametrize("op", [op for op in fastrlhf.backends() if op != "linear_token_loss"])
def test_a_mode_sees_the_op_itself(op):
    """Also the ops in Python, whose body is otherwise called without the dispatcher."""
    with Seen() as seen:
        small_call(op, "cpu", "cpu")
    ours = {name for name in seen.names if name.startswith("fastrlhf::")}
    own = {"linear_ppo_loss": "linear_loss", "linear_cross_entropy": "linear_loss"}.get(op, op)
    assert any(name.startswith(f"fastrlhf::{own}") for name in ours), ours
    if op.startswith("linear"):
        assert not any("::token_" in name for name in ours)  # those are inside of it


def logprob_and_head():
    torch.manual_seed(0)
    x, w = torch.randn(3, 8), torch.randn(50, 8)
    return x, w, torch.randint(50, (3,)), torch.randn(3), torch.randn(3)


@FUSED
@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_no_gradient_is_asked_for(how):
    x, w, targets, old, advantages = logprob_and_head()
    plain = fastrlhf.linear_ppo_loss(x, w, targets, old, advantages).loss
    assert plain.grad_fn is None and not plain.requires_grad
    w.requires_grad_()
    with how():
        loss = fastrlhf.linear_ppo_loss(x, w, targets, old, advantages).loss
        assert loss.grad_fn is None and not loss.requires_grad
    assert torch.equal(loss, plain)
    assert fastrlhf.linear_ppo_loss(x, w, targets, old, advantages).loss.grad_fn is not None


@FUSED
@FUSED
def test_the_node_of_a_linear_loss_is_named_after_it():
    """Users see the name in `grad_fn=`, in profiles and in anomaly mode."""
    x, w, targets = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3), torch.tensor([0, 1])
    an_op = fastrlhf.linear_cross_entropy(x, w, targets, backend="cpu")
    no_op = fastrlhf.linear_token_loss(x, w, targets, torch.neg, backend="cpu").loss
    assert all("linear_loss" in loss.grad_fn.name() for loss in (an_op, no_op))


def test_saved_tensors_pass_the_hooks_and_constants_stay_constants():
    x, w, targets, old, advantages = logprob_and_head()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fastrlhf.linear_ppo_loss(x, w.requires_grad_(), targets, old, advantages)
    assert [t.shape for t in kept] == [w.shape]  # dL/dW alone: hidden wants none
    assert not any(m.requires_grad for m in out.metrics.values())
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


@FUSED
@pytest.mark.parametrize("upstream", [1.0, -0.5])
@pytest.mark.parametrize("retain", [False, True])
def test_any_upstream_gradient_is_right(upstream, retain):
    """1 is not multiplied with on CPU; what a retained graph keeps is not written to."""
    grads = []
    for backend in ("reference", "cpu"):
        x, w, targets, old, advantages = logprob_and_head()
        w.requires_grad_()
        loss = fastrlhf.linear_ppo_loss(x, w, targets, old, advantages, backend=backend).loss
        for i in range(1 + retain):
            (grad,) = torch.autograd.grad(
                loss, w, torch.tensor(upstream), retain_graph=retain and i == 0
            )
            grads.append(grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


# ---------------------------------------------------------------------------------------------
# schemas


def raw_ops():
    """{name: schema} of every raw op."""
    for op in fastrlhf.backends():
        getattr(fastrlhf, op)
    names = (
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrlhf::")
    )
    return {
        name.partition("::")[2].partition(".")[0]: torch._C._get_schema(name, "") for name in names
    }


def test_a_triton_kernel_has_the_schema_of_its_twin():
    ops = raw_ops()
    twins = {name: name.replace("_triton", "") for name in ops if "_triton" in name}
    assert set(twins.values()) == {
        *("gae", "kl_gae", "kl_reward", "masked_whiten", "ppo_loss_fwd", "ranking_loss_fwd"),
        *("group_advantage", "sequence_sums"),
        *("token_logprob_fwd", "token_logprob_bwd", "token_logprob_bwd_"),
        *("token_loss_fwd", "token_loss_fwd_", "token_loss_bwd_", "token_loss_rows_"),
    }
    for triton, twin in twins.items():
        assert str(ops[triton]).replace(triton, twin, 1) == str(ops[twin])


@FUSED
def test_no_kernel_lacks_a_schema():
    """A kernel under a name without a schema would be registered and never called."""
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        if name.startswith("fastrlhf::"):
            assert name.partition("::")[2] in raw_ops()


def test_what_a_backend_runs_is_what_was_registered(monkeypatch):
    monkeypatch.setattr(_backend, "_provided", {})
    _backend.provide("two_kernels", ["cpu", "triton"], gradient=False)
    _backend.provide("two_kernels", ["cuda", "triton"], gradient=False)
    assert _backend.kernels("two_kernels") == {"triton"}
    assert _backend.unavailable_reason("two_kernels", "cpu")


def test_threads_may_run_triton_kernels_first_at_once():
    """Importing them imports Triton, whose modules fail if two threads begin to import them."""
    pytest.importorskip("triton")
    code = (
        "import sys, threading\n"
        "from fastrlhf.ops import _register\n"
        "homes = ('gae', 'kl_gae', 'kl_reward', 'masked_whiten', 'ppo_loss', 'ranking_loss')\n"
        "start, failed = threading.Barrier(len(homes)), []\n"
        "def first_call(home):\n"
        "    start.wait()\n"
        "    try: _register._triton_kernel(f'{home}.forward')()\n"
        "    except Exception as error:\n"
        "        if 'missing' not in str(error): failed.append(repr(error))\n"
        "sys.setswitchinterval(1e-5)\n"
        "threads = [threading.Thread(target=first_call, args=(home,)) for home in homes]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "sys.exit('; '.join(failed) or 0)\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------
# errors


@FUSED
def test_an_error_of_cpp_becomes_one_of_the_public_op():
    logits = torch.zeros(2, 3, requires_grad=True)
    for op in (fastrlhf.token_logprob, fastrlhf.token_loss):
        with pytest.raises(
            ValueError, match=rf"^{op.__name__}: targets must be in \[0, 3\); got 5"
        ):
            op(logits, torch.tensor([0, 5]), backend="cpu")
    with pytest.raises(ValueError, match=r"^linear_ppo_loss: targets must be in \[0, 3\); got 5"):
        rows = torch.zeros(2)
        fastrlhf.linear_ppo_loss(logits, torch.zeros(3, 3), torch.tensor([0, 5]), rows, rows)


def test_other_errors_stay_what_they_are():
    def body(x):
        raise RuntimeError("fastrlhf TypeError: x must be an int; got None" if x else "CUDA error")

    call = _register.differentiable(body, op="some_op")
    with pytest.raises(TypeError, match="^some_op: x must be an int; got None$"):
        call(1)
    with pytest.raises(RuntimeError, match="^CUDA error$"):
        call(0)


# ---------------------------------------------------------------------------------------------
# the list of linear_loss_fwd


PER_TOKEN = {
    "full": ("old_logprob", "advantages", "old_values", "returns"),
    "mixed": ("old_logprob", "advantages", None, "returns"),
    "mostly None": ("old_logprob", "advantages", None, None),
    "all None": (None, None, None, None),
    "empty": (),
}


def linear_loss(per_token):
    """(call of (hidden, weight, bias, values) -> loss by the raw op, the same loss by the reference)."""
    torch.manual_seed(0)
    n, v = 5, 7
    targets, rows = torch.randint(v, (n,)), {name: torch.randn(n) for name in PER_TOKEN["full"]}
    ppo = "old_logprob" in per_token
    has_values = "returns" in per_token
    given = [None if name is None else rows[name] for name in per_token]
    none = _checks.UNLIMITED
    clip = 0.2 if "old_values" in per_token else none
    settings = [1.0, 0.0, *((0.8, 1.2, none, clip, 0.5, 0.01) if ppo else (1.0,))]
    op = "linear_ppo_loss" if ppo else "linear_cross_entropy"
    one = torch.ones(())

    def ours(hidden, weight, bias, values):
        head = (hidden, weight, bias, values if has_values else None)
        rest = (targets, None, None, one, given, settings, None, False, op, "fast", "cpu")
        needs = [True, True, True, has_values]
        return torch.ops.fastrlhf.linear_loss_fwd(*head, *rest, needs)[0]

    def expected(hidden, weight, bias, values):
        if not ppo:
            return fastrlhf.reference.linear_cross_entropy(hidden, weight, targets, bias=bias)
        more = {name: rows[name] for name in per_token[2:] if name}
        more |= {"values": values} if has_values else {}
        return fastrlhf.reference.linear_ppo_loss(
            *(hidden, weight, targets, rows["old_logprob"], rows["advantages"]),
            bias=bias,
            entropy_coef=0.01,
            value_clip=clip if clip < none else None,
            **more,
        ).loss

    leaves = [torch.randn(n, 3), torch.randn(v, 3), torch.randn(v), torch.randn(n)]
    return ours, expected, [x.requires_grad_() for x in leaves[: 3 + has_values]]


@FUSED
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("given", PER_TOKEN)
def test_a_list_of_optional_tensors(given, compiled):
    """All gradients arrive, whatever the list beside them holds."""
    ours, expected, leaves = linear_loss(PER_TOKEN[given])
    if compiled:
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    missing = [None] * (4 - len(leaves))
    loss, right = ours(*leaves, *missing), expected(*leaves, *missing)
    torch.testing.assert_close(loss, right)
    grads = torch.autograd.grad(loss, leaves)
    for got, want in zip(grads, torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------
# metrics


def metrics():
    """(metrics that have not been read, their expected values)."""
    logprob, old, advantages = (torch.tensor([-1.0, -2.0, -0.5]) * k for k in (1, 0.9, 0.3))
    out = fastrlhf.ppo_loss(logprob, old, advantages)
    loss, named = out
    assert isinstance(named, dict) and isinstance(loss, torch.Tensor)
    again = fastrlhf.ppo_loss(logprob, old, advantages, backend="reference").metrics
    return named, again


CLIPS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "outside_fraction",
)
NAMES = ["policy_loss", "approx_kl", *CLIPS, "ratio_mean", "ratio_max"]
LOOKS = {
    "iter": list,
    "len": lambda d: len(d) == 9 and list(d),
    "bool": lambda d: bool(d) and list(d),
    "in": lambda d: "ratio_max" in d and "entropy" not in d and list(d),
    "keys": lambda d: list(d.keys()),
    "items": lambda d: [name for name, _ in d.items()],
    "reversed": lambda d: list(reversed(d))[::-1],
    "repr": lambda d: [name for name in NAMES if f"'{name}': tensor" in repr(d)],
    "dict": lambda d: list(dict(d)),
    "unpacked": lambda d: list({**d}),
    "keywords": lambda d: list((lambda **more: more)(**d)),
    "copy": lambda d: list(d.copy()),
    "or": lambda d: list(d | {}),
    "ror": lambda d: list({} | d),
    "update": lambda d: (other := {}, other.update(d), list(other))[-1],
    "pickle": lambda d: list(pickle.loads(pickle.dumps(d))),
    "json": lambda d: list(json.loads(json.dumps(d, default=float))),
    "equal": lambda d: d == d.copy() and d != {} and list(d),
    "pop": lambda d: [*(() if d.pop("ratio_max") is None else list(d)), "ratio_max"],
    "set": lambda d: (d.__setitem__("extra", 1), d.pop("extra"), list(d))[-1],
    "pytree": lambda d: list(pytree.tree_map(lambda x: x + 1, d)),
    "values": lambda d: NAMES if len(d.values()) == 9 else [],
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_metrics_are_a_dict_whoever_looks_first(look):
    named, _ = metrics()
    assert LOOKS[look](named) == NAMES


@FUSED
def test_metrics_hold_what_the_reference_does():
    named, expected = metrics()
    assert set(dict.values(named)) == {None}  # not read yet
    for name, value in expected.items():
        torch.testing.assert_close(named[name], value)
        assert named.get(name).dim() == 0 and named[name].dtype == torch.float32
    assert type(pickle.loads(pickle.dumps(named))) is OrderedDict


def test_metrics_are_saved_as_torch_load_reads_them():
    file = io.BytesIO()
    torch.save(metrics()[0], file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == NAMES


def test_metrics_that_another_thread_fills_meanwhile():
    class Overtaken(_metrics._Metrics):
        @property
        def _names(self):  # read between the look and the views
            self._stacked = None
            return tuple(NAMES)

    named = Overtaken()
    named._stacked = torch.zeros(len(NAMES))
    assert list(named) == NAMES


def test_metrics_of_a_compiled_call_are_plain():
    logprob, old, advantages = (torch.tensor([-1.0, -2.0]) * k for k in (1, 0.9, 0.3))
    compiled = torch.compile(fastrlhf.ppo_loss, fullgraph=True, backend="aot_eager")
    assert type(compiled(logprob, old, advantages).metrics) is dict


def test_metrics_that_compiled_code_looks_at_first():
    named, expected = metrics()
    doubled = torch.compile(
        lambda named: {name: 2 * x for name, x in named.items()}, backend="eager"
    )
    for name, value in doubled(named).items():
        torch.testing.assert_close(value, 2 * expected[name])
