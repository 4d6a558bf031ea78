"""The demo's evaluation: every system on held-out records, as the report's content."""

import platform
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

import fastrlhf
from fastrlhf.demo import labeler, restaurants
from fastrlhf.evals import bleu, kl, lm_loss, reward_accuracy, slots, winrate
from fastrlhf.evals.intervals import mean_interval
from fastrlhf.integrations import attention
from fastrlhf.train import data
from fastrlhf.train.models import context_length, load_policy, load_reward_model, load_tokenizer
from fastrlhf.train.runtime import Runtime
from fastrlhf.train.sampler import HFSampler
from fastrlhf.train.steps import score_sequences, token_logprobs
from fastrlhf.train.text import TextEncoder

DATA = Path(__file__).resolve().parent / "data"
BASELINE = "sft"  # win rates and changes are relative to it
REFERENCE = "rl_init"  # KL is measured from it
MAX_NEW_TOKENS = 80
MAX_TOKENS = 4096  # tokens of a micro-batch
SHOWN = 6  # records in the report's side-by-side samples


def evaluate(systems: dict[str, str], reward: str, cfg, runtime: Runtime) -> dict:
    """Evaluate every system on the split `cfg.split`.

    Args:
        systems: model folder by name; BASELINE and REFERENCE must be among them.
        reward: folder of the reward model.
        cfg: the demo's settings (DemoConfig).

    Returns:
        Part of the content of report.json; `fastrlhf.report.content` describes it.
    """
    tokenizer = load_tokenizer(systems[BASELINE])
    encoder = TextEncoder(tokenizer, parse_special_tokens=True)
    rows = _records(cfg)
    policies = {
        name: load_policy(
            folder, runtime, trainable=False, tokenizer=tokenizer, backend=cfg.backend
        )
        for name, folder in systems.items()
    }
    reward_model = load_reward_model(reward, runtime, trainable=False)
    prompts = encoder.prompts([row["prompt"] for row in rows], "prompts")
    text = data.read_text(str(DATA / f"text_{cfg.split}.txt.gz"))
    windows = data.text_windows(text, encoder, context_length(reward_model.config), "held-out text")
    windows = [w.tokens.tolist() for w in windows]

    def nll_of(policy):
        return lambda parts: [
            -x
            for x in token_logprobs(
                policy, [data.Example(np.array(p), 1) for p in parts], MAX_TOKENS
            )
        ]

    judge = Judge(rows, prompts, encoder, reward_model, policies[REFERENCE])
    found = {
        name: {
            "sampled": judge.sample(policy, times=cfg.samples, temperature=1.0, seed=cfg.seed + 11),
            "greedy": judge.sample(policy, times=1, temperature=0.0, seed=0),
            "text": lm_loss.window_sums(windows, nll_of(policy)),
        }
        for name, policy in policies.items()
    }
    baseline = found[BASELINE]
    results = {}
    for name, parts in found.items():
        results[name] = {"text_loss": lm_loss.evaluate(parts["text"])["loss"]}
        if name != BASELINE:
            change = lm_loss.difference(parts["text"], baseline["text"])
            results[name]["text_loss_change"] = change
        for decoding in ("sampled", "greedy"):
            results[name][decoding] = judge.figures(parts[decoding], baseline[decoding])
    return {
        "systems": list(systems),
        "reference": BASELINE,
        "results": results,
        "human": judge.humans(),
        "reward_model": {
            "held_out": judge.pair_accuracy(found[REFERENCE]["sampled"]),
            "human": _human_accuracy(reward_model, encoder),
        },
        "labeler": labeler.validate(
            data.read_rows(_file(f"demonstrations_{cfg.split}"), {"prompt": str}, "demonstrations"),
            data.read_rankings(_file("rankings_human")),
        ),
        "samples": judge.side_by_side({name: parts["sampled"] for name, parts in found.items()}),
        "environment": _environment(cfg, runtime),
        "backends": {
            op: next(
                (b for b, state in ways.items() if state == "available" and b != "reference"),
                "reference",
            )
            for op, ways in _on_this_device(runtime).items()
        },
        "command": "fastrlhf demo "
        + " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in _changed(cfg).items()),
    }


@dataclass(frozen=True)
class JudgedSamples:
    """One system's n completions of the records, and what labeler, reward model and reference say of them."""

    rows: list[int]  # [n] the row (record) of each completion
    texts: list[str]  # [n]
    scores: list[labeler.Score]  # [n]
    rewards: np.ndarray  # [n]
    finished: list[bool]  # [n] whether it ended with EOS
    lengths: list[int]  # [n] tokens, EOS included
    kl: dict | None  # interval, nats per completion; None if greedy or from the reference itself


class Judge:
    """Samples from systems on the same prompts and judges the samples.

    Args:
        rows: one record each: "record", "references", ...
        prompts: token ids of each row's prompt.
        reward_model: scores the samples.
        reference: the policy that KL is measured from.
    """

    def __init__(
        self,
        rows: list[dict],
        prompts: list[list[int]],
        encoder: TextEncoder,
        reward_model,
        reference,
    ):
        self.rows, self.prompts, self.encoder = rows, prompts, encoder
        self.reward_model, self.reference = reward_model, reference

    def sample(self, policy, *, times: int, temperature: float, seed: int) -> JudgedSamples:
        """Sample `times` completions for every row and judge them."""
        rows = [i for i in range(len(self.rows)) for _ in range(times)]
        prompts = [self.prompts[i] for i in rows]
        samples = HFSampler(policy, self.encoder.tokenizer, max_batch=512).generate(
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        texts = self.encoder.decode(prompts, samples.tokens, samples.finished)
        examples = [
            data.Example(np.concatenate([self.prompts[i], t]), len(self.prompts[i]))
            for i, t in zip(rows, samples.tokens, strict=True)
        ]
        divergence = None
        if temperature == 1.0 and policy is not self.reference:
            ref_logprobs = token_logprobs(self.reference, examples, MAX_TOKENS)
            divergence = kl.evaluate(samples.logprobs, ref_logprobs, rows)["sequence"]
        return JudgedSamples(
            rows=rows,
            texts=texts,
            scores=[
                labeler.score(self.rows[i]["record"], t) for i, t in zip(rows, texts, strict=True)
            ],
            rewards=score_sequences(self.reward_model, [e.tokens for e in examples], MAX_TOKENS),
            finished=samples.finished,
            lengths=[len(t) for t in samples.tokens],
            kl=divergence,
        )

    def figures(self, ours: JudgedSamples, baseline: JudgedSamples) -> dict:
        """Intervals of all figures of one system, compared with the baseline on the same prompts."""
        rows = ours.rows
        figures = slots.evaluate(ours.scores, rows)
        figures["win_rate"] = winrate.evaluate(
            [s.value for s in ours.scores], [s.value for s in baseline.scores], rows
        )
        figures["error_change"] = slots.error_change(ours.scores, baseline.scores, rows)
        figures["bleu"] = bleu.evaluate(
            ours.texts, [self.rows[i]["references"] for i in rows], rows
        )
        if ours.kl is not None:
            figures["kl"] = ours.kl
        for name, values in (
            ("reward", ours.rewards),
            ("finished", ours.finished),
            ("length", ours.lengths),
        ):
            figures[name] = mean_interval(np.asarray(values, dtype=np.float64), rows)
        return figures

    def humans(self) -> dict:
        """Slot figures of the human references."""
        pairs = [(i, text) for i, row in enumerate(self.rows) for text in row["references"]]
        scores = [labeler.score(self.rows[i]["record"], text) for i, text in pairs]
        return slots.evaluate(scores, [i for i, _ in pairs])

    def pair_accuracy(self, samples: JudgedSamples) -> dict:
        """How often the reward model orders held-out completions as the labeler does."""
        grouped: dict[int, dict] = {}
        for row, text, value in zip(samples.rows, samples.texts, samples.rewards, strict=True):
            group = grouped.setdefault(row, {"completions": [], "scores": []})
            group["completions"].append(text)
            group["scores"].append(float(value))
        return reward_accuracy.evaluate(
            [
                {
                    **group,
                    "prompt": str(i),
                    "ranks": labeler.rank(self.rows[i]["record"], group["completions"]),
                }
                for i, group in grouped.items()
            ]
        )

    def side_by_side(self, samples: dict[str, JudgedSamples]) -> list[dict]:
        """The first completion of every system for SHOWN records spread evenly over the split, with real names."""
        shown = np.linspace(0, len(self.rows) - 1, min(SHOWN, len(self.rows))).astype(int)
        out = []
        for i in shown:
            row = self.rows[i]
            outputs = {}
            for name, found in samples.items():
                k = found.rows.index(i)
                score = found.scores[k]
                outputs[name] = {
                    "text": restaurants.relexicalize(found.texts[k], row["name"], row["near"]),
                    "missing": list(score.missing),
                    "invented": list(score.invented),
                }
            record = dict(row["record"], name=row["name"])
            if "near" in record:
                record["near"] = row["near"]
            human = restaurants.relexicalize(row["references"][0], row["name"], row["near"])
            out.append({"record": record, "human": human, "outputs": outputs})
        return out


def _file(name: str) -> str:
    return str(DATA / f"{name}.jsonl.gz")


def _records(cfg) -> list[dict]:
    """One row for each record, with all its human sentences as "references"."""
    rows: dict[str, dict] = {}
    for row in data.read_rows(
        _file(f"demonstrations_{cfg.split}"), {"prompt": str}, "demonstrations"
    ):
        found = rows.setdefault(row["prompt"], {**row, "references": []})
        found["references"].append(row["completion"])
    every = list(rows.values())
    return every[: cfg.limit] if cfg.limit else every


def _human_accuracy(reward_model, encoder: TextEncoder) -> dict:
    rows = data.read_rankings(_file("rankings_human"))
    flat = [{"prompt": r["prompt"], "completion": text} for r in rows for text in r["completions"]]
    examples = data.encode_examples(
        flat, encoder, context_length(reward_model.config), "human rankings"
    )
    scores = iter(score_sequences(reward_model, [e.tokens for e in examples], MAX_TOKENS).tolist())
    return reward_accuracy.evaluate(
        [{**row, "scores": [next(scores) for _ in row["completions"]]} for row in rows]
    )


def _environment(cfg, runtime: Runtime) -> dict:
    return {
        "fastrlhf": fastrlhf.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(runtime.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": cfg.precision,
        "attention": attention.kernel_name(runtime.device, runtime.compute_dtype),
        "split": cfg.split,
        "seed": cfg.seed,
    }


def _on_this_device(runtime: Runtime) -> dict:
    order = ("cuda", "triton") if runtime.device.type == "cuda" else ("cpu",)
    return {op: {b: ways.get(b) for b in order} for op, ways in fastrlhf.backends().items()}


def _changed(cfg) -> dict:
    fresh = type(cfg)()
    return {key: value for key, value in asdict(cfg).items() if value != getattr(fresh, key)}
