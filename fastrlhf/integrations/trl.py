"""TRL 1.16: its log-probs, entropies, chunked head, GRPO and pairwise reward losses on fastrlhf's ops. See `patch`.

Shapes: logits [..., V], index and row_mask [...]; hidden [N, H], weight [V, H], bias [V], targets [N]; n rows of a
chunk.
"""

import functools

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.integrations import _common, _grpo_loss
from fastrlhf.integrations._patch import Integration, Patch
from fastrlhf.integrations._targets import Target, Unsupported
from fastrlhf.ops.linear_logprob import linear_logprob_with

_UTILS = "trl.trainer.utils"


def patch(backend: str = "auto", inplace_backward: bool = False) -> Patch:
    """Runs TRL's log-probs, entropies, chunked head, GRPO and pairwise reward losses on fastrlhf's ops.

    All trainers that call them benefit (SFT, DPO, KTO, GRPO, RLOO and the experimental ones), existing trainer objects
    included. Log-probs and entropies keep the dtypes of TRL's.

    Replaced in `trl.trainer.utils`: `selective_log_softmax`, `selective_log_softmax_and_entropy` and
    `entropy_from_logits` (`token_logprob`), and `_use_triton`: on CPU too, only positions whose label is not
    ignored enter the head, as on a GPU. Elsewhere: `ChunkedLogProbFunction.apply` (`linear_logprob`),
    `RewardTrainer.compute_loss` (`ranking_loss`) and `GRPOTrainer._compute_loss` (`ppo_loss`).

    The GRPO loss is `ppo_loss` for the loss types grpo, bnpo, dr_grpo, dapo, cispo, sapo and luspo, with every other
    setting of GRPOConfig: both importance_sampling_levels, the ratios of vLLM in all four modes, KL with and without
    its bias correction, delta, the masks of off-policy sequences, of low entropy and of tool results, and the entropy
    bonus. TRL's own method still runs, on log-probs without a graph, for its metrics, which keep names and values. The
    log-ratio is clamped to +-20, which TRL does not do. `use_liger_kernel` changes nothing here: in TRL 1.16 it
    replaces layers of the model, and no part of the loss.

    TRL's own function runs, and the reason is counted in `fallbacks`:

    - log-probs, entropies and head: several indices per position, a temperature that is not a positive number, float64
      hidden states, DTensors, and a head that ZeRO-3 shards;
    - the GRPO loss: loss_type="vespo", whose weight no op computes; an epsilon of 0; limits of at most 1 of the ratio
      (delta, and epsilon_high of cispo); and, with importance_sampling_level="sequence", a subclass's advantages per
      token.

    `GRPOConfig(cast_lm_head_to_fp32=True)`: TRL casts the head's weight when the trainer is created, and the patched
    head then gets fp32 operands. A bf16 model does not need the flag: products of bf16 operands are exact in fp32,
    and the patched head accumulates and stores logits in fp32. Its log-probs equal those of the cast head up to fp32
    rounding, while the weight, its gradient and its optimizer state stay bf16. Two differences remain: under autocast,
    fp32 weights are rounded to bf16 first, as in TRL; and the flag also changes the logits that transformers'
    generation samples from, which this patch does not.

    Args:
        backend: backend of the ops; see `fastrlhf.backends`.
        inplace_backward: the backward of log-probs and entropies overwrites the logits with their gradient,
            which halves its memory. Nothing may read the logits afterwards. See `fastrlhf.token_logprob`.

    Returns:
        A handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: TRL is not installed.
        TypeError: inplace_backward is not a bool.
        PatchError: a function is missing or has other parameters; nothing is patched.
        RuntimeError: TRL is patched with other options.
    """
    if not isinstance(inplace_backward, bool):
        kind = type(inplace_backward).__name__
        raise TypeError(f"trl.patch: inplace_backward must be a bool; got {kind}")
    return _INTEGRATION.patch(backend=backend, inplace_backward=inplace_backward)


def unpatch() -> None:
    """Restores TRL's functions and releases all handles."""
    _INTEGRATION.unpatch()


def calls() -> dict[str, int]:
    """TRL function -> number of calls that an op served in this process."""
    return _INTEGRATION.calls()


# ---- logits ----


def _require_supported(logits, index, temperature) -> None:
    _common.require_logits(logits, None)
    if index is not None and index.shape != logits.shape[:-1]:
        raise Unsupported("the shape of index is not logits.shape[:-1] (K indices per position?)")
    _common.require_number("temperature", temperature)


def _like_trl(out: Tensor, logits: Tensor) -> Tensor:
    """TRL's dtype of a result: that of the logits on CPU, fp32 from its GPU kernel."""
    return out.to(logits.dtype) if logits.device.type == "cpu" else out


def _selective_log_softmax(original, backend, inplace_backward):
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        _require_supported(logits, index, temperature)
        logprob = fastrlhf.token_logprob(
            logits,
            index,
            temperature=temperature,
            mask=row_mask,
            inplace_backward=inplace_backward,
            backend=backend,
        )
        return _like_trl(logprob, logits)

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original, backend, inplace_backward):
    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        _require_supported(logits, index, temperature)
        logprob, entropy = fastrlhf.token_logprob(
            logits,
            index,
            temperature=temperature,
            mask=row_mask,
            return_entropy=True,
            inplace_backward=inplace_backward,
            backend=backend,
        )
        entropy = _like_trl(entropy, logits)
        return _like_trl(logprob, logits), entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _entropy_from_logits(original, backend, inplace_backward):
    def entropy_from_logits(logits, chunk_size=128):
        _require_supported(logits, None, 1.0)
        entropy = _common.entropy(logits, inplace_backward=inplace_backward, backend=backend)
        return _like_trl(entropy, logits)

    return entropy_from_logits


# ---- the chunked head ----

_STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's results


def _chunked_head(original, backend, inplace_backward):
    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        if hidden.dtype == torch.float64:
            raise Unsupported("float64 hidden states: TRL computes in float32")
        if _common.is_sharded(weight):
            raise Unsupported("the output head's weight is sharded (DTensor or ZeRO-3)")
        if not temperature > 0 or not logit_scale > 0:
            raise Unsupported("temperature or logit scale is not above 0")
        # TRL: z = c tanh(s y / c) / t. The op: z = c' tanh(y / c') / t', so c' = c / s and t' = t / s.
        temperature = float(temperature / logit_scale)
        softcap = final_logit_softcapping
        softcap = None if softcap is None else float(softcap / logit_scale)
        names = tuple(name for name in _STATISTICS if name in outputs)
        operands = [_common.to_autocast_dtype(x) for x in (hidden, weight)]
        options = {
            "bias": None if bias is None else _common.to_autocast_dtype(bias),
            "temperature": temperature,
            "softcap": softcap,
            "backend": backend,
        }
        found = {}
        if names:
            logprob, entropy, found = _with_statistics(names, *operands, targets, **options)
        else:
            logprob, entropy = fastrlhf.linear_logprob(
                *operands, targets, return_entropy=True, **options
            )
        entropy = entropy if "entropy" in outputs else None
        return logprob, entropy, *(found.get(name) for name in _STATISTICS)

    return apply


def _with_statistics(names, hidden, weight, targets, temperature, softcap, **options):
    """(logprob [N], entropy [N], {name: statistic [N]})."""
    parts = []

    def observe(logits, targets):
        parts.append(_statistics(logits, targets, names, temperature, softcap))

    logprob, entropy = linear_logprob_with(
        observe, hidden, weight, targets, temperature=temperature, softcap=softcap, **options
    )
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return logprob, entropy, dict(zip(names, columns, strict=True))


def _statistics(logits, targets, names, temperature, softcap) -> tuple[Tensor, ...]:
    """TRL's statistics [n] of logits [n, V], of z = softcap * tanh(logits / softcap) / temperature.

    log_sum_sq_probs = log sum_j p_j^2, mean_logits = mean_j z_j, is_top1 = (argmax_j z_j == target).
    """
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    found = []
    for name in names:
        if name == "is_top1":
            found.append(z.argmax(-1) == targets)
        elif name == "mean_logits":
            found.append(z.mean(-1) / temperature)
        else:
            e = ((z - z.amax(-1, keepdim=True)) / temperature).exp_()
            found.append(e.square().sum(-1).log() - 2 * e.sum(-1).log())
    return tuple(found)


def _compact_on_cpu(original, backend, inplace_backward):
    # CPU and CUDA only. Where each new number of rows means a recompilation, TRL keeps the ignored rows.
    return lambda device: original(device) or device.type in ("cpu", "cuda")


def _pairwise_loss(original, backend, inplace_backward):
    @functools.wraps(original)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        margin = inputs.get("margin")
        # TRL's method computes the outputs and its metrics. Only the loss, of [B] scores, is recomputed.
        loss, outputs = original(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        ours = _common.pairwise_loss(chosen, rejected, margin, backend)
        if self.args.center_rewards_coefficient is not None:
            coefficient = self.args.center_rewards_coefficient
            ours = ours + coefficient * torch.mean((chosen + rejected) ** 2)
        ours = ours.to(loss.dtype)
        return (ours, outputs) if return_outputs else ours

    return compute_loss


_INTEGRATION = Integration(
    "trl",
    (
        Target(
            _UTILS,
            "selective_log_softmax",
            "token_logprob",
            _selective_log_softmax,
            ("logits", "index", "temperature", "row_mask"),
        ),
        Target(
            _UTILS,
            "selective_log_softmax_and_entropy",
            "token_logprob",
            _selective_log_softmax_and_entropy,
            ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
        ),
        Target(
            _UTILS,
            "entropy_from_logits",
            "token_logprob",
            _entropy_from_logits,
            ("logits", "chunk_size"),
        ),
        Target(
            "trl.kernels.chunked_logprob",
            "ChunkedLogProbFunction.apply",
            "linear_logprob",
            _chunked_head,
            (
                "ctx",
                "hidden",
                "weight",
                "bias",
                "targets",
                "temperature",
                "chunk_size",
                "final_logit_softcapping",
                "logit_scale",
                "outputs",
            ),
        ),
        Target(
            _UTILS,
            "_use_triton",
            "ignored positions are dropped before the head",
            _compact_on_cpu,
            ("device",),
            references=False,
        ),
        Target(
            "trl.trainer.reward_trainer",
            "RewardTrainer.compute_loss",
            "ranking_loss",
            _pairwise_loss,
            ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        ),
        Target(
            "trl.trainer.grpo_trainer",
            "GRPOTrainer._compute_loss",
            "ppo_loss",
            _grpo_loss.compute_loss,
            ("self", "model", "inputs"),
        ),
    ),
    unchanged={
        "trl.kernels.chunked_divergence.ChunkedDivergenceFunction": "divergence between two heads "
        "(distillation), which no op computes",
        "GMPOTrainer._compute_loss": "a ratio of a sequence that is clipped token by token, which no op computes",
        "RLOOTrainer._compute_loss, DPOTrainer._compute_loss": "elementwise arithmetic on [B, T] or [B] inside "
        "a larger method",
    },
)
