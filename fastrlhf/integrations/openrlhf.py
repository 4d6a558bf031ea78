"""OpenRLHF 0.11: its log-probs, entropy, GAE, and policy, value and pairwise losses on fastrlhf's ops. See `patch`.

Shapes: B sequences, A actions; logits [..., V], labels [...]; all others [B, A].
"""

import functools
import sys

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.integrations import _common
from fastrlhf.integrations._patch import Integration, Patch
from fastrlhf.integrations._targets import Target, Unsupported

_UTILS, _LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


def patch(backend: str = "auto") -> Patch:
    """Runs OpenRLHF's log-probs, entropy, GAE and losses on fastrlhf's ops.

    Call it in each process that trains or makes experiences. Existing loss objects use the ops too.

    Replaced: `openrlhf.models.utils.log_probs_from_logits` and `compute_entropy` (`token_logprob`),
    `RemoteExperienceMaker.get_advantages_and_returns` (`gae`), and in `openrlhf.models.loss` `PolicyLoss.forward`,
    `ValueLoss.forward` (`ppo_loss`) and `PairWiseLoss.forward` (`ranking_loss`).

    Results keep OpenRLHF's dtypes and conventions: logits are divided by the temperature in place, and a masked action
    counts in GAE as a step with reward 0 and value 0.

    `PolicyLoss` is served with every argument of its constructor: "ppo" and "gspo", both means, clip ranges that
    differ, the dual clip, and the rollout correction. The op computes the correction by the ratio of tokens; the
    weights of its other gates are computed as in OpenRLHF, and the op takes them. For "gspo" the mean log-ratio of a
    sequence is clamped to +-20 nats, which OpenRLHF does not do. Gradients of a mean over no token are 0, where
    OpenRLHF's are NaN; its value is NaN in both.

    OpenRLHF's own function runs, and the reason is counted in `fallbacks`, for 16-bit step tensors, a mask of other
    numbers than 0 and 1, a clip range of 0, a threshold whose bounds fall, pairs whose shapes differ, and where
    OpenRLHF raises an error.

    Args:
        backend: backend of the ops; see `fastrlhf.backends`.

    Returns:
        A handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: OpenRLHF is not installed.
        PatchError: a function is missing or has other parameters; nothing is patched.
        RuntimeError: OpenRLHF is patched with another backend.
    """
    return _INTEGRATION.patch(backend=backend)


def unpatch() -> None:
    """Restores OpenRLHF's functions and releases all handles."""
    _INTEGRATION.unpatch()


def calls() -> dict[str, int]:
    """OpenRLHF function -> number of calls that an op served in this process."""
    return _INTEGRATION.calls()


# ---- logits ----


@functools.cache
def _flash_cross_entropy() -> bool:
    """Whether OpenRLHF uses flash attention's cross-entropy, which ignores the label -100."""
    try:
        from flash_attn.ops.triton import cross_entropy  # noqa: F401
    except ImportError:
        return False
    return True


def _log_probs_from_logits(original, backend):
    def log_probs_from_logits(logits, labels, temperature=1.0):
        _common.require_logits(logits, labels)
        if _common.require_number("temperature", temperature) != 1.0:
            logits.div_(temperature)
        wide = logits.dtype in _common.STEP_DTYPES
        mask = labels != -100 if wide and _flash_cross_entropy() else None
        logprob = fastrlhf.token_logprob(logits, labels, mask=mask, backend=backend)
        return logprob if wide else logprob.to(_common.log_softmax_dtype(logits))

    return log_probs_from_logits


def _compute_entropy(original, backend):
    def compute_entropy(logits):
        _common.require_logits(logits, None)
        return _common.entropy(logits, backend=backend).to(_common.log_softmax_dtype(logits))

    return compute_entropy


# ---- advantages ----


def _get_advantages_and_returns(original, backend):
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
        _common.require_alike(values, rewards=rewards)
        if values.dim() != 2 or values.shape[1] == 0:
            raise Unsupported("values are not [B, A] with A > 0")
        _common.require_fraction("gamma", gamma)
        _common.require_fraction("lambd", lambd)
        with torch.no_grad():
            if action_mask is not None:
                mask_dtypes = (torch.bool, torch.int32, torch.int64, values.dtype)
                _common.require_dense("action_mask", action_mask, mask_dtypes)
                weights = _common.as_numbers(action_mask, values.dtype)
                values, rewards = weights * values, weights * rewards
            # No mask for the op: OpenRLHF counts masked actions as steps with reward 0 and value 0.
            advantages, _ = fastrlhf.gae(rewards, values, gamma=gamma, lam=lambd, backend=backend)
            return advantages, advantages + values

    return get_advantages_and_returns


# ---- losses ----


def _mask_and_aggregation(loss, like, action_mask, batch, by_sequence=False):
    """(the mask as bool or None, options of `ppo_loss`) of the loss's mean over tokens or over sequences.

    `batch`: dp_size, batch_num_tokens, global_batch_size. `by_sequence`: the mask is needed in any case.
    """
    ranks, tokens, sequences = batch
    mode = "token-mean" if loss.token_level_loss else "seq-mean-token-mean"
    options = _common.aggregation(mode, like, ranks=ranks, tokens=tokens, sequences=sequences)
    by_sequence |= not loss.token_level_loss
    if action_mask is None:
        if by_sequence or "scale" in options:
            raise Unsupported("no action_mask, an error in OpenRLHF")
        return None, options
    keep = _common.require_binary_mask(action_mask, like)
    if by_sequence and like.dim() != 2:
        raise Unsupported("tensors that are not [B, A]")
    return keep, options


def _as_mean(fraction, keep, action_mask) -> Tensor:
    """A fraction among the op's metrics with the dtype of OpenRLHF's masked mean, and NaN if no token counts."""
    if keep is None:
        return fraction
    count = keep.sum()
    return (fraction * (count / count)).to(torch.promote_types(fraction.dtype, action_mask.dtype))


def _with_mean_gradient(log_probs: Tensor, keep: Tensor) -> Tensor:
    """log_probs, whose gradients are averaged over the tokens of each sequence that count.

    The derivative of OpenRLHF's ratio of a sequence goes to all of its tokens. That of the op's gspo goes to the token
    whose loss it is; the two differ where the advantages within a sequence do.
    """
    mean = log_probs.masked_fill(~keep, 0.0).sum(-1, keepdim=True)
    mean = mean / keep.sum(-1, keepdim=True).clamp(min=1)
    return log_probs.detach() + (mean - mean.detach())


def _bounds(low, high) -> tuple[float, float | None]:
    """The op's bounds of the weights."""
    low = max(low, 0.0)
    if low > high:
        raise Unsupported("is_correction_threshold falls")
    return low, None if high == float("inf") else _common.require_number("the threshold", high)


def _correction(loss, old_log_probs, rollout_log_probs, action_mask):
    """(options of `ppo_loss`, share of dropped units or None) of the rollout correction.

    The op computes a ratio of tokens and its bounds, and counts those outside. A gate on anything else is OpenRLHF's
    own: its weights are computed here.
    """
    if loss.is_correction_level == "token" and loss.is_correction_gating == "ratio":
        return {
            "rollout_logprob": rollout_log_probs,
            "rollout_mode": "truncate" if loss.is_correction_mode == "clip" else "mask",
            "rollout_bounds": _bounds(*loss.is_correction_threshold),
        }, None
    masked_mean = sys.modules[_LOSS].masked_mean
    log_ratio = old_log_probs - rollout_log_probs
    if loss.is_correction_gating == "ratio":
        statistic = log_ratio
    else:
        # Probabilities of the sampled token under the rollout's policy and the trained one.
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout_log_probs, old_log_probs))
        if loss.is_correction_gating == "tv":
            statistic = (p - q).abs()
        else:
            statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    by_sequence = loss.is_correction_level == "seq"
    if by_sequence:
        statistic = masked_mean(statistic, action_mask, dim=-1).unsqueeze(-1)
    if loss.is_correction_gating == "ratio":
        statistic = statistic.exp()
    low, high = loss.is_correction_threshold
    dropped = ~((statistic >= low) & (statistic <= high))
    weights = log_ratio.exp().masked_fill(dropped, 0.0)
    dropped = dropped.float()
    share = dropped.mean() if by_sequence else masked_mean(dropped, action_mask)
    return {"rollout_weights": weights}, share


def _policy_loss(original, backend):
    masked_mean = sys.modules[_LOSS].masked_mean

    def forward(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        gspo = self.policy_loss_type == "gspo"
        if not gspo and self.policy_loss_type != "ppo":
            raise Unsupported(f"policy_loss_type={self.policy_loss_type!r}, an error in OpenRLHF")
        corrected = self.is_correction_level != "off"
        clip = tuple(
            _common.require_number(name, getattr(self, name))
            for name in ("clip_eps_low", "clip_eps_high")
        )
        dual = self.dual_clip
        dual = None if dual is None else _common.require_number("dual_clip", dual, low=1.0)
        constants = {"old_log_probs": old_log_probs, "advantages": advantages}
        if corrected:
            constants["rollout_log_probs"] = rollout_log_probs
        _common.require_alike(log_probs, **constants)
        _common.require_constants(**constants)
        batch = dp_size, batch_num_tokens, global_batch_size
        keep, options = _mask_and_aggregation(self, log_probs, action_mask, batch, gspo)
        policy, old, vllm_kl, share = log_probs, old_log_probs, None, None
        if gspo:
            options["objective"] = "gspo"
            policy = _with_mean_gradient(log_probs, keep)
            # With the correction on, OpenRLHF's ratio of a sequence is that to the rollout's policy.
            old = rollout_log_probs if corrected else old_log_probs
        elif corrected:
            vllm_kl = masked_mean(rollout_log_probs - old_log_probs, action_mask)
            given, share = _correction(self, old_log_probs, rollout_log_probs, action_mask)
            options |= given
        out = fastrlhf.ppo_loss(
            policy,
            old,
            advantages,
            mask=keep,
            clip=clip,
            dual_clip=dual,
            backend=backend,
            **options,
        )
        with torch.no_grad():
            # OpenRLHF reports mean(-log ratio); the op's approx_kl is another estimator.
            ppo_kl = masked_mean(old_log_probs - log_probs, action_mask)
            clipped = _as_mean(out.metrics["clip_fraction"], keep, action_mask)
            if vllm_kl is not None and share is None:
                share = _as_mean(out.metrics["rollout_outside_fraction"], keep, action_mask)
        return _common.local_mean(out.loss, keep, options), clipped, ppo_kl, vllm_kl, share

    return forward


def _value_loss(original, backend):
    def forward(
        self,
        values,
        old_values,
        returns,
        action_mask=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        clip = self.clip_eps
        others = {"returns": returns}
        if clip is not None:
            clip = _common.require_number("clip_eps", clip)
            others["old_values"] = old_values
        _common.require_alike(values, **others)
        _common.require_constants(**others)
        batch = dp_size, batch_num_tokens, global_batch_size
        keep, options = _mask_and_aggregation(self, values, action_mask, batch)
        old = others.get("old_values")
        out = _common.value_loss(
            values, old, returns, mask=keep, clip=clip, backend=backend, **options
        )
        return _common.local_mean(out.loss, keep, options)

    return forward


def _pairwise(original, backend):
    def forward(self, chosen_reward, reject_reward, margin=None):
        others = {"rejected rewards": reject_reward}
        if margin is not None:
            others["margins"] = margin
        _common.require_dense("chosen rewards", chosen_reward)
        for name, other in others.items():
            _common.require_dense(name, other, (chosen_reward.dtype,))
            if other.shape != chosen_reward.shape or other.device != chosen_reward.device:
                raise Unsupported(f"{name} of another shape or device")
        if chosen_reward.numel() == 0:
            raise Unsupported("no pairs")
        # Subtract the margins in fp32: in 16 bits the difference would be rounded before the op.
        dtype = chosen_reward.dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        parts = [chosen_reward, reject_reward] + ([] if margin is None else [margin])
        loss = _common.pairwise_loss(*(x.reshape(-1).to(wide) for x in parts), backend=backend)
        return loss.to(dtype)

    return forward


_INTEGRATION = Integration(
    "openrlhf",
    (
        Target(
            _UTILS,
            "log_probs_from_logits",
            "token_logprob",
            _log_probs_from_logits,
            ("logits", "labels", "temperature"),
        ),
        Target(_UTILS, "compute_entropy", "token_logprob", _compute_entropy, ("logits",)),
        Target(
            _MAKER,
            "RemoteExperienceMaker.get_advantages_and_returns",
            "gae",
            _get_advantages_and_returns,
            ("self", "values", "rewards", "action_mask", "gamma", "lambd"),
        ),
        Target(
            _LOSS,
            "PolicyLoss.forward",
            "ppo_loss",
            _policy_loss,
            (
                "self",
                "log_probs",
                "old_log_probs",
                "advantages",
                "action_mask",
                "rollout_log_probs",
                "dp_size",
                "batch_num_tokens",
                "global_batch_size",
            ),
        ),
        Target(
            _LOSS,
            "ValueLoss.forward",
            "ppo_loss",
            _value_loss,
            (
                "self",
                "values",
                "old_values",
                "returns",
                "action_mask",
                "dp_size",
                "batch_num_tokens",
                "global_batch_size",
            ),
        ),
        Target(
            _LOSS,
            "PairWiseLoss.forward",
            "ranking_loss",
            _pairwise,
            ("self", "chosen_reward", "reject_reward", "margin"),
        ),
    ),
    unchanged={
        f"{_LOSS}.LogExpLoss": "log(1 + exp(x)), which overflows where logsigmoid does not; no op computes it",
        f"{_UTILS}.compute_approx_kl": "clamps its estimates to [-10, 10] nats, which no op does",
        f"{_MAKER}.RemoteExperienceMaker.get_cumulative_returns": "returns of REINFORCE, which need no values",
    },
)
