"""OpenRLHF's log-probs, entropy, GAE and its policy, value and pairwise losses on fastrlhf's ops.

fastrlhf.integrations.openrlhf.patch()  # in each process that trains or makes experiences

Shapes: B sequences, A actions; logits [..., V], labels [...]; [B, A] else.
"""

import functools

import torch
from torch import Tensor

from fastrlhf.integrations import _rows
from fastrlhf.integrations._patch import Host, Patch, Target, Unserved
from fastrlhf.integrations.trl import pairwise_loss
from fastrlhf.ops.gae import gae
from fastrlhf.ops.ppo_loss import ppo_loss
from fastrlhf.ops.token_logprob import token_logprob

_UTILS, _LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


def patch(backend: str = "auto") -> Patch:
    """Run OpenRLHF's row functions, its GAE and its PPO and reward losses on fastrlhf's ops.

    Losses that were made before gain too. Results keep OpenRLHF's dtypes; logits are divided by a
    temperature in place, as OpenRLHF does.

    Args:
        backend: of the ops; see `fastrlhf.backends`.

    Returns:
        The handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: OpenRLHF is not installed.
        HostMoved: one of its functions is not where, or not what, it was; nothing is patched then.
        RuntimeError: patched already with another backend.

    Calls that no op serves run OpenRLHF's own function and are counted in `fallbacks`: GSPO, unequal
    clip ranges, the rollout correction, means over sequences, 16-bit step tensors, losses of pairs
    whose shapes differ.
    """
    return _HOST.patch(backend=backend)


def unpatch() -> None:
    """Put OpenRLHF's own functions back, whoever holds it patched."""
    _HOST.unpatch()


def calls() -> dict[str, int]:
    """OpenRLHF function -> calls that our op served in this process."""
    return _HOST.calls()


# ---- logits ----


@functools.cache
def _flash_cross_entropy() -> bool:
    """Whether OpenRLHF's rows come from flash attention, which skips the label -100."""
    try:
        from flash_attn.ops.triton import cross_entropy  # noqa: F401
    except ImportError:
        return False
    return True


def _log_probs_from_logits(original, backend):
    def log_probs_from_logits(logits, labels, temperature=1.0):
        _rows.served_rows(logits, labels)
        if _rows.number("temperature", temperature) != 1.0:
            logits.div_(temperature)
        wide = logits.dtype in _rows.STEP_DTYPES
        mask = labels != -100 if wide and _flash_cross_entropy() else None
        logprob = token_logprob(logits, labels, mask=mask, backend=backend)
        return logprob if wide else logprob.to(_rows.log_softmax_dtype(logits))

    return log_probs_from_logits


def _compute_entropy(original, backend):
    def compute_entropy(logits):
        _rows.served_rows(logits, None)
        return _rows.entropy(logits, backend).to(_rows.log_softmax_dtype(logits))

    return compute_entropy


# ---- advantages ----


def _get_advantages_and_returns(original, backend):
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
        _rows.same_steps(values, rewards=rewards)
        if values.dim() != 2 or values.shape[1] == 0:
            raise Unserved("values that are not [B, A] with an action")
        _rows.fraction("gamma", gamma)
        _rows.fraction("lambd", lambd)
        with torch.no_grad():
            if action_mask is not None:
                mask_dtypes = (torch.bool, torch.int32, torch.int64, values.dtype)
                _rows.plain("action_mask", action_mask, mask_dtypes)
                weights = _rows.weights(action_mask, values.dtype)
                values, rewards = weights * values, weights * rewards
            # The op gets no mask: OpenRLHF lets masked steps pass as steps of reward and value 0.
            advantages, _ = gae(rewards, values, gamma=gamma, lam=lambd, backend=backend)
            return advantages, advantages + values

    return get_advantages_and_returns


# ---- losses ----


def _tokens_mean(self, like, action_mask, batch_num_tokens):
    """The mask as bool (or None), unless the loss is a mean over something else than tokens."""
    if not self.token_level_loss:
        raise Unserved("a mean over sequences (token_level_loss=False)")
    if action_mask is None:
        if batch_num_tokens is not None:
            raise Unserved("batch_num_tokens without an action_mask")
        return None
    return _rows.keep(action_mask, like)


def _shared(mean, keep, dp_size=1, batch_num_tokens=None) -> Tensor:
    """The mean over this call's tokens as this call's part of a batch; of no token it is NaN."""
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
            raise Unserved(f"policy_loss_type={self.policy_loss_type!r}")
        if self.is_correction_level != "off":
            raise Unserved("the rollout correction is on")
        if self.clip_eps_low != self.clip_eps_high:
            raise Unserved("clip ranges that differ")
        clip = _rows.number("clip_eps_low", self.clip_eps_low)
        _rows.same_steps(log_probs, old_log_probs=old_log_probs, advantages=advantages)
        _rows.constants(old_log_probs=old_log_probs, advantages=advantages)
        keep = _tokens_mean(self, log_probs, action_mask, batch_num_tokens)
        out = ppo_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask=keep,
            clip=clip,
            dual_clip=self.dual_clip,
            backend=backend,
        )
        loss = _shared(out.loss, keep, dp_size, batch_num_tokens)
        with torch.no_grad():
            # OpenRLHF reports the mean of -log ratio; the op's approx_kl is another estimate.
            kl = old_log_probs - log_probs
            ppo_kl = kl.mean() if keep is None else (kl * action_mask).sum() / action_mask.sum()
            clipped = out.metrics["clip_fraction"]
            if keep is not None:
                wide = action_mask.is_floating_point()
                dtype = action_mask.dtype if wide else clipped.dtype
                clipped = _shared(clipped, keep).to(dtype)
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
            clip = _rows.number("clip_eps", clip)
            others["old_values"] = old_values
        _rows.same_steps(values, **others)
        _rows.constants(**others)
        keep = _tokens_mean(self, values, action_mask, batch_num_tokens)
        # The policy term of advantages 0 is 0: one expanded zero stands for its three tensors.
        zero = torch.zeros((), dtype=values.dtype, device=values.device).expand(values.shape)
        out = ppo_loss(
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
        return _shared(out.loss, keep, dp_size, batch_num_tokens)

    return forward


def _pairwise(original, backend):
    def forward(self, chosen_reward, reject_reward, margin=None):
        others = {"rejected rewards": reject_reward}
        if margin is not None:
            others["margins"] = margin
        _rows.plain("chosen rewards", chosen_reward)
        for name, other in others.items():
            _rows.plain(name, other, (chosen_reward.dtype,))
            if other.shape != chosen_reward.shape or other.device != chosen_reward.device:
                raise Unserved(f"{name} of another shape or device")
        if chosen_reward.numel() == 0:
            raise Unserved("no pairs")
        # Margins are taken off before the op rounds: in 16 bits its input would be rounded once more.
        dtype = chosen_reward.dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        parts = [chosen_reward, reject_reward] + ([] if margin is None else [margin])
        loss = pairwise_loss(*(x.reshape(-1).to(wide) for x in parts), backend=backend)
        return loss.to(dtype)

    return forward


_HOST = Host(
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
    left_alone={
        f"{_LOSS}.LogExpLoss": "log(1 + exp(x)) without logsigmoid's range, which no op computes",
        f"{_UTILS}.compute_approx_kl": "clamps its estimates to 10 nats, which no op does",
        f"{_MAKER}.RemoteExperienceMaker.get_cumulative_returns": "REINFORCE's returns, without values",
    },
)
