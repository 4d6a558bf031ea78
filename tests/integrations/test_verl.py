"""The verl integration: each replaced function against verl's own, values and gradients, in fp64.

Its losses have their own file, test_verl_losses.py. tests/_support/unpacked.py loads verl's modules. verl's
`linear_cross_entropy` has Triton kernels only and does not run on a CPU, so its equation replaces it here.
B sequences, T steps, N tokens, V vocabulary, H hidden.
"""

import sys
import warnings

import pytest
import torch

from _support import unpacked
from _support.patched import compare, ragged, randint, randn
from fastrlhf.integrations import PatchError
from fastrlhf.integrations import verl as integration

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP_DTYPES = (torch.float32, torch.float64)
FUNCTIONAL = "verl.utils.torch_functional"
HEAD = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
ALGOS = "verl.trainer.ppo.core_algos"
each_seed = pytest.mark.parametrize("seed", range(3))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


pytestmark = pytest.mark.usefixtures("verl")


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
    """As verl's engines call it: a view of longer logits, divided by a temperature per token."""
    logits, labels = rows(dtype, (6, 51))
    scale = temperature + torch.rand(6, 50, 1)

    def call(x):
        return verl[FUNCTIONAL].logprobs_from_logits(x[:, :-1] / scale.to(x.dtype), labels[:, :-1])

    against(f"{FUNCTIONAL}.logprobs_from_logits", call, logits)


@each_dtype
@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropy(verl, dtype, name):
    logits, _ = rows(dtype, (300,))

    def in_fp64(x):
        return verl[FUNCTIONAL].entropy_from_logits(x)  # the chunked function rounds to fp32

    def call(x):
        return getattr(verl[FUNCTIONAL], name)(x)

    against(f"{FUNCTIONAL}.{name}", call, logits, truth=in_fp64)


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


def test_logits_are_not_overwritten(verl):
    """Without flash attention verl ignores inplace_backward."""
    logits, labels = rows(torch.float32, (30,))
    before = logits.detach().clone()
    with integration.patch():
        verl[FUNCTIONAL].logprobs_from_logits(
            logits, labels, inplace_backward=True
        ).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_flash_attention_settings_are_followed(verl, monkeypatch):
    """With flash attention's kernel verl ignores the label -100, returns fp32 and may overwrite the logits."""
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
def test_fused_linear_for_ppo_with_fewer_gradients(verl, dtype, only):
    """Only one of the two outputs is used, or the head is frozen."""
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
    for mine, original in zip(ours, theirs, strict=True):
        assert mine.dtype == original.dtype
        torch.testing.assert_close(mine, original, rtol=2e-2, atol=5e-2)


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(300,), (6, 50)])
def test_linear_cross_entropy(verl, dtype, temperature, shape):
    """verl's kernel returns fp32 [N], for labels [B, T] too."""
    hidden, weight, labels = head_inputs(dtype, shape)

    def equation(x, w):
        logprob, entropy, _ = head_equation(x, w, labels, temperature)
        return logprob.reshape(-1), entropy.reshape(-1)

    def call(x, w):
        return verl[KERNEL].linear_cross_entropy(x, w, labels, temperature)

    against(
        f"{KERNEL}.linear_cross_entropy", call, hidden, weight, original=equation, truth=equation
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((2.0, "mean", None), "reduction='mean'"),
        ((1, "none", None), "temperature is not a float"),
        ((1.0, "none", object()), "the vocabulary is sharded over a process group"),
    ],
)
def test_linear_cross_entropy_falls_back(verl, options, reason, monkeypatch):
    """verl's function gets the same arguments. It needs a GPU, so a recorder replaces its forward."""
    seen = []
    own = verl[KERNEL].LinearCrossEntropy

    def forward(ctx, hidden, weight, labels, temperature, reduction, dist_process_group):
        seen.append((temperature, reduction, dist_process_group))
        return hidden

    monkeypatch.setattr(own, "forward", staticmethod(forward))
    hidden, weight, labels = head_inputs(torch.float32)
    with integration.patch() as patched:
        verl[KERNEL].linear_cross_entropy(hidden, weight, labels, *options)
    assert patched.fallbacks == {(f"{KERNEL}.linear_cross_entropy", reason): 1}
    assert seen == [options]


def test_a_fused_head_configured_for_liger_is_not_served(verl, monkeypatch):
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
    assert patched.fallbacks == {(name, "impl_backend='liger' is configured"): 1}
    assert patched.calls == {name: 1}


# ---- advantages ----

MASKS = {
    "ragged": {},
    "holes": {"holes": True},
    "missing first": {"lead": True},
    "both": {"holes": True, "lead": True},
}


@each_seed
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0)])
def test_gae(verl, seed, mask, mask_dtype, gamma, lam):
    """Masked steps too: there verl returns the advantage of the next unmasked step."""
    keep = ragged(seed, 7, 53, **MASKS[mask], dtype=mask_dtype)
    rewards, values = (randn(7, 53, seed=10 * seed + i) for i in range(2))

    def call(r, v):
        return verl[ALGOS].compute_gae_advantage_return(r, v, keep, gamma, lam)

    against(f"{ALGOS}.compute_gae_advantage_return", call, rewards, values)


def test_gae_from_its_registry(verl):
    """The reference that verl registered at import is replaced too."""
    rewards, values, mask = randn(4, 9, seed=1), randn(4, 9, seed=2), ragged(3, 4, 9).long()
    estimators = verl[ALGOS].ADV_ESTIMATOR_REGISTRY
    before = dict(estimators)
    with integration.patch() as patched:
        estimators["gae"](
            token_level_rewards=rewards, values=values, response_mask=mask, gamma=1.0, lam=0.9
        )
    assert patched.calls == {f"{ALGOS}.compute_gae_advantage_return": 1}
    assert estimators == before


@each_seed
@pytest.mark.parametrize("mask", [*MASKS, "none"])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_masked_whiten(verl, seed, mask, shift_mean, offset):
    keep = torch.ones(7, 53).bool() if mask == "none" else ragged(seed, 7, 53, **MASKS[mask])
    values = randn(7, 53, seed=seed, scale=3.0) + offset
    values[~keep] *= 100.0

    def call(x):
        return verl[FUNCTIONAL].masked_whiten(x, keep, shift_mean)

    against(f"{FUNCTIONAL}.masked_whiten", call, values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": 0}, "fewer than two"),
        ({"count": 1}, "fewer than two"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.float64}, "float64"),
        ({"weights": True}, "with other numbers than 0 and 1"),
    ],
)
@pytest.mark.parametrize("function", ["gae", "whiten"])
def test_unsupported_steps_run_verls_function(verl, change, reason, function):
    mask = ragged(1, 5, 20).long()
    if "count" in change:
        mask = torch.zeros(5, 20, dtype=torch.int64)
        mask.view(-1)[: change["count"]] = 1
    if "weights" in change:
        mask = mask * 0.5
    values = randn(5, 20, seed=2, dtype=change.get("dtype", torch.float32))

    def call():
        if function == "whiten":
            return verl[FUNCTIONAL].masked_whiten(values, mask)
        return verl[ALGOS].compute_gae_advantage_return(values, values, mask, 1.0, 0.95)[0]

    def outcome():
        try:
            return call()
        except ValueError as error:
            return str(error)

    theirs = outcome()
    with integration.patch() as patched:
        ours = outcome()
    assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)
    assert patched.calls == {}
    assert all(reason in logged for _, logged in patched.fallbacks)
    assert patched.fallbacks


# ---- the patch itself ----


def test_everything_is_restored(verl):
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
            assert sum(" runs " in line for line in patched.report) == 13
            assert sum(" is left unchanged: " in line for line in patched.report) == 9
    assert vars(verl[HEAD].FusedLinearForPPO)["forward"] is forward
    assert all(vars(verl[name])[key] is value for (name, key), value in before.items())


def test_a_missing_function_is_named(verl, monkeypatch):
    own = verl[FUNCTIONAL].logprobs_from_logits
    monkeypatch.delattr(verl[FUNCTIONAL], "masked_whiten")
    with pytest.raises(
        PatchError, match=r"verl 0\.9\.1 has no verl.utils.torch_functional.masked_whiten"
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
