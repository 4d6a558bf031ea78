"""The fused heads: no stage holds [N, V] logits, and heads that are more than a linear layer are refused."""

import pytest
import torch
import transformers
from torch import nn

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.ops import _gemms
from fastrlhf.train import models
from fastrlhf.train.heads import SummedNLL, TokenLogprobs, Unembedding, unembedding
from fastrlhf.train.stages import ppo, reward, sft
from fastrlhf.train.vocabulary import Vocabulary

ROWS = 5  # rows of a chunk


def widths(main, cfg, monkeypatch):
    """Run a stage in chunks of ROWS; return {rows: op names} of all operands [rows, V] but the head's weight."""
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: ROWS)
    cfg.self_check = False  # it computes all logits of its small copies
    config = models.AutoConfig.from_pretrained(tiny.base())
    vocab, width = config.vocab_size, config.hidden_size
    with torch.profiler.profile(record_shapes=True) as profile:
        main(cfg)
    found = {}
    for event in profile.events():
        for shape in event.input_shapes or ():
            if len(shape) >= 2 and shape[-1] == vocab:
                rows = torch.Size(shape[:-1]).numel()
                if rows != width:  # weight.T
                    found.setdefault(rows, set()).add(event.name)
    return found


def test_sft_and_ppo_ptx_hold_a_chunk_at_a_time(monkeypatch):
    tiny.reward_model()
    found = widths(sft.main, tiny.sft_config("lean-sft", epochs=0.5), monkeypatch)
    assert ROWS in found and max(found) == ROWS, found
    # The sampler computes one row of logits for each response, so there are at most ROWS responses.
    cfg = tiny.ppo_config("lean-ppo", iterations=1, ptx_coef=1.0, batch=4, minibatch=4)
    found = widths(ppo.main, cfg, monkeypatch)
    assert "fastrlhf::linear_loss_fwd" not in found.get(ROWS, ())  # its operands are no logits
    assert ROWS in found and max(found) == ROWS, found


def test_the_reward_model_has_no_vocabulary(monkeypatch):
    assert not widths(reward.main, tiny.reward_config("lean-reward", epochs=1), monkeypatch)


class Adapter(nn.Linear):
    """A layer as peft wraps it: the base layer and two low-rank matrices."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.base_layer = base
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()


@pytest.mark.parametrize("kind", ["lora", "parametrized", "no weight"])
def test_a_head_that_is_not_a_plain_linear_layer_is_refused(kind):
    lm = nn.Module()
    lm.config = transformers.LlamaConfig()
    head = nn.Linear(4, 7)
    lm.get_output_embeddings = lambda: head
    assert unembedding(lm) == Unembedding(head.weight, head.bias)
    if kind == "lora":
        head = Adapter(nn.Linear(4, 7))
    elif kind == "parametrized":
        nn.utils.parametrize.register_parametrization(head, "weight", nn.Identity())
    else:
        head = nn.Identity()
    match = (
        "base_layer, lora_A, lora_B"
        if kind == "lora"
        else {"parametrized": "parametrizations"}.get(kind, kind)
    )
    with pytest.raises(UserError, match=f"output head .* must be a plain linear layer.*{match}"):
        unembedding(lm)


SIZE = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Granite", {"logits_scaling": 8.0}),  # divides
        ("HyperCLOVAX", {"logits_scaling": 3.0}),  # multiplies, under the same name
        ("MiniCPM3", {"dim_model_base": 4, "v_head_dim": 8, **MLA}),  # divides the hidden states
        ("Cohere", {"logit_scale": 0.25}),
        ("FalconH1", {"lm_head_multiplier": 2.0, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}),
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
    ],
)  # fmt: skip
def test_heads_have_the_models_own_logits(kind, settings):
    """Logits in the sampler, log-probs and losses of the fused heads: with every factor that the model applies."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **settings})
    lm = models.AutoModelForCausalLM.from_config(config).eval()
    lm.get_output_embeddings().weight.data.normal_()
    ids = torch.randint(0, 13, (1, 5))
    with torch.no_grad():
        expected = lm(input_ids=ids).logits[0].float()
        hidden = lm.base_model(input_ids=ids).last_hidden_state[0]
    rule = unembedding(lm)
    assert (rule.scale, rule.softcap) != (1.0, None)
    torch.testing.assert_close(rule.logits(hidden), expected, rtol=1e-5, atol=1e-5)
    targets = torch.arange(5)
    for temperature in (1.0, 0.7):
        found = TokenLogprobs(targets, temperature)(hidden, rule, "auto")
        whole = (expected / temperature).log_softmax(-1)[targets, targets]
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    nll = -expected.log_softmax(-1)[targets, targets].sum()
    torch.testing.assert_close(SummedNLL(targets)(hidden, rule, "auto"), nll, rtol=1e-5, atol=1e-5)


def test_the_scale_comes_before_the_softcap():
    rule = Unembedding(torch.randn(13, 4), torch.randn(13), scale=3.0, softcap=2.0)
    hidden, targets = torch.randn(6, 4), torch.arange(6)
    logits = 2 * torch.tanh(3 * (hidden @ rule.weight.T + rule.bias) / 2)
    torch.testing.assert_close(rule.logits(hidden), logits)
    found = TokenLogprobs(targets, 0.7)(hidden, rule, "auto")
    torch.testing.assert_close(found, (logits / 0.7).log_softmax(-1)[targets, targets])


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (transformers.LlamaConfig(logit_scale=0.5), "logit_scale = 0.5 .* 'llama' model is unknown"),
        (transformers.GraniteConfig(logits_scaling=-1.0), "logits_scaling .* positive number, got -1.0"),
    ],
)  # fmt: skip
def test_a_scale_of_unknown_effect_is_refused(config, match):
    lm = nn.Module()
    lm.config, lm.get_output_embeddings = config, lambda: nn.Linear(3, 5)
    with pytest.raises(UserError, match=match):
        unembedding(lm)


def test_ids_without_a_token_under_a_softcap_are_refused():
    """Their bias of -inf would become -softcap: a probability above 0."""
    config = transformers.Gemma2Config(**{**SIZE, "head_dim": 8}, final_logit_softcapping=0.5)
    lm = models.AutoModelForCausalLM.from_config(config)
    assert models.Policy(lm, vocabulary=Vocabulary(11, ())).unembedding.weight.shape == (11, 16)
    with pytest.raises(UserError, match="no token for 2 ids .* soft-cap of its logits"):
        _ = models.Policy(lm, vocabulary=Vocabulary(11, (3, 4))).unembedding
