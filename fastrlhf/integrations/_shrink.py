"""Small copies of a transformers model: the same class and the same kinds of layer, a few thousand weights.

`shrunken(model)` makes the config small and builds the class from it. Widths become 16 per attention head and 4 heads,
windows 16 tokens, vocabularies 128 tokens; ratios between widths are kept, because most models require some of them.
The copy keeps one layer of each kind that the model has, and at least two layers.

A kind of layer is read from the modules, not from the config: models describe their patterns in many ways
(`layer_types`, `first_k_dense_replace`, `attn_layer_period`, ...), but a layer that differs has other modules or other
flags. The copy counts only if its layers are of the model's kinds.
"""

import copy
import dataclasses
import math
import re

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WINDOW = 16  # tokens: of every attention window, chunk and top-k of the copy
VOCABULARY = 128
CONTEXT = 64  # tokens that the copy's context holds at least
HEADS = 4
HEAD_WIDTH = 16
MAX_LAYERS = 16
MAX_PARAMETERS = 20_000_000  # a copy above this has a width that the rules below do not know

# Fields that count the first or the last layers of a kind.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")

# Names of config fields, by what they count. The first rule that matches a name decides.
_RULES = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"(pattern|interval|period|offset|layers|_step|multiple_of|_ids|_idxs)$", "keep"),
        (r"multiple_size$|_kernel|conv_dim$|^max_", "keep"),
        (r"vocab", "vocabulary"),
        (r"(token_id|_index)$", "token"),
        (r"^(index_topk|keep_window_size|local_attention)$|attention_chunk_size$", "window"),
        (r"^index_topk_blocks$", "chosen"),
        (r"^index_block_size$|^block_multiple_of$", "block"),
        (r"(^|_)window(_size|_len)?$|^sliding_window", "window"),
        (r"^(n_group|num_expert_group)$", "groups"),
        (r"^topk_group$", "group"),
        (r"(experts_per_tok(en)?|^moe_topk|^moe_k|^top_k_experts|^moe_top_k)$", "chosen"),
        (r"^(n_routed_experts|(moe_)?num_(local_)?experts|zero_expert_num)$", "experts"),
        (r"(lora_rank|_rank)$", "rank"),
        (
            r"head_?dim$|head_size$|d_head$|dim_head$|^d_kv$|^kv_channels$|^rotary_dim$",
            "head width",
        ),
        (r"heads$|heads_per_layer$|n_head(_kv)?$|query_groups$", "heads"),
        (r"(intermediate|ffn|feed_forward)|^d(im)?_?ff$|^d_inner$", "width"),
        (r"^(n_embd|d_model|dim_model.*|lru_width|d_ssm|mamba_d_ssm)$", "width"),
        (r"(hidden_size|embed(ding)?_(dim|size)|emb_dim|proj_dim)", "width"),
        (r"^(mamba_)?(n_?groups)$", "few"),
        (r"state_size$|d_state$", "rank"),
    )
)


class CannotShrink(Exception):
    """No small copy of the class could be built; the message says why."""


def shrunken(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """A small fp32 copy of the model's class on the CPU, in evaluation mode, with random weights.

    The weights are larger than those of a fresh model, so that every part of it moves the output; biases and
    attention sinks are not zero. They are the same in every process. The random state is unchanged.

    Raises:
        CannotShrink: the class does not accept a small config, or the copy lacks a kind of layer.
    """
    wanted = [_kind(layer) for layer in decoder_layers(model)]
    reason = "it has no list of layers"
    for chosen in _choices(wanted):
        try:
            small = _build(type(model), _small_config(model.config, chosen), implementation)
        except Exception as error:  # a class may fail in any way at sizes that it was not made for
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            continue
        missing = set(wanted) - {_kind(layer) for layer in decoder_layers(small)}
        if not missing:
            return small
        reason = f"the copy lacks {len(missing)} of {len(set(wanted))} kinds of layer"
    raise CannotShrink(reason)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the longest list of modules that is not inside another."""
    body = getattr(model, "base_model", model)
    lists = {n: m for n, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists if o != n)]
    names = _layer_names(model)
    # A multimodal model has an encoder too: its decoder is the list whose modules are the language model's.
    return list(max(outer, key=lambda m: (type(m[0]).__name__ in names, len(m)), default=[]))


def _layer_names(model) -> set[str]:
    return {n for n in model._no_split_modules or () if "Vision" not in n and "Audio" not in n}


def _kind(layer: nn.Module) -> frozenset:
    """What distinguishes a layer from others: its modules, their flags, and whether they have a window."""
    found = set()
    for name, module in layer.named_modules():
        place = re.sub(r"\d+", "#", name)
        found.add((place, type(module).__name__))
        for key, value in vars(module).items():
            if key == "training" or key.startswith("_"):
                continue
            if isinstance(value, bool | str):
                found.add((place, key, value))
            elif "window" in key or "chunk" in key:
                found.add((place, key, value is None))
    return frozenset(found)


def _choices(kinds: list[frozenset]):
    """Layers to keep: the first of each kind, then the shortest start of the model that has every kind."""
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    if not first:
        return
    if len(first) < 2:
        first = [0, 1]
    prefix = list(range(max(2, max(first) + 1)))
    for chosen in (first, prefix):
        if len(chosen) <= MAX_LAYERS:
            yield chosen


def _build(kind: type, config, implementation: str) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in kind._from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"a copy would have {size} parameters")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small = kind._from_config(
            config, attn_implementation=implementation, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            for parameter in small.parameters():
                if parameter.is_floating_point():
                    std = 0.15 if parameter.dim() > 1 else 0.1
                    parameter.add_(torch.randn(parameter.shape, dtype=torch.float32) * std)
    return small.requires_grad_(False)


# ---- the config ----


def _small_config(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    _shrink_fields(text, layers)
    if getattr(text, "pad_token_id", None) is None:  # a sequence classifier needs it for two rows
        text.pad_token_id = text.vocab_size - 1
    for value in vars(small).values():
        if isinstance(value, PretrainedConfig) and value is not text:
            _shrink_fields(value, [0, 1])
    if text is not small:
        for key, value in list(vars(small).items()):
            if key.endswith(("token_id", "token_index")):
                setattr(small, key, _token(value))
    return small


def _shrink_fields(config: PretrainedConfig, layers: list[int]) -> None:
    depth = _field(config, "num_hidden_layers") or _field(config, "num_layers")
    sizes = _Sizes(config)
    for key, value in list(vars(config).items()):
        if key.startswith("_") and key != "_sliding_window_pattern":
            continue
        if isinstance(value, PretrainedConfig):
            continue
        if isinstance(value, list | tuple) and len(value) == depth:
            value = type(value)(value[i % depth] for i in layers)
        if key in _CONTEXTS and type(value) is int:
            value = max(value, CONTEXT)
        elif key in _FIRST and type(value) is int:
            value = sum(i < value for i in layers)
        elif key in _LAST and type(value) is int and depth:
            value = sum(i >= depth - value for i in layers)
        setattr(config, key, sizes.value(key, value))
    overrides = vars(config).get(
        "_heterogeneity_spec"
    )  # transformers 5.24: fields of single layers
    if overrides is not None:
        fields = overrides.per_layer_overrides
        kept = {
            new: {key: sizes.value(key, value) for key, value in fields[old].items()}
            for new, old in enumerate(layers)
            if old in fields
        }
        config._heterogeneity_spec = dataclasses.replace(overrides, per_layer_overrides=kept)
    for name in ("num_hidden_layers", "num_layers"):
        if _field(config, name) is not None:
            setattr(config, name, len(layers))
    sizes.reconcile(config)


class _Sizes:
    """The factors by which widths, heads and head widths of one config shrink."""

    def __init__(self, config):
        hidden = _field(config, "hidden_size") or HEADS * HEAD_WIDTH
        self.heads_before = _field(config, "num_attention_heads") or HEADS
        width = _field(config, "qk_nope_head_dim") or _field(config, "head_dim")
        width = width or max(1, hidden // self.heads_before)
        self.head_factor = min(1.0, HEAD_WIDTH / width)
        self.heads = min(HEADS, self.heads_before)
        small = self.heads * width * self.head_factor
        fits = hidden == self.heads_before * width
        self.width_factor = min(1.0, (small if fits else HEADS * HEAD_WIDTH) / hidden)
        self.grouped = (_field(config, "n_group") or 1) > 1

    def value(self, key: str, value):
        if isinstance(value, dict):
            return {k: self._in_dict(k, v) for k, v in value.items()}
        if isinstance(value, list | tuple) and all(type(x) is int for x in value):
            return type(value)(self.value(key, x) for x in value)
        if type(value) is not int or value < 1:
            return value
        rule = next((rule for pattern, rule in _RULES if pattern.search(key)), "keep")
        if rule == "token":
            return _token(value)
        if rule in ("width", "head width"):
            # Grouped matrix products need widths that are multiples of 4, rotary embeddings even ones.
            factor, unit = (self.width_factor, 8) if rule == "width" else (self.head_factor, 2)
            return min(value, max(unit, unit * round(value * factor / unit)))
        if rule == "heads":
            return self._head_count(value)
        limits = {
            "vocabulary": VOCABULARY,
            "window": WINDOW,
            "block": 4,
            "groups": 2,
            "group": 1,
            "chosen": 2,
            "experts": 8 if self.grouped else 4,
            "rank": 16,
            "few": 2,
        }
        return min(value, limits.get(rule, value))

    def _head_count(self, value: int) -> int:
        if value >= self.heads_before:
            return self.heads * (value // self.heads_before)
        share = value * self.heads / self.heads_before
        divisors = [d for d in range(1, self.heads) if self.heads % d == 0] or [1]
        return min(divisors, key=lambda d: abs(d - share))

    def _in_dict(self, key, value):
        """A value in a dict of the config, such as rope_parameters; lists there have an entry per frequency."""
        if not isinstance(key, str):
            return value
        if key in ("short_factor", "long_factor"):
            return value[: max(1, round(len(value) * self.head_factor))]
        if key == "mrope_section":
            return [max(1, round(x * self.head_factor)) for x in value]
        return self.value(key, value)

    def reconcile(self, config) -> None:
        """Make the heads of a state-space layer fill its inner width: heads * head width = expand * hidden."""
        for heads, width, expand in (
            ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
            ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
            ("num_heads", "head_dim", "expand"),
        ):
            fields = vars(config)
            if all(type(fields.get(name)) is int for name in (heads, width)) and expand in fields:
                inner = getattr(config, "mamba_d_ssm", None) or int(
                    fields[expand] * config.hidden_size
                )
                if inner % fields[width]:
                    setattr(config, width, math.gcd(inner, fields[width]))
                setattr(config, heads, inner // getattr(config, width))
        for name in ("mamba_n_groups", "n_groups", "mamba_ngroups"):
            if getattr(config, name, None):
                setattr(config, name, 1)
        # GPT-Neo repeats a pattern of layers.
        if getattr(config, "attention_types", None):
            kinds = config.attention_layers
            config.attention_types = [[[kind], 1] for kind in kinds]


def has_experts(config: PretrainedConfig) -> bool:
    """Whether the config describes a mixture of experts."""
    fields = vars(config.get_text_config(decoder=True)).items()
    experts = {rule: pattern for pattern, rule in _RULES}["experts"]
    return any(experts.search(k) and type(v) is int and v > 1 for k, v in fields)


def _field(config, name: str) -> int | None:
    """A positive int among the fields of a config, whatever the class calls it."""
    value = vars(config).get(config.attribute_map.get(name, name))
    return value if type(value) is int and value > 0 else None


def _token(value):
    if isinstance(value, list | tuple):
        return type(value)(_token(x) for x in value)
    return min(value, VOCABULARY - 1) if type(value) is int else value
