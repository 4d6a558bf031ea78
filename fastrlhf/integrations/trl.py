"""TRL's loss heads on fastrlhf's ops: what its trainers compute stays, what it costs does not.

with fastrlhf.integrations.trl.patch():
    GRPOTrainer(...).train()

Shapes: logits [..., V], index and row_mask [...]; hidden [N, H], weight [V, H], targets [N].
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrlhf.integrations import _rows
from fastrlhf.integrations._patch import Host, Patch, Target, Unserved, check_parameters
from fastrlhf.ops import _backend, _chunks
from fastrlhf.ops._gemms import gemms_for
from fastrlhf.ops._linear import Head
from fastrlhf.ops._rows import RowKernels
from fastrlhf.ops.linear_logprob import check_linear, linear_logprob
from fastrlhf.ops.ranking_loss import ranking_loss
from fastrlhf.ops.token_logprob import check, check_target_values, token_logprob

_UTILS = "trl.trainer.utils"
_HEAD = "trl.kernels.chunked_logprob.ChunkedLogProbFunction"


def patch(backend: str = "auto", inplace_backward: bool = False) -> Patch:
    """Run TRL's log-prob, entropy, chunked-head and pairwise-reward functions on fastrlhf's ops.

    Every trainer that uses them gains (SFT, DPO, KTO, GRPO, RLOO and the experimental ones), also a
    trainer that was made before. Log-probs and entropies keep the dtype that TRL's own return. The
    chunked head scores only the positions whose label counts on CPU too, as TRL does on a GPU.

    Args:
        backend: of the ops; see `fastrlhf.backends`.
        inplace_backward: let the backward of log-probs and entropies write the gradient over the
            logits, which halves its memory; then nothing may read them after it. See
            `fastrlhf.token_logprob`.

    Returns:
        The handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: TRL is not installed.
        HostMoved: one of its functions is not where, or not what, it was; nothing is patched then.
        RuntimeError: patched already with other options.

    `GRPOConfig(cast_lm_head_to_fp32=True)`: TRL casts the head's own weight when the trainer is made, and
    gives the head fp32 hidden states; such a call is served as it is, with fp32 operands. A model in bf16
    does without the flag: the patched head multiplies its bf16 operands as they are, which is exact in
    fp32, and sums and keeps logits in fp32. Its log-probs are those of the cast head to fp32 rounding,
    while the weight, its gradient and its optimizer state stay in bf16. (Under autocast, fp32 weights are
    rounded to bf16 first, as TRL does. The flag also changes what transformers' own generation samples
    from, which no patch here does.)

    Calls that no op serves run TRL's own function and are counted in `fallbacks`: K indices a
    position, a temperature that is no number above 0, float64 hidden states, DTensors, and a head that
    ZeRO-3 shards.
    """
    if not isinstance(inplace_backward, bool):
        kind = type(inplace_backward).__name__
        raise TypeError(f"trl.patch: inplace_backward must be a bool; got {kind}")
    return _HOST.patch(backend=backend, inplace_backward=inplace_backward)


def unpatch() -> None:
    """Put TRL's own functions back, whoever holds it patched."""
    _HOST.unpatch()


def calls() -> dict[str, int]:
    """TRL function -> calls that our op served in this process."""
    return _HOST.calls()


def _servable(logits, index, temperature) -> None:
    _rows.plain("logits", logits)
    if logits.dim() < 2:
        raise Unserved("logits with one axis")
    if index is not None and index.shape != logits.shape[:-1]:
        raise Unserved(
            "index has a shape other than logits.shape[:-1], as for K indices a position"
        )
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise Unserved("temperature is not a number")
    if not 0 < temperature < float("inf"):
        raise Unserved("temperature is not above 0 and finite")


def _like_trl(out: Tensor, logits: Tensor) -> Tensor:
    """TRL returns its CPU results in the logits' dtype and those of its GPU kernel in fp32."""
    return out.to(logits.dtype) if logits.device.type == "cpu" else out


def _selective_log_softmax(original, backend, inplace_backward):
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        _servable(logits, index, temperature)
        logprob = token_logprob(
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
        _servable(logits, index, temperature)
        logprob, entropy = token_logprob(
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
        _servable(logits, None, 1.0)
        # Any target does: the entropy does not look at it.
        targets = torch.zeros((), dtype=torch.int64, device=logits.device).expand(logits.shape[:-1])
        _, entropy = token_logprob(
            logits,
            targets,
            return_entropy=True,
            inplace_backward=inplace_backward,
            backend=backend,
        )
        return _like_trl(entropy, logits)

    return entropy_from_logits


_HEAD_PARAMETERS = (
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
)


def _chunked_head(original, backend, inplace_backward):
    # `apply` is autograd's; what it takes stands in `forward`.
    check_parameters("trl", f"{_HEAD}.forward", original.__self__.forward, _HEAD_PARAMETERS)

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
            raise Unserved("float64 hidden states, whose results TRL makes in float32")
        if _rows.sharded(weight):
            raise Unserved("the output head's weight is sharded (DTensor or ZeRO-3)")
        if not temperature > 0 or not logit_scale > 0:
            raise Unserved("temperature or logit scale is not above 0")
        # TRL: z = c tanh(y s / c) / t. Ours: z = c' tanh(y / c') / t', with c' = c / s, t' = t / s.
        temperature = float(temperature / logit_scale)
        softcap = final_logit_softcapping
        softcap = None if softcap is None else float(softcap / logit_scale)
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
        extras = tuple(name for name in _EXTRAS if name in outputs)
        if extras:
            check_linear(_LINEAR, hidden, weight, bias, "fast")
            check(_LINEAR, hidden, targets, temperature, softcap, None, vocab=weight.shape[0])
            chosen = _backend.choose(_LINEAR, backend, hidden)
            if hidden.device.type == "cpu":
                check_target_values(_LINEAR, targets, weight.shape[0], None)
            logprob, entropy, *found = _HeadWithExtras.apply(
                hidden, weight, bias, targets, temperature, softcap or 0.0, chosen, extras
            )
        else:
            logprob, entropy = linear_logprob(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                return_entropy=True,
                backend=backend,
            )
            found = []
        found = dict(zip(extras, found, strict=True))
        entropy = entropy if "entropy" in outputs else None
        return logprob, entropy, *(found.get(name) for name in _EXTRAS)

    return apply


_LINEAR = "linear_logprob"
_EXTRAS = ("log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's results


class _HeadWithExtras(torch.autograd.Function):
    """`linear_logprob` with entropy, and the statistics that TRL logs, made while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, backend, extras):
        ctx.set_materialize_grads(False)
        ctx.settings = temperature, softcap, backend
        arguments = (hidden, weight, bias, targets, temperature, softcap, backend, extras)
        logprob, entropy, stats, found = _head_forward(*arguments)
        ctx.save_for_backward(hidden, weight, bias, targets, stats)
        ctx.mark_non_differentiable(*found)
        return logprob, entropy, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy, *_):
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 8
        hidden, weight, bias, targets, stats = ctx.saved_tensors
        temperature, softcap, backend = ctx.settings
        needs = ctx.needs_input_grad[:3]
        made_again = hidden.new_empty(0, dtype=stats.dtype)  # no logits were kept
        grads = torch.ops.fastrlhf.linear_logprob_bwd(
            grad_logprob,
            grad_entropy,
            hidden,
            weight,
            targets,
            bias,
            stats,
            made_again,
            None,
            temperature,
            softcap,
            None,
            None,
            "fast",
            backend,
            *needs,
        )
        grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*grads, *(None,) * 5)


@_chunks.without_autocast
def _head_forward(hidden, weight, bias, targets, temperature, softcap, backend, extras):
    """(logprob, entropy, stats [3, N], [each extra])."""
    head = Head(gemms_for(hidden, weight), hidden, weight, bias, targets, None, None, "fast")
    kernels = RowKernels(backend, temperature, softcap)
    logprob, entropy, stats = head.new_rows(), head.new_rows(), head.new_rows(3)
    parts = []
    for chunk in head.chunks():
        found = kernels.forward(chunk.logits, chunk.targets, None, None)
        logprob[chunk.rows], entropy[chunk.rows], stats[:, chunk.rows] = found
        parts.append(_extras(chunk.logits, chunk.targets, temperature, softcap, extras))
    if not parts:  # a batch in which nothing counts
        parts.append(
            _extras(logprob.new_empty(0, head.vocab), targets, temperature, softcap, extras)
        )
    return logprob, entropy, stats, [torch.cat(column) for column in zip(*parts, strict=True)]


def _extras(logits, targets, temperature, softcap, names):
    """The named statistics of a chunk's rows, of z = softcap * tanh(logits / softcap) / temperature."""
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    for name in names:
        if name == "is_top1":
            yield z.argmax(-1) == targets
        elif name == "mean_logits":
            yield z.mean(-1) / temperature
        else:
            e = ((z - z.amax(-1, keepdim=True)) / temperature).exp_()
            yield e.square().sum(-1).log() - 2 * e.sum(-1).log()


def _autocast(x: Tensor) -> Tensor:
    """As TRL's head: GEMM operands of autocast's dtype. On CPU all GEMMs are fp32 anyway."""
    device = x.device.type
    if device == "cpu" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _scores_only_what_counts(original, backend, inplace_backward):
    # Not on devices that compile anew for each number of rows, for which TRL leaves them in.
    return lambda device: original(device) or device.type in ("cpu", "cuda")


def _pairwise_loss(original, backend, inplace_backward):
    @functools.wraps(original)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        margin = inputs.get("margin")
        # TRL's own keeps its metrics; of what it returns only the loss, a few sums over [B], is made again.
        loss, outputs = original(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        ours = pairwise_loss(chosen, rejected, margin, backend)
        if self.args.center_rewards_coefficient is not None:
            coefficient = self.args.center_rewards_coefficient
            ours = ours + coefficient * torch.mean((chosen + rejected) ** 2)
        ours = ours.to(loss.dtype)
        return (ours, outputs) if return_outputs else ours

    return compute_loss


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), mean over the pairs; all [B], 0-d out."""
    if margin is not None:
        chosen = chosen - margin
    pairs = chosen.shape[0]
    scores = torch.stack((chosen, rejected), dim=1).reshape(-1)
    ranks = torch.tensor([1, 2], device=scores.device).repeat(pairs)
    starts = torch.arange(0, 2 * pairs + 1, 2, dtype=torch.int32, device=scores.device)
    return ranking_loss(scores, ranks, starts, backend=backend)


_HOST = Host(
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
            _HEAD.rpartition(".")[0],
            "ChunkedLogProbFunction.apply",
            "linear_logprob",
            _chunked_head,
        ),
        Target(
            _UTILS,
            "_use_triton",
            "the compaction of the rows that count",
            _scores_only_what_counts,
            ("device",),
            by_value=False,
        ),
        Target(
            "trl.trainer.reward_trainer",
            "RewardTrainer.compute_loss",
            "ranking_loss",
            _pairwise_loss,
            ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        ),
    ),
    left_alone={
        "trl.kernels.chunked_divergence.ChunkedDivergenceFunction": "a divergence between two heads "
        "(distillation), which no op computes",
        "GRPOTrainer._compute_loss, RLOOTrainer._compute_loss, DPOTrainer._compute_loss": "elementwise "
        "maths on [B, T] within a method: there is no function to replace",
    },
)
