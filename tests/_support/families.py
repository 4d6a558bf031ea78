"""Tiny models of many architectures: two layers, or one of each kind, hidden size 32, windows of 8 tokens."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 64
WINDOW = 8

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EIGHT = {"head_dim": 8}
_WINDOW = {"sliding_window": WINDOW}
_SOME = {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}  # Qwen: layer 1 only
_BOTH = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {  # keys of width 16, values of width 12
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

# model_type -> changes of _SIZES
SERVED = {
    "llama": {},
    "qwen2": _SOME,
    "qwen3": {**_EIGHT, **_SOME},
    "gemma": _EIGHT,
    "gemma2": {
        **_EIGHT,
        **_WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_EIGHT, **_BOTH},
    "mistral": {**_EIGHT, **_WINDOW},
    "ministral3": {
        **_EIGHT,
        "rope_parameters": {  # queries are scaled by position from 16 on
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "phi3": _WINDOW,
    "olmo2": {},
    "olmo3": _BOTH,
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": {},
    "gpt_neox": {},
    "granite": {},
    "cohere": {},
    "cohere2": {**_EIGHT, **_BOTH},
    "gpt_oss": {**_EIGHT, **_BOTH, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_LATENT,
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "mixtral": {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SOME, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EIGHT, **_SOME, **_EXPERTS, "num_experts": 4},
    "llama4_text": {
        **_EIGHT,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 32,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "stablelm": {},
    "glm4_moe": {
        **_EIGHT,
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {
        **_EIGHT,
        **_WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        **_EIGHT,
        **_BOTH,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
}
# model_type -> (changes, part of the message)
REFUSED = {
    "bloom": ({}, "takes no position_ids"),
    "mpt": ({}, "takes no position_ids"),
    "bart": ({"decoder_layers": 2, "d_model": 32, "decoder_ffn_dim": 32}, "takes no position_ids"),
    "xglm": ({"d_model": 32, "attention_heads": 4, "ffn_dim": 32}, "reads .size of its attention"),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "n_groups": 1}, "takes no position_ids"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers use transformers'"),
    "qwen3_5_text": ({**_EIGHT, **_LINEAR}, "1 of its 2 layers use transformers' attention"),
    "qwen3_next": (
        {
            **_EIGHT,
            **_LINEAR,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
        },
        "1 of its 2 layers use transformers' attention",
    ),
    "falcon_h1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
        | {"mamba_d_state": 8, "mamba_chunk_size": 8},
        "convolutions over tokens",
    ),
}

# Classes that choose among attention classes of their own, and cannot be built with another implementation.
CLOSED = {"falcon": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]}}


def config(name: str, **changes):
    """The config of a family."""
    own = REFUSED[name][0] if name in REFUSED else {**SERVED, **CLOSED}[name]
    return AutoConfig.for_model(name, **{**_SIZES, **own, **changes})


def model(name: str, implementation: str, **changes):
    """A causal LM with fp32 weights that depend on the family alone, and no parameter at its initial constant."""
    lm = AutoModelForCausalLM.from_config(
        config(name, **changes), attn_implementation=implementation, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.05
            start = 1.0 if parameter.dim() == 1 and parameter.abs().sum() > 0 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(start + scale * noise)
    return lm.eval()
