"""Hugging Face models on packed batches: policies, and reward and value models.

Shapes: N packed tokens, M rows (positions whose output is needed, M <= N), H hidden size, V vocabulary size,
B sequences.
"""

import functools
import inspect
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastrlhf.errors import UserError
from fastrlhf.integrations import attention
from fastrlhf.train.heads import Head, unembedding_parameters
from fastrlhf.train.packing import PackedBatch

# Attributes of a reward model's config.json.
REWARD_BIAS = "fastrlhf_reward_bias"
REWARD_STD = "fastrlhf_reward_std"


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder.

    Raises:
        UserError: it cannot be loaded, has no EOS token, or uses its EOS token as PAD.
    """
    _require_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a damaged file
        raise UserError(f"tokenizer of {path!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path!r} has no EOS token; generation could never stop")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer of {path!r}: PAD and EOS are the same token ({tokenizer.eos_token!r}, id "
            f"{tokenizer.eos_token_id}), so the model would never learn to stop; give PAD its own token"
        )
    return tokenizer


def check_vocabulary(tokenizer, model, path: str) -> None:
    """Raise UserError unless every token id has an embedding row."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{path!r}: the tokenizer has {len(tokenizer)} tokens, "
            f"the model has {rows} embedding rows; they must match"
        )


def check_same_vocabulary(first, second, what: str) -> None:
    """Raise UserError unless two tokenizers map every token to the same id, as models that share ids require."""
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            f"{what}: the vocabularies differ ({len(first)} and {len(second)} tokens); train both from one tokenizer"
        )


class Policy(nn.Module):
    """A causal LM over packed batches.

    Args:
        lm: a Hugging Face causal LM.
        backend: of the fused ops.
    """

    def __init__(self, lm, backend: str = "auto"):
        super().__init__()
        self.lm = lm
        self.backend = backend

    @property
    def config(self):
        return self.lm.config

    def hidden(self, batch: PackedBatch, cache=None) -> torch.Tensor:
        """Last hidden states [N, H]; a sampler's key/value `cache` is filled on the way."""
        return _packed_hidden(self.lm.base_model, batch, cache)

    def forward(self, batch: PackedBatch, rows: torch.Tensor, head: Head):
        """Return `head` of the hidden states at positions `rows` [M] (int64) of a packed batch.

        All uses of the weights go through this one method because DDP's and FSDP's hooks surround `forward`:
        FSDP gathers the unembedding before it and reshards it after it. The head's tensors (targets, advantages)
        are attributes of the head because FSDP casts float tensors among the arguments to the compute dtype.
        """
        hidden = self.hidden(batch).index_select(0, rows)
        weight, bias = unembedding_parameters(self.lm)
        if weight.dtype != hidden.dtype:  # under autocast: 16-bit hidden states, fp32 weights
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return head(hidden, weight, bias=bias, softcap=softcap, backend=self.backend)


class RewardModel(nn.Module):
    """A transformer with one scalar output per position; also used as the value model.

        score = hidden @ weight.T + bias

    A reward is the score at the last token of a sequence; a value is the score at each position. `bias` makes the
    demonstrations score 0 on average. `bias` and `std`, the standard deviation of the scores on the training
    comparisons, are stored in config.json (`fastrlhf_reward_bias`, `fastrlhf_reward_std`).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    @property
    def config(self):
        return self.model.config

    @property
    def bias(self) -> float:
        return float(getattr(self.config, REWARD_BIAS, 0.0))

    @property
    def std(self) -> float:
        return float(getattr(self.config, REWARD_STD, 1.0))

    def forward(self, batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        """Scores, fp32 [M], at positions `rows` [M] (int64)."""
        hidden = _packed_hidden(self.model.base_model, batch).index_select(0, rows)
        weight = self.model.score.weight.to(hidden.dtype)
        return (hidden @ weight.t()).squeeze(-1).float() + self.bias


def load_policy(path: str, runtime, *, trainable: bool, backend: str = "auto") -> Policy:
    """Load a causal LM with the attention kernel of this device.

    Trainable weights are fp32, and autocast computes in `runtime.compute_dtype`; frozen weights have that dtype.

    Raises:
        UserError: the folder is missing or damaged, or holds a reward model.
    """
    named = _config(path, runtime.trust_remote_code).architectures or []
    if any("SequenceClassification" in name for name in named):
        raise UserError(
            f"{path!r} is a reward model ({named[0]}): expected a causal language model"
        )
    return Policy(_load(AutoModelForCausalLM, path, runtime, trainable), backend)


def policy_from_config(config, runtime, backend: str = "auto") -> Policy:
    """A causal LM with fresh fp32 weights."""
    choice = attention.plan(runtime.device, runtime.compute_dtype)
    lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=choice.implementation, dtype=torch.float32
    )
    return Policy(lm.to(runtime.device), backend)


def load_reward_model(path: str, runtime, *, trainable: bool) -> RewardModel:
    """Load a reward model, or the start of a value model; dtypes as in `load_policy`.

    Raises:
        UserError: the folder is missing or damaged, its head is not one scalar, or its bias or std is no number.
    """
    config = _config(path, runtime.trust_remote_code)
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(
            f"{path!r} is not a reward model: its config names {config.architectures}, no scalar head"
        )
    if config.num_labels != 1:
        raise UserError(
            f"reward head of {path!r}: expected width 1 (num_labels), got {config.num_labels}"
        )
    for name, positive in ((REWARD_BIAS, False), (REWARD_STD, True)):
        value = getattr(config, name, 1.0)
        if (
            not isinstance(value, int | float)
            or not math.isfinite(value)
            or (positive and value <= 0)
        ):
            raise UserError(
                f"{name} in the config of {path!r}: expected a {'positive ' * positive}number, got {value!r}"
            )
    model = _load(AutoModelForSequenceClassification, path, runtime, trainable, num_labels=1)
    return RewardModel(model)


def reward_model_from_policy(path: str, runtime, seed: int = 0) -> RewardModel:
    """A reward model on the transformer of the LM in `path`, with a fresh scalar head.

    The head is initialized from N(0, 1 / (H + 1)) (Stiennon et al. 2020).

    Raises:
        UserError: the folder is missing or damaged, or its architecture has no `score` head.
    """
    head = ("score.weight",)
    model = _load(AutoModelForSequenceClassification, path, runtime, True, head, num_labels=1)
    if not hasattr(model, "score"):
        raise UserError(
            f"{path!r}: {type(model).__name__} has no `score` head that a reward can be read from"
        )
    weight = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5
    with torch.no_grad():
        weight.copy_(fresh)
    return RewardModel(model)


def context_length(config) -> int:
    """Longest sequence, in tokens, that the model supports."""
    return int(getattr(config, "max_position_embeddings", 1 << 30))


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout in a model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability


@functools.cache
def _cache_name(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def cache_arguments(body: nn.Module, cache) -> dict:
    """Keyword arguments that pass `cache` to a transformers model. From 5.24 on the argument is named `cache`."""
    if cache is None:
        return {"use_cache": False}
    return {_cache_name(type(body)): cache, "use_cache": True}


def _packed_hidden(body, batch: PackedBatch, cache=None) -> torch.Tensor:
    # `fastrlhf.integrations.attention` reads the `_q` names and `layout`; transformers' flash-attention also reads
    # the `_k` names.
    return body(
        input_ids=batch.input_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        **cache_arguments(body, cache),
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        layout=attention.padded_layout(
            batch.cu_seqlens, batch.max_seqlen, batch.input_ids.shape[0]
        ),
    ).last_hidden_state[0]


def _require_folder(path: str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"model folder {path!r}: no config.json there; expected a folder written by save_pretrained"
        )


def _config(path: str, trust_remote_code: bool):
    _require_folder(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a damaged file
        raise UserError(f"config of {path!r} cannot be read: {_first_line(error)}") from error


def _load(auto, path: str, runtime, trainable: bool, fresh: tuple[str, ...] = (), **options):
    _require_folder(path)
    choice = attention.plan(runtime.device, runtime.compute_dtype)
    try:
        model, loaded = auto.from_pretrained(
            path,
            output_loading_info=True,
            dtype=torch.float32 if trainable else runtime.compute_dtype,
            attn_implementation=choice.implementation,
            trust_remote_code=runtime.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except Exception as error:  # safetensors and transformers raise many types for a damaged file
        raise UserError(f"model of {path!r} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(set(loaded["missing_keys"]) - set(fresh))
    if missing:
        raise UserError(
            f"model of {path!r} lacks {len(missing)} of its tensors ({missing[0]}, ...), which would be random"
        )
    model.to(runtime.device)
    return model.train() if trainable else model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
