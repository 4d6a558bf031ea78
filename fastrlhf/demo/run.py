"""`fastrlhf demo`: the paper's pipeline on the shipped data, from a base model to a report.

1. SFT of the base model: the baseline.
2. SFT with pretraining text: the RL initialization.
3. K completions for each prompt, ranked by the labeler; a reward model trained on the rankings.
4. PPO and PPO-ptx.
5. Evaluation on held-out records, and report.html.

Each stage runs as its command does, with its section of the recipe, and writes to `out`/<stage>.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fastrlhf import report
from fastrlhf.demo import evaluate, labeler, restaurants
from fastrlhf.errors import UserError
from fastrlhf.train import config, data
from fastrlhf.train.files import replace_text
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.metrics_log import LOG
from fastrlhf.train.models import load_policy, load_tokenizer
from fastrlhf.train.run import Run
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler, check_temperature
from fastrlhf.train.stages import ppo, pretrain, reward, sft
from fastrlhf.train.text import TextEncoder

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
MARK = "demo_config.yaml"  # identifies the output folder of a demo
SECTIONS = ("pretrain", "sft", "rl_init", "reward", "ppo", "ppo_ptx")


@dataclass
class DemoConfig(RuntimeConfig):
    """Settings of the demo. The settings of its stages are in the recipe."""

    out: str = "runs/demo"  # output folder
    overwrite: bool = False  # replace another demo in `out`
    recipe: str = "quickstart"  # a shipped recipe, or a YAML file with a section for each stage
    from_scratch: bool = False  # pretrain the base model instead of using the shipped one
    rankings: str = ""  # JSONL of human rankings to train the reward model on, not the labeler's
    split: Literal["test", "dev"] = "test"  # records to evaluate on; dev is for choosing settings
    comparisons: int = 1500  # prompts whose completions are sampled and ranked
    completions_low: int = 4  # lower bound of K, the random number of completions of a prompt
    completions_high: int = 9  # upper bound of K
    label_temperatures: list[float] = field(default_factory=lambda: [1.0, 0.4])  # of the K, cycled
    samples: int = 2  # completions per record in the evaluation at temperature 1
    limit: int = 0  # use only the first `limit` records; 0: all


def main(cfg: DemoConfig) -> dict:
    """Run the demo, write `out`/report.json and `out`/report.html, and return the content of the report."""
    folder = _folder(cfg)
    runtime = Runtime(cfg)
    runtime.require_one_process("demo")
    with folder as out:
        config.save_resolved(cfg, out / MARK)
        return _run(cfg, out, runtime)


def _run(cfg: DemoConfig, out: Path, runtime: Runtime) -> dict:
    clock = Clock(cfg)
    base = str(HERE / "base")
    if cfg.from_scratch:
        base = str(out / "base")
        clock.stage(
            "pretrain", "pretraining the base model", pretrain.main, _config(cfg, "pretrain", base)
        )
    demonstrations = str(DATA / "demonstrations_train.jsonl.gz")
    text = str(DATA / "text_train.txt.gz")

    paths = {name: str(out / name) for name in ("sft", "rl_init", "reward", "ppo", "ppo_ptx")}
    common = {"model": base, "demonstrations": demonstrations}
    clock.stage("sft", "SFT, the baseline", sft.main, _config(cfg, "sft", paths["sft"], **common))
    rl_init = _config(cfg, "rl_init", paths["rl_init"], **common, text=text)
    clock.stage("rl_init", "SFT with pretraining text, the RL initialization", sft.main, rl_init)

    rankings = cfg.rankings or str(out / "rankings.jsonl.gz")
    if not cfg.rankings:
        clock.stage(
            "labels",
            "sampling and ranking completions",
            _label,
            cfg,
            paths["rl_init"],
            rankings,
            runtime,
        )
    rm = _config(cfg, "reward", paths["reward"], model=paths["rl_init"], rankings=rankings)
    rm.demonstrations = str(out / "demonstrations_sample.jsonl.gz")
    data.write_rows(
        Path(rm.demonstrations),
        data.read_rows(demonstrations, {"prompt": str}, "demonstrations")[::40],
    )
    clock.stage("reward", "reward model", reward.main, rm)

    models = {
        "model": paths["rl_init"],
        "reward_model": paths["reward"],
        "prompts": str(out / "prompts.jsonl.gz"),
    }
    _write_prompts(demonstrations, Path(models["prompts"]))
    for name, title in (("ppo", "PPO"), ("ppo_ptx", "PPO-ptx")):
        stage = _config(cfg, name, paths[name], **models, text=text)
        clock.stage(name, title, ppo.main, stage, _judge)
    title = "PPO update, fused against reference ops"
    speed = clock.stage("speed", title, _compare_backends, cfg, out, models, runtime)

    systems = {"base": base, **{name: paths[name] for name in ("sft", "rl_init", "ppo", "ppo_ptx")}}
    figures = clock.stage(
        "evaluate",
        f"evaluation on the {cfg.split} split",
        evaluate.evaluate,
        systems,
        paths["reward"],
        cfg,
        runtime,
    )
    result = {
        "title": "fastrlhf demo: a restaurant describer aligned by SFT, a reward model and PPO",
        "seconds": sum(clock.times.values()),
        "stages": clock.stages(out),
        "speed": speed,
        **figures,
    }
    replace_text(out / report.CONTENT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    report.main(report.ReportConfig(run=str(out)))
    return result


class Clock:
    """Prints a heading for each stage and records its wall time."""

    def __init__(self, cfg: DemoConfig):
        self.times: dict[str, float] = {}
        self.total = 7 + int(cfg.from_scratch) + int(not cfg.rankings)

    def stage(self, name: str, title: str, function, *arguments):
        """Print a heading, run `function(*arguments)`, record its seconds under `name`; return its result."""
        from rich.console import Console

        Console().rule(f"[bold]{len(self.times) + 1}/{self.total}  {title}", align="left")
        start = time.perf_counter()
        result = function(*arguments)
        self.times[name] = time.perf_counter() - start
        return result

    def stages(self, out: Path) -> list[dict]:
        """The report's "stages": name, seconds and log file of each."""
        rows = []
        for name, seconds in self.times.items():
            row = {"name": name, "seconds": seconds}
            if (out / name / LOG).is_file():
                row["log"] = f"{name}/{LOG}"
            rows.append(row)
        return rows


def _folder(cfg: DemoConfig) -> OutputFolder:
    """Check all settings; return the output folder, which is not yet created or emptied."""
    config.check_ranges(cfg)
    folder = OutputFolder(cfg.out, MARK, overwrite=cfg.overwrite, inputs=config.paths(cfg))
    if not 2 <= cfg.completions_low <= cfg.completions_high:
        raise UserError(
            f"completions_low and completions_high: expected 2 <= low <= high, "
            f"got {cfg.completions_low} and {cfg.completions_high}"
        )
    if cfg.samples < 2:
        raise UserError(
            f"samples: expected at least 2 (the reward model orders them), got {cfg.samples}"
        )
    for temperature in cfg.label_temperatures:
        check_temperature(temperature, "label_temperatures")
    if cfg.rankings:
        data.read_rankings(cfg.rankings)
    for section in SECTIONS:  # a mistake in the recipe must not stop the demo half-way
        if section != "pretrain" or cfg.from_scratch:
            _config(cfg, section, "")
    return folder


def _config(cfg: DemoConfig, section: str, out: str, **paths):
    """The settings of one stage: its section of the recipe, the demo's runtime settings, and `paths`."""
    classes = {"pretrain": pretrain.PretrainConfig, "reward": reward.RewardConfig}
    kind = classes.get(section, ppo.PPOConfig if section.startswith("ppo") else sft.SFTConfig)
    command = {"rl_init": "sft", "ppo_ptx": "ppo"}.get(section, section)
    run = {
        "device": cfg.device,
        "precision": cfg.precision,
        "seed": cfg.seed,
        "backend": cfg.backend,
    }
    stage = config.load(kind, command, cfg.recipe, {**run, "out": out, **paths}, variant=section)
    if section == "pretrain":
        stage.text = str(DATA / "text_train.txt.gz")
        stage.valid_text = str(DATA / "text_dev.txt.gz")
        stage.tokenizer_text = [str(DATA / "demonstrations_train.jsonl.gz")]
        stage.special_tokens = restaurants.special_tokens()
    return stage


def _judge(rows: list[dict], texts: list[str]) -> list[float]:
    """The labeler's value of each text, for PPO's log."""
    return [
        labeler.score_prompt(row["prompt"], text).value
        for row, text in zip(rows, texts, strict=True)
    ]


def _write_prompts(demonstrations: str, path: Path) -> None:
    """Write the distinct prompts of the demonstrations."""
    rows = data.read_rows(demonstrations, {"prompt": str}, "demonstrations")
    unique = [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in rows)]
    data.write_rows(path, unique)


def _label(cfg: DemoConfig, model: str, path: str, runtime: Runtime) -> None:
    """Sample K completions for each of `cfg.comparisons` training prompts, rank them, and write the rankings."""
    tokenizer = load_tokenizer(model)
    text = TextEncoder(tokenizer, parse_special_tokens=True)
    policy = load_policy(model, runtime, trainable=False, tokenizer=tokenizer, backend=cfg.backend)
    rows = data.read_rows(
        str(DATA / "demonstrations_train.jsonl.gz"), {"prompt": str}, "demonstrations"
    )
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    rng = np.random.default_rng([cfg.seed, 7])
    chosen = [prompts[i] for i in rng.permutation(len(prompts))[: cfg.comparisons]]
    counts = rng.integers(cfg.completions_low, cfg.completions_high + 1, size=len(chosen))
    pairs = [(n, k) for n, count in enumerate(counts) for k in range(count)]  # prompt, completion
    sampler = HFSampler(policy, tokenizer, max_batch=512)
    texts: dict[tuple[int, int], str] = {}
    for t, temperature in enumerate(cfg.label_temperatures):
        part = [(n, k) for n, k in pairs if k % len(cfg.label_temperatures) == t]
        tokens = text.prompts([chosen[n] for n, _ in part], "demonstrations")
        samples = sampler.generate(
            tokens,
            max_new_tokens=evaluate.MAX_NEW_TOKENS,
            temperature=temperature,
            seed=cfg.seed + t,
        )
        texts |= zip(part, text.decode(tokens, samples.tokens, samples.finished), strict=True)
    ranked = []
    for n, (prompt, count) in enumerate(zip(chosen, counts, strict=True)):
        completions = [texts[n, k] for k in range(count)]
        ranks = labeler.rank(restaurants.parse_prompt(prompt), completions)
        ranked.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    data.write_rows(Path(path), ranked)


def _compare_backends(
    cfg: DemoConfig, out: Path, models: dict, runtime: Runtime, turns: int = 7
) -> dict[str, float]:
    """Seconds of a PPO update with the fused ops and with the reference ops, on the same experience.

    The two alternate for `turns` turns after a warm-up; the result is the minimum of each, which other load on the
    machine disturbs least.
    """
    trainers = {}
    for backend in ("auto", "reference"):
        stage = _config(cfg, "ppo", str(out / "speed" / backend), **models)
        stage.backend, stage.log_every = backend, 0
        run = Run(stage, "ppo", runtime)
        trainer = ppo.Trainer(stage, runtime, None)
        minibatches, _ = trainer.experience(0, run)
        trainers[backend] = (trainer, minibatches, run)
    times: dict[str, list[float]] = {backend: [] for backend in trainers}
    for turn in range(turns + 1):
        for backend in sorted(trainers, reverse=turn % 2 == 0):
            trainer, minibatches, run = trainers[backend]
            times[backend].append(trainer.update(minibatches, turn, run)["time/update"])
    return {name: min(found[1:]) for name, found in times.items()}
