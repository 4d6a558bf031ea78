"""Compares functions of a third-party package with their replacements, on the same tensors, against fp64."""

import contextlib
import itertools
import random

import torch


def error(values, truth) -> float:
    """The largest absolute error of a tensor against fp64."""
    return (values.detach().double() - truth.detach()).abs().max().item() if truth.numel() else 0.0


def assert_no_worse(ours, originals, truth) -> None:
    """Our error against fp64 is at most 2 x the original's + 2 eps of the dtype x the largest true value.

    The maximum over a few elements varies at random; pass some hundred rows.
    """
    assert [x is None for x in ours] == [x is None for x in originals]
    for place, (mine, original, exact) in enumerate(zip(ours, originals, truth, strict=True)):
        if mine is None:
            continue
        assert mine.dtype == original.dtype
        assert mine.shape == original.shape
        assert mine.isfinite().all() or not original.isfinite().all()
        rounding = 2 * torch.finfo(mine.dtype).eps * exact.abs().max().clamp(min=1e-3).item()
        errors = f"output {place}: our error {error(mine, exact):.3g}, the original's "
        errors += f"{error(original, exact):.3g}, rounding {rounding:.3g}"
        assert error(mine, exact) <= 2 * error(original, exact) + rounding, errors


def outputs_and_gradients(function, *inputs):
    """[outputs..., gradients of the inputs that require grad...] for one fixed upstream gradient.

    An output may be a tensor or a tuple.
    """
    inputs = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    trained = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    terms = [
        (x.double() * g).sum() for x, g in zip(outputs, upstream, strict=True) if x.requires_grad
    ]
    grads = torch.autograd.grad(sum(terms), trained) if trained else ()
    return [x.detach() for x in outputs] + list(grads)


def upcast(x):
    """The same numbers in fp64."""
    floats = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.detach().double().requires_grad_(x.requires_grad) if floats else x


def compare(patch, name, call, *inputs, truth=None, original=None, served=True):
    """`call(*inputs)` patched and unpatched, both against `truth` in fp64.

    Args:
        patch: the integration's patch function.
        name: the function that must have been served by an op, or (not `served`) by the original.
        truth: computed in fp64; by default `original`, or `call` unpatched.
        original: replaces the unpatched `call` if that cannot run on this machine.
    """
    in_fp64 = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in inputs)
    originals = outputs_and_gradients(original or call, *inputs)
    exact = outputs_and_gradients(truth or call, *(upcast(x) for x in inputs))
    with patch() as patched:
        ours = outputs_and_gradients(call, *inputs)
    if served:
        assert set(patched.calls) == {name}
        assert patched.fallbacks == {}
        if in_fp64:
            # An fp64 result is no reference for itself: the two differ by the rounding of their sums.
            torch.testing.assert_close(ours, originals, rtol=1e-12, atol=1e-14)
        else:
            assert_no_worse(ours, originals, exact)
    else:
        assert patched.calls == {}
        ((where, _),) = patched.fallbacks
        assert where == name
        for mine, its in zip(ours, originals, strict=True):
            assert torch.equal(mine, its) or bool((mine.isnan() & its.isnan()).all())


# ---- grids of settings ----


def combinations(**axes) -> list[dict]:
    """Every combination of one value of each axis."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sample(settings: list[dict], count: int) -> list[dict]:
    """Some settings of a grid. They hold every value of every axis."""
    drawn = random.Random(0).sample(settings, count)
    for axis in settings[0]:
        assert {str(s[axis]) for s in drawn} == {str(s[axis]) for s in settings}, axis
    return drawn


@contextlib.contextmanager
def served(integration, name: str, calls: int = 1):
    """The calls of `name` in the block are served by an op; none falls back."""
    with integration.patch() as patched:
        yield patched
    assert patched.fallbacks == {}
    assert patched.calls == {name: calls}


def agree_on_grid(integration, name: str, settings: list[dict], ours, theirs=None) -> None:
    """`name` is served for every setting, in fp32 and fp64, and the results agree.

    ours(setting, dtype) -> {name: tensor, number or None}; `theirs`: the same unpatched, by default `ours`.
    """
    dtypes = (torch.float64, torch.float32)
    with served(integration, name, calls=len(dtypes) * len(settings)) as patched:
        for setting in settings:
            with patched.suspended():
                its = {dtype: (theirs or ours)(setting, dtype) for dtype in dtypes}
            agree({dtype: ours(setting, dtype) for dtype in dtypes}, its, setting)


def agree(ours: dict, theirs: dict, setting) -> None:
    """The results of one setting agree: dtype -> name -> tensor, number or None; "loss" and "gradient" and others.

    Loss and gradient in fp64 differ by the rounding of sums. In fp32 they are as near to fp64 as fp32 allows. The
    others are means, which differ from the host's by two roundings to fp32.
    """
    exact = theirs[torch.float64]
    terms = exact["gradient"].abs().sum().item()  # the loss is a sum of terms about as large
    for dtype, bar in ((torch.float64, 1e-14), (torch.float32, 6e-7)):
        assert list(ours[dtype]) == list(theirs[dtype])
        for name, mine in ours[dtype].items():
            its = theirs[dtype][name]
            where = f"{setting} {dtype} {name}: {mine} instead of {its}"
            if its is None:
                assert mine is None, where
                continue
            mine, its = torch.as_tensor(mine), torch.as_tensor(its)
            assert (mine.dtype, mine.shape) == (its.dtype, its.shape), where
            if name in ("loss", "gradient"):
                true = exact[name]
                limit = bar * max(true.abs().max().item(), terms if name == "loss" else 0.0)
            else:
                true, limit = its.double(), 2.5e-7 * abs(its.item())
            assert error(mine, true) <= limit, where


def losses(trainer) -> list[float]:
    """The loss of each logged step of a transformers Trainer after its run."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def ragged(seed, batch, steps, holes=False, dtype=torch.bool, lead=False):
    """A mask [batch, steps] of random lengths, the first one full; optionally with holes or without its first third."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    keep = torch.arange(steps) < lengths[:, None]
    if lead:
        keep &= torch.arange(steps) >= lengths[:, None] // 3
    if holes:
        keep &= torch.rand(keep.shape, generator=generator) < 0.7
    return keep.to(dtype)


def randn(*shape, seed, dtype=torch.float32, scale=1.0, train=False):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_(train)


def randint(high, shape, seed):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def each(call, *stacked):
    """`call` on each of a stack of batches; the error of a single scalar would vary at random."""
    results = [call(*batch) for batch in zip(*stacked, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
