"""verl's log-prob, entropy, fused-head, GAE and whitening functions on fastrlhf's ops, and a policy loss.

fastrlhf.integrations.verl.patch()  # in each worker; then policy_loss.loss_mode=fastrlhf, if wanted

Shapes: B sequences, T steps; logits [..., V], labels [...]; hidden [..., H], weight [V, H]; [B, T] else.
"""

import os
import sys

import torch
from torch import Tensor

from fastrlhf.integrations import _rows
from fastrlhf.integrations._patch import Host, Patch, Target, Unserved, check_parameters
from fastrlhf.ops.gae import gae
from fastrlhf.ops.masked_whiten import masked_whiten as op_masked_whiten
from fastrlhf.ops.ppo_loss import ppo_loss
from fastrlhf.ops.token_logprob import token_logprob

_FUNCTIONAL = "verl.utils.torch_functional"
_ALGOS = "verl.trainer.ppo.core_algos"
_KERNEL = "verl.utils.kernel.linear_cross_entropy"


def patch(backend: str = "auto") -> Patch:
    """Run verl's row functions, fused heads, GAE and whitening on fastrlhf's ops.

    Also registers the policy loss "fastrlhf": verl's vanilla loss, its metrics included, in one pass
    forward and backward. Results keep verl's dtypes, and what verl writes at masked steps.

    Args:
        backend: of the ops; see `fastrlhf.backends`.

    Returns:
        The handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: verl is not installed.
        HostMoved: one of its functions is not where, or not what, it was; nothing is patched then.
        RuntimeError: patched already with another backend.

    Calls that no op serves run verl's own function and are counted in `fallbacks`: the fused head
    over a process group, reduced, at a temperature that is no number, or by Liger where that was
    chosen; float64 heads; DTensors; GAE and whitening of other than fp32 or with fewer than two
    unmasked steps, which verl refuses. The policy loss "fastrlhf" hands unequal clip ranges, rollout
    weights and means over sequences to verl's vanilla loss.
    """
    return _HOST.patch(backend=backend)


def unpatch() -> None:
    """Put verl's own functions back, whoever holds it patched."""
    _HOST.unpatch()


def calls() -> dict[str, int]:
    """verl function -> calls that our op served in this process."""
    return _HOST.calls()


# ---- logits ----


def _logprobs_from_logits(original, backend):
    functional = sys.modules[original.__module__]

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        _rows.served_rows(logits, labels)
        flash = functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
        flash = flash and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
        logprob = token_logprob(
            logits,
            labels,
            # What flash attention's kernel does, and verl's own rows do not.
            mask=labels != -100 if flash else None,
            inplace_backward=flash and bool(inplace_backward),
            backend=backend,
        )
        return logprob if flash else logprob.to(_rows.log_softmax_dtype(logits))

    return logprobs_from_logits


def _entropy_from_logits(original, backend):
    def entropy_from_logits(logits):
        _rows.served_rows(logits, None)
        return _rows.entropy(logits, backend).to(_rows.log_softmax_dtype(logits))

    return entropy_from_logits


def _entropy_from_logits_with_chunking(original, backend):
    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        _rows.served_rows(logits, None)
        if logits.dim() != 2 or logits.dtype == torch.float64:
            raise Unserved("logits that are not [N, V] of at most 32 bits")
        return _rows.entropy(logits, backend)

    return entropy_from_logits_with_chunking


# ---- heads ----

_KERNEL_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "labels",
    "temperature",
    "reduction",
    "dist_process_group",
)


def _linear_cross_entropy(original, backend):
    # `apply` is autograd's; what it takes stands in `forward`.
    check_parameters("verl", f"{_KERNEL}.LinearCrossEntropy.forward",
                     original.__self__.forward, _KERNEL_PARAMETERS)  # fmt: skip

    def linear_cross_entropy(
        hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        if dist_process_group is not None:
            raise Unserved("a process group shares out the vocabulary")
        if not isinstance(reduction, str) or reduction.lower() != "none":
            raise Unserved(f"reduction={reduction!r}")
        if not isinstance(temperature, float):
            raise Unserved("temperature is not a float")
        _rows.plain("hidden states", hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _rows.head(rows, weight, labels.reshape(-1), temperature, backend)

    return linear_cross_entropy


def _fused_linear_for_ppo(original, backend):
    functional = sys.modules[original.__module__]

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        liger = functional._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is not None
        if self.impl_backend != "torch" and liger:
            raise Unserved(f"impl_backend={self.impl_backend!r} was chosen")
        if input_ids.shape != hidden_states.shape[:-1] or hidden_states.dim() not in (2, 3):
            raise Unserved("hidden states that are not [N, H] or [B, T, H] with an id each")
        logprob, entropy = _rows.head(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature, backend
        )
        return logprob, entropy.to(hidden_states.dtype)

    return forward


# ---- advantages ----

# In fp64 verl's own whitening counts and corrects in fp32; it is left to it, error and all.
_WHITENED = (torch.float32,)


def _counted(keep: Tensor) -> int:
    count = int(keep.sum())
    if count < 2:
        raise Unserved("fewer than two unmasked steps, which verl refuses")
    return count


def _moments(x: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, 1 / sqrt(var + 1e-8), x - mean) by the unmasked elements of x, which is 0 at the others."""
    mean = x.sum() / count
    centred = x - mean
    squares = _rows.weights(keep, x.dtype).mul_(centred).square_()
    return mean, (squares.sum() / (count - 1) + 1e-8).rsqrt(), centred


def _carried(advantages: Tensor, keep: Tensor) -> Tensor:
    """verl writes at a masked step the advantage of the next unmasked one; 0 after the last.

    The op's advantages are 0 at masked steps, so that only sequences with holes need anything.
    """
    steps = keep.shape[1]
    on = keep.view(torch.int8)
    if steps == 1 or int((on[:, 1:] - on[:, :-1]).max()) <= 0:
        return advantages
    index = torch.arange(steps, device=keep.device)
    index = torch.where(keep, index, steps - 1).flip(1).cummin(1).values.flip(1)
    return advantages.gather(1, index)


def _compute_gae(original, backend):
    def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
        _rows.same_steps(token_level_rewards, _WHITENED, values=values)
        if token_level_rewards.dim() != 2 or token_level_rewards.shape[1] == 0:
            raise Unserved("rewards that are not [B, T] with a step")
        _rows.fraction("gamma", gamma)
        _rows.fraction("lam", lam)
        keep = _rows.keep(response_mask, values)
        count = _counted(keep)
        with torch.no_grad():
            options = {"gamma": gamma, "lam": lam, "mask": keep, "backend": backend}
            advantages, _ = gae(token_level_rewards, values, **options)
            mean, scale, centred = _moments(advantages, keep, count)
            carried = _carried(advantages, keep)
            # A tensor of its own: the op's outputs share one allocation, which pickling would keep.
            whitened = centred if carried is advantages else carried - mean
            return whitened.mul_(scale), carried + values

    return compute_gae_advantage_return


def _masked_whiten(original, backend):
    def masked_whiten(values, mask, shift_mean=True):
        _rows.same_steps(values, _WHITENED)
        _rows.constants(values=values)
        keep = _rows.keep(mask, values)
        count = _counted(keep)
        with torch.no_grad():
            options = {"mask": keep, "shift_mean": bool(shift_mean), "backend": backend}
            whitened = op_masked_whiten(values, **options)
            if count == keep.numel():
                return whitened
            # verl whitens the masked elements as well, by the moments of the others.
            mean, scale, _ = _moments(values.masked_fill(~keep, 0.0), keep, count)
            others = (values - mean) * scale
            return torch.where(keep, whitened, others if shift_mean else others + mean)

    return masked_whiten


# ---- policy loss ----


def _policy_loss(original, backend):
    algos = sys.modules[_ALGOS]

    def compute_policy_loss_fastrlhf(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        """verl's vanilla policy loss in one pass."""
        if config is None or rollout_is_weights is not None:
            raise Unserved("no config, or rollout weights")
        clip = _equal_clip(config)
        _rows.same_steps(log_prob, old_log_prob=old_log_prob, advantages=advantages)
        _rows.constants(old_log_prob=old_log_prob, advantages=advantages)
        keep = _rows.keep(response_mask, log_prob)
        batch = dict(config.global_batch_info)
        tokens, ranks = batch.get("batch_num_tokens"), batch.get("dp_size", 1)
        if loss_agg_mode not in ("token-mean", "token-sum"):
            raise Unserved(f"loss_agg_mode={loss_agg_mode!r}")
        if loss_agg_mode == "token-mean" and tokens is None and ranks > 1:
            raise Unserved("dp_size without batch_num_tokens, which verl refuses")
        dual = float(config.get("clip_ratio_c", 3.0))
        out = ppo_loss(
            log_prob, old_log_prob, advantages, mask=keep, clip=clip, dual_clip=dual, backend=backend
        )  # fmt: skip
        count = keep.sum()
        loss = out.loss * count * ranks
        if loss_agg_mode == "token-mean":
            loss = loss / (count if tokens is None else tokens)
        with torch.no_grad():
            log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
            ratio = log_ratio.exp()
            clipped = torch.maximum(
                -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
            )
            lower = (clipped > -advantages * dual) & (advantages < 0)
            mean = algos.verl_F.masked_mean
            metrics = torch.stack(
                (
                    out.metrics["clip_fraction"].to(log_ratio.dtype),
                    mean(-log_ratio, response_mask),
                    mean(lower.to(log_ratio.dtype), response_mask),
                )
            ).tolist()
        names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return loss, dict(zip(names, metrics, strict=True))

    compute_policy_loss_fastrlhf.fallback = algos.compute_policy_loss_vanilla
    return compute_policy_loss_fastrlhf


def _equal_clip(config) -> float:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    low = config.clip_ratio if low is None else low
    high = config.clip_ratio if high is None else high
    if low != high:
        raise Unserved("clip ranges that differ")
    if config.get("clip_ratio_c", 3.0) <= 1:
        raise Unserved("clip_ratio_c of at most 1, which verl refuses")
    return _rows.number("clip_ratio", low)


_HOST = Host(
    "verl",
    (
        Target(
            _FUNCTIONAL,
            "logprobs_from_logits",
            "token_logprob",
            _logprobs_from_logits,
            ("logits", "labels", "inplace_backward"),
        ),
        Target(
            _FUNCTIONAL,
            "entropy_from_logits",
            "token_logprob",
            _entropy_from_logits,
            ("logits",),
        ),
        Target(
            _FUNCTIONAL,
            "entropy_from_logits_with_chunking",
            "token_logprob",
            _entropy_from_logits_with_chunking,
            ("logits", "chunk_size"),
        ),
        Target(_KERNEL, "linear_cross_entropy", "linear_logprob", _linear_cross_entropy),
        Target(
            "verl.utils.experimental.torch_functional",
            "FusedLinearForPPO.forward",
            "linear_logprob",
            _fused_linear_for_ppo,
            ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
        ),
        Target(
            _FUNCTIONAL,
            "masked_whiten",
            "masked_whiten",
            _masked_whiten,
            ("values", "mask", "shift_mean"),
        ),
        Target(
            _ALGOS,
            "compute_gae_advantage_return",
            "gae",
            _compute_gae,
            ("token_level_rewards", "values", "response_mask", "gamma", "lam"),
        ),
        Target(_ALGOS, "POLICY_LOSS_REGISTRY[fastrlhf]", "ppo_loss", _policy_loss, new=True),
    ),
    left_alone={
        f"{_ALGOS}.compute_policy_loss_vanilla": 'the loss "fastrlhf" stands beside it; choose it by '
        "policy_loss.loss_mode",
        f"{_ALGOS}.compute_value_loss": "its clip fraction and its means over sequences are not the op's",
        "verl.utils.megatron.tensor_parallel": "log-probs of logits that are split over ranks",
    },
)
