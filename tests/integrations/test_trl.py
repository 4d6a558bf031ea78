"""The TRL integration: each replaced function against TRL's own, values and gradients, in fp64."""

import importlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, distribute_tensor

trl = pytest.importorskip("trl")

from trl.trainer import utils  # noqa: E402
from trl.trainer.reward_trainer import RewardTrainer  # noqa: E402

from _support import small_llama  # noqa: E402
from _support.patched import assert_no_worse, outputs_and_gradients  # noqa: E402
from fastrlhf.integrations import PatchError  # noqa: E402
from fastrlhf.integrations import trl as integration  # noqa: E402
from fastrlhf.integrations._common import pairwise_loss  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGPROB, ENTROPY = (
    "trl.trainer.utils.selective_log_softmax",
    "trl.trainer.utils.entropy_from_logits",
)
BOTH = "trl.trainer.utils.selective_log_softmax_and_entropy"
HEAD = "trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"


@pytest.fixture(autouse=True)
def clean():
    yield
    integration.unpatch()


def logits_and_index(dtype, shape=(8, 32, 91), scale=4.0, strided=False):
    torch.manual_seed(1)
    logits = (scale * torch.randn(*shape[:-2], shape[-2] + strided, shape[-1])).to(dtype)
    logits = logits[:, :-1] if strided else logits
    index = torch.randint(0, shape[-1], shape[:-1])
    row_mask = torch.rand(shape[:-1]) < 0.7
    row_mask[0] = False  # a sequence of padding only
    return logits, index, row_mask


def with_gradients(function, *inputs):
    """[outputs..., gradients of the float inputs...] for one fixed upstream gradient."""
    trained = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    return outputs_and_gradients(function, *trained)


def compare(name, call, *inputs):
    """`call` patched and unpatched, both against TRL's in fp64. The op must have served it once."""
    theirs = with_gradients(call, *inputs)
    truth = with_gradients(call, *(x.double() if x.is_floating_point() else x for x in inputs))
    with integration.patch() as patched:
        ours = with_gradients(call, *inputs)
    assert patched.calls == {name: 1}
    assert patched.fallbacks == {}
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("strided", [False, True])
def test_selective_log_softmax(dtype, masked, temperature, strided):
    logits, index, row_mask = logits_and_index(dtype, strided=strided)
    options = {"temperature": temperature, "row_mask": row_mask if masked else None}
    compare(LOGPROB, lambda x: utils.selective_log_softmax(x, index, **options), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 5), (8, 32, 91), (300, 91)])
def test_entropy_from_logits(dtype, shape):
    logits, _, _ = logits_and_index(dtype, shape)
    compare(ENTROPY, lambda x: utils.entropy_from_logits(x, chunk_size=3), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_both_in_one_pass(dtype, masked, differentiable):
    logits, index, row_mask = logits_and_index(dtype)
    options = {"entropy_requires_grad": differentiable, "temperature": 0.7}
    options["row_mask"] = row_mask if masked else None
    compare(BOTH, lambda x: utils.selective_log_softmax_and_entropy(x, index, **options), logits)


def test_inplace_backward_overwrites_the_logits():
    logits, index, _ = logits_and_index(torch.float32)
    before = logits.clone()
    for inplace in (False, True):
        with integration.patch(inplace_backward=inplace):
            logits.requires_grad_().grad = None
            utils.selective_log_softmax(logits, index).sum().backward()
        assert torch.equal(logits, before) is not inplace
        assert (logits.grad.data_ptr() == logits.data_ptr()) is inplace


def test_a_last_stride_other_than_one():
    logits, index, _ = logits_and_index(torch.float32)
    logits = logits.transpose(-1, -2).contiguous()
    compare(LOGPROB, lambda x: utils.selective_log_softmax(x.transpose(-1, -2), index), logits)


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("K indices", lambda x, i: utils.selective_log_softmax(x, torch.stack((i, i), -1))),
        ("not a number", lambda x, i: utils.selective_log_softmax(x, i, torch.tensor(2.0))),
        ("not above 0", lambda x, i: utils.selective_log_softmax(x, i, temperature=-1.0)),
        ("int64", lambda x, i: utils.selective_log_softmax(x.long(), i)),
        ("one axis", lambda x, i: utils.entropy_from_logits(x[0, 0])),
    ],
)
def test_unsupported_calls_run_trls_function(reason, call):
    logits, index, _ = logits_and_index(torch.float32)

    def outcome():
        try:
            return call(logits, index)
        except Exception as error:
            return type(error), str(error)

    theirs = outcome()
    with integration.patch() as patched:
        ours = outcome()
    assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
    ((_, logged),) = patched.fallbacks
    assert reason in logged
    assert patched.calls == {}


def head_inputs(dtype, biased, seed=3):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(300, 24).to(dtype), torch.randn(83, 24).to(dtype)
    bias = torch.randn(83).to(dtype) if biased else None
    return hidden, weight, bias, torch.randint(0, 83, (300,))


def head_in_fp64(hidden, weight, bias, targets, temperature, softcap, scale):
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    statistics = ((2 * logp).logsumexp(-1).detach(), (z / temperature).mean(-1).detach())
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), *statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("extras", [(), ("log_sum_sq_probs", "mean_logits")])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 1.0), (1.3, 30.0, 0.25), (0.9, None, 3.0)]
)  # fmt: skip
def test_chunked_head(dtype, biased, extras, temperature, softcap, scale):
    *parts, targets = head_inputs(dtype, biased)
    floats = [x for x in parts if x is not None]
    wanted = ("entropy", *extras)
    function = utils._ChunkedLogProbFunction

    def call(hidden, weight, bias=None):
        out = function.apply(hidden, weight, bias, targets, temperature, 32, softcap, scale, wanted)
        return tuple(x for x in out if x is not None)

    def exact(hidden, weight, bias=None):
        out = head_in_fp64(hidden, weight, bias, targets, temperature, softcap, scale)
        return out[: 1 + len(wanted)]

    theirs = with_gradients(call, *floats)
    truth = with_gradients(exact, *(x.double() for x in floats))
    with integration.patch() as patched:
        ours = with_gradients(call, *floats)
    assert patched.calls == {HEAD: 1}
    assert_no_worse(ours, theirs, truth)


def test_chunked_head_under_autocast():
    """TRL's default: fp32 weights with the head's GEMM in bf16. Ours is at least as accurate."""
    *floats, targets = head_inputs(torch.float32, True)

    def call(*parts):
        with torch.autocast("cpu", torch.bfloat16):
            out = utils._ChunkedLogProbFunction.apply(
                *parts, targets, 0.8, 32, None, 1.0, ("entropy",)
            )
        return out[:2]

    theirs = with_gradients(call, *floats)
    truth = with_gradients(
        lambda *parts: head_in_fp64(*parts, targets, 0.8, None, 1.0)[:2],
        *(x.double() for x in floats),
    )
    with integration.patch():
        ours = with_gradients(call, *floats)
    assert_no_worse(ours, theirs, truth)


def test_chunked_head_statistics_with_the_reference_backend():
    *floats, targets = head_inputs(torch.float32, True)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def call(*parts):
        out = utils._ChunkedLogProbFunction.apply(*parts, targets, 0.7, 32, 5.0, 0.5, outputs)
        return (*out[:4], out[4].float())

    originals = with_gradients(call, *floats)
    with integration.patch(backend="reference") as patched:
        ours = with_gradients(call, *floats)
    assert patched.calls == {HEAD: 1}
    torch.testing.assert_close(ours, originals, rtol=1e-4, atol=1e-5)


def test_chunked_head_reports_the_top_1():
    hidden, weight, bias, targets = head_inputs(torch.float32, True)
    best = (hidden @ weight.T + bias).argmax(-1)
    targets[::2] = best[::2]
    arguments = (hidden, weight, bias, targets, 0.7, 32, None, 1.0, ("is_top1",))
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with integration.patch():
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    assert ours[4].equal(theirs[4])
    assert 0.4 < ours[4].float().mean() < 0.9
    assert ours[1:4] == theirs[1:4] == (None, None, None)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("not above 0", {"scale": -1.0}),
        ("float64", {"dtype": torch.float64}),
    ],
)
def test_chunked_head_falls_back(reason, changes):
    hidden, weight, _, targets = head_inputs(changes.get("dtype", torch.float32), False)
    settings = (1.0, 32, None, changes.get("scale", 1.0))
    arguments = (hidden, weight, None, targets, *settings, changes.get("outputs", ()))
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with integration.patch() as patched:
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    assert [(a is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [
        True
    ] * 5
    ((name, logged),) = patched.fallbacks
    assert name == HEAD
    assert reason in logged


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("counted", [0.0, 0.3, 1.0])
def test_fused_head_of_a_model(temperature, counted):
    """The forward that the trainers call. Ignored labels are skipped; a batch of ignored labels gives zeros."""
    model = small_llama.causal_lm()
    utils.add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
    torch.manual_seed(5)
    ids = torch.randint(0, model.config.vocab_size, (3, 11))
    labels = ids.masked_fill(torch.rand(3, 11) >= counted, -100)

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + out.entropy.sum()).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        return [out.loss, out.log_probs, out.entropy, out.is_top1.float(), *grads]

    theirs = run()
    with integration.patch() as patched:
        ours = run()
    assert patched.calls[HEAD] == 1
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_margin", [False, True])
def test_pairwise_loss(dtype, with_margin):
    torch.manual_seed(0)
    scores = [(3 * torch.randn(9)).to(dtype) for _ in range(2)]
    margin = torch.rand(9).to(dtype) if with_margin else torch.zeros(9, dtype=dtype)

    def original(chosen, rejected):
        return -torch.nn.functional.logsigmoid(chosen - rejected - margin.to(chosen.dtype)).mean()

    def ours(chosen, rejected):
        return pairwise_loss(chosen, rejected, margin).to(dtype)

    truth = with_gradients(original, *(x.double() for x in scores))
    assert_no_worse(with_gradients(ours, *scores), with_gradients(original, *scores), truth)


def test_every_reference_is_replaced_and_restored():
    from trl.experimental.cpo import cpo_trainer
    from trl.kernels import ChunkedLogProbFunction

    before = (
        utils.selective_log_softmax,
        cpo_trainer.selective_log_softmax,
        utils.entropy_from_logits,
        utils._use_triton,
        vars(RewardTrainer)["compute_loss"],
        vars(ChunkedLogProbFunction).get("apply"),
    )
    with integration.patch():
        assert cpo_trainer.selective_log_softmax is utils.selective_log_softmax is not before[0]
        # A module that TRL loads lazily, here while patched, imports the replacement.
        late = importlib.import_module("trl.experimental.orpo.orpo_trainer")
        assert late.selective_log_softmax is utils.selective_log_softmax
    after = (
        utils.selective_log_softmax,
        late.selective_log_softmax,
        utils.entropy_from_logits,
        utils._use_triton,
        vars(RewardTrainer)["compute_loss"],
        vars(ChunkedLogProbFunction).get("apply"),
    )
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert cpo_trainer.selective_log_softmax is before[0]
    assert "apply" not in vars(ChunkedLogProbFunction)


def test_a_missing_function_is_named(monkeypatch):
    before = utils.selective_log_softmax
    monkeypatch.delattr(utils, "entropy_from_logits")
    with pytest.raises(PatchError, match="trl 1.* has no trl.trainer.utils.entropy_from_logits"):
        integration.patch()
    assert utils.selective_log_softmax is before


# ---- calls that TRL's own trainers do not make ----


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_logits_that_are_a_dtensor(mesh):
    logits, index = (
        distribute_tensor(x, mesh, [Replicate()])
        for x in (torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5)))
    )

    def run():
        logprob = utils.selective_log_softmax(logits, index)
        return logprob.full_tensor(), utils.entropy_from_logits(logits).full_tensor()

    expected = run()
    with integration.patch() as patched:
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    assert {reason for _, reason in patched.fallbacks} == {"logits is a DTensor"}


def test_a_head_that_zero_3_gathers():
    """Under ZeRO-3 TRL gathers the weight again for its backward; a weight that ours saved would be empty by then."""
    hidden, weight = torch.randn(3, 4), torch.randn(11, 4)
    weight.ds_id = 0
    with integration.patch() as patched:
        with pytest.raises(ValueError, match="targets must be in"):
            utils._ChunkedLogProbFunction.apply(
                hidden, weight + 0, None, torch.tensor([0, 1, -100]), 1.0, 32
            )
        try:
            utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(3), 1.0, 32)
        except ImportError:  # TRL's function imports deepspeed here
            pass
    assert [reason for _, reason in patched.fallbacks] == [
        "the output head's weight is sharded (DTensor or ZeRO-3)"
    ]


def test_inplace_backward_must_be_a_bool():
    with pytest.raises(TypeError, match="trl.patch: inplace_backward must be a bool; got str"):
        integration.patch(inplace_backward="yes")
