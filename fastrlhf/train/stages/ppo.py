"""PPO and PPO-ptx (paper C.4, equation 2).

One iteration:

1. Sample a response for each of `batch` prompts.
2. Score them on the training path: log-probs of policy and reference, values, rewards.
3. reward_t = -kl_coef * KL_t, plus the reward model's score at the last token; then GAE and whitening.
4. One pass (or `inner_epochs`) over random minibatches, one optimizer step each, on

       PPO's clipped loss + ptx_coef * mean NLL of pretraining text

   The value model has its own loss and optimizer.

`ptx_coef` 0 is PPO; the paper's PPO-ptx uses 27.8.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.ops.linear_ppo_loss import linear_ppo_loss
from fastrlhf.train import data, rollout, sharded
from fastrlhf.train.config import require_paths
from fastrlhf.train.models import (
    check_context,
    check_same_vocabulary,
    context_length,
    load_policy,
    load_reward_model,
    load_tokenizer,
)
from fastrlhf.train.optim import EMA, OptimConfig, Optimizers, warm_constant
from fastrlhf.train.rollout import MicroBatch, ScoredMicroBatch, TrainingMicroBatch
from fastrlhf.train.run import OutputConfig, Run
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler, NonFiniteLogits, Samples, check_temperature
from fastrlhf.train.steps import nll_backward, require_batch, require_fit
from fastrlhf.train.text import TextConfig, TextEncoder, check_same_ends
from fastrlhf.train.vocabulary import with_pad

# Metrics of a line on the terminal.
HEADLINE = (
    "reward/rm",
    "reward/labeler",
    "kl/reference",
    "eos/fraction",
    "ptx/loss",
    "time/update",
)
SAMPLES_SHOWN = 2  # responses in the table below such a line
Labeler = Callable[[Sequence[dict], Sequence[str]], Sequence[float]]


@dataclass
class PPOConfig(OptimConfig, RuntimeConfig, TextConfig, OutputConfig):
    """Settings of the ppo stage. Defaults are the paper's or, where it gives none, those of earlier papers."""

    model: str = ""  # folder of the RL initialization: start of the policy, and the KL reference
    reward_model: str = ""  # folder of the reward model; also the start of the value model
    prompts: str = ""  # JSONL: prompt
    text: str = ""  # pretraining text, needed if ptx_coef > 0
    iterations: int = 500  # rounds of sampling and updating
    batch: int = 512  # episodes (responses) per iteration; a prompt may have several
    minibatch: int = 64  # episodes per optimizer step
    inner_epochs: int = 1  # passes over an iteration's episodes
    max_new_tokens: int = 1024  # limit of a response; prompt + response must fit the context
    temperature: float = 1.0  # sampling temperature, also applied to all log-probs
    lr: float = 5e-6  # peak learning rate of the policy; the paper scanned 2.55e-6 to 2.55e-5
    value_lr: float = 9e-6  # learning rate of the value model
    warmup_iterations: int = 10  # the policy's learning rate rises from a tenth over these
    kl_coef: float = 0.02  # beta: penalty per nat of KL to the reference
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"  # estimator of the KL in the reward
    gamma: float = 1.0  # discount of GAE
    lam: float = 0.95  # lambda of GAE; from Stiennon et al. 2020
    clip: float = 0.2  # clip range of the probability ratio
    dual_clip: float | None = None  # loss <= -dual_clip * A where A < 0; not in the paper
    value_clip: float | None = 0.2  # clip range of the value; not in the paper; null: off
    whiten_advantages: bool = True  # over an iteration; not in the paper
    scale_reward: bool = False  # divide scores by their std on the training comparisons
    missing_eos_score: float | None = None  # score of a response without EOS; null: unchanged
    ptx_coef: float = 0.0  # weight of the pretraining loss; paper: 27.8 (gamma in equation 2)
    router_coef: float | None = None  # of a router loss (experts) beside ptx; null: the model's own
    ppo_router_coef: float = 0.0  # of a router loss (experts) beside PPO's loss; 0: none
    ptx_ratio: float = 8.0  # pretraining sequences per episode
    ptx_length: int = 0  # tokens of a pretraining sequence; 0: the model's context
    ema_decay: float = 0.992  # decay of the averaged policy per optimizer step; 0: no average
    max_tokens: int = 8192  # tokens of a micro-batch


def main(cfg: PPOConfig, labeler: Labeler | None = None) -> dict:
    """Train a policy; write its averaged weights to `cfg.out` and the value model to `cfg.out`/value.

    Args:
        cfg: the settings.
        labeler: scores prompt rows and response texts. Its mean is logged beside the reward model's; nothing is
            trained on it.

    Returns:
        Metrics of the last iteration: {"reward/rm", "kl/reference", ...}.
    """
    runtime = Runtime(cfg)
    _check(cfg, runtime)
    with Run(cfg, "ppo", runtime, HEADLINE, extendable=("iterations",)) as run:
        trainer = Trainer(cfg, runtime, labeler)
        run.say(trainer.text.notes)
        for step in run.steps(cfg.iterations, trainer.parts):
            run.log(step, trainer.iterate(step - 1, run))
        return trainer.finish(run)


class PPOLoss:
    """The head that computes PPO's clipped policy loss and value loss, means over the micro-batch's M tokens.

    A plain class: FSDP rounds the float tensors in arguments that are containers or dataclasses to the compute dtype.

    Args:
        micro: the micro-batch.
        values: [M], of the value model that is trained.
        cfg: the settings.
    """

    def __init__(self, micro: TrainingMicroBatch, values: torch.Tensor, cfg: PPOConfig):
        self.micro, self.values, self.cfg = micro, values, cfg

    def __call__(self, hidden, unembedding, backend):
        m, cfg = self.micro, self.cfg
        return linear_ppo_loss(
            hidden,
            unembedding.weight,
            m.targets,
            m.old_logprob,
            m.advantages,
            values=self.values,
            old_values=m.values,
            returns=m.returns,
            clip=cfg.clip,
            dual_clip=cfg.dual_clip,
            value_clip=cfg.value_clip,
            value_coef=1.0,  # the value model has its own optimizer
            backend=backend,
            **unembedding.options(cfg.temperature),
        )


class Trainer:
    """Models, optimizers and data order of a run; `iterate` is the algorithm."""

    def __init__(self, cfg: PPOConfig, runtime: Runtime, labeler: Labeler | None):
        self.cfg, self.runtime, self.labeler = cfg, runtime, labeler
        self.tokenizer = load_tokenizer(cfg.model, cfg.trust_remote_code)
        self.text = TextEncoder(self.tokenizer, cfg.parse_special_tokens)
        value_tokenizer = load_tokenizer(cfg.reward_model, cfg.trust_remote_code)
        check_same_vocabulary(self.tokenizer, value_tokenizer, "model and reward_model")
        check_same_ends(self.text, value_tokenizer, "model and reward_model")
        self.policy, self.reference = (
            load_policy(
                cfg.model,
                runtime,
                trainable=trainable,
                tokenizer=self.tokenizer,
                backend=cfg.backend,
            )
            for trainable in (True, False)
        )
        for weight in (cfg.router_coef, cfg.ppo_router_coef):
            self.policy.router_coefficient(weight)  # refuses a model without a router loss
        self.reward_model = load_reward_model(cfg.reward_model, runtime, trainable=False)
        self.value_model = load_reward_model(cfg.reward_model, runtime, trainable=True)
        self.value_tokenizer = with_pad(value_tokenizer, self.value_model.model)
        self.reward_scale = 1 / self.reward_model.std if cfg.scale_reward else 1.0
        self.value_model.rescale(self.reward_scale)  # values predict the scaled reward

        context = context_length(self.policy.config)
        self.rows = data.read_rows(cfg.prompts, {"prompt": str}, "prompts")
        what = f"prompts {cfg.prompts!r}"
        self.prompts = data.encode_prompts(self.rows, self.text, context, cfg.max_new_tokens, what)
        self.order = data.Shuffle(len(self.prompts), cfg.seed)
        self.windows: list[data.Example] = []
        if cfg.ptx_coef > 0:
            length = data.window_length(cfg.ptx_length, context, "ptx_length")
            documents = data.read_text(cfg.text)
            self.windows = data.text_windows(documents, self.text, length, f"text {cfg.text!r}")
            require_batch(
                _text_per_step(cfg), len(self.windows), "minibatch * ptx_ratio", "text windows"
            )
        longest = [len(p) + cfg.max_new_tokens for p in self.prompts]
        require_fit(longest, cfg.max_tokens, "prompts + max_new_tokens")
        name = f"reward_model {cfg.reward_model!r}"
        check_context(self.reward_model.config, max(longest), name, "prompts + max_new_tokens")
        require_fit([len(w.tokens) for w in self.windows], cfg.max_tokens, "text windows")
        self.text_order = data.Shuffle(max(1, len(self.windows)), cfg.seed + 1)

        self.optimizer = Optimizers(self.policy, cfg)
        value_cfg = OptimConfig(
            lr=cfg.value_lr, beta1=cfg.beta1, beta2=cfg.beta2, adam_eps=cfg.adam_eps
        )
        self.value_optimizer = Optimizers(self.value_model, value_cfg)
        self.policy_module = runtime.prepare(self.policy, self.optimizer)
        self.value_module = runtime.prepare(self.value_model, self.value_optimizer)
        self.reference = runtime.prepare_frozen(self.reference)
        self.reward_model = runtime.prepare_frozen(self.reward_model)
        self.ema = EMA(self.policy, cfg.ema_decay) if cfg.ema_decay > 0 else None
        self.sampler = HFSampler(self.policy, self.tokenizer)
        self.text.note_ends(self.sampler.ends)
        # What a checkpoint holds.
        self.parts = {
            "policy": self.policy,
            "value": self.value_model,
            "optimizer": self.optimizer,
            "value_optimizer": self.value_optimizer,
            "order": self.order,
            "text_order": self.text_order,
        }
        if self.ema is not None:
            self.parts["ema"] = self.ema

    def iterate(self, iteration: int, run: Run) -> dict[str, float]:
        """One iteration (from 0): experience, then the update; return its metrics."""
        minibatches, metrics = self.experience(iteration, run)
        return metrics | self.update(minibatches, iteration, run)

    def experience(
        self, iteration: int, run: Run
    ) -> tuple[list[list[TrainingMicroBatch]], dict[str, float]]:
        """Sample responses, score them and compute advantages; return the minibatches and metrics."""
        cfg, runtime = self.cfg, self.runtime
        clock = [time.perf_counter()]
        mine, parts = rollout.shares(
            cfg.batch, cfg.batch // cfg.minibatch, [cfg.seed, iteration, 0], runtime
        )
        drawn = self.order.take(cfg.batch)
        chosen = [drawn[i] for i in mine]
        prompts = [self.prompts[i] for i in chosen]
        seed = [cfg.seed, iteration, runtime.rank]
        try:
            samples = self.sampler.generate(
                prompts,
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
            )
        except NonFiniteLogits:
            run.check(iteration + 1, {"the log-prob of a sampled token": math.nan})
            raise
        clock.append(time.perf_counter())

        # Train mode, so that old log-probs come from the same code as in the update.
        for module in (self.policy_module, self.value_module):
            module.train()
        packed = rollout.split(prompts, samples, parts, cfg.max_tokens, runtime)
        scored = [self._score(part) for part in packed]
        labels = self._labels(chosen, prompts, samples)
        metrics = rollout.metrics(scored, samples, runtime, labels)
        rewards = self._rewards(scored, samples)
        minibatches, kl = rollout.add_advantages(scored, rewards, runtime, cfg)
        if run.terminal.prints(iteration + 1):
            texts = self.tokenizer.batch_decode(
                [t.tolist() for t in samples.tokens[:SAMPLES_SHOWN]]
            )
            shown = [self.rows[i]["prompt"] for i in chosen[:SAMPLES_SHOWN]]
            rows = list(zip(shown, texts, rewards[:SAMPLES_SHOWN].tolist(), strict=True))
            run.show_samples(iteration + 1, ("prompt", "response", "score"), rows)
        clock.append(time.perf_counter())
        times = zip(("time/sample", "time/score"), np.diff(clock).tolist(), strict=True)
        return minibatches, metrics | kl | dict(times)

    def update(
        self, minibatches: list[list[TrainingMicroBatch]], iteration: int, run: Run
    ) -> dict[str, float]:
        """Pass over the minibatches, with one step of both optimizers each; return the mean metrics."""
        cfg, start = self.cfg, time.perf_counter()
        factor = warm_constant(iteration, warmup=cfg.warmup_iterations)
        logs: list[dict[str, float]] = []
        for _ in range(cfg.inner_epochs):
            for micros in minibatches:
                logs.append(self._update_minibatch(micros, factor, run, iteration + 1))
        metrics = {k: float(np.mean([log[k] for log in logs])) for k in logs[0]}
        metrics["policy/ratio_max_first"] = logs[0]["policy/ratio_max"]
        metrics["policy/ratio_max"] = max(log["policy/ratio_max"] for log in logs)
        return metrics | {"time/update": time.perf_counter() - start}

    def _score(self, micros: list[MicroBatch]) -> list[ScoredMicroBatch]:
        return rollout.score(
            micros,
            self.policy_module,
            self.reference,
            self.reward_model,
            self.value_module,
            self.cfg.temperature,
        )

    def _rewards(self, scored: list[list[ScoredMicroBatch]], samples: Samples) -> torch.Tensor:
        """Reward of each response at its last token, fp32 [R] on the CPU, in the order of the rollout."""
        rewards = torch.zeros(len(samples.tokens))
        for m in (m for part in scored for m in part if m.weight):
            rewards[torch.from_numpy(m.indices)] = m.scores.float().cpu() * self.reward_scale
        if self.cfg.missing_eos_score is not None:
            rewards[~torch.tensor(samples.finished)] = self.cfg.missing_eos_score
        return rewards

    def _labels(
        self, chosen: list[int], prompts: list[list[int]], samples: Samples
    ) -> Sequence[float] | None:
        if self.labeler is None:
            return None
        texts = self.text.decode(prompts, samples.tokens, samples.finished)
        return self.labeler([self.rows[i] for i in chosen], texts)

    def _update_minibatch(
        self, micros: list[TrainingMicroBatch], factor: float, run: Run, step: int
    ) -> dict[str, float]:
        """Accumulate the gradients of PPO and of the pretraining loss, then step both optimizers."""
        cfg, runtime = self.cfg, self.runtime
        (total,) = runtime.sum(float(sum(m.weight * len(m.targets) for m in micros)))
        sums: dict[str, torch.Tensor] = {}
        for number, m in enumerate(micros, 1):
            values = self.value_module(m.batch, m.rows)
            out, loss = self.policy_loss(m, values)
            # The op's means are over this micro-batch; those of the minibatch are over all ranks' tokens.
            share = m.weight * len(m.targets) / total
            runtime.backward(
                (self.policy_module, self.value_module),
                loss * (share * runtime.world),
                last=number == len(micros),
            )
            for name, metric in out.metrics.items() if m.weight else ():
                if name == "ratio_max":
                    sums[name] = torch.maximum(sums.get(name, metric), metric)
                else:
                    sums[name] = sums.get(name, 0) + share * metric
        log = self._mean_metrics(sums)
        log["grad_norm/ppo"] = runtime.clip(self.policy_module, None)
        if cfg.ptx_coef > 0:
            log |= self._pretraining_backward()
        run.check(step, log)
        log["grad_norm/total"] = runtime.clip(self.policy_module, cfg.max_grad_norm)
        log["grad_norm/value"] = runtime.clip(self.value_module, cfg.max_grad_norm)
        log["lr"] = self.optimizer.step(factor)
        self.value_optimizer.step(1.0)
        if self.ema is not None:
            self.ema.update(self.policy)
        return log

    def policy_loss(self, m: TrainingMicroBatch, values: torch.Tensor):
        """(outputs of PPO's op, its loss plus ppo_router_coef * router loss) of a micro-batch."""
        head = PPOLoss(m, values, self.cfg)
        coefficient = self.cfg.ppo_router_coef
        if not coefficient:
            out = self.policy_module(m.batch, m.rows, head)
            return out, out.loss
        out, router = self.policy_module(m.batch, m.rows, head, with_router_loss=True)
        return out, out.loss + coefficient * router

    def _mean_metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        names = {
            "policy_loss": "policy/loss",
            "value_loss": "value/loss",
            "approx_kl": "policy/approx_kl",
            "clip_fraction": "policy/clip_fraction",
            "value_clip_fraction": "value/clip_fraction",
            "explained_variance": "value/explained_variance",
            "ratio_mean": "policy/ratio_mean",
        }
        means = torch.stack([sums[n].float() for n in names]).tolist()  # one copy from the GPU
        log = dict(zip(names.values(), self.runtime.sum(*means), strict=True))
        return log | {"policy/ratio_max": self.runtime.max(float(sums["ratio_max"]))}

    def _pretraining_backward(self) -> dict[str, float]:
        """Accumulate ptx_coef * gradient of the mean NLL of pretraining text; return the NLL and this part's norm."""
        cfg, runtime = self.cfg, self.runtime
        before = [None if p.grad is None else p.grad.clone() for p in self.policy.parameters()]
        chosen = self.text_order.take(_text_per_step(cfg))[runtime.rank :: runtime.world]
        examples = [self.windows[i] for i in chosen]
        losses = nll_backward(
            self.policy_module,
            examples,
            runtime,
            cfg.max_tokens,
            scale=cfg.ptx_coef,
            router_coefficient=self.policy.router_coefficient(cfg.router_coef),
        )
        added = [
            p.grad if b is None else p.grad - b
            for p, b in zip(self.policy.parameters(), before, strict=True)
            if p.grad is not None
        ]
        norm = float(sharded.full_tensor(torch.nn.utils.get_total_norm(added)))
        log = {f"ptx/{name}": float(loss) for name, loss in losses.items()}
        return log | {"grad_norm/ptx": norm / runtime.loss_scale}

    def finish(self, run: Run) -> dict:
        """Write the averaged policy and the value model."""
        if self.ema is not None:
            self.ema.copy_to(self.policy)
        run.save_model(self.value_model.model, self.value_tokenizer, run.out / "value")
        kept = ("reward/rm", "reward/labeler", "kl/reference", "ptx/loss")
        summary = {name: run.metrics[name] for name in kept if name in run.metrics}
        return run.finish(self.policy.lm, self.tokenizer, summary)


def _text_per_step(cfg: PPOConfig) -> int:
    return max(1, round(cfg.minibatch * cfg.ptx_ratio))


def _check(cfg: PPOConfig, runtime: Runtime) -> None:
    require_paths(cfg, "model", "reward_model", "prompts")
    if cfg.ptx_coef > 0 and not cfg.text:
        raise UserError("ptx_coef > 0 needs text: expected a file of pretraining text, got nothing")
    check_temperature(cfg.temperature, greedy=False)
    if cfg.batch % cfg.minibatch or cfg.minibatch % runtime.world:
        raise UserError(
            f"batch {cfg.batch} must be a multiple of minibatch {cfg.minibatch}, "
            f"and minibatch of the {runtime.world} processes"
        )
