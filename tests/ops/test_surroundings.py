"""Each op as users of torch call it: under modes, default devices and checkpoints, traced, exported, compiled.

`specs.py` draws the inputs. Results are compared with the same call in plain eager mode.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from specs import (
    MASKED,
    PACKED,
    SMALL,
    SPECS,
    each_backend,
    flat,
    gradients,
    tensors_of,
    with_leaves,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastrlhf.ops import _backend

pytestmark = pytest.mark.skipif(
    bool(_backend.unavailable_reason("gae", "cpu")), reason="the C++ extension is not built"
)
SITUATIONS = (SMALL, MASKED, PACKED)
each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
# Of the tests that compile: the ops of `make test`; the others run nightly.
FEW = ("token_loss",)
few = pytest.mark.parametrize(
    "spec", [SPECS[op] if op in FEW else pytest.param(SPECS[op], marks=pytest.mark.nightly) for op in SPECS], ids=SPECS
)  # fmt: skip
# Not per row: what stays when rows are picked.
WHOLE = ("weight", "bias", "scale", "class_weight")


def given(spec, situation=SMALL):
    """Arguments with leaves that require grad; None if the op has no such situation."""
    arguments = spec.inputs(situation, torch.float32)
    return None if arguments is None else with_leaves(spec, arguments)


def results(outputs, arguments):
    return [x.detach() for x in outputs] + gradients(outputs, arguments)


def taken(spec, arguments):
    """(names of the tensors, the tensors, the op as a function of them)."""
    names = list(tensors_of(arguments))

    def function(*tensors, **more):
        return flat(
            spec.call("auto", {**arguments, **dict(zip(names, tensors, strict=True)), **more})
        )

    return names, [arguments[name] for name in names], function


@each_backend(("reference", "cpu"))
def test_another_default_device(spec, backend):
    """Nothing is made on it, in the forward or in the backward."""
    for situation in SITUATIONS if backend == "cpu" else (SMALL,):
        if (arguments := given(spec, situation)) is None:
            continue
        expected = results(flat(spec.call(backend, arguments)), arguments)
        with torch.device("meta"):
            outputs = flat(spec.call(backend, arguments))
            upstream = [torch.ones_like(o) for o in outputs if o.requires_grad]
            if upstream:
                wanted = [x for x in tensors_of(arguments).values() if x.requires_grad]
                found = torch.autograd.grad(
                    [o for o in outputs if o.requires_grad], wanted, upstream, retain_graph=True
                )
                assert all(x.device.type == "cpu" for x in found)
        torch.testing.assert_close(results(outputs, arguments), expected)


def like(kind, x, mode):
    if not isinstance(x, torch.Tensor):
        return {name: like(kind, y, mode) for name, y in x.items()} if isinstance(x, dict) else x
    if kind == "fake":
        return mode.from_tensor(x)
    return x.detach().to("meta").requires_grad_(x.requires_grad)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@each_op
def test_tensors_without_values(spec, kind):
    """Shapes and dtypes of results and gradients are those of a real call."""
    for situation in SITUATIONS:
        if (real := given(spec, situation)) is None:
            continue
        expected = results(flat(spec.call("auto", real)), real)
        with FakeTensorMode() if kind == "fake" else contextlib.nullcontext() as mode:
            arguments = {name: like(kind, x, mode) for name, x in real.items()}
            outputs = flat(spec.call("auto", arguments))
            kept = [o for o in outputs if o.requires_grad]
            leaves = [x for x in tensors_of(arguments).values() if x.requires_grad]
            found = (
                torch.autograd.grad(kept, leaves, [torch.ones_like(o) for o in kept])
                if kept
                else ()
            )
        for ours, theirs in zip((*outputs, *found), expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("op", ["kl_reward", "gae", "kl_gae", "ranking_loss"])
def test_a_reference_that_needs_values_says_so(op):
    arguments = {
        name: like("meta", x, None) for name, x in SPECS[op].inputs(PACKED, torch.float32).items()
    }
    with pytest.raises(NotImplementedError, match=f"^{op}: the reference needs the values of cu_"):
        SPECS[op].call("reference", arguments)


@pytest.mark.parametrize("reentrant", [True, False])
@each_op
def test_under_a_checkpoint(spec, reentrant):
    if not spec.differentiable:
        return
    for situation in SITUATIONS:
        if (arguments := given(spec, situation)) is None:
            continue
        _, tensors, function = taken(spec, arguments)
        eager = function(*tensors)
        kept = [i for i, o in enumerate(eager) if o.requires_grad]
        leaves = [x for x in tensors if x.requires_grad]
        upstream = [torch.full_like(eager[i], 0.5) for i in kept]
        expected = torch.autograd.grad([eager[i] for i in kept], leaves, upstream)
        outputs = checkpoint(lambda *x: tuple(function(*x)), *tensors, use_reentrant=reentrant)  # noqa: B023
        torch.autograd.backward([outputs[i] for i in kept], upstream)
        torch.testing.assert_close([x.grad for x in leaves], list(expected))
        torch.testing.assert_close([o.detach() for o in outputs], [o.detach() for o in eager])


@few
def test_under_compiled_autograd(spec):
    if not spec.differentiable:
        return
    arguments = given(spec)
    expected = results(flat(spec.call("auto", arguments)), arguments)
    outputs = flat(spec.call("auto", arguments))
    torch._dynamo.reset()
    compiler = torch.compile(backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        found = results(outputs, arguments)
    torch.testing.assert_close(found, expected)


def rows_of(names, tensors, rows, groups, packed):
    """The chosen rows of each tensor. `groups` chooses among the ends of sequences and groups, and so among these."""
    of_group = ("score", "bootstrap", "advantages", "rollout_weights") if packed else ()
    for name, x in zip(names, tensors, strict=True):
        if name in WHOLE or not x.dim():
            yield x
        elif name in (*of_group, "margin"):
            yield x[groups.narrow(0, 1, len(groups) - 1) - 1]
        else:
            yield x[groups if name in ("cu_seqlens", "cu_groups") else rows]


@few
@pytest.mark.parametrize("kind", ["marked", "picked"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_with_sizes_that_only_the_data_tells(spec, kind):
    """Sizes are marked as unbacked, each on its own, or come from nonzero()."""
    packed = spec.inputs(PACKED, torch.float32) is not None and kind == "picked"
    arguments = given(
        spec, PACKED if packed and spec.name not in ("kl_reward", "kl_gae") else SMALL
    )
    names, tensors, function = taken(spec, arguments)
    rows, groups = (torch.ones(n, dtype=torch.bool) for n in (len(tensors[0]), 1))
    for name, x in zip(names, tensors, strict=True):
        if name in ("cu_seqlens", "cu_groups"):
            groups = torch.ones(len(x), dtype=torch.bool)
    per_token = arguments.get("per_token", {})

    def picked(rows, groups, *tensors):
        rows, groups = rows.nonzero().squeeze(1), groups.nonzero().squeeze(1)
        chosen = rows_of(names, tensors, rows, groups, "cu_seqlens" in names)
        more = {"per_token": {name: x[rows] for name, x in per_token.items()}} if per_token else {}
        return function(*chosen, **more)

    expected = function(*tensors)
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager"}
    if kind == "picked":
        found = torch.compile(picked, dynamic=True, **options)(rows, groups, *tensors)
    else:
        for name, x in zip(names, tensors, strict=True):
            for axis in range(x.dim() - (name in ("logits", "hidden")) if name not in WHOLE else 0):
                torch._dynamo.decorators.mark_unbacked(x, axis)
        found = torch.compile(function, **options)(*tensors)
    torch.testing.assert_close([x.detach() for x in found], [x.detach() for x in expected])
    if any(x.requires_grad for x in found):
        sum(x.sum() for x in found if x.requires_grad).backward()


def exported(spec, folder):
    """Saves the op with dynamic rows, its inputs and its results; returns the files."""
    arguments = spec.inputs(SMALL, torch.float32)
    names, tensors, function = taken(spec, arguments)

    class Module(torch.nn.Module):
        def forward(self, *x):
            return tuple(function(*x))

    auto = torch.export.Dim.AUTO
    dynamic = tuple(
        dict.fromkeys(range(x.dim() - (name in ("logits", "hidden"))), auto) if name not in WHOLE else None
        for name, x in zip(names, tensors, strict=True)
    )  # fmt: skip
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=(dynamic,))
    path = folder / f"{spec.name}.pt2"
    torch.export.save(program, path)
    torch.save((tensors, [x.detach() for x in function(*tensors)]), folder / f"{spec.name}.pt")
    return path


LOAD = """
import sys
import fastrlhf
import torch
for name in sys.argv[1:]:
    program = torch.export.load(name)
    tensors, expected = torch.load(name.removesuffix("2"))
    torch.testing.assert_close(list(program.module()(*tensors)), expected)
    print(name)
"""


@pytest.mark.parametrize(
    "ops", [FEW, pytest.param(tuple(SPECS), marks=pytest.mark.nightly)], ids=["few", "all"]
)
def test_exported_programs_load_where_only_fastrlhf_is_imported(ops, tmp_path):
    paths = [str(exported(SPECS[op], tmp_path)) for op in ops]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.split() == paths, done.stderr[-2000:]


# Op -> tensors by name. Every other argument keeps its default.
DEFAULTS = {
    "ppo_loss": ("logprob", "old_logprob", "advantages"),
    "token_loss": ("logits", "targets", "advantages", "old_logprob"),
    "linear_ppo_loss": ("hidden", "weight", "targets", "old_logprob", "advantages"),
    "linear_cross_entropy": ("hidden", "weight", "targets"),
}
PACKAGE = """
import sys
import torch
import fastrlhf
op, path = sys.argv[1:]
tensors = torch.load(path)

class Module(torch.nn.Module):
    def forward(self, *x):
        out = getattr(fastrlhf, op)(**dict(zip(tensors, x)))
        return out if isinstance(out, torch.Tensor) else out[0]

given = tuple(tensors.values())
made = torch._inductor.aoti_compile_and_package(torch.export.export(Module(), given), package_path=path + "2")
torch.testing.assert_close(torch._inductor.aoti_load_package(made)(*given), Module()(*given))
print("equal")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("op", DEFAULTS)
def test_aotinductor_with_default_arguments(op, tmp_path):
    """In a process of its own, which a broken package would end."""
    arguments = SPECS[op].inputs((4, 3) if op == "ppo_loss" else (4,), torch.float32)
    path = str(tmp_path / f"{op}.pt")
    torch.save({name: arguments[name] for name in DEFAULTS[op]}, path)
    done = subprocess.run([sys.executable, "-c", PACKAGE, op, path], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["equal"], done.stderr[-2000:]
