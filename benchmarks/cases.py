"""The shapes at which each op is timed.

N tokens, V vocabulary, H hidden size, B sequences, T steps, P prompts with K completions each. CPU shapes take
seconds on two cores. GPU shapes are those for which other projects publish figures.
"""

from typing import NamedTuple


class Case(NamedTuple):
    """One shape of one op. The maker in bench_<op>.py turns `sizes` into tensors."""

    op: str
    name: str
    dtype: str
    sizes: dict[str, int]


def _heads(op: str, rows: list[tuple[str, int, int, str]], entropy: bool = False) -> list[Case]:
    return [
        Case(
            op,
            f"{name} {n}x{v}{' with entropy' * entropy}",
            dtype,
            {"N": n, "V": v, "entropy": int(entropy)},
        )
        for name, n, v, dtype in rows
    ]


def _cross_entropy(*rows: tuple[str, int, int, str]) -> list[Case]:
    """token_loss without advantages, i.e. the negative log-likelihood."""
    return [
        case._replace(name=f"{case.name}, cross entropy", sizes={**case.sizes, "policy": 0})
        for case in _heads("token_loss", list(rows))
    ]


# Settings of linear_ppo_loss beside plain PPO; bench_linear_logprob.py has them.
POLICIES = ("", "clip pair and dual clip", "cispo, KL, rollout", "gspo")


def _linear(
    op: str,
    rows: list[tuple[str, int, int, int, str]],
    masked: int = 0,
    frozen: int = 0,
    variants: int = 0,
    policy: int = 0,
) -> list[Case]:
    """`masked`: percent of the rows; `frozen`: 1 = no gradients; `variants`: 1 = also time other ways to call ours.

    `policy`: index in POLICIES.
    """
    note = f", {masked} % masked" * bool(masked) + ", no gradient" * frozen
    note += f", {POLICIES[policy]}" * bool(policy)
    more = {"masked": masked, "frozen": frozen, "variants": variants, "policy": policy}
    return [
        Case(op, f"{name} {n}x{h}x{v}{note}", dtype, {"N": n, "H": h, "V": v, **more})
        for name, n, h, v, dtype in rows
    ]


def _policies(*shape) -> list[Case]:
    """Each of POLICIES beside plain PPO."""
    every = range(1, len(POLICIES))
    return [case for i in every for case in _linear("linear_ppo_loss", [shape], policy=i)]


def _sequences(op: str, layout: str, *shapes: tuple[int, int], whiten: int = 1) -> list[Case]:
    packed, note = int(layout == "packed"), "" if whiten else ", not whitened"
    return [
        Case(
            op,
            f"{layout} {b}x{t}{note}",
            "float32",
            {"B": b, "T": t, "packed": packed, "whiten": whiten},
        )
        for b, t in shapes
    ]


_SEQUENCE_OPS = ("kl_reward", "gae", "kl_gae", "masked_whiten")

CPU = [
    *_heads(
        "token_logprob",
        [("Llama-2", 1024, 32000, "float32"), ("Llama-3", 512, 128256, "bfloat16")],
    ),
    *_heads("token_logprob", [("Llama-2", 1024, 32000, "float32")], entropy=True),
    *_heads(
        "token_loss",
        [("Llama-2", 1024, 32000, "float32"), ("Llama-3", 512, 128256, "bfloat16")],
    ),
    *_linear("linear_logprob", [("small head", 512, 512, 32000, "float32")]),
    *_linear("linear_logprob", [("small head", 2048, 512, 32000, "float32")], frozen=1),
    *_linear("linear_cross_entropy", [("small head", 512, 512, 32000, "float32")]),
    *_linear("linear_token_loss", [("small head", 512, 512, 32000, "float32")]),
    *_linear("linear_ppo_loss", [("small head", 2048, 512, 32000, "float32")]),
    *_linear("linear_ppo_loss", [("small head", 2048, 512, 32000, "float32")], masked=60),
    *_linear("linear_ppo_loss", [("small head", 512, 512, 32000, "float32")]),
    *_policies("small head", 512, 512, 32000, "float32"),
    *_linear("linear_logprob", [("small head", 1024, 512, 32000, "bfloat16")], frozen=1),
    *_linear("linear_ppo_loss", [("small head", 1024, 512, 32000, "bfloat16")]),
    *[case for op in _SEQUENCE_OPS for case in _sequences(op, "padded", (512, 1024))],
    *[case for op in ("gae", "kl_gae") for case in _sequences(op, "packed", (512, 1024))],
    *_sequences("gae", "padded", (512, 1024), whiten=0),
    Case("ppo_loss", "64k tokens", "float32", {"B": 64, "T": 1024}),
    Case("ranking_loss", "512 prompts x 9", "float32", {"P": 512, "K": 9}),
    Case("group_advantage", "512 prompts x 8", "float32", {"P": 512, "K": 8}),
    Case("pack", "1M lengths", "int64", {"n": 1_000_000, "max_tokens": 16384}),
]

# The cases of `make gpu-quick`, most important first: cases that would start too late are left out.
GPU_QUICK = [
    *_heads("token_logprob", [("Llama-3", 8192, 128256, "bfloat16")]),
    *_heads("token_loss", [("Llama-3", 8192, 128256, "bfloat16")]),
    *[case for op in _SEQUENCE_OPS for case in _sequences(op, "padded", (512, 4096))],
    *_sequences("gae", "padded", (512, 4096), whiten=0),
    Case("ppo_loss", "64k tokens", "float32", {"B": 64, "T": 1024}),
    Case("ranking_loss", "512 prompts x 9", "float32", {"P": 512, "K": 9}),
    Case("group_advantage", "512 prompts x 8", "float32", {"P": 512, "K": 8}),
    *_heads("token_logprob", [("Llama-3", 8192, 128256, "bfloat16")], entropy=True),
    *_linear(
        "linear_logprob", [("Llama-3-8B", 8192, 4096, 128256, "bfloat16")], frozen=1, variants=1
    ),
    *_linear("linear_ppo_loss", [("Llama-3-8B", 8192, 4096, 128256, "bfloat16")], variants=1),
    *_cross_entropy(("Llama-3", 8192, 128256, "bfloat16")),
    *_heads(
        "token_logprob",
        [
            ("GPT-2", 4096, 50257, "bfloat16"),
            ("Llama-3", 2048, 128256, "float16"),
            ("Llama-3", 2048, 128256, "float32"),
        ],
    ),
    *_heads(
        "token_loss",
        [("GPT-2", 4096, 50257, "bfloat16"), ("Llama-3", 2048, 128256, "float32")],
    ),
    *_linear("linear_cross_entropy", [("Llama-3-8B", 8192, 4096, 128256, "bfloat16")], variants=1),
    *_linear(
        "linear_ppo_loss", [("Llama-3-8B", 8192, 4096, 128256, "bfloat16")], masked=60, variants=1
    ),
]

GPU_REST = [
    *_heads(
        "token_logprob",
        [("Qwen", 8192, 151936, "bfloat16"), ("Llama-2", 8192, 32000, "float32")],
    ),
    *_heads(
        "token_loss",
        [
            ("Qwen", 8192, 151936, "bfloat16"),
            ("Llama-2", 8192, 32000, "float32"),
            ("Qwen3.5", 4096, 248320, "bfloat16"),
        ],
    ),
    *_linear("linear_logprob", [("Llama-3-8B", 8192, 4096, 128256, "bfloat16")], variants=1),
    *_linear("linear_token_loss", [("Llama-3-8B", 8192, 4096, 128256, "bfloat16")], variants=1),
    *[case for op in ("gae", "kl_gae") for case in _sequences(op, "packed", (512, 4096))],
    *_policies("Llama-3-8B", 8192, 4096, 128256, "bfloat16"),
]

GPU = [*GPU_QUICK, *GPU_REST]
LISTS = {"cpu": CPU, "gpu": GPU, "gpu-quick": GPU_QUICK, "gpu-rest": GPU_REST}

# Caps of `run.py --quick` and `pytest --size tiny`, which only show that the benchmarks run.
QUICK = {"N": 64, "V": 4096, "H": 64, "B": 16, "T": 64, "P": 32, "K": 4, "n": 10_000}
# Few rows. Their divisibility is that of the full size, so Triton compiles the same kernels.
WARM_UP = {"N": 64, "H": 512, "B": 16, "P": 32}
# Caps of the fp64 gate on a CPU. V, H and K keep their full size.
GATE = {"N": 32, "B": 8, "P": 32, "n": 2_000}


def capped(case: Case, caps: dict[str, int]) -> Case:
    """The same case with every size limited to its cap."""
    sizes = {key: min(size, caps.get(key, size)) for key, size in case.sizes.items()}
    name = case.name if sizes == case.sizes else f"capped {case.name}"
    return case._replace(name=name, sizes=sizes)
