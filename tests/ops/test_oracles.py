"""Our ops against other people's functions: torch's, TRL's and verl's, imported from their packages.

Values and gradients on random numbers, masks with holes, ragged packed lengths. tests/_support/oracles.py says how
they are loaded and what the bar is. B sequences, T steps, N tokens, V vocabulary, H hidden, K completions.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastrlhf
from _support.logit_cases import (
    DEVICE,
    DTYPES,
    each_backend,
    generator,
    randint,
    randn,
)
from _support.oracles import Batch, VerlActorConfig, compare, trl_function, verl

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_seed = pytest.mark.parametrize("seed", range(4))
each_layout = pytest.mark.parametrize("layout", ["mask", "cu_seqlens"])


# ---------------------------------------------------------------------------------------------
# log-probabilities


def torch_logprob(logits, targets):
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)


def torch_cross_entropy(logits, targets):
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(
        targets.shape
    )


def trl_logprob(logits, targets):
    return trl_function("selective_log_softmax")(logits, targets)


def trl_logprob_entropy(logits, targets):
    return trl_function("selective_log_softmax_and_entropy")(logits, targets)


def trl_two_calls(logits, targets):
    logprob = trl_function("selective_log_softmax")(logits, targets)
    return logprob, trl_function("entropy_from_logits")(logits)


def verl_logprob(logits, targets):
    return verl().torch_functional.logprobs_from_logits(logits, targets)


def verl_logprob_entropy(logits, targets):
    functional = verl().torch_functional
    return verl_logprob(logits, targets), functional.entropy_from_logits(logits)


def torch_categorical(logits, targets):
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(targets), distribution.entropy()


LOGPROB = [torch_logprob, torch_cross_entropy, trl_logprob, verl_logprob]
LOGPROB_ENTROPY = [torch_categorical, trl_logprob_entropy, trl_two_calls, verl_logprob_entropy]


def logit_inputs(dtype, vocab=1037, shape=(3, 4)):
    """Logits that are an even view of wider rows would hide strides; these rows are odd."""
    logits = randn(*shape, vocab, seed=1, dtype=dtype, scale=3.0)
    return [logits, randint(vocab, shape, seed=2)]


@each_backend("token_logprob")
@each_dtype
@pytest.mark.parametrize("oracle", LOGPROB)
def test_token_logprob(backend, dtype, oracle):
    op = functools.partial(fastrlhf.token_logprob, backend=backend)
    compare(op, oracle, logit_inputs(dtype), backend)


@each_backend("token_logprob")
@each_dtype
@pytest.mark.parametrize("oracle", LOGPROB_ENTROPY)
def test_token_logprob_and_entropy(backend, dtype, oracle):
    op = functools.partial(fastrlhf.token_logprob, return_entropy=True, backend=backend)
    compare(op, oracle, logit_inputs(dtype), backend)


@each_backend("token_logprob")
def test_token_logprob_temperature_and_mask(backend):
    inputs = logit_inputs(torch.float32)
    keep = torch.rand(inputs[1].shape, generator=generator(3)) < 0.6
    options = {"temperature": 0.7}

    def trl(logits, targets):
        function = trl_function("selective_log_softmax_and_entropy")
        return function(logits, targets, row_mask=keep, **options)

    def ours(logits, targets):
        return fastrlhf.token_logprob(
            logits,
            targets,
            mask=keep.to(logits.device),
            return_entropy=True,
            backend=backend,
            **options,
        )

    compare(ours, trl, inputs, backend)


def linear_inputs(dtype):
    n, h, v = 9, 24, 517
    hidden, weight = randn(n, h, seed=4, dtype=dtype), randn(v, h, seed=5, dtype=dtype, scale=0.5)
    return [hidden, weight, randint(v, (n,), seed=6)]


@each_backend("linear_logprob")
@each_dtype
def test_linear_logprob_is_trls_chunked_head(backend, dtype):
    """With bias, temperature and soft-cap; chunks of 100 of 517 words. TRL sums in fp32 whatever the dtype."""

    def trl(hidden, weight, targets, bias):
        head = trl_function("ChunkedLogProbFunction", "trl.kernels")
        return head.apply(hidden, weight, bias, targets, 0.8, 100, 20.0)[:2]

    def ours(hidden, weight, targets, bias):
        options = {"temperature": 0.8, "softcap": 20.0, "return_entropy": True, "backend": backend}
        return fastrlhf.linear_logprob(hidden, weight, targets, bias=bias, **options)

    def exact(hidden, weight, targets, bias):
        logits = 20 * torch.tanh((hidden @ weight.T + bias) / 20)
        return torch_categorical(logits / 0.8, targets)

    inputs = [*linear_inputs(dtype), randn(517, seed=7, dtype=dtype)]
    compare(ours, trl, inputs, backend, truth=exact)


@each_backend("linear_cross_entropy")
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_torchs(backend, dtype, reduction):
    hidden, weight, targets = linear_inputs(dtype)
    targets[2] = targets[5] = -100

    def of_torch(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)

    op = functools.partial(fastrlhf.linear_cross_entropy, reduction=reduction, backend=backend)
    compare(op, of_torch, [hidden, weight, targets], backend)


# ---------------------------------------------------------------------------------------------
# sequences: verl's layout is [B, T] with a 0-1 mask


@each_backend("masked_whiten")
@each_dtype
@each_layout
@each_seed
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_is_verls(backend, dtype, layout, seed, shift_mean):
    batch = Batch(seed, layout)

    def of_verl(x):
        whiten = verl().torch_functional.masked_whiten
        return whiten(x, batch.floats(x.dtype), shift_mean=shift_mean)[batch.keep]

    def ours(x):
        return batch.ours(fastrlhf.masked_whiten, backend, x.detach(), shift_mean=shift_mean)

    compare(ours, lambda x: of_verl(x.detach()), [batch.draw(dtype)], backend)


@each_backend("kl_reward")
@each_dtype
@each_layout
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_reward_is_verls(backend, dtype, layout, estimator):
    batch = Batch(11, layout)
    score = randn(batch.sequences, seed=7)
    inputs = [batch.draw(dtype, 2.0), batch.draw(dtype, 2.0), score]

    def of_verl(logprob, ref_logprob, score):
        algos = verl().core_algos
        kl = algos.kl_penalty(logprob, ref_logprob, estimator)
        # compute_rewards takes the difference of two log-probs: kl and nothing give kl back.
        nothing = torch.zeros_like(kl)
        scores = batch.scores_at_last_token(score)
        rewards = algos.compute_rewards(scores, kl, nothing, 0.05)
        return rewards.detach()[batch.keep], kl.detach()[batch.keep]

    def ours(*tensors):
        tensors = [t.detach() for t in tensors]
        return batch.ours(fastrlhf.kl_reward, backend, *tensors, beta=0.05, estimator=estimator)

    compare(ours, of_verl, inputs, backend)


GAMMA_LAM = [(1.0, 0.95), (0.99, 0.9), (0.97, 1.0), (0.9, 0.0)]


@each_backend("gae")
@each_dtype
@each_layout
@each_seed
def test_gae_is_verls(backend, dtype, layout, seed):
    """Whitened advantages, and raw returns; carried through holes of the mask."""
    batch = Batch(seed, layout)
    gamma, lam = GAMMA_LAM[seed]

    def of_verl(rewards, values):
        mask = batch.floats(rewards.dtype)
        out = verl().core_algos.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
        return tuple(o[batch.keep] for o in out)

    def ours(rewards, values):
        tensors = rewards.detach(), values.detach()
        return batch.ours(fastrlhf.gae, backend, *tensors, gamma=gamma, lam=lam, whiten=True)

    detached = lambda *tensors: of_verl(*(t.detach() for t in tensors))  # noqa: E731
    compare(ours, detached, [batch.draw(dtype), batch.draw(dtype)], backend)


@each_backend("kl_gae")
@each_dtype
@each_layout
@each_seed
def test_kl_gae_is_verls_chain(backend, dtype, layout, seed):
    batch = Batch(20 + seed, layout)
    gamma, lam = GAMMA_LAM[seed]
    score = randn(batch.sequences, seed=8)
    inputs = [batch.draw(dtype), batch.draw(dtype), score, batch.draw(dtype)]

    def of_verl(logprob, ref_logprob, score, values):
        algos, mask = verl().core_algos, batch.floats(logprob.dtype)
        scores = batch.scores_at_last_token(score)
        rewards = algos.compute_rewards(scores, logprob, ref_logprob, 0.1).detach()
        out = algos.compute_gae_advantage_return(rewards, values.detach(), mask, gamma, lam)
        return tuple(o[batch.keep] for o in (*out, rewards))

    def ours(*tensors):
        tensors = [t.detach() for t in tensors]
        options = {"beta": 0.1, "gamma": gamma, "lam": lam, "whiten": True}
        return batch.ours(fastrlhf.kl_gae, backend, *tensors, **options)[:3]

    compare(ours, of_verl, inputs, backend)


# ---------------------------------------------------------------------------------------------
# losses


@each_backend("ppo_loss")
@each_dtype
@each_layout
@each_seed
def test_ppo_loss_is_verls(backend, dtype, layout, seed):
    """Dual clip, clipped values: loss, both gradients, and the metrics that both report."""
    batch = Batch(30 + seed, layout)
    old = batch.draw(scale=1.0)
    # Ratios on both sides of both clips; verl has no masked entry to step over in its own loss.
    logprob = old + randn(*old.shape, seed=40 + seed, scale=0.8)
    constants = [old, batch.draw(), batch.draw(), batch.draw()]
    old, advantages, old_values, returns = (t.to(dtype) for t in constants)
    metrics = {}

    def of_verl(logprob, values):
        algos, mask = verl().core_algos, batch.floats(logprob.dtype)
        of_type = lambda t: t.to(logprob.dtype)  # noqa: E731
        policy, metrics["theirs"] = algos.compute_policy_loss_vanilla(
            of_type(old),
            logprob,
            of_type(advantages),
            mask,
            config=VerlActorConfig(clip=0.2, dual_clip=1.5),
        )
        value, metrics["value clips"] = algos.compute_value_loss(
            values, of_type(returns), of_type(old_values), mask, cliprange_value=0.3
        )
        return policy + 0.7 * value

    def ours(logprob, values):
        device = DEVICE[backend]
        of_layout = lambda t: batch.into_layout(t.to(device))  # noqa: E731
        out = fastrlhf.ppo_loss(
            *map(of_layout, (logprob, old, advantages)),
            values=of_layout(values),
            old_values=of_layout(old_values),
            returns=of_layout(returns),
            mask=batch.keep.to(device) if layout == "mask" else None,
            dual_clip=1.5,
            value_clip=0.3,
            value_coef=0.7,
            backend=backend,
        )
        metrics["ours"] = out.metrics
        return out.loss

    values = old_values.float().masked_fill(~batch.keep, 0) + randn(*old.shape, seed=50 + seed)
    compare(ours, of_verl, [logprob.to(dtype), values.to(dtype)], backend)
    clip_fraction = metrics["ours"]["clip_fraction"].item()
    value_clip_fraction = metrics["ours"]["value_clip_fraction"].item()
    assert clip_fraction == pytest.approx(metrics["theirs"]["actor/pg_clipfrac"], abs=1e-6)
    assert value_clip_fraction == pytest.approx(metrics["value clips"].item(), abs=1e-6)
    assert min(clip_fraction, value_clip_fraction) > 0.05  # the clips were met
    assert metrics["theirs"]["actor/pg_clipfrac_lower"] > 0


@each_backend("ranking_loss")
@each_dtype
def test_ranking_loss_of_pairs_is_logsigmoid(backend, dtype):
    """K = 2: the pairwise loss of every reward trainer, better first or last."""
    pairs = 37
    scores = randn(2 * pairs, seed=60, dtype=dtype, scale=2.0)
    first_is_better = randint(2, (pairs,), seed=61).bool()
    ranks = torch.stack([2 - first_is_better.long(), 1 + first_is_better.long()], 1).flatten()
    groups = torch.arange(0, 2 * pairs + 1, 2, dtype=torch.int32)

    def of_torch(scores):
        first, second = scores.view(-1, 2).T
        better = torch.where(first_is_better, first, second)
        worse = torch.where(first_is_better, second, first)
        return -F.logsigmoid(better - worse).mean()

    def ours(scores):
        on = [t.to(scores.device) for t in (ranks, groups)]
        return fastrlhf.ranking_loss(scores, *on, backend=backend)

    compare(ours, of_torch, [scores], backend)


@each_backend("ranking_loss")
@pytest.mark.parametrize("completions", [3, 4, 9])
def test_ranking_loss_of_many_is_the_mean_over_pairs(backend, completions):
    """Ranked lists without ties: binary cross-entropy of all ordered pairs, by torch."""
    prompts = 6
    scores = randn(prompts * completions, seed=70, scale=2.0)
    order = torch.stack([torch.randperm(completions, generator=generator(s)) for s in range(6)])
    groups = torch.arange(0, prompts * completions + 1, completions, dtype=torch.int32)
    better, worse = torch.triu_indices(completions, completions, offset=1)
    where = order.argsort(1)  # the completion that has each rank

    def of_torch(scores):
        ranked = scores.view(prompts, completions).gather(1, where)
        difference = ranked[:, better] - ranked[:, worse]
        return F.binary_cross_entropy_with_logits(difference, torch.ones_like(difference))

    def ours(scores):
        on = [t.to(scores.device) for t in (order.flatten() + 1, groups)]
        return fastrlhf.ranking_loss(scores, *on, backend=backend)

    compare(ours, of_torch, [scores], backend)
