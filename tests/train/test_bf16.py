"""bf16: a policy and its reference compute the same, and scores are not rounded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed.utils import _apply_to_tensors

from _support import tiny, zoo
from fastrlhf.train import models
from fastrlhf.train.packing import collate
from fastrlhf.train.stages import ppo
from fastrlhf.train.steps import token_logprobs


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral"])
def test_bf16_reference_equals_the_policy_in_every_bit(kind, tmp_path):
    folder = saved(zoo.FAMILIES[kind].make_model(), tmp_path)
    runtime = zoo.runtime(torch.bfloat16)
    policy, reference = (models.load_policy(folder, runtime, trainable=t) for t in (True, False))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in reference.parameters()}
    examples = zoo.examples()
    ours, theirs = (np.concatenate(token_logprobs(p, examples, 99)) for p in (policy, reference))
    assert np.array_equal(ours, theirs)
    exact = models.load_policy(folder, zoo.runtime(), trainable=False)
    gap = np.abs(ours - np.concatenate(token_logprobs(exact, examples, 99))).max()
    assert 1e-4 < gap < 0.5  # bf16 is what ran


def test_bf16_scores_are_not_rounded(tmp_path):
    folder = saved(zoo.FAMILIES["llama"].make_model(pad_token_id=1), tmp_path)
    bf16 = zoo.runtime(torch.bfloat16)
    fresh = models.reward_model_from_policy(folder, bf16)
    again = saved(fresh.model, tmp_path / "reward")
    frozen = models.load_reward_model(again, bf16, trainable=False)
    batch = collate([[5, 6, 7, 8], [9, 10], [11, 12, 13]])
    rows = torch.arange(9)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():  # as accelerate's wrapper
        scores = fresh(batch, rows)
        torch.testing.assert_close(frozen(batch, rows), scores, rtol=1e-6, atol=1e-6)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16()).sum() >= 6


def test_ppo_starts_at_a_kl_of_zero(monkeypatch):
    """KL of the policy from itself, and the sampler's gap to the training path: 0.0069 a sequence and more before."""
    cfg = tiny.ppo_config("bf16", iterations=1, precision="bf16")
    AcceleratorState._reset_state()  # accelerate fixes the precision of a process
    try:
        ppo.main(cfg)
    finally:
        AcceleratorState._reset_state()
    (row,) = tiny.log(cfg.out)
    assert row["kl/reference"] == 0.0 and row["policy/ratio_max_first"] == 1.0
    assert row["sampler/logprob_gap"] < 0.01


def test_fsdp_does_not_round_the_tensors_of_ppos_loss():
    """FSDP2 applies this function to the arguments of a forward. Old log-probs rounded to bf16 gave ratios of 1.015."""
    x = torch.tensor([1.001])
    micro = SimpleNamespace(old_logprob=x, advantages=x, values=x, returns=x)
    head = _apply_to_tensors(lambda t: t.bfloat16(), ppo.PPOLoss(micro, x, None))
    assert head.micro.old_logprob is x and head.micro.returns is x and head.values is x
