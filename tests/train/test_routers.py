"""The router loss of a mixture of experts: transformers' own number and gradient, and where it is added."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

from _support import zoo
from fastrlhf.errors import UserError
from fastrlhf.train import data, models
from fastrlhf.train.rollout import TrainingMicroBatch
from fastrlhf.train.routers import router_loss
from fastrlhf.train.stages import ppo
from fastrlhf.train.steps import nll_backward

RUNTIME = SimpleNamespace(
    device=torch.device("cpu"),
    world=1,
    sum=lambda *x: list(x),
    max=lambda x: x,
    backward=lambda modules, loss, last: loss.backward(),
)


@pytest.fixture(params=["mixtral", "qwen2_moe"])
def policy(request):
    return models.Policy(zoo.FAMILIES[request.param].make_model())


def test_loss_and_gradient_equal_transformers(policy):
    policy.lm.set_attn_implementation(zoo.attention.NAME)
    tokens = torch.randint(0, 100, (1, 12))
    losses = nll_backward(
        policy, [data.Example(tokens[0].numpy(), 1)], RUNTIME, 64, router_coefficient=0.5
    )
    ours = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    policy.lm.set_attn_implementation("eager")
    policy.lm.router_aux_loss_coef = 0.5
    out = policy.lm(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
    out.loss.backward()
    torch.testing.assert_close(losses["router_loss"], out.aux_loss)
    torch.testing.assert_close(losses["loss"] + 0.5 * losses["router_loss"], out.loss)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_coefficient_is_the_models_unless_set():
    for name, expected in (
        ("mixtral", 0.001),
        ("gpt_oss", 0.001),
        ("deepseek_v3", 0.0),
        ("llama", 0.0),
    ):
        policy = models.Policy(zoo.FAMILIES[name].make_model())
        assert policy.router_coefficient(None) == expected
        assert policy.router_coefficient(0.0) == 0.0
        if expected:
            assert policy.router_coefficient(0.25) == 0.25
        else:
            with pytest.raises(UserError, match="ForCausalLM has none; got 0.25"):
                policy.router_coefficient(0.25)
        assert (router_loss(policy.lm) is not None) == (expected > 0)  # fmt: skip


def test_weights_under_other_names():
    """Of JetMoE and DBRX; their losses equal transformers' own."""
    experts = {"moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.05, "ffn_hidden_size": 32}
    jetmoe = JetMoeConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, aux_loss_coef=0.03,
    )  # fmt: skip
    dbrx = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=100,
        attn_config=DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        ffn_config=DbrxFFNConfig(hidden_size=32, **experts),
    )  # fmt: skip
    tokens = torch.randint(0, 100, (1, 12))
    for config, weight in ((jetmoe, 0.03), (dbrx, 0.05)):
        lm = AutoModelForCausalLM.from_config(
            config, attn_implementation=zoo.attention.NAME, dtype=torch.float32
        )
        policy = models.Policy(lm)
        assert policy.router_coefficient(None) == weight
        examples = [data.Example(tokens[0].numpy(), 1)]
        losses = nll_backward(policy, examples, RUNTIME, 64, router_coefficient=0.5)
        lm.set_attn_implementation("eager")
        out = lm(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
        torch.testing.assert_close(losses["router_loss"], out.aux_loss)


def test_micro_batches_count_by_their_tokens(policy):
    policy.lm.set_attn_implementation(zoo.attention.NAME)
    examples = [data.Example(torch.randint(0, 100, (n,)).numpy(), 1) for n in (12, 4)]
    apart = nll_backward(policy, examples, RUNTIME, 12, router_coefficient=1.0)["router_loss"]
    alone = [nll_backward(policy, [e], RUNTIME, 12, router_coefficient=1.0) for e in examples]
    first, second = (losses["router_loss"] for losses in alone)
    torch.testing.assert_close(apart, (12 * first + 4 * second) / 16)


def test_ppo_adds_it_only_when_asked(policy):
    policy.lm.set_attn_implementation(zoo.attention.NAME)
    example = data.Example(torch.randint(0, 100, (9,)).numpy(), 3)
    batch, rows, targets = data.next_token_rows([example], "cpu")
    zero = torch.zeros(len(rows))
    micro = TrainingMicroBatch(
        indices=None, weight=1.0, batch=batch, rows=rows, targets=targets, lengths=None, old_logprob=zero - 3,
        ref_logprob=zero, entropy=zero, values=zero, scores=zero, advantages=zero, returns=zero,
    )  # fmt: skip

    def loss(coefficient):
        trainer = SimpleNamespace(
            cfg=ppo.PPOConfig(ppo_router_coef=coefficient), policy=policy, policy_module=policy
        )
        return ppo.Trainer.policy_loss(trainer, micro, zero)[1]

    hidden = policy.lm.base_model(
        input_ids=batch.input_ids[None], output_router_logits=True, use_cache=False
    )
    expected = policy.router(hidden.router_logits)
    assert expected > 1
    torch.testing.assert_close(loss(0.5) - loss(0.0), 0.5 * expected)
