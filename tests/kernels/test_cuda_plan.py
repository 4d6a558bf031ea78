"""The GPU path of the linear ops on CPU tensors, with benchmarks/fake_gpu.py in place of the device.

Results against the reference in fp64; num_rows, graph capture, compact_rows and unusual operands.
"""

import random
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import fastrlhf
from _support import ranks
from _support.bench_problems import BENCHMARKS
from _support.logit_cases import randint, randn
from fastrlhf import reference
from fastrlhf.ops import _backend, _gemms, linear_logprob

sys.path.insert(0, str(BENCHMARKS))
from fake_gpu import DEVICE, FakeGpu

sys.path.remove(str(BENCHMARKS))

pytestmark = pytest.mark.skipif(
    bool(_backend.unavailable_reason("linear_ppo_loss", "cpu", "cpu")),
    reason="the C++ extension is not built",
)

N, H, V = 22, 8, 50  # five chunks of at most 5 rows; V is no multiple of a 16-byte vector
ROWS = 5
OPS = ("linear_logprob", "linear_cross_entropy", "linear_ppo_loss", "linear_token_loss")
LOSSES = OPS[1:]
each_op = pytest.mark.parametrize("op", OPS)
each_loss = pytest.mark.parametrize("op", LOSSES)
MASK = torch.arange(N) % 5 != 2  # row 0 is unmasked: on CPU an invalid target raises
COUNT = int(MASK.sum())
# Of gradients, relative to the largest element: with 16-bit operands, dlogits are rounded to their dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@contextmanager
def small_chunks(keep=False, rows=ROWS):
    """Chunks of `rows` rows on the fake GPU. `keep`: whether linear_logprob keeps small logits for the backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gemms, "chunk_rows", lambda *_: rows)
        if not keep:
            patch.setattr(linear_logprob, "KEEP_BYTES", 0)
        yield


class Problem:
    """Inputs of all four ops. `choice`: deviations from the defaults, by name."""

    def __init__(self, **choice):
        self.choice = choice
        self.dtype = choice.get("dtype", torch.bfloat16)
        self.weight_dtype = choice.get("weight_dtype", self.dtype)
        self.shape = choice.get("shape", (N,))
        self.mask = choice.get("mask")
        self.targets = randint(V, (N,), 2)
        if self.mask is not None:  # targets of masked rows are not read
            self.targets = self.targets.masked_fill(~self.mask, -100)
        self.count = N if self.mask is None else int(self.mask.sum())
        self.old, self.advantages = randn(N, seed=3) - 4, randn(N, seed=4)
        self.advantages[N // 2 :] *= choice.get("some_advantages", 1)
        self.bonus = (torch.arange(N) % 2).float()
        self.old_values, self.returns = randn(N, seed=10), randn(N, seed=11)
        self.temperature = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(5))
        self.needs = choice.get("needs", (True, True, True))

    def leaves(self, dtype=None):
        """[hidden, weight, bias or None, values or None], in `dtype` or in the dtypes of the problem."""
        choice = self.choice
        x = randn(N, H, seed=0).to(self.dtype).to(dtype or self.dtype)
        if "masked_hidden" in choice:  # of rows that do not count
            x = x.masked_fill(~MASK[:, None], choice["masked_hidden"])
        w = randn(V, H, seed=1).to(self.weight_dtype).to(dtype or self.weight_dtype)
        b = randn(V, seed=6).to(self.weight_dtype).to(dtype or self.weight_dtype)
        if choice.get("strided"):
            x = (
                x.repeat(1, 2)[:, ::2].copy_(x)
                if choice["strided"] == "gaps"
                else x.t().contiguous().t()
            )
            w = w.t().contiguous().t()
        if choice.get("one_row"):  # expanded: stride 0
            x = x[:1].expand(N, H)
        x = x.view(*self.shape, H) if not choice.get("strided") else x.reshape(*self.shape, H)
        leaves = [x, w, b if choice.get("bias") else None]
        for leaf, need in zip(leaves, self.needs, strict=True):
            if leaf is not None:
                leaf.requires_grad_(need)
        values = randn(N, seed=12).to(dtype or torch.float32).view(self.shape)
        return [*leaves, values.requires_grad_() if choice.get("values") else None]

    def rows(self, x):
        return None if x is None else x.view(self.shape)

    def call(self, op, leaves, **more):
        """(differentiable results, constants) of the op."""
        x, w, b, values = leaves
        choice = self.choice
        options = self.options(b) | {"workspace": choice.get("workspace", "fast")}
        if choice.get("num_rows"):
            options["num_rows"] = self.count
        if op != "linear_logprob" and "scale" in choice:
            options["scale"] = choice["scale"]
        if op in ("linear_ppo_loss", "linear_token_loss"):
            options["compact_rows"] = choice.get("compact_rows", False)
        rows = (x, w, self.rows(self.targets))
        if op == "linear_ppo_loss":
            policy = (self.rows(self.old), self.rows(self.advantages))
            out = fastrlhf.linear_ppo_loss(*rows, *policy, **options, **self.ppo(values), **more)
            return [out.loss], [x for _, x in sorted(out.metrics.items())]
        return self.others(fastrlhf, op, rows, options | more)

    def reference(self, op, leaves):
        """The same by the reference, with all logits, in fp64."""
        x, w, b, values = leaves
        rows, options = (x, w, self.rows(self.targets)), self.options(b)
        if "row_temperature" in self.choice:
            options["temperature"] = options["temperature"].double()
        if op != "linear_ppo_loss":
            outs, constants = self.others(reference, op, rows, options)
        else:
            logprob, entropy = reference.linear_logprob(*rows, return_entropy=True, **options)
            policy = (self.rows(self.old).double(), self.rows(self.advantages).double())
            more = {"entropy": entropy, "mask": self.rows(self.mask)} | self.ppo(values)
            out = reference.ppo_loss(logprob, *policy, **more)
            outs, constants = [out.loss], [x for _, x in sorted(out.metrics.items())]
        if op != "linear_logprob":
            outs = [x * self.choice.get("scale", 1.0) for x in outs]
        return outs, constants

    def options(self, bias):
        options = {
            "bias": bias,
            "softcap": self.choice.get("softcap"),
            "mask": self.rows(self.mask),
        }
        if self.choice.get("row_temperature"):
            options["temperature"] = self.rows(self.temperature)
        elif "temperature" in self.choice:
            options["temperature"] = self.choice["temperature"]
        return options

    def ppo(self, values):
        choice = self.choice
        options = {
            "entropy_coef": choice.get("entropy_coef", 0.0),
            "dual_clip": choice.get("dual_clip"),
            **choice.get("settings", {}),
        }
        if values is not None:
            rows = (self.rows(x).to(values.dtype) for x in (self.old_values, self.returns))
            options |= {"values": values} | dict(zip(("old_values", "returns"), rows, strict=True))
        return options

    def others(self, library, op, rows, options):
        function, reduction = getattr(library, op), self.choice.get("reduction", "mean")
        every = self.choice.get("every", False)
        if op == "linear_logprob":
            return list(function(*rows, return_entropy=True, return_lse=every, **options)), []
        options["reduction"] = reduction
        if op == "linear_cross_entropy":  # the mask is in its targets
            del options["mask"]
            if not every:
                return [function(*rows, **options)], []
            loss, lse = function(*rows, **options, **EVERY)
            return [loss], [lse]
        given = {"advantages": self.rows(self.advantages), "bonus": self.rows(self.bonus)}
        if library is reference:
            given = {name: x.double() for name, x in given.items()}
        out = function(*rows, loss_fn, per_token=given, with_entropy=True, **options)
        return [out.loss], [out.logprob, out.entropy, *out.metrics.values()]

    def upstream(self, op, outs):
        if op != "linear_logprob":
            return [torch.full_like(outs[0], self.choice.get("upstream", 1.0))]
        return [randn(N, seed=7 + i).to(x.dtype).view_as(x) for i, x in enumerate(outs)]


# Of linear_cross_entropy, beyond the plain loss.
EVERY = {
    "class_weight": torch.linspace(0.5, 2, V),
    "label_smoothing": 0.2,
    "z_loss": 0.01,
    "return_lse": True,
}


def loss_fn(logprob, entropy, advantages, bonus):
    """Rows with a gradient of the logprob, of the entropy, of both, or of none."""
    return -(logprob.exp() * advantages) - 0.1 * entropy * bonus, {"ratio": logprob.exp()}


def gradients(op, problem, leaves, **options):
    outs, constants = problem.call(op, leaves, **options)
    torch.autograd.backward(outs, problem.upstream(op, outs))
    return outs, constants


def exact(op, problem):
    """(results, constants, leaves with gradients) of the reference."""
    leaves = problem.leaves(torch.float64)
    outs, constants = problem.reference(op, leaves)
    torch.autograd.backward(outs, problem.upstream(op, outs))
    return [x.detach() for x in outs], constants, leaves


def check(op, problem, *, capturing=False, adds_in_place=True) -> FakeGpu:
    """Compares values and gradients on the fake GPU with the reference in fp64."""
    expected, constants, wide = exact(op, problem)
    leaves, options, into = problem.leaves(), {}, None
    if "into" in problem.choice and op in LOSSES:
        into = randn(V, H, seed=8).to(problem.choice["into"])
        options["accumulate_into"] = into.clone()
    with (
        small_chunks(problem.choice.get("keep", False), problem.choice.get("rows", ROWS)),
        FakeGpu(V, H, capturing=capturing, adds_in_place=adds_in_place) as gpu,
    ):
        found, found_constants = gradients(op, problem, leaves, **options)
    for a, b in zip(found + found_constants, expected + constants, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)
    tolerance = max(TOLERANCE[problem.dtype], TOLERANCE[problem.weight_dtype])
    for name, leaf, right in zip(("hidden", "weight", "bias", "values"), leaves, wide, strict=True):
        if leaf is None or not leaf.requires_grad or (name == "values" and op != "linear_ppo_loss"):
            assert leaf is None or leaf.grad is None
            continue
        grad, whole = leaf.grad, right.grad
        if name == "weight" and into is not None:
            assert grad is None
            grad, whole = options["accumulate_into"].double() - into.double(), right.grad
            tolerance = max(
                tolerance, TOLERANCE[into.dtype] * float(into.abs().max() / whole.abs().max())
            )
        else:
            assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        error = (grad.double() - whole).abs().max() / whole.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.1e}"
    if problem.mask is not None and leaves[0].requires_grad:
        assert (leaves[0].grad.view(N, H)[~problem.mask] == 0).all()
    return gpu


ALONE = {
    "plain": {},
    "kept logits": {"keep": True, "bias": True},
    "kept logits, mask": {"keep": True, "mask": MASK},
    "kept logits, mask, num_rows": {"keep": True, "mask": MASK, "num_rows": True},
    "kept logits, compact": {"keep": True, "workspace": "compact"},
    "kept fp32 logits": {"keep": True, "dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "bf16 hidden, fp32 weight": {"weight_dtype": torch.float32},
    "fp32 hidden, fp16 weight": {"dtype": torch.float32, "weight_dtype": torch.float16},
    "bf16 hidden, fp16 weight": {"weight_dtype": torch.float16},
    "bias": {"bias": True},
    "mask": {"mask": MASK},
    "mask and num_rows": {"mask": MASK, "num_rows": True},
    "all rows": {"mask": torch.ones(N, dtype=torch.bool), "num_rows": True},
    "no rows": {"mask": torch.zeros(N, dtype=torch.bool)},
    "no rows, num_rows": {"mask": torch.zeros(N, dtype=torch.bool), "num_rows": True},
    "one row": {"mask": torch.arange(N) == 7, "num_rows": True},
    "one chunk": {"mask": torch.arange(N) < ROWS},
    "softcap": {"softcap": 3.0},
    "rare softcap": {"softcap": 100.0},
    "temperature": {"temperature": 0.7, "softcap": 5.0},
    "row temperature": {"row_temperature": True},
    "row temperature, mask": {"row_temperature": True, "mask": MASK},
    "entropy": {"entropy_coef": 0.1},
    "entropy, dual clip, mask": {"entropy_coef": 0.1, "dual_clip": 1.5, "mask": MASK},
    "compact_rows": {"compact_rows": True, "some_advantages": 0},
    "compact_rows, mask": {"compact_rows": True, "some_advantages": 0, "mask": MASK},
    "compact_rows, bias": {"compact_rows": True, "some_advantages": 0, "bias": True},
    "compact workspace": {"workspace": "compact", "bias": True},
    "into fp32": {"into": torch.float32},
    "into bf16": {"into": torch.bfloat16},
    "into fp32, mask": {"into": torch.float32, "mask": MASK, "bias": True},
    "into fp32 of fp32": {"into": torch.float32, "dtype": torch.float32},
    "values": {"values": True, "scale": 0.5},
    "values, mask, num_rows": {"values": True, "mask": MASK, "num_rows": True, "entropy_coef": 0.1},
    "values, 3-d, mask": {"values": True, "mask": MASK, "shape": (2, 11), "upstream": 2.0},
    "scale": {"scale": 0.25, "upstream": 3.0},
    "sum": {"reduction": "sum"},
    "sum of fp16": {
        "reduction": "sum",
        "dtype": torch.float16,
        "upstream": 2.0**-15,  # without it, dW of the sum overflows fp16
        "scale": 2.0**15,
    },
    "3-d": {"shape": (2, 11), "mask": MASK},
    "4-d": {"shape": (2, 1, 11)},
    "columns first": {"strided": "columns"},
    "columns first, mask": {"strided": "columns", "mask": MASK},
    "gaps": {"strided": "gaps"},
    "expanded": {"one_row": True, "needs": (False, True, True)},
    "frozen weight": {"needs": (True, False, False), "bias": True},
    "frozen hidden": {"needs": (False, True, True), "bias": True},
    "bias alone": {"needs": (False, False, True), "bias": True},
}


@each_op
@pytest.mark.parametrize("rows", [ROWS, N])
@pytest.mark.parametrize("choice", ALONE.values(), ids=ALONE)
def test_results(op, choice, rows, poisoned):
    check(op, Problem(**choice, rows=rows))


def drawn(seed):
    """A random combination of options."""
    draw = random.Random(seed)
    some = lambda value, of=2: {} if draw.randrange(of) else value  # noqa: E731
    choice = {"dtype": draw.choice(list(TOLERANCE))}
    mask = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < draw.random()
    choice |= some({"mask": mask} | some({"num_rows": True}))
    choice |= some({"weight_dtype": draw.choice(list(TOLERANCE))}, 4)
    choice |= (
        some({"keep": True}) | some({"bias": True}) | some({"softcap": draw.choice([2.0, 70.0])}, 3)
    )
    choice |= some({"row_temperature": True}, 3) | some({"workspace": "compact"})
    choice |= some({"entropy_coef": 0.05}) | some({"dual_clip": 1.2})
    choice |= some({"compact_rows": True, "some_advantages": 0})
    choice |= some(
        {"into": draw.choice([torch.float32, choice.get("weight_dtype", choice["dtype"])])}, 3
    )
    if "into" not in choice:
        choice |= some({"upstream": 0.5})
    choice |= (
        some({"rows": draw.randrange(1, N + 5)}, 3)
        | some({"scale": 2.0})
        | some({"shape": (11, 2)})
        | some({"strided": "columns"}, 4)
    )
    return choice | some({"needs": draw.choice([(True, False, True), (False, True, False)])}, 4)


@each_op
@pytest.mark.parametrize("seed", range(30))
def test_results_of_drawn_options(op, seed, poisoned):
    choice = drawn(seed)
    if "into" in choice:
        choice["needs"] = (True, True, True)
    check(op, Problem(**choice))


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        {"bias": True},
        {"dtype": torch.float16, "softcap": 3.0, "mask": MASK},
        {"dtype": torch.float32, "softcap": 3.0, "row_temperature": True},
        {"keep": True, "mask": MASK, "row_temperature": True},
        {"into": torch.float32, "mask": MASK, "scale": 0.25},
    ],
    ids=lambda choice: ", ".join(choice),
)
def test_results_of_lse_and_of_the_settings_of_cross_entropy(op, choice, capturing, poisoned):
    gpu = check(op, Problem(**choice, every=True), capturing=capturing)
    # As of the plain ones: nothing is waited for but the number of rows.
    plain = check(op, Problem(**choice), capturing=capturing)
    assert gpu.syncs == plain.syncs and gpu.gemm_rows == plain.gemm_rows


# ---- host syncs, GEMMs and memory ----------------------------------------------------------------


@each_op
def test_host_syncs(op):
    forward_and_backward = 2 if op == "linear_logprob" else 1
    if op != "linear_cross_entropy":  # its targets always act as a mask
        assert check(op, Problem()).syncs == 0
    assert check(op, Problem(mask=MASK)).syncs == forward_and_backward
    assert check(op, Problem(mask=MASK, num_rows=True)).syncs == 0


@each_op
@pytest.mark.parametrize("choice", [{}, {"num_rows": True}])
def test_masked_rows_enter_no_gemm(op, choice):
    gpu = check(op, Problem(mask=MASK, **choice))
    again = 2 if op == "linear_logprob" else 1  # its backward recomputes the logits
    assert sum(gpu.gemm_rows["logits"]) == again * COUNT and sum(gpu.gemm_rows["hidden"]) == COUNT


@each_loss
@pytest.mark.parametrize("workspace", ["fast", "compact"])
def test_forward_and_update_multiply_logits_in_the_same_shapes(op, workspace):
    """The bits of a logit may depend on the shape of the GEMM, so forward and update must use the same shapes."""
    choice = {"mask": MASK, "workspace": workspace}
    with torch.no_grad(), small_chunks(), FakeGpu(V, H) as forward:
        Problem(**choice).call("linear_logprob", Problem(**choice).leaves())
    assert forward.gemm_rows["logits"] == check(op, Problem(**choice)).gemm_rows["logits"]


@pytest.mark.parametrize("op", ["linear_ppo_loss", "linear_token_loss"])
@pytest.mark.parametrize("workspace", ["fast", "compact"])
def test_compact_rows_packs_the_chunks_of_a_product(op, workspace):
    choice = {"some_advantages": torch.arange(N // 2) % 3 == 0, "bias": True}
    problem = Problem(compact_rows=True, workspace=workspace, **choice)
    gpu = check(op, problem)
    _, _, (hidden, *_) = exact(op, problem)
    carrying = int((hidden.grad != 0).any(-1).sum())  # clipped rows have no gradient either
    assert 0 < carrying < N and sum(gpu.gemm_rows["hidden"]) == carrying
    assert sum(gpu.gemm_rows["logits"]) == N and gpu.syncs == 2 * -(-N // ROWS)
    assert (
        1 <= gpu.gemms["weight"] <= (2 if workspace == "fast" else 3)
    )  # a product without rows is skipped


@each_op
def test_dw_is_added_up_by_the_gemm(op):
    fast = check(op, Problem(dtype=torch.bfloat16))
    compact = check(op, Problem(workspace="compact"))
    assert (fast.gemms["weight"], compact.gemms["weight"]) == (
        2,
        3,
    )  # four or two of five chunks each
    for gpu in (fast, compact):
        names = {name for name, _, _ in gpu.passes_over("weight")}
        assert names <= {"to", "_to_copy", "token_loss_bwd_"}, names
    # An older torch adds the product of a GEMM in a separate pass.
    old = check(op, Problem(), adds_in_place=False)
    assert "add_" in {name for name, _, _ in old.passes_over("weight")}


def test_whether_the_gemm_adds_in_place_is_probed_once():
    for answer in (True, False):
        with FakeGpu(V, H, adds_in_place=answer) as gpu:
            _gemms._adds_in_place.clear()
            for _ in range(2):
                assert _gemms.adds_in_place(DEVICE, torch.bfloat16) is answer
            assert gpu.syncs == 1


@each_op
def test_rows_are_aligned_to_vectors(op):
    """Rows of logits and dlogits are 16-byte aligned, and no GEMM copies an operand."""
    for choice in ({}, {"strided": "columns"}, {"mask": MASK}):
        gpu = check(op, Problem(**choice))
        assert gpu.copies == 0
        assert gpu.row_bytes and all(size % 16 == 0 for size in gpu.row_bytes), gpu.row_bytes


# ---- num_rows and capture ------------------------------------------------------------------------


def test_a_wrong_num_rows_is_nan_even_if_loss_fn_clips():
    """The NaN must not vanish in the gradient of a clip, which is 0."""
    problem = Problem(mask=MASK)
    x, w, *_ = problem.leaves()
    with small_chunks(), FakeGpu(V, H):
        options = {"mask": MASK, "num_rows": COUNT - 1}
        clipped = lambda logprob: logprob.clamp(max=-1e6)  # noqa: E731
        fastrlhf.linear_token_loss(x, w, problem.targets, clipped, **options).loss.backward()
    assert x.grad[MASK.nonzero().squeeze(1)[:-1]].isnan().all() and w.grad.isnan().all()


@pytest.mark.parametrize("capturing", [False, True])
def test_kept_logits_need_no_sync_if_num_rows_is_given(capturing):
    problem = Problem(mask=MASK, num_rows=True)
    with small_chunks(keep=True), FakeGpu(V, H, capturing=capturing) as gpu:
        gradients("linear_logprob", problem, problem.leaves())
    assert gpu.syncs == 0


@pytest.mark.parametrize("forward", [False, True])
def test_one_half_in_a_graph_and_the_other_outside(forward):
    """A graph computes all rows, eager mode the unmasked ones: neither may reuse the other's kept logits."""
    problem = Problem(mask=MASK)
    wide = problem.leaves(torch.float64)
    g = randn(N, seed=7)
    options = {"mask": MASK}
    out = fastrlhf.linear_logprob(*wide[:2], problem.targets, **options, backend="reference")
    out.backward(g.double())
    leaves = problem.leaves()
    with small_chunks(keep=True), FakeGpu(V, H, capturing=forward) as gpu:
        out = fastrlhf.linear_logprob(*leaves[:2], problem.targets, **options)
        gpu.capturing = not forward
        out.backward(g)
    for leaf, right in zip(leaves[:2], wide[:2], strict=True):
        error = (leaf.grad.double() - right.grad).abs().max() / right.grad.abs().max()
        assert error <= TOLERANCE[problem.dtype]


@each_op
@pytest.mark.parametrize("into", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [0, 1, COUNT - 1, COUNT + 1, N])
def test_a_wrong_num_rows_is_nan(op, wrong, into):
    if into is not None and op == "linear_logprob":
        pytest.skip("it has no accumulate_into")
    problem = Problem(mask=MASK, bias=True)
    leaves = problem.leaves()
    total = None if into is None else torch.ones(V, H, dtype=into)
    options = {} if into is None else {"accumulate_into": total}
    with small_chunks(), FakeGpu(V, H) as gpu:
        outs, constants = gradients(op, problem, leaves, num_rows=wrong, **options)
    assert gpu.syncs == 0
    for out in outs:
        rows = out[MASK] if op == "linear_logprob" else out
        assert rows.isnan().all()
    if op == "linear_ppo_loss":
        assert all(x.isnan() for x in constants)
    for x in constants if op == "linear_token_loss" else ():
        assert x[MASK].isnan().all() and (x[~MASK] == 0).all()
    hidden, weight, bias, _ = leaves
    taken = MASK.nonzero().squeeze(1)[: max(wrong, 0)]
    if wrong:
        assert hidden.grad[taken].isnan().all() and (hidden.grad[~MASK] == 0).all()
    else:
        assert hidden.grad.isnan().all()
    assert (weight.grad if into is None else total).isnan().all()
    assert bias.grad.isnan().all()


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_cross_entropy"])
def test_num_rows_above_0_with_all_rows_masked_is_nan(op):
    """Row 0 replaces missing rows. (linear_cross_entropy is left out: there row 0 has no valid target.)"""
    problem = Problem(bias=True)
    problem.mask = torch.zeros(N, dtype=torch.bool)
    leaves = problem.leaves()
    with small_chunks(), FakeGpu(V, H):
        outs, constants = gradients(op, problem, leaves, num_rows=2)
    if op != "linear_logprob":  # its results are all masked
        assert outs[0].isnan()
    assert op != "linear_ppo_loss" or all(x.isnan() for x in constants)
    assert all(leaf.grad.isnan().any() for leaf in leaves[:3])


def test_an_error_in_loss_fn_leaves_accumulate_into_unchanged():
    calls = []

    def fails(logprob):
        calls.append(len(logprob))
        if len(calls) == 5:
            raise KeyError("in the last chunk, after a product")
        return -logprob

    into = torch.ones(V, H)
    problem = Problem()
    x, w, *_ = problem.leaves()
    with small_chunks(), FakeGpu(V, H) as gpu, pytest.raises(KeyError):
        fastrlhf.linear_token_loss(x, w, problem.targets, fails, accumulate_into=into)
    assert gpu.gemms["weight"] == 1 and (into == 1).all()


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"compact_rows": True, "some_advantages": 0}, {"num_rows": True}]
)
def test_a_masked_row_of_nan_reaches_no_gradient(op, dtype, capturing, more):
    """During a capture such rows enter the GEMMs, where their dlogits of 0 times a NaN would be a NaN in dW."""
    found = []
    for hidden in ({}, {"masked_hidden": torch.nan if dtype == torch.float32 else torch.inf}):
        problem = Problem(mask=MASK, bias=True, dtype=dtype, **hidden, **more)
        leaves = problem.leaves()
        with small_chunks(), FakeGpu(V, H, capturing=capturing):
            outs, _ = gradients(op, problem, leaves)
        found.append([x.detach() for x in outs] + [x.grad for x in leaves[:3]])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs) and theirs.isfinite().all()
    assert (found[0][-3][~MASK] == 0).all()


@each_op
@pytest.mark.parametrize("into", [{}, {"into": torch.float32}])
@pytest.mark.parametrize("more", [{}, {"compact_rows": True, "some_advantages": 0}])
def test_graph_capture_has_no_sync(op, into, more):
    gpu = check(op, Problem(mask=MASK, bias=True, **into, **more), capturing=True)
    assert gpu.syncs == 0
    check(op, Problem(mask=MASK, num_rows=True, **into, **more), capturing=True)


# Sequences of 9 (two chunks), 0, 3, 2, 7 (two chunks) and 1 tokens.
GSPO = {
    "objective": "gspo",
    "clip": (0.2, 0.3),
    "aggregation": "seq-mean-token-mean",
    "cu_seqlens": torch.tensor([0, 9, 9, 12, 14, 21, 22], dtype=torch.int32),
}
# options, host syncs of the forward if the rows exceed a chunk
RATIOS = {
    "plain": ({}, 1),
    "mask": ({"mask": MASK}, 2),
    "num_rows": ({"mask": MASK, "num_rows": True, "values": True}, 1),
    "bias, into": ({"bias": True, "into": torch.float32, "entropy_coef": 0.1}, 1),
    "fp32": ({"dtype": torch.float32}, 1),
    "mask, compact": ({"mask": MASK, "compact_rows": True, "some_advantages": 0}, None),
    "frozen": ({"needs": (False, False, True), "bias": True, "mask": MASK}, 2),
}


@pytest.mark.parametrize("rows", [ROWS, N])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_of_sequences(name, capturing, rows, poisoned):
    """The host waits for the lengths if the rows exceed a chunk; in a capture all logits are computed twice."""
    choice, syncs = RATIOS[name]
    gpu = check("linear_ppo_loss", Problem(**choice, settings=GSPO, rows=rows), capturing=capturing)
    products = sum(gpu.gemm_rows["logits"])
    if capturing:
        assert gpu.syncs == 0
        counted = N if "num_rows" not in choice else COUNT
        assert products == (2 * counted if rows == ROWS else counted)
    else:
        counted = COUNT if "mask" in choice else N
        longer = {N: 16, COUNT: 7 + 6}[counted]
        assert products == counted + (longer if rows == ROWS else 0)
        assert syncs is None or gpu.syncs == syncs - (rows == N)


@each_op
def test_the_gradient_of_the_gradient_is_refused(op):
    leaves = Problem().leaves()
    with small_chunks(), FakeGpu(V, H):
        outs, _ = Problem().call(op, leaves)
        with pytest.raises(NotImplementedError, match="gradient of the gradient|create_graph"):
            torch.autograd.grad(outs[0].sum(), leaves[:2], create_graph=True)[0].sum().backward()


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("keep", [False, True])
def test_a_second_backward_is_bitwise_identical(op, dtype, mask, keep):
    problem = Problem(dtype=dtype, mask=mask, bias=True)
    found = []
    with small_chunks(keep), FakeGpu(V, H):
        leaves = problem.leaves()
        outs, _ = problem.call(op, leaves)
        for again in (True, False):
            up = problem.upstream(op, outs)
            found.append(torch.autograd.grad(outs, leaves[:3], up, retain_graph=again))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@each_loss
def test_an_upstream_gradient_scales(op):
    for upstream in (0.0, -2.0, float("nan")):
        problem = Problem(upstream=upstream, bias=True)
        if upstream == upstream and upstream:
            check(op, problem)
            continue
        leaves = problem.leaves()
        with small_chunks(), FakeGpu(V, H):
            gradients(op, problem, leaves)
        for leaf in leaves[:3]:
            assert (leaf.grad == 0).all() if upstream == 0 else leaf.grad.isnan().all()


@pytest.mark.parametrize("op", LOSSES)
def test_an_upstream_gradient_of_mixed_float64_scales(op):
    """The loss is float64; the gradient of the float32 operand is accumulated in float32."""
    x, w = randn(N, H, seed=0).double().requires_grad_(), randn(V, H, seed=1).requires_grad_()
    targets = randint(V, (N,), 2)
    rows = {"old_logprob": randn(N, seed=3).double(), "advantages": randn(N, seed=4).double()}
    options = {"linear_ppo_loss": rows, "linear_token_loss": {"loss_fn": torch.neg}}.get(op, {})

    def loss():
        out = getattr(fastrlhf, op)(x, w, targets, **options)
        return out if op == "linear_cross_entropy" else out.loss

    expected = torch.autograd.grad(3 * loss(), (x, w))
    with small_chunks(), FakeGpu(V, H):
        found = torch.autograd.grad(3 * loss(), (x, w))
    torch.testing.assert_close(found, expected)


@each_loss
def test_accumulate_into_requires_an_upstream_gradient_of_1(op):
    problem = Problem(upstream=2.0, bias=True)
    leaves = problem.leaves()
    with small_chunks(), FakeGpu(V, H) as gpu:
        gradients(op, problem, leaves, accumulate_into=torch.zeros(V, H))
    assert leaves[0].grad.isnan().all() and leaves[2].grad.isnan().all()
    assert gpu.syncs == (op == "linear_cross_entropy")


@each_op
def test_a_tied_weight_has_both_gradients(op):
    problem = Problem(mask=MASK)
    found = []
    for wide in (False, True):
        table = problem.leaves(torch.float64 if wide else None)[1]
        ids = randint(V, (N,), 9)
        if wide:
            outs, _ = problem.reference(op, (table[ids], table, None, None))
            torch.autograd.backward(outs, problem.upstream(op, outs))
        else:
            with small_chunks(), FakeGpu(V, H):
                gradients(op, problem, (table[ids], table, None, None))
        found.append(table.grad.double())
    assert (found[0] - found[1]).abs().max() <= 1.6e-2 * found[1].abs().max()


@each_op
@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)])
def test_no_rows_at_all(op, mask):
    problem = Problem(bias=True)
    for name in ("targets", "old", "advantages", "bonus"):
        setattr(problem, name, getattr(problem, name)[:0])
    problem.shape, problem.mask = (0,), mask
    _, w, b, _ = Problem(bias=True).leaves()
    x = torch.zeros(0, H, dtype=torch.bfloat16, requires_grad=True)
    with small_chunks(), FakeGpu(V, H):
        outs, _ = problem.call(op, (x, w, b, None))
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    assert all((out == 0).all() for out in outs) and x.grad.shape == (0, H)
    assert (w.grad == 0).all() and (b.grad == 0).all()


@each_op
def test_without_gradients(op):
    problem = Problem(mask=MASK, bias=True)
    leaves = problem.leaves()
    with torch.no_grad(), small_chunks(), FakeGpu(V, H) as gpu:
        found, _ = problem.call(op, leaves)
    expected, _, _ = exact(op, problem)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    assert gpu.gemms["weight"] == gpu.gemms["hidden"] == 0


# ---- vocabulary sharded over two processes -------------------------------------------------------

SHARED = {
    "plain": {"bias": True},
    "mask": {"mask": MASK, "workspace": "compact"},
    "num_rows": {"mask": MASK, "num_rows": True, "bias": True, "row_temperature": True},
    "compact_rows": {"compact_rows": True, "some_advantages": 0, "softcap": 3.0},
    "fp32": {"dtype": torch.float32, "mask": MASK},
}


def shared(rank):
    """For each op and choice: [results and constants, gradients of hidden and of the rank's shard, syncs]."""
    each, found = V // ranks.WORLD, []
    for op in OPS:
        for choice in SHARED.values():
            problem = Problem(**choice)
            x, w, b, _ = problem.leaves()
            mine = [None if p is None else p.detach()[rank * each :][:each] for p in (w, b)]
            leaves = [x, *(None if p is None else p.requires_grad_() for p in mine), None]
            with small_chunks(), FakeGpu(each, H) as gpu:
                outs, constants = problem.call(op, leaves, process_group=dist.group.WORLD)
                torch.autograd.backward(outs, problem.upstream(op, outs))
            grads = [None if p is None else p.grad for p in leaves[:3]]
            found.append([[x.detach() for x in outs + constants], grads, gpu.syncs])
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_the_sharded_vocabulary():
    first, second = ranks.run(shared)
    cases = [(op, choice) for op in OPS for choice in SHARED.values()]
    for (op, choice), mine, other in zip(cases, first, second, strict=True):
        problem = Problem(**choice)
        outs, constants, leaves = exact(op, problem)
        for a, b, right in zip(mine[0], other[0], outs + constants, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a.double(), right.double(), rtol=2e-5, atol=2e-5)
        (x, *rows), (again, *others) = mine[1], other[1]
        assert torch.equal(x, again)
        whole = [
            None if a is None else torch.cat((a, b)) for a, b in zip(rows, others, strict=True)
        ]
        for grad, leaf in zip((x, *whole), leaves[:3], strict=True):
            if grad is not None:
                error = (grad.double() - leaf.grad).abs().max() / leaf.grad.abs().max()
                assert error <= TOLERANCE[problem.dtype], (op, choice)
        if "num_rows" in choice:
            assert mine[2] == other[2] == 0
