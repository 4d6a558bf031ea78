"""`fastrlhf demo`: the paper's pipeline on the shipped data, from a base model to a report.

base -> SFT (the baseline) and RL initialisation -> K completions a prompt, ranked by the labeler -> reward model ->
PPO and PPO-ptx -> evaluation on records that no training saw -> report.html.

Every stage runs as its own command would, with its section of the recipe; `out`/<stage> holds what it wrote.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fastrlhf import report
from fastrlhf.demo import evaluate, labeler, restaurants
from fastrlhf.errors import UserError
from fastrlhf.train import checkpoint, config, data
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.models import load_policy, load_tokenizer
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler
from fastrlhf.train.stages import ppo, pretrain, reward, sft
from fastrlhf.train.tracking import LOG, Run

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
MARK = "demo_config.yaml"
SECTIONS = ("pretrain", "sft", "rl_init", "reward", "ppo", "ppo_ptx")


@dataclass
class DemoConfig(RuntimeConfig):
    """Settings of the demo; those of its stages stand in the recipe."""

    out: str = "runs/demo"
    overwrite: bool = False  # replace another demo in `out`
    recipe: str = "quickstart"  # a shipped recipe's name or a YAML file with a section a stage
    from_scratch: bool = False  # pretrain the base model first instead of taking the shipped one
    rankings: str = (
        ""  # a file of human rankings to train the reward model on instead of the labeler's
    )
    split: Literal["test", "dev"] = "test"  # records to evaluate on; settings are chosen on dev
    comparisons: int = 1500  # prompts whose completions are sampled and ranked
    completions_low: int = 4  # K, the number of completions of a prompt, is drawn from low..high
    completions_high: int = 9
    label_temperatures: list[float] = field(default_factory=lambda: [1.0, 0.4])  # of the K, in turn
    samples: int = 2  # completions a record in the evaluation at temperature 1
    limit: int = 0  # evaluate on the first so many records; 0: all


def main(cfg: DemoConfig) -> dict:
    """Run the demo; writes `out`/report.json and `out`/report.html and returns the report's figures."""
    with _folder(cfg) as out:
        config.save_resolved(cfg, out / MARK)
        return _run(cfg, out)


def _run(cfg: DemoConfig, out: Path) -> dict:
    runtime = Runtime(cfg)
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
    clock.stage("rl_init", "SFT with pretraining text, the RL initialisation", sft.main, rl_init)

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
    checkpoint.replace_file(
        out / report.CONTENT, json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    )
    report.main(report.ReportConfig(run=str(out)))
    return result


class Clock:
    """Announces each stage and remembers how long it took."""

    def __init__(self, cfg: DemoConfig):
        self.times: dict[str, float] = {}
        self.total = 7 + int(cfg.from_scratch) + int(not cfg.rankings)

    def stage(self, name: str, title: str, function, *arguments):
        """Run `function(*arguments)` under a headline."""
        from rich.console import Console

        Console().rule(f"[bold]{len(self.times) + 1}/{self.total}  {title}", align="left")
        start = time.perf_counter()
        result = function(*arguments)
        self.times[name] = time.perf_counter() - start
        return result

    def stages(self, out: Path) -> list[dict]:
        """Time and log file of each stage, as the report wants them."""
        rows = []
        for name, seconds in self.times.items():
            row = {"name": name, "seconds": seconds}
            if (out / name / LOG).is_file():
                row["log"] = f"{name}/{LOG}"
            rows.append(row)
        return rows


def _folder(cfg: DemoConfig) -> OutputFolder:
    # Not taken yet: every mistake in the settings must show before an old run is replaced.
    config.check_ranges(cfg)
    folder = OutputFolder(cfg.out, MARK, overwrite=cfg.overwrite, inputs=asdict(cfg))
    if not 2 <= cfg.completions_low <= cfg.completions_high:
        raise UserError(
            f"completions_low and completions_high: expected 2 <= low <= high, "
            f"got {cfg.completions_low} and {cfg.completions_high}"
        )
    if cfg.samples < 2:
        raise UserError(
            f"samples: expected at least 2 (the reward model orders them), got {cfg.samples}"
        )
    if cfg.rankings:
        data.read_rankings(cfg.rankings)
    for section in SECTIONS:  # a recipe with a mistake must not be found out half-way
        if section != "pretrain" or cfg.from_scratch:
            _config(cfg, section, "")
    return folder


def _config(cfg: DemoConfig, section: str, out: str, **paths):
    # A stage's config: its section of the recipe, plus where to run and which files to use.
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


def _judge(rows, texts) -> list[float]:
    return [
        labeler.score_prompt(row["prompt"], text).value
        for row, text in zip(rows, texts, strict=True)
    ]


def _write_prompts(demonstrations: str, path: Path) -> list[dict]:
    rows = data.read_rows(demonstrations, {"prompt": str}, "demonstrations")
    unique = [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in rows)]
    data.write_rows(path, unique)
    return unique


def _label(cfg: DemoConfig, model: str, path: str, runtime: Runtime) -> dict:
    """Sample K completions of each of `comparisons` training prompts and rank them with the labeler."""
    tokenizer = load_tokenizer(model)
    policy = load_policy(model, runtime, trainable=False, backend=cfg.backend)
    rows = data.read_rows(
        str(DATA / "demonstrations_train.jsonl.gz"), {"prompt": str}, "demonstrations"
    )
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    rng = np.random.default_rng([cfg.seed, 7])
    chosen = [prompts[i] for i in rng.permutation(len(prompts))[: cfg.comparisons]]
    counts = rng.integers(cfg.completions_low, cfg.completions_high + 1, size=len(chosen))
    slots = [(n, k) for n, count in enumerate(counts) for k in range(count)]
    sampler = HFSampler(policy, tokenizer, max_batch=512)
    texts: dict[tuple[int, int], str] = {}
    for t, temperature in enumerate(cfg.label_temperatures):
        part = [s for s in slots if s[1] % len(cfg.label_temperatures) == t]
        samples = sampler.generate(
            data.encode(tokenizer, [chosen[n] for n, _ in part]),
            max_new_tokens=evaluate.MAX_NEW_TOKENS,
            temperature=temperature,
            seed=cfg.seed + t,
        )
        found = [tokens.tolist() for tokens in samples.tokens]
        texts |= zip(part, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True)
    ranked = []
    for n, (prompt, count) in enumerate(zip(chosen, counts, strict=True)):
        completions = [texts[n, k] for k in range(count)]
        ranks = labeler.rank(restaurants.parse_prompt(prompt), completions)
        ranked.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    data.write_rows(Path(path), ranked)
    return {"prompts": len(ranked), "completions": len(slots)}


def _compare_backends(
    cfg: DemoConfig, out: Path, models: dict, runtime: Runtime, turns: int = 7
) -> dict[str, float]:
    """Least seconds of a PPO update on the fused ops and on the reference ops: same seed, same experience, in turn."""
    ready = {}
    for backend in ("auto", "reference"):
        stage = _config(cfg, "ppo", str(out / "speed" / backend), **models)
        stage.backend, stage.log_every = backend, 0
        run = Run(stage, "ppo", runtime)
        trainer = ppo.Trainer(stage, runtime, None)
        plan, _ = trainer.experience(0, run)
        ready[backend] = (trainer, plan, run)
    times: dict[str, list[float]] = {backend: [] for backend in ready}
    for turn in range(turns + 1):
        for backend in sorted(ready, reverse=turn % 2 == 0):
            trainer, plan, run = ready[backend]
            times[backend].append(trainer.improve(plan, turn, run)["time/update"])
    # The first warms up; the least is the one that other work on the machine disturbed least.
    return {name: min(found[1:]) for name, found in times.items()}
