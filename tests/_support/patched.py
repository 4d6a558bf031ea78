"""One function of a host, patched and not, on the same tensors: values and gradients against fp64."""

import torch

from _support import hosts


def numbers(function, *inputs):
    """(outputs..., gradients of the float inputs that train...) under one fixed upstream gradient.

    An output may be a tensor, a tuple, or a dict of numbers.
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


def compare(patch, name, call, *inputs, truth=None, host=None, served=True):
    """`call(*inputs)` patched and unpatched, both against `truth` (by default the host's own) in fp64.

    `name` is the host's function that must have run on the op, or (not `served`) on the host's own.
    `host` stands in for a host's function that cannot run on this machine.
    """
    in_fp64 = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in inputs)
    theirs = numbers(host or call, *inputs)
    exact = numbers(truth or call, *(upcast(x) for x in inputs))
    with patch() as patched:
        ours = numbers(call, *inputs)
    if served:
        assert set(patched.calls) == {name}
        assert patched.fallbacks == {}
        if in_fp64:
            # The host in fp64 is no truth for itself: the two differ by the roundings of their sums.
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        else:
            hosts.assert_no_worse(ours, theirs, exact)
    else:
        assert patched.calls == {}
        ((where, _),) = patched.fallbacks
        assert where == name
        for mine, their in zip(ours, theirs, strict=True):
            assert torch.equal(mine, their) or bool((mine.isnan() & their.isnan()).all())


def ragged(seed, batch, steps, holes=False, dtype=torch.bool, lead=False):
    """A mask of random lengths, the first one full; with holes in it, and steps missing in front."""
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
    """`call` on each of a stack of batches: a scalar's error alone would be luck."""
    results = [call(*batch) for batch in zip(*stacked, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
