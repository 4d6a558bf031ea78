"""Time, peak memory and largest batch of a whole PPO update of a 1B Llama, with four heads side by side.

    python benchmarks/update.py --out update.json [--tiny] [--device cpu|cuda] [--dtype bfloat16|float32]

The model is random, built from a config: bf16 with gradient checkpointing, tied embeddings, sequences of 2048
tokens. An update is forward, loss, backward, gradient-norm clipping and an AdamW step. The heads take the same
hidden states:

    linear_ppo_loss   hidden states -> loss; fp32 logits chunk by chunk
    token_loss        16-bit logits of a plain matrix product -> loss; the gradient overwrites the logits
    bf16 head         16-bit logits cast to fp32, log-softmax and loss in plain PyTorch
    fp32 head         as the bf16 head, with both operands of the product cast to fp32 (an fp32_lm_head flag)

"trunk alone" has neither head nor loss and gives the shared cost. The gate compares loss and gradients of a small
batch with those of the fp32 head. A head that fails gets no time. The exit status is 1 if a head fails the gate or
an update raises. Running out of memory is a result. The search for the largest batch doubles, then bisects to
within an eighth. --tiny: a model and batches of a few hundred tokens, seconds on a CPU.

If FASTRLHF_UNTIL (seconds since the epoch) is set, nothing starts that would not finish before it. The file is
rewritten after each row.
"""

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastrlhf
from fastrlhf import reference
from harness import machine, peak_bytes, plain

CLIP = 0.2
NOISE = 0.05  # on the old log-probs: ratios are 1 +- 0.05, far from the clip at 1 +- 0.2


@dataclass
class Setup:
    """Sizes of the model and of the batches."""

    config: dict
    row: int  # tokens of a sequence
    gate: int  # tokens of the gate's batch
    tokens: dict[int, int]  # of a timed batch -> timed updates; several follow a warm-up
    most: int  # tokens of the largest batch to try

    def model(self, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            **self.config,
            max_position_embeddings=self.row,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        with torch.device(device):
            model = LlamaForCausalLM(config).to(dtype)
        model.train()
        # transformers >= 5.24 has the first name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))(
            {"use_reentrant": False}
        )
        return model


BILLION = Setup(  # Llama-3.2-1B's
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    row=2048,
    gate=4096,
    tokens={2**14: 3, 2**16: 2, 2**18: 1},
    most=2**20,
)
TINY = Setup(
    {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    row=64,
    gate=256,
    tokens={256: 1, 512: 1},
    most=1024,
)


@dataclass
class Batch:
    """tokens, targets, old_logprob, advantages, each [B, T]."""

    tokens: Tensor
    targets: Tensor
    old_logprob: Tensor
    advantages: Tensor

    @classmethod
    def draw(cls, count: int, setup: Setup, device: str) -> "Batch":
        """`count` tokens, at least one sequence. The old policy is uniform: log-prob -log V, plus noise."""
        vocab = setup.config["vocab_size"]
        generator = torch.Generator(device).manual_seed(count)
        shape = max(count // setup.row, 1), setup.row
        tokens, targets = (
            torch.randint(vocab, shape, generator=generator, device=device) for _ in range(2)
        )
        noise, advantages = (
            torch.randn(shape, generator=generator, device=device) for _ in range(2)
        )
        return cls(tokens, targets, NOISE * noise - math.log(vocab), advantages)

    @torch.no_grad()
    def of(self, model: LlamaForCausalLM) -> "Batch":
        """The same batch with the model itself, plus noise, as the old policy: all ratios are near 1."""
        hidden = model.model(self.tokens, use_cache=False).last_hidden_state
        logits = F.linear(hidden.float(), model.lm_head.weight.float())
        logprob = logits.log_softmax(-1).gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)
        noise = self.old_logprob + math.log(logits.shape[-1])
        return replace(self, old_logprob=logprob + noise)


# (hidden states [B, T, H], weight [V, H], batch) -> the mean loss
Head = Callable[[Tensor, Tensor, Batch], Tensor]


def ours_on_hidden(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    rows = batch.targets, batch.old_logprob, batch.advantages
    return fastrlhf.linear_ppo_loss(hidden, weight, *rows, clip=CLIP).loss


def ours_on_logits(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    losses, _ = fastrlhf.token_loss(
        F.linear(hidden, weight),
        batch.targets,
        batch.advantages,
        old_logprob=batch.old_logprob,
        clip=CLIP,
        scale=1 / batch.targets.numel(),
        inplace_backward=True,
    )
    return losses.sum()


def _eager(logits: Tensor, batch: Batch) -> Tensor:
    logprob = logits.log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    return reference.ppo_loss(logprob, batch.old_logprob, batch.advantages, clip=CLIP).loss


def bf16_head(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    return _eager(F.linear(hidden.bfloat16(), weight.bfloat16()).float(), batch)


def fp32_head(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    return _eager(F.linear(hidden.float(), weight.float()), batch)


TRUTH = "fp32 head"
HEADS: dict[str, Head] = {
    "linear_ppo_loss": ours_on_hidden,
    "token_loss": ours_on_logits,
    "bf16 head": bf16_head,
    TRUTH: fp32_head,
}
TRUNK = "trunk alone"


def exact(head: str, dtype: torch.dtype) -> bool:
    """True if the head computes logits in fp32."""
    if head == "token_loss":
        return dtype == torch.float32  # its logits have the dtype of the model
    return head != "bf16 head"


def bars(head: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest distances from the fp32 head that rounding explains; gradients: relative to their norm.

    Exact heads differ by the order of fp32 sums; in bf16 that flips a rounding of dX and dW, and the backward of
    attention adds in no fixed order. For the others, rounding a logit of size 4 to bf16 is off by up to 2^-7. A
    ratio near 1 moves by as much, the mean over tokens by less than a quarter of it. Every layer rounds its bf16
    gradient (2^-9) again.
    """
    if exact(head, dtype):
        gradients = 1e-2 if dtype == torch.bfloat16 else 1e-4
        return {"loss": 2e-5, "head": gradients, "trunk": gradients}
    return {"loss": 2**-9, "head": 3e-2, "trunk": 3e-2}


def forward(model: LlamaForCausalLM, head: Head | None, batch: Batch) -> Tensor:
    """The loss; without a head, a scalar that reaches every trunk parameter."""
    hidden = model.model(batch.tokens, use_cache=False).last_hidden_state
    if head is None:
        return hidden.mean(dtype=torch.float32)
    return head(hidden, model.lm_head.weight, batch)


def gate(model: LlamaForCausalLM, setup: Setup) -> dict[str, dict]:
    """Head -> loss, gradient_norm, distance (from the fp32 head), bars, and `wrong` if a distance exceeds its bar."""
    batch = Batch.draw(setup.gate, setup, str(model.device)).of(model)
    loss, truth = _gradients(model, HEADS[TRUTH], batch)
    found = {}
    for name, head in HEADS.items():
        try:
            own_loss, own = _gradients(model, head, batch)
        except Exception as error:  # go on with the other heads
            model.zero_grad(set_to_none=True)
            found[name] = {"wrong": f"{type(error).__name__}: {error}"}
            continue
        distance = {part: _distance(own[part], truth[part]) for part in truth}
        distance["loss"] = abs(own_loss - loss)
        norm = math.hypot(*(_norm(grads) for grads in own.values()))
        found[name] = {"loss": own_loss, "gradient_norm": norm, "distance": distance}
        found[name]["bars"] = most = bars(name, model.dtype)
        wrong = [
            f"distance of the {part} is {distance[part]:.3g}, allowed {most[part]:.3g}"
            for part in most
            if not distance[part] <= most[part]  # NaN too
        ]
        if wrong:
            found[name]["wrong"] = ", ".join(wrong)
    return found


def _gradients(model, head, batch) -> tuple[float, dict[str, list[Tensor]]]:
    """(loss, gradients of "head", the weight that it shares with the embedding, and of "trunk")."""
    loss = forward(model, head, batch)
    loss.backward()
    parts: dict[str, list[Tensor]] = {"head": [], "trunk": []}
    for p in model.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        parts["head" if p is model.lm_head.weight else "trunk"].append(grad)
    model.zero_grad(set_to_none=True)
    return loss.item(), parts


def _norm(grads: Iterable[Tensor]) -> float:
    return math.sqrt(sum(g.float().square().sum().item() for g in grads))


def _distance(grads: list[Tensor], truth: list[Tensor]) -> float:
    return _norm(a.float() - b for a, b in zip(grads, truth, strict=True)) / _norm(truth)


class Runner:
    """Runs updates of one model with any head; records which batches fit, and their speed."""

    def __init__(self, model: LlamaForCausalLM, setup: Setup, until: float = math.inf):
        self.model, self.setup, self.until = model, setup, until
        self.device = model.device.type
        fused = self.device == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)
        self.fitted: dict[tuple[str, int], bool | None] = {}  # None: it raised something else
        self.rate: dict[str, float] = {}  # head -> seconds per token of its latest batch

    def update(self, head: Head | None, batch: Batch) -> None:
        forward(self.model, head, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def row(self, name: str, tokens: int, updates: int) -> dict:
        """Time and memory of `updates` updates; `fits` is False if memory ran out, `raised` is another error."""
        row = {"head": name, "tokens": tokens}
        if self.late(name, tokens, updates + (updates > 1)):
            return row | {"not_run": "no time was left"}
        measured, raised = None, ""
        try:
            measured = self._measured(HEADS.get(name), tokens, updates)
        except Exception as error:
            # Keep only the text: the exception holds the frames, and the frames hold the tensors.
            raised = "" if _out_of_memory(error) else f"{type(error).__name__}: {error}"
        if measured is None:
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.fitted[name, tokens] = None if raised else False
            return row | ({"raised": raised} if raised else {"fits": False})
        self.fitted[name, tokens] = True
        self.rate[name] = measured["seconds"] / tokens
        return row | {"fits": True, "tokens_per_s": tokens / measured["seconds"]} | measured

    def late(self, name: str, tokens: int, updates: int) -> bool:
        """True if `updates` updates would probably not finish before `until`."""
        rate = self.rate.get(name, max(self.rate.values(), default=0.0))
        return time.time() + 1.2 * rate * tokens * updates > self.until

    def _measured(self, head: Head | None, tokens: int, updates: int) -> dict:
        batch = Batch.draw(tokens, self.setup, str(self.model.device))
        if updates > 1:
            self.update(head, batch)
        seconds, gpu = [], self.device == "cuda"
        if gpu:
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(updates):
            start = time.perf_counter()
            self.update(head, batch)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found = {"seconds": statistics.median(seconds), "samples": seconds}
        if gpu:
            peak = torch.cuda.max_memory_allocated()
            return found | {"peak_bytes": peak, "beyond_bytes": peak - held}
        return found | {"beyond_bytes": peak_bytes(lambda: self.update(head, batch), "cpu")}

    def fits(self, name: str, tokens: int) -> bool | None:
        """Whether one update fits; None if no time is left to try, or if it raised."""
        if (name, tokens) not in self.fitted and "not_run" in self.row(name, tokens, 1):
            return None
        return self.fitted[name, tokens]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def largest(fits: Callable[[int], bool | None], first: int, most: int, row: int) -> dict:
    """The largest batch that fits, in tokens: double from `first` up to `most`, then bisect to within an eighth.

    {"tokens": largest that fits, "does_not_fit": smallest that does not, "untried": size at which time ran out}.
    """
    good, bad, count = 0, None, first
    while count <= most and bad is None:
        if (answer := fits(count)) is None:
            return {"tokens": good, "does_not_fit": bad, "untried": count}
        good, bad = (count, None) if answer else (good, count)
        count *= 2
    while bad is not None and bad - good > max(row, good // 8):
        count = (good + bad) // 2 // row * row
        if not good < count < bad:
            break
        if (answer := fits(count)) is None:
            return {"tokens": good, "does_not_fit": bad, "untried": count}
        good, bad = (count, bad) if answer else (good, count)
    return {"tokens": good, "does_not_fit": bad}


def bench(setup: Setup, device: str, dtype: torch.dtype, write: Callable[[dict], None]) -> int:
    """Gate, timings, largest batches; `write` receives the document after each. Returns the exit status."""
    model = setup.model(device, dtype)
    document = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "dtype": str(dtype)[6:],
    }
    count = sum(p.numel() for p in model.parameters())
    document |= {"machine": machine(device), "model": {**setup.config, "parameters": count}}
    document |= {"row": setup.row, "gate": gate(model, setup), "rows": [], "largest": {}}
    write(document)
    print(LEGEND, flush=True)
    print("\ngate", flush=True)
    for name, found in document["gate"].items():
        print(gate_line(name, found), flush=True)
    right = [name for name, found in document["gate"].items() if "wrong" not in found]
    runner = Runner(model, setup, float(os.environ.get("FASTRLHF_UNTIL") or "inf"))
    print(f"\n{COLUMNS}", flush=True)
    for tokens, updates in setup.tokens.items():
        for name in (TRUNK, *(n for n in HEADS if n in right)):
            document["rows"].append(row := runner.row(name, tokens, updates))
            print(row_line(row), flush=True)
            write(document)
    print("\nlargest batch", flush=True)
    for name in (n for n in HEADS if n in right):
        found = largest(
            lambda n, name=name: runner.fits(name, n), min(setup.tokens), setup.most, setup.row
        )
        document["largest"][name] = found
        print(largest_line(name, found), flush=True)
        write(document)
    broken = [row for row in document["rows"] if "raised" in row]
    return int(len(right) < len(HEADS) or bool(broken))


LEGEND = """\
gate: distance of the loss (absolute) and of the gradients (relative, 2-norm) from those of the fp32 head
s: median time of an update; tokens/s: tokens of the batch over it
peak MB: most memory that torch's allocator held; beyond MB: without what was held before the update (weights,
    optimizer state), and on a CPU the only one that is measured
largest batch: tokens of the largest batch that fits, and of the smallest that does not"""
COLUMNS = f"{'tokens':>8} {'head':<16} {'s':>9} {'tokens/s':>10} {'peak MB':>9} {'beyond MB':>9}"


def gate_line(name: str, found: dict) -> str:
    distances = ", ".join(f"{part} {x:.2g}" for part, x in found.get("distance", {}).items())
    return f"{name:<16} {found.get('wrong') or 'passed'}" + f" ({distances})" * bool(distances)


def row_line(row: dict) -> str:
    start = f"{row['tokens']:>8} {row['head']:<16}"
    if not row.get("fits"):
        return f"{start} {row.get('not_run') or row.get('raised') or 'does not fit'}"
    peak = f"{row['peak_bytes'] / 1e6:9.0f}" if "peak_bytes" in row else f"{'-':>9}"
    beyond = row["beyond_bytes"] / 1e6
    return f"{start} {row['seconds']:9.3f} {row['tokens_per_s']:10.0f} {peak} {beyond:9.0f}"


def largest_line(name: str, found: dict) -> str:
    if found["does_not_fit"] is not None:
        end = f"{found['does_not_fit']} do not fit"
    else:
        end = "no larger batch was tried" + ", no time left" * ("untried" in found)
    return f"{name:<16} {found['tokens']:>8} tokens; {end}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/update.json"))
    arguments = parser.parse_args()
    # Read at the first CUDA allocation. Without it, batches of growing size fragment the memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if arguments.out.is_dir():
        parser.error(f"--out {arguments.out}: expected a file, got a directory")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def write(document: dict) -> None:
        document["seconds"] = round(time.perf_counter() - start, 1)
        unfinished = arguments.out.with_name(f".{arguments.out.name}")
        unfinished.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
        os.replace(unfinished, arguments.out)

    setup = TINY if arguments.tiny else BILLION
    status = bench(setup, arguments.device, getattr(torch, arguments.dtype), write)
    print(f"wrote {arguments.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
