"""`fastrlhf eval`: sample from a model, judge the samples, and measure its loss on held-out text."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrlhf.errors import UserError, printable
from fastrlhf.evals import bleu, kl, lm_loss, reward_accuracy, slots, winrate
from fastrlhf.evals.intervals import mean_interval
from fastrlhf.train import config, data, models
from fastrlhf.train.files import PARTIAL, replace_text
from fastrlhf.train.folder import refuse_input_inside
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler, check_temperature
from fastrlhf.train.steps import require_fit, score_sequences, token_logprobs
from fastrlhf.train.text import TextConfig, TextEncoder, check_same_ends

CONTENT = ("model", "figures", "samples")  # keys of the file that `out` names


@dataclass
class EvalConfig(RuntimeConfig, TextConfig):
    """Evaluate a model folder. Every figure is printed with its 95 % interval."""

    model: str = ""  # folder of the model to evaluate
    baseline: str = ""  # folder of a model to compare with: win rate, slot errors, loss and KL
    reward_model: str = ""  # folder of a reward model: mean score, and pair accuracy on rankings
    prompts: str = ""  # JSONL: prompt, optional completion (human references, for BLEU)
    text: str = ""  # held-out text: loss per token
    rankings: str = ""  # JSONL: prompt, completions, ranks, optional criterion
    judge: str = ""  # module:function(prompt, completion); returns a number or a judgement
    out: str = ""  # JSON file for the figures and the samples
    overwrite: bool = False  # replace `out`
    limit: int = 0  # use only the first `limit` prompts; 0: all
    samples: int = 1  # completions per prompt
    max_new_tokens: int = 96  # limit of a completion
    temperature: float = 1.0  # sampling temperature; 0: greedy
    window: int = 0  # tokens of a text window; 0: the context, the smaller one with a baseline
    max_tokens: int = 8192  # tokens of a micro-batch


def load_judge(path: str) -> Callable[[str, str], slots.Judgement]:
    """The judge "module:function"; the module may be in the working directory.

    Raises:
        UserError: there is no such function. The judge raises it too, for a result that is no judgement.
    """
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
    """A loaded policy with its tokenizer."""

    def __init__(self, folder: str, cfg: EvalConfig, runtime: Runtime):
        self.cfg = cfg
        self.tokenizer = models.load_tokenizer(folder, cfg.trust_remote_code)
        self.policy = models.load_policy(
            folder, runtime, trainable=False, tokenizer=self.tokenizer, backend=cfg.backend
        )
        self.sampler = HFSampler(self.policy, self.tokenizer)
        self.text = TextEncoder(self.tokenizer, cfg.parse_special_tokens)
        self.text.note_ends(self.sampler.ends)
        self.context = models.context_length(self.policy.config)

    def prompts(self, rows: Sequence[dict]) -> list[list[int]]:
        """Token ids of each row's prompt. UserError if a prompt and its completion do not fit."""
        cfg, room = self.cfg, self.cfg.max_new_tokens
        what = f"prompts {cfg.prompts!r}"
        prompts = data.encode_prompts(rows, self.text, self.context, room, what)
        longest = [len(prompt) + room for prompt in prompts]
        require_fit(longest, cfg.max_tokens, "prompts with max_new_tokens")
        return prompts

    def sample(self, prompts: list[list[int]]) -> tuple[list[str], list[data.Example], list[bool]]:
        """One completion per prompt: (texts, prompt + completion tokens, whether it ended with an end token)."""
        cfg = self.cfg
        samples = self.sampler.generate(
            prompts,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seed=cfg.seed,
        )
        texts = self.text.decode(prompts, samples.tokens, samples.finished)
        examples = [
            data.Example(np.array([*p, *t], dtype=np.int64), len(p))
            for p, t in zip(prompts, samples.tokens, strict=True)
        ]
        return texts, examples, list(samples.finished)

    def token_nll(self, windows: list[list[int]]) -> list[np.ndarray]:
        """Negative log-likelihoods [L - 1] (nats) of each window of L tokens."""
        examples = [data.Example(np.array(w, dtype=np.int64), 1) for w in windows]
        return [-x for x in token_logprobs(self.policy, examples, self.cfg.max_tokens)]


def _prompts(cfg: EvalConfig) -> tuple[list[dict], dict[str, list[str]]]:
    """(`cfg.samples` rows for each distinct prompt, human references by prompt)."""
    references: dict[str, list[str]] = {}
    for row in data.read_rows(cfg.prompts, {"prompt": str}, "prompts"):
        texts = references.setdefault(row["prompt"], [])
        if isinstance(row.get("completion"), str):
            texts.append(row["completion"])
    unique = list(references)[: cfg.limit or None]
    return [{"prompt": p} for p in unique for _ in range(cfg.samples)], references


def _encoded_prompts(
    cfg: EvalConfig, rows: list[dict], model: _Model, baseline: _Model | None, reward_model
) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts of the rows for the model and for the baseline. UserError if a sequence does not fit a model."""
    prompts = model.prompts(rows)
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    for name, other in (("baseline", baseline and baseline.policy), ("reward_model", reward_model)):
        if other:
            which = f"{name} {getattr(cfg, name)!r}"
            models.check_context(other.config, longest, which, "prompts + max_new_tokens")
    return prompts, baseline.prompts(rows) if baseline else []


def _evaluate_samples(
    cfg: EvalConfig,
    labels: list[str],
    references: dict[str, list[str]],
    prompts: tuple[list[list[int]], list[list[int]]],
    model: _Model,
    baseline: _Model | None,
    reward_model,
    result: dict,
) -> list[dict]:
    """Add the figures of sampled completions to `result`; return the samples.

    Args:
        labels: the text of each prompt.
        references: human completions by prompt.
        prompts: as from `_encoded_prompts`.
    """
    texts, examples, finished = model.sample(prompts[0])
    baseline_texts = baseline.sample(prompts[1])[0] if baseline else None
    result["finished"] = mean_interval(finished, labels, seed=cfg.seed)
    result["length"] = mean_interval([e.targets for e in examples], labels, seed=cfg.seed)
    if all(references[p] for p in set(labels)):
        human = [references[p] for p in labels]
        result["bleu"] = bleu.evaluate(texts, human, labels, seed=cfg.seed)
    if cfg.judge:
        judge = load_judge(cfg.judge)
        ours = [judge(p, t) for p, t in zip(labels, texts, strict=True)]
        result |= slots.evaluate(ours, labels, seed=cfg.seed)
        if baseline_texts is not None:
            theirs = [judge(p, t) for p, t in zip(labels, baseline_texts, strict=True)]
            values = ([j.value for j in side] for side in (ours, theirs))
            result["win_rate"] = winrate.evaluate(*values, labels, seed=cfg.seed)
            if "errors" in result:
                change = slots.error_change(ours, theirs, labels, seed=cfg.seed)
                result["error_change"] = change
    if baseline and cfg.temperature == 1:
        both = [token_logprobs(m.policy, examples, cfg.max_tokens) for m in (model, baseline)]
        result["kl"] = kl.evaluate(*both, labels, seed=cfg.seed)["sequence"]
    if reward_model:
        scores = score_sequences(reward_model, [e.tokens for e in examples], cfg.max_tokens)
        result["reward"] = mean_interval(scores, labels, seed=cfg.seed)
    return [{"prompt": p, "completion": t} for p, t in zip(labels, texts, strict=True)]


def _rankings(path: str) -> list[dict]:
    rows = data.read_rankings(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("criterion", ""), str):
            got = type(row["criterion"]).__name__
            raise UserError(f"rankings {path!r}, row {number}: criterion: expected str, got {got}")
    return rows


def _ranked(
    cfg: EvalConfig, rows: list[dict], reward_model, text: TextEncoder
) -> list[data.Example]:
    """The sequences of all completions, in the order of the rows."""
    flat = [{"prompt": r["prompt"], "completion": c} for r in rows for c in r["completions"]]
    context, what = models.context_length(reward_model.config), f"rankings {cfg.rankings!r}"
    examples = data.encode_examples(flat, text, context, what, whose="reward model")
    require_fit([len(e.tokens) for e in examples], cfg.max_tokens, what)
    return examples


def _pair_accuracy(
    cfg: EvalConfig, rows: list[dict], examples: list[data.Example], reward_model
) -> dict:
    scores = iter(score_sequences(reward_model, [e.tokens for e in examples], cfg.max_tokens))
    rows = [r | {"scores": [float(next(scores)) for _ in r["completions"]]} for r in rows]
    return reward_accuracy.evaluate(rows, seed=cfg.seed)


def _windows(
    cfg: EvalConfig, documents: list[str], model: _Model, baseline: _Model | None
) -> list[list[int]]:
    """The text in windows that both models can read."""
    context = min(m.context for m in (model, baseline) if m)
    length = data.window_length(cfg.window, context, "window")
    what = f"text {cfg.text!r}"
    windows = data.text_windows(documents, model.text, length, what)
    require_fit([len(w.tokens) for w in windows], cfg.max_tokens, what)
    return [w.tokens.tolist() for w in windows]


def _evaluate_text(
    cfg: EvalConfig,
    windows: list[list[int]],
    model: _Model,
    baseline: _Model | None,
    result: dict,
) -> None:
    ours = lm_loss.window_sums(windows, model.token_nll)
    result["text_loss"] = lm_loss.evaluate(ours, seed=cfg.seed)["loss"]
    if baseline:
        theirs = lm_loss.window_sums(windows, baseline.token_nll)
        result["text_loss_change"] = lm_loss.difference(ours, theirs, seed=cfg.seed)


def _check(cfg: EvalConfig) -> None:
    if not cfg.model:
        raise UserError("model: expected a model folder, got nothing")
    if not (cfg.prompts or cfg.text or cfg.rankings):
        raise UserError("nothing to evaluate on: give prompts, text or rankings")
    if cfg.rankings and not cfg.reward_model:
        raise UserError("rankings: needs reward_model, whose pair accuracy they measure")
    check_temperature(cfg.temperature)
    if cfg.samples < 1 or cfg.limit < 0:
        raise UserError(
            f"samples, limit: expected >= 1 and >= 0, got {cfg.samples} and {cfg.limit}"
        )
    if cfg.out:
        _check_out(cfg)
    if cfg.judge:
        load_judge(cfg.judge)


def _check_out(cfg: EvalConfig) -> None:
    """Raise UserError unless `out` can be written and holds nothing but an earlier evaluation."""
    out = Path(cfg.out)
    if "\0" in cfg.out or out.is_dir():
        raise UserError(f"out: expected a file to write, got {cfg.out!r}")
    for name, paths in config.paths(cfg).items():
        for target in (out, out.with_name(out.name + PARTIAL)):
            refuse_input_inside(target, name, paths)
    folder = next(p for p in out.absolute().parents if p.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"out {cfg.out!r}: nothing can be written to {str(folder)!r}")
    if not out.exists():
        return
    if not cfg.overwrite:
        raise UserError(f"out {cfg.out!r} exists; give --overwrite to replace it")
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        earlier = None
    if not isinstance(earlier, dict) or set(earlier) != set(CONTENT):
        raise UserError(
            f"out {cfg.out!r} is not a result of eval, so --overwrite does not replace it"
        )


def main(cfg: EvalConfig) -> dict:
    """Compute the figures that the given files allow, print them, and write them to `cfg.out`.

    Returns:
        {figure: interval}; MEANING describes the figures.
    """
    _check(cfg)
    # Read before the models: a damaged file must not cost the samples.
    documents = data.read_text(cfg.text) if cfg.text else []
    rankings = _rankings(cfg.rankings) if cfg.rankings else []
    rows, references = _prompts(cfg) if cfg.prompts else ([], {})
    runtime = Runtime(cfg)
    runtime.require_one_process("eval")
    model = _Model(cfg.model, cfg, runtime)
    baseline = _Model(cfg.baseline, cfg, runtime) if cfg.baseline else None
    if baseline:
        models.check_same_vocabulary(model.tokenizer, baseline.tokenizer, "model and baseline")
        if cfg.text:  # both read the same windows
            check_same_ends(model.text, baseline.tokenizer, "model and baseline")
    reward_model = None
    if cfg.reward_model:
        tokenizer = models.load_tokenizer(cfg.reward_model, cfg.trust_remote_code)
        models.check_same_vocabulary(model.tokenizer, tokenizer, "model and reward_model")
        check_same_ends(model.text, tokenizer, "model and reward_model")
        reward_model = models.load_reward_model(cfg.reward_model, runtime, trainable=False)
    # All checks come before the samples, which cost the most.
    encoded = _encoded_prompts(cfg, rows, model, baseline, reward_model) if rows else ([], [])
    windows = _windows(cfg, documents, model, baseline) if cfg.text else []
    ranked = _ranked(cfg, rankings, reward_model, model.text) if cfg.rankings else []
    result: dict = {}
    samples = []
    if cfg.prompts:
        labels = [r["prompt"] for r in rows]
        samples = _evaluate_samples(
            cfg, labels, references, encoded, model, baseline, reward_model, result
        )
    if cfg.text:
        _evaluate_text(cfg, windows, model, baseline, result)
    if cfg.rankings:
        accuracy = _pair_accuracy(cfg, rankings, ranked, reward_model)
        for criterion, figures in accuracy.items():
            for key in ("accuracy", "longer"):
                result[f"pair_{key}/{criterion}"] = figures[key]
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        content = dict(zip(CONTENT, (cfg.model, result, samples), strict=True))
        replace_text(Path(cfg.out), json.dumps(content, ensure_ascii=False, indent=1))
    for note in model.text.notes:
        print(printable(f"eval: {note}"))
    _print(cfg, result, samples, runtime)
    return result


# Description of each figure, by the part of its name before the slash.
MEANING = {
    "finished": "share of completions that end with an end token",
    "length": "tokens per completion, end token included",
    "bleu": "against the prompts' human completions",
    "coverage": "share of the prompts' slots that are expressed",
    "missing": "missing slots per completion",
    "invented": "invented slots per completion",
    "errors": "missing + invented slots per completion",
    "error_rate": "errors per slot of the prompt",
    "perfect": "share of completions without an error",
    "value": "the judge's mean value",
    "win_rate": "judged better than the baseline; ties count half",
    "error_change": "errors relative to the baseline: -0.3 is 30 % fewer",
    "kl": "nats per completion, from the baseline",
    "reward": "mean score of the reward model",
    "text_loss": "nats per token",
    "text_loss_change": "nats per token, minus the baseline's",
    "pair_accuracy": "share of strict pairs that the reward model orders as ranked",
    "pair_longer": "the same for the rule that the longer completion wins",
}


def _print(cfg: EvalConfig, result: dict, samples: Sequence[dict], runtime: Runtime) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=Text(printable(f"evaluation of {cfg.model}")))
    table.caption = Text(
        "n: number of prompts or text windows that the interval is over\n"
        + printable(runtime.describe_checks())
    )
    for column in ("figure", "value", "95 % interval", "n", "meaning"):
        table.add_column(column, justify="left" if column in ("figure", "meaning") else "right")
    for name, found in result.items():
        interval = f"{found['low']:.4g} to {found['high']:.4g}"
        meaning = MEANING.get(name.partition("/")[0], "")
        figure = Text(printable(name))  # may hold a criterion of the rankings
        table.add_row(figure, f"{found['mean']:.4g}", interval, str(found["n"]), meaning)
    console.print(table)
    for row in samples[: 3 * cfg.samples : cfg.samples]:
        prompt, completion = printable(row["prompt"]), printable(row["completion"])
        console.print(Text.assemble(prompt, " ", (completion, "bold")))
