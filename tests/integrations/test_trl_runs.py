"""TRL's trainers, patched and unpatched from one seed: the same loss curve, served by the op."""

import warnings

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from trl.trainer.reward_trainer import RewardTrainer  # noqa: E402

from _support import small_llama  # noqa: E402
from _support.patched import losses  # noqa: E402
from fastrlhf.integrations import trl as integration  # noqa: E402

LOSS = "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"
HEAD = "trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"
REWARD = "trl.trainer.reward_trainer.RewardTrainer.compute_loss"


@pytest.fixture(autouse=True)
def clean():
    yield
    integration.unpatch()


QUIET = {"use_cpu": True, "logging_steps": 1, "report_to": [], "save_strategy": "no", "bf16": False}
STEPS = {
    "max_steps": 20,
    "learning_rate": 5e-3,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}


def length_reward(completions, **_):
    """Higher for short completions and for the word "cat"."""
    return [2.0 * ("cat" in text) - 0.1 * len(text.split()) for text in completions]


def sampled(trainer_class, config_class, out, **extra):
    config = config_class(
        **QUIET,
        **STEPS,
        output_dir=str(out),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        temperature=0.9,
        beta=0.1,
        **extra,
    )
    rows = Dataset.from_dict({"prompt": small_llama.sentences(40, low=2, high=6)})
    folder = str(out / "model")  # TRL loads the reference model from the same folder
    small_llama.causal_lm().save_pretrained(folder)
    return trainer_class(
        model=folder,
        reward_funcs=length_reward,
        args=config,
        train_dataset=rows,
        processing_class=small_llama.tokenizer(),
    )


def grpo(out):
    return sampled(trl.GRPOTrainer, trl.GRPOConfig, out, num_iterations=2)


def grpo_of(loss_type, **settings):
    """GRPO with this loss, over two micro-batches a step."""

    def make(out):
        given = {"num_iterations": 2, "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.7}
        return sampled(
            trl.GRPOTrainer, trl.GRPOConfig, out, loss_type=loss_type, **given, **settings
        )

    return make


SEQUENCE = {"importance_sampling_level": "sequence"}


def grpo_with_fp32_head(out):
    """TRL casts the head's weight and gives it fp32 hidden states outside autocast."""
    return sampled(
        trl.GRPOTrainer, trl.GRPOConfig, out, num_iterations=2, cast_lm_head_to_fp32=True
    )


def rloo(out):
    return sampled(trl.RLOOTrainer, trl.RLOOConfig, out, num_iterations=2)


def preferences():
    chosen, rejected = small_llama.sentences(80, seed=2), small_llama.sentences(80, seed=3)
    return {"chosen": [" cat " + x for x in chosen], "rejected": [" " + x for x in rejected]}


def dpo(out):
    config = trl.DPOConfig(**QUIET, **STEPS, output_dir=str(out), per_device_train_batch_size=4)
    rows = {"prompt": small_llama.sentences(80, seed=1), **preferences()}
    return trl.DPOTrainer(
        model=small_llama.causal_lm(),
        ref_model=small_llama.causal_lm(),
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=small_llama.tokenizer(),
    )


def reward(out):
    config = trl.RewardConfig(
        **QUIET,
        **STEPS,
        output_dir=str(out),
        per_device_train_batch_size=4,
        center_rewards_coefficient=0.01,
    )
    return RewardTrainer(
        model=small_llama.reward_model(),
        args=config,
        train_dataset=Dataset.from_dict(preferences()),
        processing_class=small_llama.tokenizer(),
    )


def sft(out):
    config = trl.SFTConfig(**QUIET, **STEPS, output_dir=str(out), per_device_train_batch_size=4)
    return trl.SFTTrainer(
        model=small_llama.causal_lm(),
        args=config,
        train_dataset=Dataset.from_dict({"text": small_llama.sentences(80)}),
        processing_class=small_llama.tokenizer(),
    )


# AdamW amplifies rounding differences over 20 steps to about this size. A wrong term changes the curve by > 1e-2.
TOLERANCE = 2e-4


@pytest.mark.parametrize(
    ("make", "function", "op_calls"),
    [
        (grpo, LOSS, 20),
        pytest.param(grpo_of("grpo", **SEQUENCE), LOSS, 40, marks=pytest.mark.nightly),
        pytest.param(grpo_of("dr_grpo", delta=2.0), LOSS, 40, marks=pytest.mark.nightly),
        pytest.param(grpo_of("bnpo", entropy_coef=0.01), LOSS, 40, marks=pytest.mark.nightly),
        pytest.param(grpo_of("luspo", **SEQUENCE), LOSS, 40, marks=pytest.mark.nightly),
        pytest.param(grpo_of("cispo", epsilon_high=1.3), LOSS, 40, marks=pytest.mark.nightly),
        pytest.param(grpo_of("sapo"), LOSS, 40, marks=pytest.mark.nightly),
        (grpo_with_fp32_head, HEAD, 20),
        (rloo, HEAD, 20),
        (dpo, HEAD, 20),
        (sft, HEAD, 20),
        (reward, REWARD, 20),
    ],
)
def test_training_run_keeps_its_curve(make, function, op_calls, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = make(tmp_path / "plain")
        plain.train()
        with integration.patch() as patched:
            fused = make(tmp_path / "fused")
            fused.train()
    assert patched.calls[function] >= op_calls
    assert patched.fallbacks == {}
    ours, theirs = losses(fused), losses(plain)
    assert len(ours) == len(theirs) == 20
    assert max(theirs) - min(theirs) > 10 * TOLERANCE  # the loss changes during the run
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    skipped = {"epoch", "step", "total_flos"}
    for mine, original in zip(fused.state.log_history, plain.state.log_history, strict=True):
        assert mine.keys() == original.keys()
        timed = {k for k in original if "time" in k or "per_second" in k or "runtime" in k}
        for key in original.keys() - skipped - timed:
            assert mine[key] == pytest.approx(original[key], rel=1e-2, abs=1e-3), key


def test_beside_the_patch_of_transformers(tmp_path):
    from fastrlhf.integrations import transformers as beneath

    theirs = sft(tmp_path / "plain")
    theirs.train()
    with beneath.patch() as below, integration.patch() as patched:
        ours = sft(tmp_path / "ours")
        ours.train()
    assert patched.calls[HEAD] == 20
    assert below.fallbacks == {}
    assert losses(ours) == pytest.approx(losses(theirs), abs=TOLERANCE)


def bf16_trainer(out, cast):
    """GRPO on a bf16 model with large logits, with or without TRL's flag."""
    model = small_llama.causal_lm().bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    config = trl.GRPOConfig(
        **QUIET,
        output_dir=str(out),
        per_device_train_batch_size=2,
        num_generations=2,
        temperature=0.9,
        cast_lm_head_to_fp32=cast,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": small_llama.sentences(4)}),
        processing_class=small_llama.tokenizer(),
    ).model


def scored(model):
    """(log-probs, entropies, gradient of the head's weight) of fixed tokens."""
    ids = torch.randint(3, 20, (16, 32), generator=torch.Generator().manual_seed(7))
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    out.log_probs.sum().backward()
    return out.log_probs.detach(), out.entropy.detach(), model.lm_head.weight.grad


def test_a_bf16_head_has_the_log_probs_of_the_fp32_head(tmp_path):
    """Patched, a bf16 head has the log-probs of TRL's cast_lm_head_to_fp32, with and without the flag.

    A product of two bf16 numbers is exact in fp32, so logits differ in their summation order only.
    """
    plain, cast = bf16_trainer(tmp_path, False), bf16_trainer(tmp_path, True)
    assert (plain.lm_head.weight.dtype, cast.lm_head.weight.dtype) == (
        torch.bfloat16,
        torch.float32,
    )
    rounded, theirs = scored(plain), scored(cast)
    with integration.patch() as patched:
        ours, ours_cast = scored(plain), scored(cast)
    assert patched.calls[HEAD] == 2 and patched.fallbacks == {}
    for mine in (ours, ours_cast):
        for values, expected in zip(mine[:2], theirs[:2], strict=True):
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=4e-6)
    assert (rounded[0].float() - theirs[0]).abs().max() > 1e-3  # the error that the flag avoids
    assert plain.lm_head.weight.dtype == ours[2].dtype == torch.bfloat16
    torch.testing.assert_close(ours[2].float(), theirs[2], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(ours_cast[2], theirs[2], rtol=1e-5, atol=1e-5)
