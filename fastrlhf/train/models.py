"""Hugging Face models as the trainer uses them: packed batches in, per-token numbers out, no [N, V] logits.

Shapes: N packed tokens, M rows asked for (M <= N), H hidden, V vocabulary, B sequences.
"""

import functools
import inspect
import math
from collections.abc import Callable
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
from fastrlhf.ops.linear_cross_entropy import linear_cross_entropy
from fastrlhf.ops.linear_logprob import linear_logprob
from fastrlhf.train.packing import PackedBatch

REWARD_BIAS = "fastrlhf_reward_bias"
REWARD_STD = "fastrlhf_reward_std"


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """The folder's tokenizer; an EOS is required and PAD, where there is one, must differ from it."""
    _require_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the model, and this reads config.json too
        raise UserError(f"tokenizer of {path!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path!r} has no EOS token; generation could never stop")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer of {path!r}: PAD and EOS are the same token ({tokenizer.eos_token!r}, id "
            f"{tokenizer.eos_token_id}), so the model would never learn to stop; give PAD a token of its own"
        )
    return tokenizer


def check_vocabulary(tokenizer, model, path: str) -> None:
    """Every id the tokenizer can produce must have an embedding row."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{path!r}: the tokenizer knows {len(tokenizer)} tokens, "
            f"the model has {rows} embedding rows; they must match"
        )


def same_vocabulary(first, second, what: str) -> None:
    """Two tokenizers must map every token to the same id: log-probs and rewards of one are fed to the other."""
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            f"{what}: the vocabularies differ ({len(first)} and {len(second)} tokens); train both from one tokenizer"
        )


class Policy(nn.Module):
    """A causal LM over packed batches. The head is applied chunk by chunk, only to the rows asked for."""

    def __init__(self, lm, backend: str = "auto"):
        super().__init__()
        self.lm = lm
        self.backend = backend

    @property
    def config(self):
        return self.lm.config

    def hidden(self, batch: PackedBatch, cache=None) -> torch.Tensor:
        """Last hidden states [N, H] of a packed batch; a sampler's cache is filled on the way."""
        return _packed_hidden(self.lm.base_model, batch, cache)

    def forward(
        self,
        batch: PackedBatch,
        rows,
        targets,
        *,
        mode: str,
        temperature: float = 1.0,
        loss: Callable | None = None,
    ):
        """Per-row numbers of a packed batch; `rows` [M] int64 picks the positions that predict `targets` [M].

        mode "logprob": log-prob [M]; "entropy": (log-prob [M], entropy [M]); "nll": the sum of the NLL, 0-d;
        "loss": what `loss`, a linear op with its rows bound to it, makes of (hidden, weight, targets). (Bound,
        and not passed: FSDP would cast tensors that it sees to the compute dtype.)
        """
        hidden = self.hidden(batch).index_select(0, rows)
        weight, bias = head_parameters(self.lm)
        if (
            weight.dtype != hidden.dtype
        ):  # autocast hands back 16-bit hidden states of an fp32 model
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        options = {
            "bias": bias,
            "softcap": getattr(self.config, "final_logit_softcapping", None),
            "backend": self.backend,
        }
        if mode == "nll":
            every = targets.numel()  # nothing to wait for on a GPU
            return linear_cross_entropy(
                hidden, weight, targets, reduction="sum", num_rows=every, **options
            )
        if mode == "loss":
            return loss(hidden, weight, targets, temperature=temperature, **options)
        return linear_logprob(
            hidden,
            weight,
            targets,
            temperature=temperature,
            return_entropy=mode == "entropy",
            **options,
        )


# What models multiply or divide their logits by: Cohere; Granite, HyperCLOVA X, MiniCPM3; Falcon-H1.
_LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def head_parameters(lm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [V, H], bias [V] or None) of the unembedding, where they are all that it computes.

    An adapter around the head (LoRA) would be dropped without a word by whoever multiplies with the weight.
    """
    head = lm.get_output_embeddings()
    adapters = [
        n for n in ("base_layer", "lora_A", "lora_B", "modules_to_save") if hasattr(head, n)
    ]
    inside = [name for name, _ in head.named_children()]
    if adapters or inside or not isinstance(getattr(head, "weight", None), torch.Tensor):
        what = ", ".join(adapters or inside) or "no weight"
        raise UserError(
            f"the output head {type(head).__name__} must be a plain linear layer; it has {what}, which the "
            "fused head would leave out: merge the adapter (merge_and_unload), or leave lm_head out of its targets"
        )
    for name in _LOGIT_FACTORS:
        factor = getattr(getattr(lm, "config", None), name, None)
        if factor is not None and factor != 1:
            raise UserError(
                f"{type(lm).__name__} scales its logits ({name} = {factor:g} in config.json), which the fused "
                "head would leave out: expected a model without such a factor"
            )
    return head.weight, getattr(head, "bias", None)


class Scorer(nn.Module):
    """A model with one scalar output per position: reward model (read at the last token) and value model (every row).

    `bias` is added to every score, so that demonstrations score 0 on average; it lives in the model's config.json
    (`fastrlhf_reward_bias`), next to the spread of the scores on the training comparisons (`fastrlhf_reward_std`).
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
    def spread(self) -> float:
        return float(getattr(self.config, REWARD_STD, 1.0))

    def forward(self, batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        """Scores fp32 [M] of the rows asked for; only those rows enter the head."""
        hidden = _packed_hidden(self.model.base_model, batch).index_select(0, rows)
        weight = self.model.score.weight.to(hidden.dtype)
        return (hidden @ weight.t()).squeeze(-1).float() + self.bias


def load_policy(path: str, runtime, *, trainable: bool, backend: str = "auto") -> Policy:
    """A causal LM from a folder, with the attention path of this device.

    Trainable weights are fp32 (autocast computes in `runtime.compute_dtype`); frozen ones are held in that dtype.
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


def load_scorer(path: str, runtime, *, trainable: bool) -> Scorer:
    """A reward or value model from a folder; its head must have exactly one output."""
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
    return Scorer(_load(AutoModelForSequenceClassification, path, runtime, trainable, num_labels=1))


def scorer_from_policy(path: str, runtime, seed: int = 0) -> Scorer:
    """A reward model on the body of the LM in `path`: unembedding replaced by one projection, N(0, 1/(H+1))."""
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
    return Scorer(model)


def context_length(config) -> int:
    """The longest sequence the model was made for."""
    return int(getattr(config, "max_position_embeddings", 1 << 30))


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model; RM and PPO run with 0, so that the ratio is 1 at the first step."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability


@functools.cache
def _cache_name(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def cached(body: nn.Module, cache) -> dict:
    """The arguments that hand `cache` to a transformers model: from 5.24 on it is called `cache`."""
    if cache is None:
        return {"use_cache": False}
    return {_cache_name(type(body)): cache, "use_cache": True}


def _packed_hidden(body, batch: PackedBatch, cache=None) -> torch.Tensor:
    # transformers' own flash paths read the `_k` names too.
    return body(
        input_ids=batch.input_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        **cached(body, cache),
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
            f"model of {path!r} lacks {len(missing)} of its tensors ({missing[0]}, ...): they would be random"
        )
    model.to(runtime.device)
    return model.train() if trainable else model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
