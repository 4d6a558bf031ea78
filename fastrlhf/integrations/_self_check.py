"""What a self-check measures: the output of a model, computed in two ways that must agree.

Shapes: B rows of L tokens. The output of a row is one number for each of its tokens, or for each that has a successor.

A `Gap` is the difference of two outputs and the limit for it. In fp32 the limit comes from the model: transformers'
own result for a row changes by that much when another row joins the batch (a mixture of experts groups its tokens
differently), and rounding adds some ulp of the output's size.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

PACKING = "packed rows differ from each row alone in transformers' eager attention"
FUTURE = "a changed token changes the output of tokens before it"
HEAD = "hidden states times head differ from the model's own output"
DROPOUT = "a pass in training mode with dropout off differs from one in evaluation mode"
SAMPLER = "the sampler's log-probs differ from those of the training path"

# Row lengths. The copy's windows have 16 tokens.
COPY_ROWS = (23, 9, 32)
WEIGHT_ROWS = (24, 40)


@dataclass(frozen=True)
class Gap:
    """A measured difference: the property `what` is off by `amount`; up to `limit` it is rounding."""

    what: str
    amount: float
    limit: float
    unit: str = "nats"

    @property
    def failed(self) -> bool:
        return not self.amount <= self.limit  # NaN fails

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.what}: expected at most {self.limit:.1e}{unit}, got {self.amount:.3g}"


@dataclass(frozen=True)
class Outputs:
    """The output of one model, computed in the ways that are compared.

    Args:
        packed: rows, rows of the same lengths -> outputs of all rows, concatenated, by our attention on the packed
            rows. The second are those whose tokens are predicted.
        alone: row -> its output; by the same code in transformers' eager attention.
        own: ids [B, L] -> outputs [B, ...]; by the model's own forward in transformers' eager attention.
        shared: an output of `alone` -> the part of it that `own` computes.
        shorter: by how much the output of a row is shorter than the row.
        unit: of an output.
    """

    packed: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
    alone: Callable[[torch.Tensor], torch.Tensor]
    own: Callable[[torch.Tensor], torch.Tensor]
    shared: Callable[[torch.Tensor], torch.Tensor] = lambda output: output
    shorter: int = 1
    unit: str = "nats"


def causal_lm_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-prob of each next token, fp32 [B, L - 1], of logits [B, L, V] and ids [B, L]."""
    logprobs = logits.float().log_softmax(-1)
    return logprobs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)


def random_rows(lengths: Sequence[int], config, device, seed: int = 0) -> list[torch.Tensor]:
    """Rows of random token ids (int64) that fit the model's vocabulary and context, without PAD."""
    config = config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or max(lengths)
    reserved = 8 if config.vocab_size > 32 else 0  # where PAD, BOS and EOS usually are
    high = min(config.vocab_size - reserved, 1000)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(reserved, high, (max(2, min(n, context)),), generator=generator)
        for n in lengths
    ]
    pad = getattr(config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) else -1
    return [torch.where(row == pad, (row + 1) % high, row).to(device) for row in rows]


def configs(lm) -> list:
    """The configs that the modules of a model read, each once."""
    found = (getattr(module, "config", None) for module in lm.modules())
    return list({id(c): c for c in found if hasattr(c, "_attn_implementation")}.values())


@contextlib.contextmanager
def measuring(device: torch.device):
    """A block without autocast and TF32, whose random numbers do not count; tensors are made on the CPU by default."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def eager(lm):
    """transformers' own eager attention in the block."""
    # Not set_attn_implementation: it leaves models that have attention code of their own as they are, and transformers
    # then builds no masks for them.
    before = [(config, config._attn_implementation) for config in configs(lm)]
    for config, _ in before:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


@dataclass(frozen=True)
class Reference:
    """Each row alone in transformers' eager attention: the outputs of our code and of the model's own forward."""

    rows: list[torch.Tensor]
    ours: list[torch.Tensor]
    own: list[torch.Tensor]

    @property
    def size(self) -> float:
        """The largest output, and at least 8."""
        return max(8.0, *(float(output.abs().max()) for output in self.own))


def reference(outputs: Outputs, rows: list[torch.Tensor]) -> Reference:
    """The outputs that packed rows are compared with."""
    own = [outputs.own(row[None])[0] for row in rows]
    return Reference(rows, [outputs.alone(row) for row in rows], own)


def fp32_limit(outputs: Outputs, ref: Reference) -> float:
    """The largest difference that is rounding, in fp32: 8 times that of a repeat, plus 64 ulp of the outputs.

    The repeat is the model's own result for a row beside another row of its length.
    """
    beside = [outputs.own(torch.stack([row, row.flip(0)]))[0] for row in ref.rows]
    noise = max(float((a - b).abs().max()) for a, b in zip(ref.own, beside, strict=True))
    return 8 * noise + 64 * torch.finfo(torch.float32).eps * ref.size


def head(outputs: Outputs, ref: Reference, limit: float, reduce=torch.max) -> Gap:
    """The gap HEAD; `reduce` makes one number of the differences."""
    gaps = [
        (outputs.shared(ours) - own).abs().flatten()
        for ours, own in zip(ref.ours, ref.own, strict=True)
    ]
    return Gap(HEAD, float(reduce(torch.cat(gaps))), limit, outputs.unit)


def packing(outputs: Outputs, ref: Reference, limit: float, reduce=torch.max) -> Gap:
    """The gap PACKING; `reduce` makes one number of the differences."""
    gaps = (outputs.packed(ref.rows, ref.rows) - torch.cat(ref.ours)).abs()
    return Gap(PACKING, float(reduce(gaps)), limit, outputs.unit)


def future(outputs: Outputs, rows: Sequence[torch.Tensor], limit: float) -> Gap:
    """The gap FUTURE: the last third of each packed row changes, and the outputs before it are compared."""
    cuts = [2 * len(row) // 3 for row in rows]
    changed = [
        torch.cat([row[:cut], row.flip(0)[cut:]]) for row, cut in zip(rows, cuts, strict=True)
    ]
    sizes = [len(row) - outputs.shorter for row in rows]
    # The same tokens are predicted, so that the last output before a cut can be compared too.
    before, after = (outputs.packed(r, rows).split(sizes) for r in (rows, changed))
    amount = max(
        float((a[:cut] - b[:cut]).abs().max())
        for a, b, cut in zip(before, after, cuts, strict=True)
    )
    return Gap(FUTURE, amount, limit, outputs.unit)


def failures(gaps: Sequence[Gap]) -> str | None:
    """The gaps that failed, in words; None if all passed."""
    return "; ".join(str(gap) for gap in gaps if gap.failed) or None


def line(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
