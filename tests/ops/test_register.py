"""What fastrlhf/ops/_register.py promises of every op, and the metrics that are taken apart when looked at."""

import io
import json
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf
from _support.small_calls import small_call
from fastrlhf.ops import _backend, _metrics

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
# metrics


def metrics():
    """Fresh ones, that nobody has looked at, and what they are to hold."""
    logprob, old, advantages = (torch.tensor([-1.0, -2.0, -0.5]) * k for k in (1, 0.9, 0.3))
    out = fastrlhf.ppo_loss(logprob, old, advantages)
    loss, named = out
    assert isinstance(named, dict) and isinstance(loss, torch.Tensor)
    again = fastrlhf.ppo_loss(logprob, old, advantages, backend="reference").metrics
    return named, again


NAMES = ["policy_loss", "approx_kl", "clip_fraction", "ratio_mean", "ratio_max"]
LOOKS = {
    "iter": list,
    "len": lambda d: len(d) == 5 and list(d),
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
    "values": lambda d: NAMES if len(d.values()) == 5 else [],
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_metrics_are_a_dict_whoever_looks_first(look):
    named, _ = metrics()
    assert LOOKS[look](named) == NAMES


@FUSED
def test_metrics_hold_what_the_reference_does():
    named, expected = metrics()
    assert set(dict.values(named)) == {None}  # nobody has looked
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
