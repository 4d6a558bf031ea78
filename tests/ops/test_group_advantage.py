"""group_advantage against loops over Python floats, and against verl's and torch's own functions."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.oracles import verl
from _support.tolerance import assert_near
from fastrlhf import group_advantage, reference

GROUPS = (4, 9, 1, 0, 2, 6, 3, 2, 70)
M = sum(GROUPS)
BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "batch_std", "gpg", "none")
each_backend = cases.each_backend("group_advantage")
fused = cases.each_backend("group_advantage", cases.FUSED)
each_baseline = pytest.mark.parametrize("baseline", BASELINES)
each_scale = pytest.mark.parametrize("scale", SCALES)
anywhere = cases.anywhere(group_advantage)


def rewards_of(seed, dtype=torch.float64, count=M):
    """Verdicts of 0 and 1 beside scores."""
    rewards = cases.randn(count, seed, scale=2.0)
    rewards[: count // 3] = (rewards[: count // 3] > 0).double()
    return rewards.to(dtype)


def std_of(x):
    return statistics.stdev(x) if len(x) > 1 else 0.0


def naive(rewards, groups, baseline, scale, eps):
    out, start = [], 0
    for size in groups:
        group = rewards[start : start + size]
        start += size
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            if baseline == "none":
                value = reward
            elif baseline == "mean":
                value = reward - statistics.fmean(group)
            else:
                value = reward - statistics.fmean(others) if others else 0.0
            if scale == "std":
                value /= std_of(group) + eps
            elif scale == "batch_std":
                value /= std_of(rewards) + eps
            elif scale == "gpg":
                value *= len(rewards) / max(1, sum(r != 0 for r in rewards))
            out.append(value)
    return torch.tensor(out, dtype=torch.float64)


@each_backend
@each_baseline
@each_scale
def test_equals_a_loop(backend, baseline, scale):
    rewards, eps = rewards_of(1), 0.01
    options = {"baseline": baseline, "scale": scale, "eps": eps}
    ours = anywhere(rewards, cases.cu_of(GROUPS), **options, backend=backend)
    expected = naive(rewards.tolist(), GROUPS, **options)
    assert ours.dtype == torch.float64 and not ours.requires_grad
    assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-14)


@fused
@each_scale
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_error_at_most_twice_eager(backend, scale, dtype):
    rewards, cu = 5 + rewards_of(2, dtype), cases.cu_of(GROUPS)
    options = {"baseline": "leave_one_out", "scale": scale}
    ours = anywhere(rewards, cu, **options, backend=backend)
    eager = reference.group_advantage(rewards, cu, **options)
    truth = reference.group_advantage(rewards.double(), cu, **options)
    assert ours.dtype == torch.float32
    assert_near(ours, eager, truth)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reward", [0.1, -1e30, 0.0])
def test_equal_rewards_and_a_group_of_one_have_no_advantage(backend, dtype, reward):
    """Exactly: a rounding error over a std of 0 would be an advantage."""
    rewards = torch.full((14,), reward, dtype=dtype)
    for baseline in ("mean", "leave_one_out"):
        for scale in SCALES:
            options = {"baseline": baseline, "scale": scale, "backend": backend}
            out = anywhere(rewards, cases.cu_of((1, 3, 0, 10)), **options)
            assert torch.equal(out, torch.zeros(14))
    plain = anywhere(rewards, cases.cu_of((1, 13)), baseline="none", scale="none", backend=backend)
    assert torch.equal(plain, rewards.float())


@each_backend
def test_nothing(backend):
    for groups in ((), (0, 0)):
        for scale in SCALES:
            out = anywhere(torch.ones(0), cases.cu_of(groups), scale=scale, backend=backend)
            assert out.shape == (0,)


@each_backend
def test_a_nan_stays_in_its_group(backend):
    rewards, cu = rewards_of(3, torch.float32, 9), cases.cu_of((3, 4, 2))
    expected = anywhere(rewards, cu, backend=backend)
    rewards[4] = math.nan
    out = anywhere(rewards, cu, backend=backend)
    assert out[3:7].isnan().all()
    assert torch.equal(out[:3], expected[:3]) and torch.equal(out[7:], expected[7:])
    assert anywhere(rewards, cu, scale="batch_std", backend=backend).isnan().all()


@each_backend
@each_scale
def test_a_group_does_not_depend_on_its_place(backend, scale):
    """Bitwise, but for the std of the batch, whose order of the sum is that of the batch."""
    rewards, groups = rewards_of(4, torch.float32), list(GROUPS)
    out = anywhere(rewards, cases.cu_of(groups), scale=scale, backend=backend)
    back = torch.cat(out.split(groups)[::-1])
    swapped = torch.cat(rewards.split(groups)[::-1])
    other = anywhere(swapped, cases.cu_of(groups[::-1]), scale=scale, backend=backend)
    close = {"rtol": 1e-6, "atol": 0} if scale == "batch_std" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(other, back, **close)


@fused
def test_many_groups_and_a_long_one(backend, monkeypatch):
    """Blocks, or Triton's programs, take several groups each; a long one takes several steps."""
    prompts = 2500
    if cases.interpreted(backend):
        from fastrlhf.kernels import group_advantage as kernels

        prompts = 150
        monkeypatch.setattr(kernels, "PROGRAMS", 64)
    sizes = torch.randint(0, 9, (prompts,), generator=torch.Generator().manual_seed(3)).tolist()
    groups = [*sizes, 175, 33]
    rewards = rewards_of(5, count=sum(groups))
    for baseline, scale in (("mean", "std"), ("leave_one_out", "batch_std")):
        options = {"baseline": baseline, "scale": scale, "eps": 1e-3}
        out = anywhere(rewards, cases.cu_of(groups), **options, backend=backend)
        expected = reference.group_advantage(rewards, cases.cu_of(groups), **options)
        assert torch.allclose(out, expected, rtol=1e-11, atol=1e-13)


@cases.each_backend("group_advantage", ("cuda",))
@pytest.mark.parametrize("cu", [[0, 3], [1, 6], [0, 5, 3, 6], [0, 7, 6], [0, -1, 6], [0]])
def test_broken_groups_are_not_followed(backend, cu):
    arguments = cases.at(backend, (torch.arange(6.0), torch.tensor(cu).int()))
    assert torch.ops.fastrlhf.group_advantage(*arguments, 0, 0, 1e-6).isnan().all()


@each_backend
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.integers(0, 99),
    st.sampled_from(BASELINES),
    st.sampled_from(SCALES),
)
def test_any_groups(backend, groups, seed, baseline, scale):
    rewards = rewards_of(seed, count=sum(groups))
    options = {"baseline": baseline, "scale": scale, "eps": 0.1}
    out = anywhere(rewards, cases.cu_of(groups), **options, backend=backend)
    expected = naive(rewards.tolist(), groups, **options)
    assert torch.allclose(out, expected, rtol=1e-11, atol=1e-12)


# ---- the functions of trainers; groups of one differ, as the docstring says

VERL = {
    "grpo": ("compute_grpo_outcome_advantage", {}, {}),
    "dr_grpo": (
        "compute_grpo_outcome_advantage",
        {"norm_adv_by_std_in_grpo": False},
        {"scale": "none"},
    ),
    "rloo": (
        "compute_rloo_outcome_advantage",
        {},
        {"baseline": "leave_one_out", "scale": "none"},
    ),
    "rloo_vectorized": (
        "compute_rloo_vectorized_outcome_advantage",
        {},
        {"baseline": "leave_one_out", "scale": "none"},
    ),
    "gpg": ("compute_gpg_outcome_advantage", {}, {"scale": "gpg"}),
}


@each_backend
@pytest.mark.parametrize("name", VERL)
def test_equals_verl(backend, name):
    function, theirs, options = VERL[name]
    groups = (4, 9, 2, 6, 3) + ((1,) if name == "rloo_vectorized" else ())
    rewards = rewards_of(6, torch.float32, sum(groups))
    index = np.repeat(np.arange(len(groups)), groups)
    mask = torch.ones(len(rewards), 1)
    expected, _ = getattr(verl().core_algos, function)(
        rewards.clone().unsqueeze(1), mask, index, **theirs
    )
    ours = anywhere(rewards, cases.cu_of(groups), **options, backend=backend)
    torch.testing.assert_close(ours, expected.squeeze(1).float(), rtol=3e-6, atol=1e-6)


@each_backend
def test_equals_trls_batch_std(backend):
    """GRPOTrainer with scale_rewards="batch", by torch."""
    rewards = rewards_of(7, torch.float32, 24)
    expected = rewards.view(6, 4)
    expected = (expected - expected.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    ours = anywhere(rewards, cases.cu_of([4] * 6), scale="batch_std", eps=1e-4, backend=backend)
    torch.testing.assert_close(ours, expected.flatten(), rtol=3e-6, atol=1e-6)
