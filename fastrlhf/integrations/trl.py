"""TRL's loss heads on fastrlhf's ops: what its trainers compute stays, what it costs does not.

with fastrlhf.integrations.trl.patch():
    GRPOTrainer(...).train()

Shapes: logits [..., V], index and row_mask [...]; hidden [N, H], weight [V, H], targets [N].
"""

import functools

import torch
from torch import Tensor

from fastrlhf.integrations._patch import Host, Patch, Target, Unserved, check_parameters
from fastrlhf.ops import _backend, _checks
from fastrlhf.ops.linear_logprob import check_linear
from fastrlhf.ops.ranking_loss import ranking_loss
from fastrlhf.ops.token_logprob import check, run, token_logprob

_UTILS = "trl.trainer.utils"
_HEAD = "trl.kernels.chunked_logprob.ChunkedLogProbFunction"


def patch(backend: str = "auto") -> Patch:
    """Run TRL's log-prob, entropy, chunked-head and pairwise-reward functions on fastrlhf's ops.

    Every trainer that uses them gains (SFT, DPO, KTO, GRPO, RLOO and the experimental ones), also a
    trainer that was made before. Log-probs and entropies keep the dtype that TRL's own return. The
    chunked head scores only the positions whose label counts on CPU too, as TRL does on a GPU.

    Args:
        backend: of the ops; see `fastrlhf.backends`.

    Returns:
        The handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: TRL is not installed.
        HostMoved: one of its functions is not where, or not what, it was; nothing is patched then.
        RuntimeError: patched already with another backend.

    Calls that no op serves run TRL's own function and are counted in `fallbacks`: K indices a
    position, a temperature that is no number above 0, float64 hidden states, `log_sum_sq_probs`
    (WPO weights), and mean logits under a soft-cap.
    """
    return _HOST.patch(backend=backend)


def unpatch() -> None:
    """Put TRL's own functions back, whoever holds it patched."""
    _HOST.unpatch()


def calls() -> dict[str, int]:
    """TRL function -> calls that our op served in this process."""
    return _HOST.calls()


def _servable(logits, index, temperature) -> None:
    if not isinstance(logits, Tensor) or logits.dtype not in _checks.FLOAT_DTYPES:
        raise Unserved(f"logits of {getattr(logits, 'dtype', type(logits).__name__)}")
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


def _selective_log_softmax(original, backend):
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        _servable(logits, index, temperature)
        logprob = token_logprob(
            logits, index, temperature=temperature, mask=row_mask, backend=backend
        )
        return _like_trl(logprob, logits)

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original, backend):
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
            backend=backend,
        )
        entropy = _like_trl(entropy, logits)
        return _like_trl(logprob, logits), entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _entropy_from_logits(original, backend):
    def entropy_from_logits(logits, chunk_size=128):
        _servable(logits, None, 1.0)
        # Any target does: the entropy does not look at it.
        targets = torch.zeros((), dtype=torch.int64, device=logits.device).expand(logits.shape[:-1])
        _, entropy = token_logprob(logits, targets, return_entropy=True, backend=backend)
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


def _chunked_head(original, backend):
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
        if "log_sum_sq_probs" in outputs:
            raise Unserved("log_sum_sq_probs is asked for")
        if "mean_logits" in outputs and final_logit_softcapping is not None:
            raise Unserved("mean_logits under a soft-cap is asked for")
        if hidden.dtype == torch.float64:
            raise Unserved("float64 hidden states, whose results TRL makes in float32")
        if not temperature > 0 or not logit_scale > 0:
            raise Unserved("temperature or logit scale is not above 0")
        # TRL: z = c tanh(y s / c) / t. Ours: z = c' tanh(y / c') / t', with c' = c / s, t' = t / s.
        temperature = float(temperature / logit_scale)
        softcap = final_logit_softcapping
        softcap = None if softcap is None else float(softcap / logit_scale)
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
        logprob, entropy, stats = _linear_logprob(
            hidden, weight, bias, targets, temperature, softcap, backend
        )
        mean = top = None
        if "mean_logits" in outputs:
            mean = _mean_logits(hidden, weight, bias, temperature)
        if "is_top1" in outputs:
            # logprob = (z_target - max) - log_sum, and the difference is 0 for the maximum itself.
            top = logprob.detach() >= -stats[1]
        return logprob, entropy if "entropy" in outputs else None, None, mean, top

    return apply


def _autocast(x: Tensor) -> Tensor:
    """As TRL's head: GEMM operands of autocast's dtype. On CPU all GEMMs are fp32 anyway."""
    device = x.device.type
    if device == "cpu" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _linear_logprob(hidden, weight, bias, targets, temperature, softcap, backend):
    """`fastrlhf.linear_logprob`, with the (max, log sum) of each row as well."""
    op = "linear_logprob"
    check_linear(op, hidden, weight, bias, "fast")
    _, temperature, softcap, _ = check(
        op, hidden, targets, temperature, softcap, None, vocab=weight.shape[0]
    )
    chosen = _backend.choose(op, backend, hidden)
    trained = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    settings = (None, temperature, softcap, None, "fast", chosen, trained)
    out = run(op, torch.ops.fastrlhf.linear_logprob_fwd, (hidden, weight, targets, bias, *settings))
    return out[:3]


@torch.no_grad()
def _mean_logits(hidden, weight, bias, temperature):
    """Mean over V of (hidden @ weight.T + bias) / temperature: the mean row's product, no logits."""
    mean = torch.mv(hidden.float(), weight.mean(0, dtype=torch.float32))
    if bias is not None:
        mean = mean + bias.float().mean()
    return mean / temperature


def _scores_only_what_counts(original, backend):
    # Not on devices that compile anew for each number of rows, for which TRL leaves them in.
    return lambda device: original(device) or device.type in ("cpu", "cuda")


def _pairwise_loss(original, backend):
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
