"""`fastrlhf eval`: sample from a model, judge the samples, measure its loss on held-out text."""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrlhf.errors import UserError
from fastrlhf.evals import kl, lm_loss, overlap, reward_accuracy, slots, winrate
from fastrlhf.evals._intervals import mean_interval


@dataclass
class EvalConfig:
    """Evaluate a model folder; every figure comes with its 95 % interval."""

    model: str = ""  # folder of the model to evaluate
    baseline: str = (
        ""  # folder of a second model: win rate, change of slot errors, and KL against it
    )
    reward_model: str = (
        ""  # folder of a reward model: mean score; with `rankings` its pair accuracy
    )
    prompts: str = ""  # JSONL: prompt, optional completion (human references, for BLEU)
    text: str = ""  # held-out text: loss per token
    rankings: str = ""  # JSONL: prompt, completions, ranks, optional criterion
    judge: str = (
        ""  # module:function(prompt, completion) -> number, or .value .covered .missing .invented
    )
    out: str = ""  # JSON file for the figures and the samples
    overwrite: bool = False  # replace `out`
    limit: int = 0  # evaluate on the first so many prompts; 0: all
    samples: int = 1  # completions a prompt
    max_new_tokens: int = 96
    temperature: float = 1.0  # 0: greedy
    window: int = 0  # tokens of a text window; 0: the model's context
    max_tokens: int = 8192  # of a micro-batch
    device: str = "auto"  # auto | cpu
    precision: str = "fp32"  # fp32 | bf16 | fp16
    seed: int = 0
    backend: str = "auto"  # of the fused ops
    trust_remote_code: bool = False


def load_judge(path: str) -> Callable:
    """The function named by "module:function", also of a module in the working directory."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.append("")
    try:
        judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"judge: expected module:function, got {path!r} ({error})") from error

    def checked(prompt: str, completion: str) -> slots.Judgement:
        try:
            return slots.judgement(judge(prompt, completion))
        except ValueError as error:
            raise UserError(f"judge {path}: {error}") from error

    return checked


class _Model:
    """A loaded policy and what is asked of it."""

    def __init__(self, folder: str, cfg: EvalConfig, runtime):
        from fastrlhf.train import models

        self.cfg = cfg
        self.tokenizer = models.load_tokenizer(folder, cfg.trust_remote_code)
        self.policy = models.load_policy(folder, runtime, trainable=False, backend=cfg.backend)
        models.check_vocabulary(self.tokenizer, self.policy.lm, folder)
        self.context = models.context_length(self.policy.config)

    def sample(self, rows: Sequence[dict]) -> tuple[list[str], list, list[bool]]:
        """Texts, examples (prompt + response tokens) and whether each ended."""
        from fastrlhf.train.data import Example, encode_prompts
        from fastrlhf.train.sampler import HFSampler

        cfg = self.cfg
        room = cfg.max_new_tokens
        prompts = encode_prompts(
            rows, self.tokenizer, self.context, room, f"prompts {cfg.prompts!r}"
        )
        found = HFSampler(self.policy, self.tokenizer).generate(
            prompts, max_new_tokens=room, temperature=cfg.temperature, seed=cfg.seed
        )
        texts = self.tokenizer.batch_decode(found.tokens, skip_special_tokens=True)
        examples = [
            Example(np.array([*p, *t], dtype=np.int64), len(p))
            for p, t in zip(prompts, found.tokens, strict=True)
        ]
        return texts, examples, list(found.finished)

    def token_nll(self, windows: list[list[int]]) -> list[np.ndarray]:
        from fastrlhf.train.data import Example
        from fastrlhf.train.steps import token_logprobs

        examples = [Example(np.array(w, dtype=np.int64), 1) for w in windows]
        return [-x for x in token_logprobs(self.policy, examples, self.cfg.max_tokens)]


def _prompts(cfg: EvalConfig) -> tuple[list[dict], dict[str, list[str]]]:
    # -> one row a prompt and sample; human references by prompt
    from fastrlhf.train.data import read_rows

    references: dict[str, list[str]] = {}
    for row in read_rows(cfg.prompts, {"prompt": str}, "prompts"):
        found = references.setdefault(row["prompt"], [])
        if isinstance(row.get("completion"), str):
            found.append(row["completion"])
    unique = list(references)[: cfg.limit or None]
    return [{"prompt": p} for p in unique for _ in range(cfg.samples)], references


def _samples(cfg, model, baseline, scorer, result: dict) -> list[dict]:
    from fastrlhf.train.steps import score_sequences, token_logprobs

    rows, references = _prompts(cfg)
    labels = [r["prompt"] for r in rows]
    texts, examples, finished = model.sample(rows)
    others = baseline.sample(rows) if baseline else None
    result["finished"] = mean_interval(finished, labels, seed=cfg.seed)
    result["length"] = mean_interval([e.targets for e in examples], labels, seed=cfg.seed)
    if all(references[p] for p in set(labels)):
        human = [references[p] for p in labels]
        result["bleu"] = overlap.evaluate(texts, human, labels, seed=cfg.seed)
    if cfg.judge:
        judge = load_judge(cfg.judge)
        judged = [judge(p, t) for p, t in zip(labels, texts, strict=True)]
        result |= slots.evaluate(judged, labels, seed=cfg.seed)
        if others:
            theirs = [judge(p, t) for p, t in zip(labels, others[0], strict=True)]
            values = ([j.value for j in side] for side in (judged, theirs))
            result["win_rate"] = winrate.evaluate(*values, labels, seed=cfg.seed)
            if "errors" in result:
                change = slots.error_change(judged, theirs, labels, seed=cfg.seed)
                result["error_change"] = change
    if baseline and cfg.temperature == 1:
        both = [token_logprobs(m.policy, examples, cfg.max_tokens) for m in (model, baseline)]
        result["kl"] = kl.evaluate(*both, labels, seed=cfg.seed)["sequence"]
    if scorer:
        scores = score_sequences(scorer, [e.tokens for e in examples], cfg.max_tokens)
        result["reward"] = mean_interval(scores, labels, seed=cfg.seed)
    return [{"prompt": p, "completion": t} for p, t in zip(labels, texts, strict=True)]


def _rankings(cfg, scorer, tokenizer, context: int) -> dict:
    from fastrlhf.train.data import encode_examples, read_rankings
    from fastrlhf.train.steps import score_sequences

    rows = read_rankings(cfg.rankings)
    flat = [{"prompt": r["prompt"], "completion": c} for r in rows for c in r["completions"]]
    examples = encode_examples(flat, tokenizer, context, f"rankings {cfg.rankings!r}")
    scores = iter(score_sequences(scorer, [e.tokens for e in examples], cfg.max_tokens))
    rows = [r | {"scores": [float(next(scores)) for _ in r["completions"]]} for r in rows]
    return reward_accuracy.evaluate(rows, seed=cfg.seed)


def _text(cfg, model, baseline, result: dict) -> None:
    from fastrlhf.train.data import read_text, text_windows

    length = cfg.window or model.context
    what = f"text {cfg.text!r}"
    found = text_windows(read_text(cfg.text), model.tokenizer, length, what)
    parts = [w.tokens.tolist() for w in found]
    ours = lm_loss.window_sums(parts, model.token_nll)
    result["text_loss"] = lm_loss.evaluate(ours, seed=cfg.seed)["loss"]
    if baseline:
        theirs = lm_loss.window_sums(parts, baseline.token_nll)
        result["text_loss_change"] = lm_loss.difference(ours, theirs, seed=cfg.seed)


def _check(cfg: EvalConfig) -> None:
    if not cfg.model:
        raise UserError("model: expected a model folder, got nothing")
    if not (cfg.prompts or cfg.text or cfg.rankings):
        raise UserError("nothing to evaluate on: give prompts, text or rankings")
    if cfg.rankings and not cfg.reward_model:
        raise UserError("rankings: need reward_model, whose scores they are compared with")
    if cfg.samples < 1 or cfg.limit < 0:
        raise UserError(
            f"samples, limit: expected >= 1 and >= 0, got {cfg.samples} and {cfg.limit}"
        )
    if cfg.out and Path(cfg.out).exists() and not cfg.overwrite:
        raise UserError(f"out {cfg.out!r} exists; give --overwrite to replace it")
    if cfg.judge:
        load_judge(cfg.judge)


def main(cfg: EvalConfig) -> dict:
    """Evaluate what the given files allow, print a table, return (and write) the figures."""
    _check(cfg)
    from fastrlhf.train import checkpoint, models
    from fastrlhf.train.runtime import Runtime

    runtime = Runtime(cfg)
    model = _Model(cfg.model, cfg, runtime)
    baseline = _Model(cfg.baseline, cfg, runtime) if cfg.baseline else None
    if baseline:
        models.same_vocabulary(model.tokenizer, baseline.tokenizer, "model and baseline")
    scorer = None
    if cfg.reward_model:
        theirs = models.load_tokenizer(cfg.reward_model, cfg.trust_remote_code)
        models.same_vocabulary(model.tokenizer, theirs, "model and reward_model")
        scorer = models.load_scorer(cfg.reward_model, runtime, trainable=False)
    result: dict = {}
    samples = _samples(cfg, model, baseline, scorer, result) if cfg.prompts else []
    if cfg.text:
        _text(cfg, model, baseline, result)
    if cfg.rankings:
        for criterion, found in _rankings(cfg, scorer, model.tokenizer, model.context).items():
            for key in ("accuracy", "longer"):
                result[f"pair_{key}/{criterion}"] = found[key]
    _print(cfg, result, samples)
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        whole = {"model": cfg.model, "figures": result, "samples": samples}
        checkpoint.replace_file(Path(cfg.out), json.dumps(whole, ensure_ascii=False, indent=1))
    return result


# What a figure means, by the part of its name before the slash.
MEANING = {
    "finished": "share of completions that end with EOS",
    "length": "tokens a completion, EOS included",
    "bleu": "against the prompts' human completions",
    "coverage": "share of the prompts' slots that are kept",
    "missing": "slots missing a completion",
    "invented": "slots invented a completion",
    "errors": "missing + invented a completion",
    "error_rate": "errors a slot of the prompt",
    "perfect": "share of completions without an error",
    "value": "the judge's value",
    "win_rate": "judged better than the baseline, ties half",
    "error_change": "errors relative to the baseline: -0.3 is 30 % fewer",
    "kl": "nats a completion, to the baseline",
    "reward": "mean score of the reward model",
    "text_loss": "nats a token",
    "text_loss_change": "nats a token, minus the baseline's",
    "pair_accuracy": "share of strict pairs ordered as ranked",
    "pair_longer": "the same for 'longer wins'",
}


def _print(cfg: EvalConfig, result: dict, samples: Sequence[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"evaluation of {cfg.model}")
    table.caption = "n: prompts or text windows that the interval is over"
    for column in ("figure", "value", "95 % interval", "n", "meaning"):
        table.add_column(column, justify="left" if column in ("figure", "meaning") else "right")
    for name, found in result.items():
        interval = f"{found['low']:.4g} to {found['high']:.4g}"
        meaning = MEANING.get(name.partition("/")[0], "")
        table.add_row(name, f"{found['mean']:.4g}", interval, str(found["n"]), meaning)
    console.print(table)
    for row in samples[: 3 * cfg.samples : cfg.samples]:
        console.print(f"{row['prompt']} [bold]{row['completion']}[/]", highlight=False)
