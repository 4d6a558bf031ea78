"""fp16's loss scaler in the stages, on a CPU.

Scaling by a power of two leaves the results bitwise identical; an overflow skips one step.
"""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train import runtime
from fastrlhf.train.optim import OptimConfig, Optimizers
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.stages import ppo, sft

SCALE = 2.0**9


class Scaled(Accelerator):
    """An Accelerator with a loss scaler, as under fp16 on a GPU, that computes in fp32."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Grows after two finite steps, so that the scale changes within a run.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr(runtime, "Accelerator", Scaled)


@pytest.fixture(scope="module")
def unscaled():
    """Folder of the same PPO-ptx run without a scaler."""
    cfg = tiny.ppo_config("ppo_fp32", **PPO)
    ppo.main(cfg)
    return cfg.out


# Two steps per iteration. Muon gives the policy two optimizers; the value model has one.
PPO = {"ptx_coef": 27.8, "max_grad_norm": None, "optimizer": "muon"}


def test_ppo_with_a_scaler_equals_ppo_bitwise(unscaled, scaled):
    cfg = tiny.ppo_config("ppo_scaled", **PPO)
    ppo.main(cfg)
    assert tiny.same_weights(cfg.out, unscaled) and tiny.same_weights(
        f"{cfg.out}/value", f"{unscaled}/value"
    )
    for row, expected in zip(tiny.log(cfg.out), tiny.log(unscaled), strict=True):
        for name in ("grad_norm/ppo", "grad_norm/ptx", "grad_norm/total", "grad_norm/value"):
            assert row[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_resumed_run_keeps_the_scale(scaled, monkeypatch):
    settings = {"epochs": 3.0, "optimizer": "muon", "save_every": 3}
    uninterrupted = tiny.sft_config("fp16_whole", **settings)
    sft.main(uninterrupted)
    cut = tiny.sft_config("fp16_cut", **settings)
    tiny.stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        sft.main(cut)
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "Accelerator", Scaled)
    scales = []
    step = Optimizers.step

    def seen(self, factor):
        scales.append(self.parts[0].scaler.get_scale())
        return step(self, factor)

    monkeypatch.setattr(Optimizers, "step", seen)
    cut.resume = True
    sft.main(cut)
    assert tiny.same_weights(uninterrupted.out, cut.out)
    assert scales[0] == 2 * SCALE  # step 4, after the growth that followed steps 1 and 2


def parts(optimizer="muon"):
    torch.manual_seed(0)
    run = Runtime(RuntimeConfig(device="cpu"))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = Optimizers(module, OptimConfig(lr=0.1, optimizer=optimizer))
    return run, run.prepare(module, optimizers), optimizers


def test_clipping_twice_a_step(scaled):
    run, module, optimizers = parts()
    run.backward([module], module(torch.ones(3, 4)).sum(), last=True)
    before = run.clip(module, None)
    run.backward([module], module(torch.ones(3, 4)).sum(), last=True)
    assert run.clip(module, 0.5) == pytest.approx(2 * before)
    assert run.clip(module, None) == pytest.approx(0.5, rel=1e-5)
    optimizers.step(1.0)


def test_an_overflow_skips_the_step_of_all_optimizers_and_halves_the_scale_once(scaled):
    run, module, optimizers = parts()
    weights = [p.detach().clone() for p in module.parameters()]
    run.backward([module], module(torch.ones(3, 4)).sum() * 3e38, last=True)
    assert not math.isfinite(run.clip(module, 1.0))
    optimizers.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    run.backward([module], module(torch.ones(3, 4)).sum(), last=True)
    assert run.loss_scale == SCALE / 2
    assert math.isfinite(run.clip(module, 1.0))
    optimizers.step(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def test_a_run_survives_an_overflow(scaled, monkeypatch):
    backward = Runtime.backward
    calls = []

    def overflowing(self, modules, loss, last):
        calls.append(loss)
        backward(self, modules, loss * (3e38 if len(calls) == 1 else 1.0), last)

    monkeypatch.setattr(Runtime, "backward", overflowing)
    cfg = tiny.sft_config("fp16_overflow")
    sft.main(cfg)
    norms = [row["grad_norm"] for row in tiny.log(cfg.out)]
    assert not math.isfinite(norms[0]) and all(map(math.isfinite, norms[1:])) and len(norms) > 1


def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="precision: fp16 needs a GPU.*use bf16 or fp32"):
        Runtime(RuntimeConfig(device="cpu", precision="fp16"))
