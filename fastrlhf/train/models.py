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
from fastrlhf.train.vocabulary import Vocabulary, end_tokens

# Attributes of a reward model's config.json.
REWARD_BIAS = "fastrlhf_reward_bias"
REWARD_STD = "fastrlhf_reward_std"

_MAX_LAYERS = 10_000


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder.

    Raises:
        UserError: it cannot be loaded, or has no EOS token.
    """
    _require_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a damaged file
        raise UserError(f"tokenizer of {path!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path!r} has no EOS token; generation could never stop")
    return tokenizer


def check_vocabulary(tokenizer, model, path: str) -> Vocabulary:
    """The tokenizer's ids; raise UserError unless each has an embedding row."""
    vocabulary = Vocabulary.of(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary.size > rows:
        raise UserError(
            f"{path!r}: the tokenizer has {vocabulary.size} tokens, "
            f"the model has {rows} embedding rows; they must match"
        )
    if vocabulary.holes and getattr(
        model.config.get_text_config(), "final_logit_softcapping", None
    ):
        raise UserError(
            f"{path!r}: the tokenizer skips {len(vocabulary.holes)} ids (first {vocabulary.holes[0]}) and the model "
            "soft-caps its logits; expected a token for each id"
        )
    return vocabulary


def check_same_vocabulary(first, second, what: str) -> None:
    """Raise UserError unless two tokenizers map every token to the same id, as models that share ids require.

    A PAD that only one of them has makes no difference (see `with_pad`).
    """
    pads = {(t.pad_token, t.pad_token_id) for t in (first, second)}
    if (first.get_vocab().items() ^ second.get_vocab().items()) - pads:
        raise UserError(
            f"{what}: the vocabularies differ ({len(first)} and {len(second)} tokens); train both from one tokenizer"
        )


class Policy(nn.Module):
    """A causal LM over packed batches.

    Args:
        lm: a Hugging Face causal LM.
        backend: of the fused ops.
        vocabulary: the ids that have a token; the other rows of the head have probability 0. None: every row has one.
    """

    def __init__(self, lm, backend: str = "auto", vocabulary: Vocabulary | None = None):
        super().__init__()
        self.lm = lm
        self.backend = backend
        self.vocabulary = vocabulary

    @property
    def config(self):
        return self.lm.config

    @property
    def unembedding(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head (weight [S, H], bias [S] or None), with the S rows of `vocabulary`."""
        weight, bias = unembedding_parameters(self.lm)
        if self.vocabulary is None:
            return weight, bias
        return self.vocabulary.unembedding(weight, bias)

    def hidden(self, batch: PackedBatch, cache=None) -> torch.Tensor:
        """Last hidden states [N, H]; a sampler's `cache` is filled with keys and values on the way."""
        return _packed_hidden(decoder(self.lm), batch, cache)

    def forward(self, batch: PackedBatch, rows: torch.Tensor, head: Head):
        """Return `head` of the hidden states at positions `rows` [M] (int64) of a packed batch.

        All uses of the weights go through this one method because DDP's and FSDP's hooks surround `forward`:
        FSDP gathers the unembedding before it and reshards it after it. The head's tensors (targets, advantages)
        are attributes of the head because FSDP casts float tensors among the arguments to the compute dtype.
        """
        hidden = self.hidden(batch).index_select(0, rows)
        weight, bias = self.unembedding
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
        hidden = _packed_hidden(decoder(self.model), batch).index_select(0, rows)
        weight = self.model.score.weight.to(hidden.dtype)
        return (hidden @ weight.t()).squeeze(-1).float() + self.bias


def load_policy(
    path: str, runtime, *, trainable: bool, tokenizer=None, backend: str = "auto"
) -> Policy:
    """Load a causal LM with this package's attention.

    Trainable weights are fp32, and autocast computes in `runtime.compute_dtype`; frozen weights have that dtype.

    Args:
        tokenizer: rows of the vocabulary without a token in it have probability 0, and its EOS is an end token. None:
            every row has a token.

    Raises:
        UserError: the folder is missing or damaged, holds a reward model, or has fewer embedding rows than tokens.
    """
    named = _config(path, runtime.trust_remote_code).architectures or []
    if any("SequenceClassification" in name for name in named):
        raise UserError(
            f"{path!r} is a reward model ({named[0]}): expected a causal language model"
        )
    lm = _load(AutoModelForCausalLM, path, runtime, trainable)
    if tokenizer is None:
        return Policy(lm, backend)
    # Training teaches the tokenizer's EOS, so `generate` of the saved model must stop there too.
    ends = end_tokens(tokenizer, lm)
    lm.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    return Policy(lm, backend, check_vocabulary(tokenizer, lm, path))


def policy_from_config(
    config, runtime, backend: str = "auto", vocabulary: Vocabulary | None = None
) -> Policy:
    """A causal LM with fresh fp32 weights; `vocabulary` as in `Policy`."""
    lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME, dtype=torch.float32
    )
    lm.get_input_embeddings().padding_idx = None  # see _load
    return Policy(lm.to(runtime.device), backend, vocabulary)


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
    """Longest sequence, in tokens, that the model supports beside others in a batch."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", 1 << 30)
    return int(min(longest, _batch_independent_length(config)))


def _batch_independent_length(config) -> int:
    # Beyond it, the longest sequence of a batch changes the angles by which RoPE rotates all of them.
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limit = 1 << 30
    for found in (rope, *rope.values()):  # one dict, or one for each kind of layer
        kind = found.get("rope_type") if isinstance(found, dict) else None
        if kind == "longrope":
            limit = min(limit, found["original_max_position_embeddings"])
        elif kind == "dynamic":
            limit = min(limit, config.max_position_embeddings)
    return limit


def check_positions(config, longest: int, row: int) -> None:
    """Raise UserError where transformers computes a token from more than its sequence and its position in it.

    Args:
        config: of the model.
        longest: longest sequence.
        row: tokens of the packed row; the longest sequence while decoding.
    """
    limit = _batch_independent_length(config)
    if longest > limit:
        raise UserError(
            f"a sequence of {longest} tokens: expected at most {limit}, because beyond that the model's RoPE (longrope "
            "or dynamic) rotates all sequences of a batch by other angles"
        )
    text = config.get_text_config()
    if getattr(text, "attn_temperature_tuning", False) and row >= text.floor_scale:
        raise UserError(
            f"a packed row of {row} tokens: expected fewer than {text.floor_scale}, because from there on "
            "transformers scales the queries by the position in the row instead of that in the sequence"
        )


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout in a model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability


def decoder(model) -> nn.Module:
    """The transformer of a model with a head.

    Raises:
        UserError: the model names none, or it takes no positions, as a packed batch requires.
    """
    found = [x for x in (model.base_model, getattr(model, "model", model)) if x is not model]
    if not found:
        raise UserError(f"{type(model).__name__} has no transformer apart from its head")
    if "position_ids" not in _parameters(type(found[0])):
        raise UserError(
            f"{type(found[0]).__name__} is not supported: its forward takes no position_ids, "
            "which packed sequences need"
        )
    return found[0]


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _packed_hidden(body, batch: PackedBatch, cache=None) -> torch.Tensor:
    total = batch.input_ids.shape[0]
    check_positions(body.config, batch.max_seqlen, total)
    row = attention.PackedRow(batch.cu_seqlens, batch.max_seqlen, total, cache)
    with attention.running(row):
        hidden = body(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
        ).last_hidden_state[0]
    row.check(body)
    return hidden


def _require_folder(path: str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"model folder {path!r}: no config.json there; expected a folder written by save_pretrained"
        )


def _config(path: str, trust_remote_code: bool):
    _require_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a damaged file
        raise UserError(f"config of {path!r} cannot be read: {_first_line(error)}") from error
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"config of {path!r}: architectures: expected names, got {named!r}")
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MAX_LAYERS:  # transformers would build them for hours
        raise UserError(
            f"config of {path!r}: num_hidden_layers: expected at most {_MAX_LAYERS}, got {layers}"
        )
    return config


def _load(auto, path: str, runtime, trainable: bool, fresh: tuple[str, ...] = (), **options):
    _config(path, runtime.trust_remote_code)
    try:
        model, loaded = auto.from_pretrained(
            path,
            output_loading_info=True,
            dtype=torch.float32 if trainable else runtime.compute_dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=runtime.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except Exception as error:  # safetensors and transformers raise many types for a damaged file
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            raise UserError(
                f"model of {path!r} is not supported: its class does not use transformers' attention functions"
            ) from error
        raise UserError(f"model of {path!r} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(set(loaded["missing_keys"]) - set(fresh))
    if missing:
        raise UserError(
            f"model of {path!r} lacks {len(missing)} of its tensors ({missing[0]}, ...), which would be random"
        )
    # torch drops the gradient of this row. Packed batches have no padding, and PAD may be EOS.
    model.get_input_embeddings().padding_idx = None
    model.to(runtime.device)
    return model.train() if trainable else model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
