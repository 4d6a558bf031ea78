"""Tiny random-weight models of many families, and the checks that decide whether the trainer serves one.

`judge(family)` returns the line of the table: "works", or "refused: " and the reason. A result that is wrong without a
refusal raises AssertionError, whatever the recorded verdict says.
"""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.evals import EvalConfig
from fastrlhf.evals import main as evaluate
from fastrlhf.integrations import attention  # noqa: F401  (registered before a model is made)
from fastrlhf.train import data, models
from fastrlhf.train.classifiers import language_model
from fastrlhf.train.dropout import residual_branches
from fastrlhf.train.heads import SummedNLL, TokenLogprobs
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler
from fastrlhf.train.stages import ppo, reward, sft
from fastrlhf.train.steps import token_logprobs

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORD, PAGE = DOCS / "families.json", DOCS / "families.md"
MARKS = ("<!-- families -->", "<!-- /families -->")
VOCAB = 320  # of tiny.base()'s tokenizer
WINDOW = 6  # tokens of a sliding window; shorter than the sequences below


@dataclass(frozen=True)
class Family:
    """A class of transformers and the settings of a tiny model of it."""

    title: str
    config: str
    settings: dict = field(default_factory=dict)
    must_work: bool = True

    def make_config(self, **changes):
        size = {k: v for k, v in _SIZE.items() if (self.config, k) != ("FalconConfig", "head_dim")}
        kind = getattr(transformers, self.config)
        if "vision_config" not in self.settings:
            return kind(**{**size, **self.settings, **changes})
        text = {**size, **self.settings["text_config"], **changes}
        return kind(**{**self.settings, "text_config": text})

    def make_model(self, **changes):
        """A causal LM with random weights that make its outputs depend on every part: sinks, biases and norms too."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            config = self.make_config(**changes)
            lm = language_model(config).from_config(config)
            for parameter in lm.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return lm.eval()


_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {  # the last layers read the keys and values of earlier ones
    **_SLIDING,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def _family(title, config, must_work=True, **settings):
    return Family(title, f"{config}Config", settings, must_work)


FAMILIES = {
    "llama": _family("Llama 2, 3", "Llama", tie_word_embeddings=False),
    "llama_tied": _family("Llama 3.2 (tied)", "Llama", tie_word_embeddings=True),
    "qwen2": _family("Qwen 2, 2.5", "Qwen2"),
    "qwen3": _family("Qwen 3", "Qwen3"),
    "gemma": _family("Gemma 1", "Gemma"),
    "gemma2": _family("Gemma 2", "Gemma2", **_SLIDING, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3": _family("Gemma 3", "Gemma3Text", **_SLIDING),
    "mistral": _family("Mistral", "Mistral", sliding_window=WINDOW),
    "ministral3": _family("Ministral 3", "Ministral3"),
    "phi3": _family("Phi-3, Phi-4", "Phi3", sliding_window=WINDOW, resid_pdrop=0.1, embd_pdrop=0.1, pad_token_id=0),
    "olmo2": _family("OLMo 2", "Olmo2"),
    "olmo3": _family("OLMo 3", "Olmo3", **_SLIDING),
    "smollm3": _family("SmolLM 3", "SmolLM3", no_rope_layers=[1, 0]),
    "gpt2": _family("GPT-2", "GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": _family("GPT-NeoX, Pythia", "GPTNeoX", hidden_dropout=0.1),
    "granite": _family(
        "Granite", "Granite", logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "cohere": _family("Cohere", "Cohere", logit_scale=0.25, use_qk_norm=True),
    "cohere2": _family("Cohere 2", "Cohere2", logit_scale=0.25, **_SLIDING),
    "gpt_oss": _family("gpt-oss", "GptOss", **_SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _family(
        "DeepSeek-V3", "DeepseekV3", **_MLA, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1,
    ),
    "mixtral": _family("Mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1),
    "qwen2_moe": _family("Qwen 2-MoE", "Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": _family("Qwen 3-MoE", "Qwen3Moe", **_EXPERTS),
    "gemma3_images": _family(
        "Gemma 3 with images, on text", "Gemma3", text_config=_SLIDING, vision_config=_VISION, mm_tokens_per_image=4
    ),
    "ministral3_images": _family(
        "Ministral 3 with images, on text", "Mistral3", text_config={"model_type": "ministral3"},
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    "apertus": _family("Apertus", "Apertus", must_work=False),
    "ernie4_5": _family("Ernie 4.5", "Ernie4_5", must_work=False),
    "opt": _family("OPT", "OPT", must_work=False, ffn_dim=48, dropout=0.1, word_embed_proj_dim=32),
    "phi": _family("Phi-1, Phi-2", "Phi", must_work=False, resid_pdrop=0.1, embd_pdrop=0.1),
    "stablelm": _family("StableLM", "StableLm", must_work=False, hidden_dropout=0.1),
    "qwen3_5": _family("Qwen 3.5", "Qwen3_5Text", must_work=False, **_LINEAR),
    "qwen3_next": _family(
        "Qwen 3-Next", "Qwen3Next", must_work=False, **_LINEAR, **_EXPERTS, shared_expert_intermediate_size=16
    ),
    "gemma3n": _family(
        "Gemma 3n", "Gemma3nText", must_work=False, **_SHARED, intermediate_size=[48] * 4, laurel_rank=4,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
    ),
    "gemma4": _family("Gemma 4", "Gemma4Text", must_work=False, **_SHARED, global_head_dim=16),
    "llama4": _family(
        "Llama 4", "Llama4Text", must_work=False, intermediate_size_mlp=48, num_local_experts=4,
        attention_chunk_size=WINDOW, interleave_moe_layer_step=2, no_rope_layers=[1, 0],
    ),
    "glm4_moe": _family(
        "GLM-4-MoE", "Glm4Moe", must_work=False, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1,
    ),
    "falcon": _family(
        "Falcon", "Falcon", must_work=False, hidden_dropout=0.1, new_decoder_architecture=False, multi_query=True
    ),
    "bloom": _family("Bloom", "Bloom", must_work=False, n_layer=2, n_head=4, hidden_dropout=0.1),
    "mamba2": _family(
        "Mamba 2", "Mamba2", must_work=False, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8
    ),
    "lfm2": _family("LFM 2", "Lfm2", must_work=False, layer_types=["conv", "full_attention"]),
}  # fmt: skip
# What `make test` judges; `make nightly` judges all.
SOME = ("granite", "qwen2_moe", "gpt2", "gpt_oss")


def runtime(dtype: torch.dtype = torch.float32):
    """What loading a model needs of a `Runtime`."""
    device = torch.device("cpu")
    return SimpleNamespace(
        device=device,
        compute_dtype=dtype,
        fsdp=False,
        trust_remote_code=False,
        check=lambda module, path: module,
    )


@functools.cache
def folder(name: str) -> str:
    """A folder with the tiny model of a family and tiny.base()'s tokenizer."""
    family, path = FAMILIES[name], tiny.folder() / f"family-{name}"
    tokenizer = models.load_tokenizer(tiny.base())
    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    family.make_config(**ends).save_pretrained(path)
    tokenizer.save_pretrained(path)
    # Qwen2's tokenizer class adds a token.
    family.make_model(**ends, vocab_size=len(models.load_tokenizer(path))).save_pretrained(path)
    return str(path)


def judge(name: str) -> str:
    """The verdict on a family: "works", with what it does not have, or "refused: " and the reason."""
    path = folder(name)
    try:
        # With the self-check, so that the reason of a refusal is what a user reads.
        policy = models.load_policy(path, Runtime(RuntimeConfig(device="cpu")), trainable=True)
        check_training_path(policy, path)
        check_sampler(policy, path)
        check_bf16(path)
        note = ""
        try:
            residual_branches(policy.lm.base_model)
        except UserError:
            note = "; dropout must be 0"
        run_stages(name, path, dropout=0.0 if note else 0.1)
    except UserError as error:
        return f"refused: {_reason(str(error), path)}"
    return "works" + note


def _reason(message: str, path: str) -> str:
    """A refusal without the folder and without the frame that the self-check puts around it."""
    message = re.sub(
        r".* fails the self-check: (?:a small copy of it cannot run: )?(.*) \(--self_check .*\)",
        r"\1",
        message,
    )
    message = re.sub(r"^'[^']*' \(\w+\): ", "", message)
    return message.replace(f"model of {path!r}", "the model").replace(path, "the model")


def examples(seed: int = 0) -> list[data.Example]:
    """Sequences shorter and longer than the window."""
    rng = np.random.default_rng(seed)
    return [data.Example(rng.integers(3, VOCAB, size=n), 1) for n in (2, 33, WINDOW + 1, 12)]


def check_training_path(policy, path: str) -> None:
    """Log-probs and gradients of a packed batch against each sequence alone in transformers' eager attention."""
    kind = language_model(policy.config)
    alone = kind.from_pretrained(path, attn_implementation="eager").eval()
    found = examples()
    batch, rows, targets = data.next_token_rows(found, "cpu")
    policy.train()
    ours = policy(batch, rows, TokenLogprobs(targets))
    policy(batch, rows, SummedNLL(targets)).backward()
    theirs = []
    for example in found:
        ids = torch.tensor(example.tokens)[None]
        logits = alone(input_ids=ids, use_cache=False).logits[0, :-1].float()
        theirs.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
        (-theirs[-1].sum()).backward()
    gap = (ours - torch.cat(theirs)).abs().max()
    assert gap < 1e-4, f"log-probs are wrong by up to {gap:.3g} nats"
    gradients = {n: p.grad for n, p in alone.named_parameters()}
    for name, parameter in policy.lm.named_parameters():
        expected = gradients[name]
        if expected is None or parameter.grad is None:
            assert expected is None and parameter.grad is None, f"{name} has one gradient of two"
            continue
        error = (parameter.grad - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < 1e-3, f"the gradient of {name} is wrong by {float(error):.3g} of its norm"
    policy.zero_grad()


def check_sampler(policy, path: str, new: int = 2 * WINDOW) -> None:
    """The sampler's log-probs against those of the training path, beyond any window."""
    prompts = [e.tokens.tolist() for e in examples(1)]
    sampler = HFSampler(policy, models.load_tokenizer(path))
    samples = sampler.generate(prompts, max_new_tokens=new, temperature=1.0, seed=0)
    whole = [
        data.Example(np.array([*p, *t]), len(p))
        for p, t in zip(prompts, samples.tokens, strict=True)
    ]
    expected = np.concatenate(token_logprobs(policy, whole, 1000))
    gap = np.abs(np.concatenate(samples.logprobs) - expected).max()
    assert gap < 1e-4, f"the sampler's log-probs are wrong by up to {gap:.3g} nats"


def check_bf16(path: str) -> None:
    """A policy and its reference agree in every bit at bf16."""
    both = [models.load_policy(path, runtime(torch.bfloat16), trainable=t) for t in (True, False)]
    first, second = (np.concatenate(token_logprobs(p, examples(), 1000)) for p in both)
    gap = np.abs(first - second).max()
    assert gap == 0, f"at bf16 the reference differs from the policy by up to {gap:.3g} nats"


def run_stages(name: str, path: str, dropout: float) -> None:
    """SFT -> reward model -> PPO-ptx -> eval, a step of each."""
    files = tiny.folder()
    out = {stage: f"family-{name}-{stage}" for stage in ("sft", "rm", "ppo")}
    small = {"overwrite": True, "optimizer": "muon"}
    sft.main(
        tiny.sft_config(out["sft"], model=path, epochs=0.2, batch=12, dropout=dropout, **small)
    )
    begun = str(files / out["sft"])
    reward.main(tiny.reward_config(out["rm"], model=begun, epochs=1, batch=24, **small))
    judge_folder = str(files / out["rm"])
    cfg = tiny.ppo_config(
        out["ppo"],
        model=begun,
        reward_model=judge_folder,
        iterations=1,
        batch=4,
        minibatch=4,
        ptx_coef=1.0,
        **small,
    )
    result = ppo.main(cfg)
    row = tiny.log(cfg.out)[-1]
    assert row["policy/ratio_max_first"] == 1.0, row
    assert abs(row["kl/reference"]) < 1e-9, row
    assert row["sampler/logprob_gap"] < 1e-4, row
    assert result["ptx/loss"] > 0
    figures = evaluate(
        EvalConfig(
            device="cpu",
            model=cfg.out,
            baseline=begun,
            reward_model=judge_folder,
            prompts=cfg.prompts,
            text=cfg.text,
            rankings=str(files / "rankings.jsonl"),
            limit=4,
            max_new_tokens=6,
        )
    )
    assert {"reward", "kl", "text_loss", "pair_accuracy/"} <= {*figures, "pair_accuracy/"}, figures


def version() -> str:
    """Major and minor version of the installed transformers."""
    return ".".join(transformers.__version__.split(".")[:2])


def recorded() -> dict[str, dict[str, str]]:
    """{version of transformers: {family: verdict}}."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def table(record: dict[str, dict[str, str]]) -> str:
    """The page's table: a row for each family, a column for each recorded version."""
    versions = sorted(record, key=lambda v: [int(x) for x in v.split(".")])
    lines = ["| family | class | " + " | ".join(f"transformers {v}" for v in versions) + " |"]
    lines.append("|---|---|" + "---|" * len(versions))
    for name, family in FAMILIES.items():
        cells = (record[v][name].replace("|", "\\|") for v in versions)
        kind = family.config.removesuffix("Config")
        lines.append(f"| {family.title} | `{kind}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
