"""Patched hosts called in ways that their own trainers do not: the host's result, or a clear error at once."""

import importlib

import pytest
import torch
import torch.distributed as dist

from _support import hosts
from fastrlhf.integrations import transformers as integration

CALL = "transformers.modeling_utils.PreTrainedModel.__call__"


@pytest.fixture(scope="module")
def model():
    return hosts.causal_lm()


def batch():
    ids = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    return ids, ids.masked_fill(ids < 5, -100)


def step(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("host", ["transformers", "trl"])
@pytest.mark.parametrize("backend", ["nonsense", None, 3])
def test_a_wrong_backend_is_refused_before_anything_is_patched(host, backend):
    pytest.importorskip(host)
    module = importlib.import_module(f"fastrlhf.integrations.{host}")
    with pytest.raises(
        ValueError, match=f"{host}.patch: backend must be one of .*; got {backend!r}"
    ):
        module.patch(backend=backend)
    assert not module._HOST.patched


def test_labels_by_place(model):
    ids, labels = batch()
    expected = step(model, ids, labels=labels)
    with integration.patch() as patched:
        ours = step(model, ids, None, None, None, None, labels)
    assert patched.calls[CALL] == 1
    torch.testing.assert_close(ours, expected)


def test_hooks_of_all_modules_see_the_logits(model):
    ids, labels = batch()
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(type(out)) if module is model.lm_head else None
    )
    try:
        with integration.patch():
            step(model, ids, labels=labels)
    finally:
        hook.remove()
    assert seen == [torch.Tensor]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_in_place_is_compiled_once(whole):
    from torch._dynamo.testing import CompileCounter

    model, (ids, labels), counter = hosts.causal_lm(), batch(), CompileCounter()
    torch._dynamo.reset()
    if whole:
        model.compile(backend=counter)
    else:
        model.forward = torch.compile(model.forward, backend=counter)
    with integration.patch() as patched:
        for _ in range(3):
            step(model, ids, labels=labels)
    torch._dynamo.reset()
    assert counter.frame_count == 1
    assert patched.fallbacks == {(CALL, "torch.compile traces the model"): 3}


# ---- TRL ----


@pytest.fixture
def mesh():
    pytest.importorskip("trl")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_trl_rows_of_a_dtensor(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor
    from trl.trainer import utils

    from fastrlhf.integrations import trl

    logits, index = (
        distribute_tensor(x, mesh, [Replicate()])
        for x in (torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5)))
    )

    def rows():
        logprob = utils.selective_log_softmax(logits, index)
        return logprob.full_tensor(), utils.entropy_from_logits(logits).full_tensor()

    expected = rows()
    with trl.patch() as patched:
        torch.testing.assert_close(rows(), expected, rtol=0, atol=0)
    assert {said for _, said in patched.fallbacks} == {"logits is a DTensor"}


def test_trl_head_that_zero_3_gathers():
    """TRL gathers the weight again for its own backward; what ours had saved would be empty by then."""
    pytest.importorskip("trl")
    from trl.trainer import utils

    from fastrlhf.integrations import trl

    hidden, weight = torch.randn(3, 4), torch.randn(11, 4)
    weight.ds_id = 0
    with trl.patch() as patched:
        with pytest.raises(ValueError, match="targets must be in"):
            utils._ChunkedLogProbFunction.apply(
                hidden, weight + 0, None, torch.tensor([0, 1, -100]), 1.0, 32
            )
        try:
            utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(3), 1.0, 32)
        except ImportError:  # TRL's own asks for deepspeed
            pass
    assert [said for _, said in patched.fallbacks] == [
        "the output head's weight is sharded (DTensor or ZeRO-3)"
    ]


def test_trl_options():
    pytest.importorskip("trl")
    from fastrlhf.integrations import trl

    with pytest.raises(TypeError, match="trl.patch: inplace_backward must be a bool; got str"):
        trl.patch(inplace_backward="yes")
