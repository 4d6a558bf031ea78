"""verl patched computes what verl computes, on verl's own modules: each function against fp64.

tests/_support/unpacked.py says how they are loaded and what could not be. One function cannot run on a CPU:
`linear_cross_entropy`, whose own kernels are Triton for a GPU; there its equation stands in for it.
The advantages and the policy loss are in tests/integrations/test_integrations_verl_steps.py.
B sequences, T steps, N tokens, V vocabulary, H hidden.
"""

import sys
import warnings

import pytest
import torch

from _support import unpacked
from _support.patched import compare, randint, randn
from fastrlhf.integrations import verl as integration
from fastrlhf.integrations._patch import HostMoved

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUNCTIONAL = "verl.utils.torch_functional"
HEAD = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def verl():
    with unpacked.installed(unpacked.verl()) as modules:
        yield modules
        integration.unpatch()


def against(name, call, *inputs, **options):
    compare(integration.patch, name, call, *inputs, **options)


# ---- logits ----


def rows(dtype, shape, vocab=307, scale=4.0):
    logits = randn(*shape, vocab, seed=1, dtype=dtype, scale=scale, train=True)
    return logits, randint(vocab, shape, seed=2)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (300,), (5, 60)])
def test_logprobs_from_logits(verl, dtype, shape):
    logits, labels = rows(dtype, shape)

    def call(x):
        return verl[FUNCTIONAL].logprobs_from_logits(x, labels)

    against(f"{FUNCTIONAL}.logprobs_from_logits", call, logits)


@each_dtype
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_of_scaled_views(verl, dtype, temperature):
    """What the engines pass: logits divided by a temperature of each token, cut out of longer rows."""
    logits, labels = rows(dtype, (6, 51))
    scale = temperature + torch.rand(6, 50, 1)

    def call(x):
        return verl[FUNCTIONAL].logprobs_from_logits(x[:, :-1] / scale.to(x.dtype), labels[:, :-1])

    against(f"{FUNCTIONAL}.logprobs_from_logits", call, logits)


@each_dtype
@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropy(verl, dtype, name):
    logits, _ = rows(dtype, (300,))

    def host_in_fp64(x):
        return verl[FUNCTIONAL].entropy_from_logits(x)  # the chunked one rounds to fp32

    def call(x):
        return getattr(verl[FUNCTIONAL], name)(x)

    against(f"{FUNCTIONAL}.{name}", call, logits, truth=host_in_fp64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast(verl, dtype):
    logits, labels = rows(dtype, (40,))
    functions = verl[FUNCTIONAL]

    def dtypes():
        with torch.autocast("cpu", torch.bfloat16):
            return [
                functions.logprobs_from_logits(logits, labels).dtype,
                functions.entropy_from_logits(logits).dtype,
            ]

    theirs = dtypes()
    with integration.patch() as patched:
        assert dtypes() == theirs
    assert len(patched.calls) == 2


def test_logits_are_kept(verl):
    """verl's own path writes nothing over them, whatever inplace_backward says."""
    logits, labels = rows(torch.float32, (30,))
    before = logits.detach().clone()
    with integration.patch():
        verl[FUNCTIONAL].logprobs_from_logits(
            logits, labels, inplace_backward=True
        ).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_flash_attention_settings_are_followed(verl, monkeypatch):
    """With its kernel verl skips the label -100, returns fp32 and may overwrite the logits."""
    monkeypatch.setattr(verl[FUNCTIONAL], "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    logits, labels = rows(torch.bfloat16, (30,))
    labels[3] = -100
    with integration.patch():
        logprob = verl[FUNCTIONAL].logprobs_from_logits(logits, labels)
        assert logprob.dtype == torch.float32
        assert logprob[3] == 0
        monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
        assert (
            verl[FUNCTIONAL].logprobs_from_logits(logits, labels.clamp(min=0)).dtype == logits.dtype
        )


# ---- heads ----


def head_inputs(dtype, shape=(300,), hidden=24, vocab=97):
    inputs = randn(*shape, hidden, seed=1, dtype=dtype, train=True)
    weight = randn(vocab, hidden, seed=2, dtype=dtype, train=True)
    return inputs, weight, randint(vocab, shape, seed=3)


def head_equation(hidden, weight, labels, temperature):
    logits = (hidden @ weight.T) / temperature
    out = logits.dtype
    logprob = (logits if out == torch.float64 else logits.float()).log_softmax(-1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    return logprob.gather(-1, labels[..., None]).squeeze(-1), entropy, out


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(300,), (6, 50)])
def test_fused_linear_for_ppo(verl, dtype, temperature, shape):
    hidden, weight, labels = head_inputs(dtype, shape)
    fused = verl[HEAD].FusedLinearForPPO(chunk_size=64)

    def exact(x, w):
        return head_equation(x, w, labels, temperature)[:2]

    def call(x, w):
        return fused(x, w, labels, temperature=temperature)

    against(f"{HEAD}.FusedLinearForPPO.forward", call, hidden, weight, truth=exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("only", ["logprob", "entropy", "hidden"])
def test_fused_linear_for_ppo_in_part(verl, dtype, only):
    """One output of the two used, or a frozen head."""
    hidden, weight, labels = head_inputs(dtype)
    weight.requires_grad_(only != "hidden")
    fused = verl[HEAD].FusedLinearForPPO()

    def pick(out):
        return out[0] if only == "logprob" else out[1] if only == "entropy" else out[:2]

    def exact(x, w):
        return pick(head_equation(x, w, labels, 1.0))

    def call(x, w):
        return pick(fused(x, w, labels))

    against(f"{HEAD}.FusedLinearForPPO.forward", call, hidden, weight, truth=exact)


def test_fused_linear_for_ppo_under_autocast(verl):
    hidden, weight, labels = head_inputs(torch.float32)
    fused = verl[HEAD].FusedLinearForPPO()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            logprob, entropy = fused(hidden, weight, labels)
        return logprob, entropy

    theirs = run()
    with integration.patch() as patched:
        ours = run()
    assert patched.fallbacks == {}
    for mine, host in zip(ours, theirs, strict=True):
        assert mine.dtype == host.dtype
        torch.testing.assert_close(mine, host, rtol=2e-2, atol=5e-2)


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(300,), (6, 50)])
def test_linear_cross_entropy(verl, dtype, temperature, shape):
    """verl's kernel returns fp32 of [N], also for [B, T]; on a CPU its equation stands for it."""
    hidden, weight, labels = head_inputs(dtype, shape)

    def equation(x, w):
        logprob, entropy, _ = head_equation(x, w, labels, temperature)
        return logprob.reshape(-1), entropy.reshape(-1)

    def call(x, w):
        return verl[KERNEL].linear_cross_entropy(x, w, labels, temperature)

    against(f"{KERNEL}.linear_cross_entropy", call, hidden, weight, host=equation, truth=equation)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((2.0, "mean", None), "reduction='mean'"),
        ((1, "none", None), "temperature is not a float"),
        ((1.0, "none", object()), "a process group shares out the vocabulary"),
    ],
)
def test_linear_cross_entropy_falls_back(verl, options, reason, monkeypatch):
    """verl's own is called with the very arguments; on this machine it would need a GPU."""
    seen = []
    own = verl[KERNEL].LinearCrossEntropy
    monkeypatch.setattr(own, "forward", staticmethod(lambda ctx, *a: seen.append(a) or a[0]))
    monkeypatch.setattr(integration, "_KERNEL_PARAMETERS", ("ctx",))
    hidden, weight, labels = head_inputs(torch.float32)
    with integration.patch() as patched:
        verl[KERNEL].linear_cross_entropy(hidden, weight, labels, *options)
    assert patched.fallbacks == {(f"{KERNEL}.linear_cross_entropy", reason): 1}
    assert seen[0][3:] == options


def test_fused_head_that_liger_was_chosen_for_stays_its_own(verl, monkeypatch):
    class Liger:
        @staticmethod
        def apply(hidden, *_):
            return hidden.sum(-1), hidden.sum(-1)

    monkeypatch.setattr(verl[HEAD], "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", Liger)
    hidden, weight, labels = head_inputs(torch.float32)
    with integration.patch() as patched:
        out, _ = verl[HEAD].FusedLinearForPPO(impl_backend="liger")(hidden, weight, labels)
        verl[HEAD].FusedLinearForPPO(impl_backend="torch")(hidden, weight, labels)
    assert torch.equal(out, -hidden.sum(-1))
    name = f"{HEAD}.FusedLinearForPPO.forward"
    assert patched.fallbacks == {(name, "impl_backend='liger' was chosen"): 1}
    assert patched.calls == {name: 1}


# ---- the patch itself ----


def test_everything_is_put_back(verl):
    before = {
        (name, key): value
        for name, module in verl.items()
        for key, value in vars(module).items()
        if callable(value)
    }
    forward = vars(verl[HEAD].FusedLinearForPPO)["forward"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # verl 0.9 is in the tested range
        with integration.patch() as patched:
            assert vars(verl[HEAD].FusedLinearForPPO)["forward"] is not forward
            assert sum(" runs " in line for line in patched.report) == 8
            assert sum(" is left alone: " in line for line in patched.report) == 3
    assert vars(verl[HEAD].FusedLinearForPPO)["forward"] is forward
    assert all(vars(verl[name])[key] is value for (name, key), value in before.items())


def test_a_function_that_moved_is_named(verl, monkeypatch):
    own = verl[FUNCTIONAL].logprobs_from_logits
    monkeypatch.delattr(verl[FUNCTIONAL], "masked_whiten")
    with pytest.raises(
        HostMoved, match=r"verl 0\.9\.1 has no verl.utils.torch_functional.masked_whiten"
    ):
        integration.patch()
    assert verl[FUNCTIONAL].logprobs_from_logits is own


def test_without_verl(monkeypatch):
    with monkeypatch.context() as patch:
        for name in [n for n in sys.modules if n == "verl" or n.startswith("verl.")]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "path", [p for p in sys.path if p != str(unpacked.FOLDER)])
        with pytest.raises(ImportError, match="verl is not installed; pip install verl"):
            integration.patch()
