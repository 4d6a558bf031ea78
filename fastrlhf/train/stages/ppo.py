"""PPO and PPO-ptx (paper C.4, eq. 2). `ptx_coef` 0 is PPO; 27.8 is the paper's PPO-ptx.

One iteration: sample `batch` responses; take log-probs of policy and reference, values and reward
scores on the train path; reward = -kl_coef * KL per token, plus the score on the last generated
token; GAE; whitening; then one pass (or `inner_epochs`) over random minibatches. In each minibatch
the PPO gradient and ptx_coef times the gradient of the pretraining loss are accumulated into the
same buffers before one optimizer step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.ops.linear_ppo_loss import linear_ppo_loss
from fastrlhf.train import data, rollout, sharded
from fastrlhf.train.models import (
    REWARD_BIAS,
    check_vocabulary,
    context_length,
    load_policy,
    load_scorer,
    load_tokenizer,
    same_vocabulary,
    set_dropout,
)
from fastrlhf.train.optim import EMA, OptimConfig, Optimizers, warm_constant
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler
from fastrlhf.train.steps import nll_backward, require_fit
from fastrlhf.train.tracking import OutputConfig, Run

HEADLINE = (
    "reward/rm",
    "reward/labeler",
    "kl/reference",
    "eos/fraction",
    "ptx/loss",
    "time/update",
)
SHOWN = 2  # responses in the table under a line of the log
Labeler = Callable[[Sequence[dict], Sequence[str]], Sequence[float]]


@dataclass
class PPOConfig(OptimConfig, RuntimeConfig, OutputConfig):
    """Settings of the ppo stage; the defaults are the paper's, and where it is silent its lineage's."""

    model: str = (
        ""  # folder of the RL initialisation: the policy starts here, and it is the KL reference
    )
    reward_model: str = ""  # folder of the reward model; the value model starts as a copy of it
    prompts: str = ""  # JSONL: prompt
    text: str = ""  # pretraining text, needed when ptx_coef > 0
    iterations: int = 500
    batch: int = 512  # episodes an iteration
    minibatch: int = 64  # episodes an optimizer step
    inner_epochs: int = 1  # passes over an iteration's episodes
    max_new_tokens: int = 1024  # of a response; prompt + response must fit the model's context
    temperature: float = 1.0  # of sampling, and of every log-prob
    lr: float = 5e-6  # of the policy; the paper scanned 2.55e-6 to 2.55e-5
    value_lr: float = 9e-6
    warmup_iterations: int = 10  # the learning rates rise from a tenth
    kl_coef: float = 0.02  # beta: reward per nat of KL to the RL initialisation
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"  # of the KL in the reward
    gamma: float = 1.0  # discount of GAE
    lam: float = 0.95  # lambda of GAE; not in the paper: Stiennon et al. 2020
    clip: float = 0.2  # of the ratio
    dual_clip: float | None = (
        None  # bound of the loss where the advantage is negative; not the paper's
    )
    value_clip: float | None = (
        0.2  # of the value's move; not in the paper: its lineage's; null: off
    )
    whiten_advantages: bool = True  # over an iteration; not in the paper: its lineage's
    scale_reward: bool = False  # divide the score by its spread on the training comparisons
    missing_eos_score: float | None = None  # what a response without EOS earns instead of its score
    ptx_coef: float = 0.0  # gamma_ptx; paper: 27.8
    ptx_ratio: float = 8.0  # pretraining sequences per episode
    ptx_length: int = 0  # tokens of a pretraining sequence; 0: the model's context
    ema_decay: float = 0.992  # once per optimizer step; 0: off
    max_tokens: int = 8192  # of a micro-batch


def main(cfg: PPOConfig, labeler: Labeler | None = None) -> dict:
    """Align a policy; the averaged (EMA) weights go to `out`, the value model to `out`/value.

    A `labeler` scores prompts' rows and response texts; its mean is logged beside the reward model's, never trained on.
    """
    runtime = Runtime(cfg)
    _check(cfg, runtime)
    with Run(cfg, "ppo", runtime, HEADLINE, extendable=("iterations",)) as run:
        trainer = Trainer(cfg, runtime, labeler)
        first = run.begin(cfg.iterations)
        if run.state:
            trainer.load_state_dict(run.state)
        for iteration in range(first, cfg.iterations):
            metrics = trainer.iterate(iteration, run)
            run.log(iteration + 1, metrics)
            run.checkpoint(iteration + 1, trainer.state_dict)
        return trainer.finish(run)


class Trainer:
    """Models, optimizers and data streams of a run; `iterate` is the algorithm."""

    def __init__(self, cfg: PPOConfig, runtime: Runtime, labeler: Labeler | None):
        self.cfg, self.runtime, self.labeler = cfg, runtime, labeler
        self.tokenizer = load_tokenizer(cfg.model, cfg.trust_remote_code)
        same_vocabulary(
            self.tokenizer,
            load_tokenizer(cfg.reward_model, cfg.trust_remote_code),
            "model and reward_model",
        )
        self.policy = load_policy(cfg.model, runtime, trainable=True, backend=cfg.backend)
        check_vocabulary(self.tokenizer, self.policy.lm, cfg.model)
        self.reference = load_policy(cfg.model, runtime, trainable=False, backend=cfg.backend)
        self.reward = load_scorer(cfg.reward_model, runtime, trainable=False)
        self.value = load_scorer(cfg.reward_model, runtime, trainable=True)
        self.scale = 1 / self.reward.spread if cfg.scale_reward else 1.0
        with torch.no_grad():  # values are in units of the scaled reward
            self.value.model.score.weight.mul_(self.scale)
        setattr(self.value.config, REWARD_BIAS, self.value.bias * self.scale)
        for module in (self.policy, self.value):
            set_dropout(module, 0.0)

        context = context_length(self.policy.config)
        self.rows = data.read_rows(cfg.prompts, {"prompt": str}, "prompts")
        what = f"prompts {cfg.prompts!r}"
        self.prompts = data.encode_prompts(
            self.rows, self.tokenizer, context, cfg.max_new_tokens, what
        )
        self.order = data.Shuffle(len(self.prompts), cfg.seed)
        self.windows: list[data.Example] = []
        if cfg.ptx_coef > 0:
            length = data.window_length(cfg.ptx_length, context, "ptx_length")
            documents = data.read_text(cfg.text)
            self.windows = data.text_windows(
                documents, self.tokenizer, length, f"text {cfg.text!r}"
            )
        longest = [len(p) + cfg.max_new_tokens for p in self.prompts]
        require_fit(longest, cfg.max_tokens, "prompts + max_new_tokens")
        if max(longest) > context_length(self.reward.config):
            raise UserError(
                f"reward_model {cfg.reward_model!r}: its context holds "
                f"{context_length(self.reward.config)} tokens, prompts + max_new_tokens reach {max(longest)}"
            )
        require_fit([len(w.tokens) for w in self.windows], cfg.max_tokens, "text windows")
        self.text_order = data.Shuffle(max(1, len(self.windows)), cfg.seed + 1)

        self.optimizer = Optimizers(self.policy, cfg)
        value_cfg = OptimConfig(
            lr=cfg.value_lr, beta1=cfg.beta1, beta2=cfg.beta2, adam_eps=cfg.adam_eps
        )
        self.value_optimizer = Optimizers(self.value, value_cfg)
        self.policy_module = runtime.prepare(self.policy, self.optimizer)
        self.value_module = runtime.prepare(self.value, self.value_optimizer)
        self.reference = runtime.share_frozen(self.reference)
        self.reward = runtime.share_frozen(self.reward)
        self.ema = EMA(self.policy, cfg.ema_decay) if cfg.ema_decay > 0 else None
        self.sampler = HFSampler(self.policy, self.tokenizer)

    def iterate(self, iteration: int, run: Run) -> dict[str, float]:
        """One iteration: experience, then the update; returns its metrics."""
        plan, metrics = self.experience(iteration, run)
        return metrics | self.improve(plan, iteration, run)

    def experience(
        self, iteration: int, run: Run
    ) -> tuple[list[list[rollout.Micro]], dict[str, float]]:
        """Sampled and scored minibatches with their advantages, and the metrics of both."""
        cfg, runtime = self.cfg, self.runtime
        clock = [time.perf_counter()]
        chosen = self.order.take(cfg.batch)[runtime.rank :: runtime.world]
        prompts = [self.prompts[i] for i in chosen]
        samples = self.sampler.generate(
            prompts,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seed=int(
                np.random.SeedSequence([cfg.seed, iteration, runtime.rank]).generate_state(1)[0]
            ),
        )
        clock.append(time.perf_counter())

        minibatches = cfg.batch // cfg.minibatch
        seed = [cfg.seed, iteration, runtime.rank]
        plan = rollout.split(prompts, samples, minibatches, cfg.max_tokens, runtime, seed)
        micros = [m for part in plan for m in part]
        for module in (self.policy_module, self.value_module):
            module.train()  # dropout is 0: the only point is that old log-probs run exactly the code of the update
        rollout.score(
            micros,
            self.policy_module,
            self.reference,
            self.reward,
            self.value_module,
            cfg.temperature,
        )
        metrics = rollout.metrics(micros, samples, runtime, self._labels(chosen, samples))
        scores = self._scores(micros, samples)
        metrics |= rollout.advantages(micros, scores, runtime, cfg)
        if run.speaks(iteration + 1):
            texts = self.tokenizer.batch_decode([t.tolist() for t in samples.tokens[:SHOWN]])
            shown = [self.rows[i]["prompt"] for i in chosen[:SHOWN]]
            rows = list(zip(shown, texts, scores[:SHOWN].tolist(), strict=True))
            run.samples(iteration + 1, ("prompt", "response", "score"), rows)
        clock.append(time.perf_counter())
        times = zip(("time/sample", "time/score"), np.diff(clock).tolist(), strict=True)
        return plan, metrics | dict(times)

    def improve(
        self, plan: list[list[rollout.Micro]], iteration: int, run: Run
    ) -> dict[str, float]:
        """The passes over the minibatches, one step of both optimizers each; returns the mean metrics."""
        cfg, start = self.cfg, time.perf_counter()
        factor = warm_constant(iteration, warmup=cfg.warmup_iterations)
        logs: list[dict[str, float]] = []
        for _ in range(cfg.inner_epochs):
            for part in plan:
                logs.append(self._update(part, factor, run, iteration + 1))
        metrics = {k: float(np.mean([log[k] for log in logs])) for k in logs[0]}
        metrics["policy/ratio_max_first"] = logs[0]["policy/ratio_max"]
        metrics["policy/ratio_max"] = max(log["policy/ratio_max"] for log in logs)
        return metrics | {"time/update": time.perf_counter() - start}

    def _scores(self, micros: list[rollout.Micro], samples) -> torch.Tensor:
        # What each response earns at its last token, in the order of the rollout.
        scores = torch.zeros(len(samples.tokens))
        for m in micros:
            if m.weight:
                scores[torch.from_numpy(m.indices)] = m.scores.float().cpu() * self.scale
        if self.cfg.missing_eos_score is not None:
            scores[~torch.tensor(samples.finished)] = self.cfg.missing_eos_score
        return scores

    def _labels(self, chosen, samples) -> Sequence[float] | None:
        if self.labeler is None:
            return None
        tokens = [t.tolist() for t in samples.tokens]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return self.labeler([self.rows[i] for i in chosen], texts)

    def _update(
        self, micros: list[rollout.Micro], factor: float, run: Run, step: int
    ) -> dict[str, float]:
        # One minibatch: PPO gradient, pretraining gradient into the same buffers, one step of each optimizer.
        cfg, runtime = self.cfg, self.runtime
        (total,) = runtime.sum(float(sum(m.weight * len(m.targets) for m in micros)))
        sums: dict[str, torch.Tensor] = {}
        for number, m in enumerate(micros, 1):
            loss = partial(
                linear_ppo_loss,
                old_logprob=m.old_logprob,
                advantages=m.advantages,
                values=self.value_module(m.batch, m.rows),
                old_values=m.values,
                returns=m.returns,
                clip=cfg.clip,
                dual_clip=cfg.dual_clip,
                value_clip=cfg.value_clip,
                value_coef=1.0,  # the value model has its own optimizer
            )
            out = self.policy_module(
                m.batch, m.rows, m.targets, mode="loss", temperature=cfg.temperature, loss=loss
            )
            # The op's mean is over this micro-batch; the loss is a mean over the minibatch of all ranks.
            share = m.weight * len(m.targets) / total
            last = number == len(micros)
            runtime.backward(
                (self.policy_module, self.value_module),
                out.loss * (share * runtime.world),
                last=last,
            )
            for name, metric in out.metrics.items():
                if name == "ratio_max":
                    sums[name] = torch.maximum(sums.get(name, metric), metric)
                else:
                    sums[name] = sums.get(name, 0) + share * metric
        log = self._gather(sums)
        log["grad_norm/ppo"] = runtime.clip(self.policy_module, None)
        if cfg.ptx_coef > 0:
            log |= self._ptx()
        run.check(step, log)
        log["grad_norm/total"] = runtime.clip(self.policy_module, cfg.max_grad_norm)
        log["grad_norm/value"] = runtime.clip(self.value_module, cfg.max_grad_norm)
        log["lr"] = self.optimizer.step(factor)
        self.value_optimizer.step(1.0)
        if self.ema is not None:
            self.ema.update(self.policy)
        return log

    def _gather(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        names = {
            "policy_loss": "policy/loss",
            "value_loss": "value/loss",
            "approx_kl": "policy/approx_kl",
            "clip_fraction": "policy/clip_fraction",
            "value_clip_fraction": "value/clip_fraction",
            "explained_variance": "value/explained_variance",
            "ratio_mean": "policy/ratio_mean",
        }
        means = torch.stack([sums[n].float() for n in names]).tolist()  # one transfer for all
        log = dict(zip(names.values(), self.runtime.sum(*means), strict=True))
        return log | {"policy/ratio_max": float(sums["ratio_max"])}

    def _ptx(self) -> dict[str, float]:
        cfg, runtime = self.cfg, self.runtime
        before = [None if p.grad is None else p.grad.clone() for p in self.policy.parameters()]
        count = max(runtime.world, round(cfg.minibatch * cfg.ptx_ratio))
        chosen = self.text_order.take(count)[runtime.rank :: runtime.world]
        examples = [self.windows[i] for i in chosen]
        loss = nll_backward(
            self.policy_module, examples, runtime, cfg.max_tokens, scale=cfg.ptx_coef
        )
        own = [
            p.grad if b is None else p.grad - b
            for p, b in zip(self.policy.parameters(), before, strict=True)
        ]
        norm = float(sharded.full(torch.nn.utils.get_total_norm(own)))
        return {"ptx/loss": float(loss), "grad_norm/ptx": norm / runtime.loss_scale}

    def state_dict(self) -> dict:
        """All that a resumed run needs to go on as if it had not stopped."""
        return {
            "policy": self.policy.state_dict(),
            "value": self.value.state_dict(),
            "ema": self.ema.shadow if self.ema is not None else [],
            "optimizer": self.optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "cursors": [self.order.cursor, self.text_order.cursor],
        }

    def load_state_dict(self, state: dict) -> None:
        sharded.load(self.policy, state["policy"])
        sharded.load(self.value, state["value"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.order.cursor, self.text_order.cursor = state["cursors"]

    def finish(self, run: Run) -> dict:
        """Write the averaged policy and the value model."""
        if self.ema is not None:
            self.ema.copy_to(self.policy)
        run.save_model(self.value.model, self.tokenizer, run.out / "value")
        kept = ("reward/rm", "reward/labeler", "kl/reference", "ptx/loss")
        return run.finish(
            self.policy.lm, self.tokenizer, {k: run.last[k] for k in kept if k in run.last}
        )


def _check(cfg: PPOConfig, runtime: Runtime) -> None:
    for name in ("model", "reward_model", "prompts"):
        if not getattr(cfg, name):
            raise UserError(f"{name}: expected a path, got nothing")
    if cfg.ptx_coef < 0 or cfg.kl_coef < 0:
        raise UserError(
            f"ptx_coef and kl_coef: expected numbers >= 0, got {cfg.ptx_coef} and {cfg.kl_coef}"
        )
    if cfg.ptx_coef > 0 and not cfg.text:
        raise UserError("ptx_coef > 0 needs text: expected a file of pretraining text, got nothing")
    if cfg.temperature <= 0:
        raise UserError(f"temperature: expected a positive number, got {cfg.temperature}")
    if cfg.batch % cfg.minibatch or cfg.minibatch % runtime.world:
        raise UserError(
            f"batch {cfg.batch} must be a multiple of minibatch {cfg.minibatch}, "
            f"and that of the {runtime.world} processes"
        )
