"""verl 0.9: its log-probs, entropies, fused heads, GAE, whitening and losses on fastrlhf's ops. See `patch`.

Shapes: B sequences, T steps; logits [..., V], labels [...]; hidden [..., H], weight [V, H]; all others [B, T].
"""

import functools
import inspect
import os
import sys

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.integrations import _common
from fastrlhf.integrations._patch import Integration, Patch
from fastrlhf.integrations._targets import Target, Unsupported
from fastrlhf.reference import AGGREGATIONS, LOG_RATIO_LIMIT

_FUNCTIONAL = "verl.utils.torch_functional"
_ALGOS = "verl.trainer.ppo.core_algos"
_KERNEL = "verl.utils.kernel.linear_cross_entropy"


def patch(backend: str = "auto") -> Patch:
    """Runs verl's log-probs, entropies, fused heads, GAE, whitening and losses on fastrlhf's ops.

    Call it in each worker.

    Replaced: `verl.utils.torch_functional.logprobs_from_logits`, `entropy_from_logits`,
    `entropy_from_logits_with_chunking` (`token_logprob`) and `masked_whiten`;
    `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy` and `FusedLinearForPPO.forward` of
    `verl.utils.experimental.torch_functional` (`linear_logprob`); `core_algos.compute_gae_advantage_return` (`gae`) and
    `compute_value_loss` (`ppo_loss`); of verl's policy losses "gspo", "sapo", "gpg" and "cispo" (`ppo_loss`).

    Added: the policy loss "fastrlhf" (`actor.policy_loss.loss_mode=fastrlhf`), which is verl's vanilla loss
    (`ppo_loss`).

    The losses run in one pass forward and backward, with all of verl's aggregation modes, its clip ranges, batch
    info and rollout weights, and with the same metrics. Log-ratios are clamped to +-20 nats as in verl; for "gspo"
    verl clamps their mean to at most 10. Gradients of a mean over no token are 0; its value is NaN, as in verl.

    Results keep verl's dtypes, and the values that verl writes at masked steps.

    verl's own function runs, and the reason is counted in `fallbacks`:

    - fused heads over a process group, with a reduction, with a temperature that is not a number, with Liger as
      the chosen implementation, or in float64;
    - DTensors;
    - GAE and whitening in another dtype than fp32, or of fewer than two unmasked steps (an error in verl);
    - losses of 16-bit tensors or of tensors that differ in dtype, with a mask of other numbers than 0 and 1, with a
      clip range of 0, or where verl raises an error; for "fastrlhf" verl's vanilla loss runs;
    - verl's other policy losses (`report` has the reason for each).

    Args:
        backend: backend of the ops; see `fastrlhf.backends`.

    Returns:
        A handle: a context manager with `unpatch()`, `calls`, `fallbacks` and `report`.

    Raises:
        ImportError: verl is not installed.
        PatchError: a function is missing or has other parameters; nothing is patched.
        RuntimeError: verl is patched with another backend.
    """
    return _INTEGRATION.patch(backend=backend)


def unpatch() -> None:
    """Restores verl's functions and releases all handles."""
    _INTEGRATION.unpatch()


def calls() -> dict[str, int]:
    """verl function -> number of calls that an op served in this process."""
    return _INTEGRATION.calls()


# ---- logits ----


def _logprobs_from_logits(original, backend):
    functional = sys.modules[original.__module__]

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        _common.require_logits(logits, labels)
        flash = functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
        flash = flash and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
        logprob = fastrlhf.token_logprob(
            logits,
            labels,
            # flash attention's cross-entropy ignores the label -100; verl's own code does not.
            mask=labels != -100 if flash else None,
            inplace_backward=flash and bool(inplace_backward),
            backend=backend,
        )
        return logprob if flash else logprob.to(_common.log_softmax_dtype(logits))

    return logprobs_from_logits


def _entropy_from_logits(original, backend):
    def entropy_from_logits(logits):
        _common.require_logits(logits, None)
        return _common.entropy(logits, backend=backend).to(_common.log_softmax_dtype(logits))

    return entropy_from_logits


def _entropy_from_logits_with_chunking(original, backend):
    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        _common.require_logits(logits, None)
        if logits.dim() != 2 or logits.dtype == torch.float64:
            raise Unsupported("logits are not [N, V] of at most 32 bits")
        return _common.entropy(logits, backend=backend)

    return entropy_from_logits_with_chunking


# ---- heads ----


def _linear_cross_entropy(original, backend):
    def linear_cross_entropy(
        hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        if dist_process_group is not None:
            raise Unsupported("the vocabulary is sharded over a process group")
        if not isinstance(reduction, str) or reduction.lower() != "none":
            raise Unsupported(f"reduction={reduction!r}")
        if not isinstance(temperature, float):
            raise Unsupported("temperature is not a float")
        _common.require_dense("hidden states", hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _common.head_logprob(rows, weight, labels.reshape(-1), temperature, backend)

    return linear_cross_entropy


def _fused_linear_for_ppo(original, backend):
    functional = sys.modules[original.__module__]

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        liger = functional._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is not None
        if self.impl_backend != "torch" and liger:
            raise Unsupported(f"impl_backend={self.impl_backend!r} is configured")
        if input_ids.shape != hidden_states.shape[:-1] or hidden_states.dim() not in (2, 3):
            raise Unsupported("hidden states are not [N, H] or [B, T, H] with one id per row")
        logprob, entropy = _common.head_logprob(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature, backend
        )
        return logprob, entropy.to(hidden_states.dtype)

    return forward


# ---- advantages ----

# fp32 only: in fp64, verl still computes the count and the Bessel correction of its whitening in fp32; no op does.
_WHITEN_DTYPES = (torch.float32,)


def _require_two_steps(keep: Tensor) -> int:
    """The number of unmasked steps."""
    count = int(keep.sum())
    if count < 2:
        raise Unsupported("fewer than two unmasked steps, an error in verl")
    return count


def _moments(x: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, 1 / sqrt(var + 1e-8), x - mean) with the moments of the unmasked elements. x is 0 at masked ones."""
    mean = x.sum() / count
    centred = x - mean
    squares = _common.as_numbers(keep, x.dtype).mul_(centred).square_()
    return mean, (squares.sum() / (count - 1) + 1e-8).rsqrt(), centred


def _fill_masked_steps(advantages: Tensor, keep: Tensor) -> Tensor:
    """The advantage of the next unmasked step at each masked step, and 0 after the last, as verl returns them.

    The op returns 0 at masked steps, so advantages change only where an unmasked step follows a masked one. If there
    is none, the argument itself is returned.
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
        _common.require_alike(token_level_rewards, _WHITEN_DTYPES, values=values)
        if token_level_rewards.dim() != 2 or token_level_rewards.shape[1] == 0:
            raise Unsupported("rewards are not [B, T] with T > 0")
        _common.require_fraction("gamma", gamma)
        _common.require_fraction("lam", lam)
        keep = _common.require_binary_mask(response_mask, values)
        count = _require_two_steps(keep)
        with torch.no_grad():
            options = {"gamma": gamma, "lam": lam, "mask": keep, "backend": backend}
            advantages, _ = fastrlhf.gae(token_level_rewards, values, **options)
            mean, scale, centred = _moments(advantages, keep, count)
            filled = _fill_masked_steps(advantages, keep)
            # Return new tensors: the op's outputs share one allocation, all of which a pickle would contain.
            whitened = centred if filled is advantages else filled - mean
            return whitened.mul_(scale), filled + values

    return compute_gae_advantage_return


def _masked_whiten(original, backend):
    def masked_whiten(values, mask, shift_mean=True):
        _common.require_alike(values, _WHITEN_DTYPES)
        _common.require_constants(values=values)
        keep = _common.require_binary_mask(mask, values)
        count = _require_two_steps(keep)
        with torch.no_grad():
            options = {"mask": keep, "shift_mean": bool(shift_mean), "backend": backend}
            whitened = fastrlhf.masked_whiten(values, **options)
            if count == keep.numel():
                return whitened
            # verl also whitens the masked elements, with the moments of the unmasked ones.
            mean, scale, _ = _moments(values.masked_fill(~keep, 0.0), keep, count)
            others = (values - mean) * scale
            return torch.where(keep, whitened, others if shift_mean else others + mean)

    return masked_whiten


# ---- losses ----


def _aggregation(
    mode,
    like,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
    **unknown,
) -> dict:
    """Options of `ppo_loss` for one of verl's modes and its global batch info."""
    if mode not in AGGREGATIONS:
        raise Unsupported(f"loss_agg_mode={mode!r}, an error in verl")
    if unknown:
        raise Unsupported(f"the batch info {', '.join(sorted(unknown))}")
    if like.dim() != 2:
        raise Unsupported("tensors that are not [B, T]")
    options = _common.aggregation(
        mode,
        like,
        ranks=dp_size,
        tokens=batch_num_tokens,
        sequences=global_batch_size,
        length=like.shape[1] if loss_scale_factor is None else loss_scale_factor,
    )
    if "scale" not in options and dp_size > 1:
        raise Unsupported("dp_size without the number in the batch, an error in verl")
    return options


def _clip(config) -> dict:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    low = config.clip_ratio if low is None else low
    high = config.clip_ratio if high is None else high
    return {
        "clip": (
            _common.require_number("clip_ratio_low", low),
            _common.require_number("clip_ratio_high", high),
        )
    }


def _clip_and_dual_clip(config) -> dict:
    bound = _common.require_number("clip_ratio_c", config.get("clip_ratio_c", 3.0), low=1.0)
    return _clip(config) | {"dual_clip": bound}


def _temperatures(config) -> dict:
    return {
        name: _common.require_number(name, getattr(config, name)) for name in ("tau_pos", "tau_neg")
    }


def _policy_loss(objective, settings, original, backend):
    """`settings`: the options of the objective, from verl's config."""
    algos = sys.modules[_ALGOS]
    fallback = original or algos.compute_policy_loss_vanilla
    default_mode = inspect.signature(fallback).parameters["loss_agg_mode"].default

    def compute_policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode=default_mode,
        config=None,
        rollout_is_weights=None,
    ):
        if config is None:
            raise Unsupported("no config, an error in verl")
        with_ratio = objective != "reinforce"  # verl does not look at old_log_prob either
        tokens = {"advantages": advantages} | ({"old_log_prob": old_log_prob} if with_ratio else {})
        _common.require_alike(log_prob, **tokens)
        keep = _common.require_binary_mask(response_mask, log_prob)
        # verl takes the mean over sequences for sapo, whatever the configured mode.
        mode = default_mode if objective == "sapo" else loss_agg_mode
        options = _aggregation(mode, log_prob, **config.global_batch_info)
        if rollout_is_weights is not None:
            per_sequence = getattr(rollout_is_weights, "shape", None) == (log_prob.shape[0], 1)
            like = log_prob[:, :1] if per_sequence else log_prob
            _common.require_alike(like, rollout_is_weights=rollout_is_weights)
            tokens["rollout_is_weights"] = rollout_is_weights
        _common.require_constants(**tokens)
        out = fastrlhf.ppo_loss(
            log_prob,
            tokens.get("old_log_prob"),
            advantages,
            mask=keep,
            objective=objective,
            rollout_weights=rollout_is_weights,
            **settings(config),
            **options,
            backend=backend,
        )
        loss = _common.local_mean(out.loss, keep, options)
        if not with_ratio:
            return loss, {}
        with torch.no_grad():
            # verl reports mean(-log ratio); the op's approx_kl is another estimator.
            kl = old_log_prob - log_prob
            kl = kl if objective == "gspo" else kl.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            kl = algos.verl_F.masked_mean(kl, response_mask)
            zero = torch.zeros_like(kl)  # sapo clips nothing
            clipped, lower = (
                out.metrics.get(name, zero).to(kl.dtype)
                for name in ("clip_fraction", "dual_clip_fraction")
            )
            metrics = torch.stack((clipped, kl, lower)).tolist()  # one transfer from a GPU
        names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return loss, dict(zip(names, metrics, strict=True))

    compute_policy_loss.fallback = fallback
    return compute_policy_loss


def _value_loss(original, backend):
    def compute_value_loss(
        vpreds,
        returns,
        values,
        response_mask,
        cliprange_value,
        loss_agg_mode="token-mean",
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ):
        clip = _common.require_number("cliprange_value", cliprange_value)
        _common.require_alike(vpreds, returns=returns, values=values)
        _common.require_constants(returns=returns, values=values)
        keep = _common.require_binary_mask(response_mask, vpreds)
        batch = dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
        options = _aggregation(loss_agg_mode, vpreds, *batch)
        out = _common.value_loss(
            vpreds, values, returns, mask=keep, clip=clip, backend=backend, **options
        )
        loss = _common.local_mean(out.loss, keep, options)
        return loss, out.metrics["value_clip_fraction"]

    return compute_value_loss


# Why verl's other policy losses stay its own.
_OTHER_LOSSES = {
    "masks tokens by a divergence of probabilities, which no op computes": ("dppo_tv", "dppo_kl"),
    "chooses tokens by a covariance over the batch, in part at random": ("clip_cov", "kl_cov"),
    "clips the log-ratio of each token before their mean over the sequence": ("geo_mean",),
    "its penalty is quadratic in the log-ratio": ("dro",),
    "makes rollout weights and masks for verl's reinforce or vanilla loss": ("bypass_mode",),
}


def _registered(name: str, objective: str, settings, new: bool = False) -> Target:
    """The entry of verl's registry of policy losses."""
    make = functools.partial(_policy_loss, objective, settings)
    parameters = () if new else _POLICY_LOSS
    return Target(_ALGOS, f"POLICY_LOSS_REGISTRY[{name}]", "ppo_loss", make, parameters, new=new)


_POLICY_LOSS = (
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
)

_INTEGRATION = Integration(
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
        Target(
            _KERNEL,
            "linear_cross_entropy",
            "linear_logprob",
            _linear_cross_entropy,
            (
                "ctx",
                "hidden",
                "weight",
                "labels",
                "temperature",
                "reduction",
                "dist_process_group",
            ),
        ),
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
        _registered("fastrlhf", "ppo", _clip_and_dual_clip, new=True),
        _registered("gspo", "gspo", _clip),
        _registered("sapo", "sapo", _temperatures),
        _registered("gpg", "reinforce", lambda config: {}),
        _registered("cispo", "cispo", _clip),
        Target(
            _ALGOS,
            "compute_value_loss",
            "ppo_loss",
            _value_loss,
            (
                "vpreds",
                "returns",
                "values",
                "response_mask",
                "cliprange_value",
                "loss_agg_mode",
                "dp_size",
                "batch_num_tokens",
                "global_batch_size",
                "loss_scale_factor",
            ),
        ),
    ),
    unchanged={
        f"{_ALGOS}.compute_policy_loss_vanilla": 'the loss "fastrlhf" is added beside it; select it with '
        "policy_loss.loss_mode",
        **{
            f"{_ALGOS}.compute_policy_loss_{name}": reason
            for reason, names in _OTHER_LOSSES.items()
            for name in names
        },
        "verl.utils.megatron.tensor_parallel": "log-probs of logits that are sharded over ranks",
    },
)
