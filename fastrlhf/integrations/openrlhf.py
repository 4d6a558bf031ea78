"""OpenRLHF 0.11: its log-probs, entropy, GAE, and policy, value and pairwise losses on fastrlhf's ops. See `patch`.

Shapes: B sequences, A actions; logits [..., V], labels [...]; all others [B, A].
"""

import functools

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

    OpenRLHF's own function runs, and the reason is counted in `fallbacks`, for GSPO, clip ranges that differ, the
    rollout correction, means over sequences, 16-bit step tensors, and pairs whose shapes differ.

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


def _token_mask(self, like, action_mask, batch_num_tokens):
    """The mask as bool, or None; Unsupported unless the loss is a mean over tokens."""
    if not self.token_level_loss:
        raise Unsupported("a mean over sequences (token_level_loss=False)")
    if action_mask is None:
        if batch_num_tokens is not None:
            raise Unsupported("batch_num_tokens without an action_mask")
        return None
    return _common.require_binary_mask(action_mask, like)


def _share_of_batch(mean, keep, dp_size=1, batch_num_tokens=None) -> Tensor:
    """Rescales a mean over this call's tokens to this call's share of the mean over the batch.

    mean * count / batch_num_tokens * dp_size; without batch_num_tokens the mean itself. NaN if no token counts.
    """
    if keep is None:
        return mean
    count = keep.sum()
    if batch_num_tokens is None:
        return mean * count / count
    return mean * count / batch_num_tokens * dp_size


def _policy_loss(original, backend):
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
        if self.policy_loss_type != "ppo":
            raise Unsupported(f"policy_loss_type={self.policy_loss_type!r}")
        if self.is_correction_level != "off":
            raise Unsupported("the rollout correction is on")
        if self.clip_eps_low != self.clip_eps_high:
            raise Unsupported("clip ranges that differ")
        clip = _common.require_number("clip_eps_low", self.clip_eps_low)
        _common.require_alike(log_probs, old_log_probs=old_log_probs, advantages=advantages)
        _common.require_constants(old_log_probs=old_log_probs, advantages=advantages)
        keep = _token_mask(self, log_probs, action_mask, batch_num_tokens)
        out = fastrlhf.ppo_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask=keep,
            clip=clip,
            dual_clip=self.dual_clip,
            backend=backend,
        )
        loss = _share_of_batch(out.loss, keep, dp_size, batch_num_tokens)
        with torch.no_grad():
            # OpenRLHF reports mean(-log ratio); the op's approx_kl is another estimator.
            kl = old_log_probs - log_probs
            ppo_kl = kl.mean() if keep is None else (kl * action_mask).sum() / action_mask.sum()
            clipped = out.metrics["clip_fraction"]
            if keep is not None:
                wide = action_mask.is_floating_point()
                dtype = action_mask.dtype if wide else clipped.dtype
                clipped = _share_of_batch(clipped, keep).to(dtype)
        return loss, clipped, ppo_kl, None, None

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
        keep = _token_mask(self, values, action_mask, batch_num_tokens)
        # With advantages of 0 the policy term is 0. One expanded zero serves as all three of its tensors.
        zero = torch.zeros((), dtype=values.dtype, device=values.device).expand(values.shape)
        out = fastrlhf.ppo_loss(
            zero,
            zero,
            zero,
            values=values,
            old_values=others.get("old_values"),
            returns=returns,
            mask=keep,
            value_clip=clip,
            value_coef=1.0,
            backend=backend,
        )
        return _share_of_batch(out.loss, keep, dp_size, batch_num_tokens)

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
