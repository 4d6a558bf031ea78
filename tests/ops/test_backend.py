"""Which backend runs: the table of backends, the choice of "auto", and each instruction set of this machine."""

import os
import subprocess
import sys

import pytest
import torch

import fastrlhf
from fastrlhf import backends, token_logprob
from fastrlhf.ops import _backend, _library


def test_backend_that_cannot_run_says_why_and_what_to_use():
    if torch.cuda.is_available():
        pytest.skip("every backend may run on this machine")
    logits, targets = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="backend='cuda' cannot run: .*Use backend='auto'"):
        token_logprob(logits, targets, backend="cuda")
    assert backends()["token_logprob"]["cuda"] != "available"
    assert backends()["token_logprob"]["reference"] == "available"


def test_build_facts():
    from fastrlhf import __version__

    if _backend.unavailable_reason("token_logprob", "cpu"):
        pytest.skip(_backend.unavailable_reason("token_logprob", "cpu"))
    info = _library.build_info()
    assert info["version"] == __version__
    assert info["torch_target_version"] == "2.10"
    assert info["cpu_isa_running"] in info["cpu_isa_compiled"]


def test_auto_takes_the_compiled_kernel_and_counts_it():
    if _backend.unavailable_reason("token_logprob", "cpu"):
        pytest.skip(_backend.unavailable_reason("token_logprob", "cpu"))
    before = _backend.calls["token_logprob", "cpu"]
    token_logprob(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert _backend.calls["token_logprob", "cpu"] == before + 1


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_of_this_machine(isa):
    """The C++ loops for narrower instruction sets, which this machine does not select; `make test-isa` has the rest."""
    if _backend.unavailable_reason("token_logprob", "cpu"):
        pytest.skip(_backend.unavailable_reason("token_logprob", "cpu"))
    code = (
        "import torch; from fastrlhf import token_logprob, reference\n"
        "from fastrlhf.ops import _library; print(_library.build_info()['cpu_isa_running'])\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    z = (3 * torch.randn(5, 4133)).to(dtype); y = torch.randint(4133, (5,))\n"
        "    a, b = (z.clone().requires_grad_() for _ in range(2))\n"
        "    kw = dict(softcap=9.0, temperature=0.9, return_entropy=True)\n"
        "    o, r = token_logprob(a, y, **kw), reference.token_logprob(b, y, **kw)\n"
        "    for p, q in zip(o, r): torch.testing.assert_close(p, q, rtol=2e-6, atol=4e-6)\n"
        "    (o[0] + o[1]).sum().backward(); (r[0] + r[1]).sum().backward()\n"
        "    torch.testing.assert_close(a.grad, b.grad, rtol=8e-3, atol=1e-6)\n"
    )
    env = {**os.environ, "FASTRLHF_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("baseline", isa)


def test_the_package_lists_its_public_names_and_nothing_else():
    assert fastrlhf.token_logprob is token_logprob and backends()
    assert dir(fastrlhf) == sorted(fastrlhf.__all__)
    assert not [n for n in dir(fastrlhf) if n.startswith("_") and n != "__version__"]
