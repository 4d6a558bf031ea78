"""Hugging Face models on packed batches: policies, and reward and value models.

Shapes: N packed tokens, M rows (positions whose output is needed, M <= N), H hidden size, V vocabulary size,
B sequences.
"""

import functools
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fastrlhf.errors import UserError
from fastrlhf.integrations import attention
from fastrlhf.train import dropout
from fastrlhf.train.classifiers import language_model, sequence_classifier
from fastrlhf.train.heads import Head, Unembedding, unembedding
from fastrlhf.train.packing import PackedBatch
from fastrlhf.train.routers import router_loss
from fastrlhf.train.vocabulary import Vocabulary, end_tokens

# Attributes of a reward model's config.json.
REWARD_BIAS = "fastrlhf_reward_bias"
REWARD_STD = "fastrlhf_reward_std"

_MAX_LAYERS = 10_000


# One of them is in a folder that holds a tokenizer of transformers, in Rust or Python.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TOKENIZER_FILES += ("vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder.

    Raises:
        UserError: it cannot be loaded, or has no EOS token.
    """
    _require_folder(path)
    if not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"tokenizer of {path!r}: no {' or '.join(_TOKENIZER_FILES[:3])} there; save the model's tokenizer to the "
            "folder (tokenizer.save_pretrained)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a damaged file
        raise UserError(f"tokenizer of {path!r} cannot be loaded: {_reason(error)}") from error
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


class _Packed(nn.Module):
    """A transformer over packed batches: what policies and reward models share.

    Its arithmetic is the same for trained fp32 weights and for the frozen ones of `_load`: linear layers multiply in
    `dtype`, and the rest is fp32. The model's own dropout and other noise are off in both modes.
    """

    dtype: torch.dtype

    @property
    def transformer(self):
        """The Hugging Face model."""
        raise NotImplementedError

    @property
    def body(self):
        """The transformer below the head."""
        return decoder(self.transformer)

    @property
    def config(self):
        return self.transformer.config

    def train(self, mode: bool = True):
        super().train(mode)
        dropout.silence(self.transformer)
        return self

    def set_residual_dropout(self, probability: float) -> None:
        """Drop elements of the residual branches in training mode; see `dropout.add_residual_dropout`."""
        dropout.add_residual_dropout(self, self.body, probability)

    def autocast(self) -> torch.autocast:
        """The context of every forward of the body."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32)


class Policy(_Packed):
    """A causal LM over packed batches.

    Args:
        lm: a Hugging Face causal LM.
        backend: of the fused ops.
        dtype: of the products of linear layers and head: fp32, bf16 or fp16.
        vocabulary: the ids that have a token; the other rows of the head have probability 0. None: every row has one.
    """

    def __init__(
        self,
        lm,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.backend = backend
        self.dtype = dtype
        self.vocabulary = vocabulary
        self.router = router_loss(lm)
        self.train()

    @property
    def transformer(self):
        return self.lm

    @property
    def unembedding(self) -> Unembedding:
        """The head, with the S rows of `vocabulary` and its parameters in `dtype`.

        Raises:
            UserError: as `heads.unembedding`; or rows have no token and the model caps its logits.
        """
        found = unembedding(self.lm)
        if self.vocabulary is not None:
            if self.vocabulary.holes and found.softcap is not None:
                raise UserError(  # a bias of -inf would become -softcap
                    f"the tokenizer has no token for {len(self.vocabulary.holes)} ids between its tokens, which a "
                    "model with a soft-cap of its logits cannot leave out: expected a tokenizer without such gaps"
                )
            weight, bias = self.vocabulary.unembedding(found.weight, found.bias)
            found = replace(found, weight=weight, bias=bias)
        return found.to(self.dtype)

    def router_coefficient(self, setting: float | None) -> float:
        """The weight of the router loss: `setting`, or the config's for None; 0 for a model without that loss.

        Raises:
            UserError: a weight is given, and the model has no such loss.
        """
        if self.router is None:
            if setting:
                raise UserError(
                    f"router loss: expected a weight of 0 or null, {type(self.lm).__name__} has none; got {setting:g}"
                )
            return 0.0
        return self.router.coefficient if setting is None else setting

    def hidden(self, batch: PackedBatch, cache=None) -> torch.Tensor:
        """Last hidden states [N, H]; a sampler's key/value `cache` is filled on the way."""
        with self.autocast():
            return _packed_hidden(self.body, batch, cache)

    def forward(
        self, batch: PackedBatch, rows: torch.Tensor, head: Head, with_router_loss: bool = False
    ):
        """Return `head` of the hidden states at positions `rows` [M] (int64) of a packed batch.

        With `with_router_loss` the result is (head's result, load-balancing loss of the batch's N tokens).

        All uses of the weights go through this one method because DDP's and FSDP's hooks surround `forward`:
        FSDP gathers the unembedding before it and reshards it after it. FSDP also casts float tensors among the
        arguments to the compute dtype, so a head hides its own (advantages): it is no container and no dataclass.
        """
        options = {"output_router_logits": True} if with_router_loss else {}
        with self.autocast():
            outputs = _packed_outputs(self.body, batch, **options)
        hidden = outputs.last_hidden_state[0].index_select(0, rows)
        result = head(hidden.to(self.dtype), self.unembedding, self.backend)
        if with_router_loss:
            return result, self.router(outputs.router_logits)
        return result


class RewardModel(_Packed):
    """A transformer with one scalar output per position; also used as the value model.

        score = hidden @ weight.T + bias

    A reward is the score at the last token of a sequence; a value is the score at each position. `bias` makes the
    demonstrations score 0 on average. `bias` and `std`, the standard deviation of the scores on the training
    comparisons, are stored in config.json (`fastrlhf_reward_bias`, `fastrlhf_reward_std`).

    Args:
        model: a Hugging Face sequence classifier with a linear head `score` of width 1.
        dtype: of the products of linear layers; the head computes in fp32.

    Raises:
        UserError: the head is another one.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        super().__init__()
        _require_score_head(model)
        self.model = model
        self.dtype = dtype
        self.train()

    @property
    def transformer(self):
        return self.model

    @property
    def bias(self) -> float:
        return float(getattr(self.config, REWARD_BIAS, 0.0))

    @property
    def std(self) -> float:
        return float(getattr(self.config, REWARD_STD, 1.0))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply every score by `factor`."""
        for parameter in self.model.score.parameters():
            parameter.mul_(factor)
        setattr(self.config, REWARD_BIAS, self.bias * factor)

    def forward(self, batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        """Scores, fp32 [M], at positions `rows` [M] (int64)."""
        with self.autocast():
            hidden = _packed_hidden(self.body, batch)
        head = self.model.score
        # fp32 also under an autocast of the caller: a 16-bit product would round the scores.
        with torch.autocast(hidden.device.type, enabled=False):
            scores = hidden.index_select(0, rows).float() @ head.weight.float().t()
            if head.bias is not None:
                scores = scores + head.bias.float()
        return scores.squeeze(-1) + self.bias


def _require_score_head(model) -> None:
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise UserError(
            "a reward model needs a linear head `score` on each position's hidden state; "
            f"{type(model).__name__} has none"
        )
    if score.out_features != 1:
        raise UserError(f"reward head: expected width 1 (num_labels), got {score.out_features}")


def load_policy(
    path: str, runtime, *, trainable: bool, tokenizer=None, backend: str = "auto"
) -> Policy:
    """Load a causal LM with this package's attention.

    Trainable weights are fp32, and autocast computes in `runtime.compute_dtype`. Frozen weights have that dtype
    where autocast would round them to it, so both compute the same.

    Args:
        tokenizer: rows of the vocabulary without a token in it have probability 0, and its EOS is an end token. None:
            every row has a token.

    Raises:
        UserError: the folder is missing or damaged, holds another kind of model, or has fewer embedding rows than
            tokens; or the model fails the self-check.
    """
    config = _config(path, runtime.trust_remote_code)
    named = config.architectures or []
    if any("SequenceClassification" in name for name in named):
        raise UserError(
            f"{path!r} is a reward model ({named[0]}): expected a causal language model"
        )
    if named and _OTHER_HEADS.search(named[0]):
        raise UserError(f"{path!r} is a {named[0]}: expected a causal language model")
    lm = _load(language_model(config), path, runtime, trainable)
    unembedding(lm)  # a head that cannot be served is refused here
    policy = Policy(lm, backend, runtime.compute_dtype).train(trainable)
    # Before rows of the head are left out: the check compares with the model's own logits.
    runtime.check(policy, path)
    if tokenizer is not None:
        # Training teaches the tokenizer's EOS, so `generate` of the saved model must stop there too.
        ends = end_tokens(tokenizer, lm)
        lm.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        policy.vocabulary = check_vocabulary(tokenizer, lm, path)
        _ = policy.unembedding  # gaps in a vocabulary under a soft-cap are refused here
    return policy


def policy_from_config(
    config, runtime, backend: str = "auto", vocabulary: Vocabulary | None = None
) -> Policy:
    """A causal LM with fresh fp32 weights; `vocabulary` as in `Policy`."""
    lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME, dtype=torch.float32
    )
    lm.get_input_embeddings().padding_idx = None  # see _load
    policy = Policy(lm.to(runtime.device), backend, runtime.compute_dtype)
    runtime.check(policy, "the new model")
    policy.vocabulary = vocabulary
    return policy


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
    model = _load(sequence_classifier(config, path), path, runtime, trainable, num_labels=1)
    reward_model = RewardModel(model, runtime.compute_dtype)
    return runtime.check(reward_model.train(trainable), path)


def reward_model_from_policy(path: str, runtime, seed: int = 0) -> RewardModel:
    """A reward model on the transformer of the LM in `path`, with a fresh scalar head.

    The head is initialized from N(0, 1 / (H + 1)) (Stiennon et al. 2020).

    Raises:
        UserError: the folder is missing or damaged, or its architecture has no `score` head.
    """
    kind = sequence_classifier(_config(path, runtime.trust_remote_code), path)
    fresh = ("score.weight", "score.bias")
    reward_model = RewardModel(
        _load(kind, path, runtime, True, fresh, num_labels=1), runtime.compute_dtype
    )
    head = reward_model.model.score
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
    return runtime.check(reward_model.train(), path)


def context_length(config) -> int:
    """Longest sequence, in tokens, that the model supports beside others in a batch."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", 1 << 30)
    return int(min(longest, _batch_independent_length(config)))


def check_context(config, longest: int, model: str, what: str) -> None:
    """Raise UserError if `model`, named as in the command, cannot read the `longest` tokens that `what` reach."""
    context = context_length(config)
    if longest > context:
        raise UserError(f"{model}: its context holds {context} tokens, {what} reach {longest}")


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
    return _packed_outputs(body, batch, cache).last_hidden_state[0]


def _packed_outputs(body, batch: PackedBatch, cache=None, **options):
    total = batch.input_ids.shape[0]
    check_positions(body.config, batch.max_seqlen, total)
    row = attention.PackedRow(batch.cu_seqlens, batch.max_seqlen, total, cache)
    with attention.running(row):
        outputs = body(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            **options,
        )
    row.check(body)
    return outputs


# Heads of models that are no causal language models, by the names of their classes.
_OTHER_HEADS = re.compile(
    "(TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM|PreTraining|RewardModel)$"
)


def _require_folder(path: str) -> None:
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(
            f"model folder {path!r} holds an adapter (adapter_config.json), not a model: merge it into its base model "
            "(merge_and_unload) and give the folder of the result"
        )
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"model folder {path!r}: no config.json there; expected a folder written by save_pretrained (models are "
            "not downloaded)"
        )


def _config(path: str, trust_remote_code: bool):
    _require_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a damaged file
        raise UserError(f"config of {path!r} cannot be read: {_reason(error)}") from error
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"config of {path!r}: architectures: expected names, got {named!r}")
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MAX_LAYERS:  # transformers would build them for hours
        raise UserError(
            f"config of {path!r}: num_hidden_layers: expected at most {_MAX_LAYERS}, got {layers}"
        )
    return config


def _load(kind, path: str, runtime, trainable: bool, fresh: tuple[str, ...] = (), **options):
    # FSDP rounds all weights of a trained model to the compute dtype, so a frozen model has them in that dtype.
    compact = runtime.compute_dtype if runtime.fsdp and not trainable else torch.float32
    try:
        model, loaded = kind.from_pretrained(
            path,
            output_loading_info=True,
            dtype=compact,
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
        raise UserError(f"model of {path!r} cannot be loaded: {_reason(error)}") from error
    if fresh:
        _require_score_head(model)
    missing = sorted(set(loaded["missing_keys"]) - set(fresh))
    if missing:
        raise UserError(
            f"model of {path!r} lacks {len(missing)} of its tensors ({missing[0]}, ...), which would be random"
        )
    # torch drops the gradient of this row. Packed batches have no padding, and PAD may be EOS.
    model.get_input_embeddings().padding_idx = None
    if not trainable:
        model.requires_grad_(False)
        _round_linear_weights(model, runtime.compute_dtype)
    return model.to(runtime.device)


def _round_linear_weights(model, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in `dtype`, to which autocast would round them in every product.

    All else keeps fp32, because autocast computes with it in fp32: embeddings (and a head tied to one), norms, biases,
    routers, and the score head, which `RewardModel` multiplies in fp32.
    """
    kept = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if isinstance(score := getattr(model, "score", None), nn.Linear):
        kept.add(id(score.weight))
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in kept:
            module.weight.data = module.weight.data.to(dtype)


_REASON = 400  # characters of a message of transformers: some go on with advice on the Hub


def _reason(error: Exception) -> str:
    """What transformers says, in one line."""
    if "trust_remote_code" in str(error):
        return "its class is defined by code in the folder; give --trust_remote_code true if you trust that code"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON else f"{text[:_REASON]} ..."
