"""Every setting of the policy losses against loops in fp64 (tests/_support/policy_oracle.py): values, gradients and
metrics.

`make test` runs a pairwise covering of the settings, `make nightly` the whole grid of objective, aggregation, KL and
rollout correction.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import fastrlhf
from _support import logit_cases, policy_cases, sequence_cases
from _support import policy_oracle as oracle
from _support.logit_cases import interpreted, randint, randn
from _support.policy_cases import FACTORS, GRID, groups_of, lists, placed, settings, tokens
from _support.tolerance import assert_near
from fastrlhf.ops import _gemms, _policy

OPS = ("ppo_loss", "token_loss", "linear_ppo_loss")
BACKENDS = ("reference", "cpu", "triton", "cuda")
COVERING = policy_cases.covering()
CONSTANTS = (
    "old_logprob",
    "advantages",
    "ref_logprob",
    "rollout_logprob",
    "rollout_weights",
    "old_values",
    "returns",
)
V, H = 21, 5


def policy_losses(ops=OPS, backends=BACKENDS):
    """(op, backend) as pytest parameters."""
    return [
        pytest.param(op, *param.values, id=f"{op}-{param.values[0]}", marks=param.marks)
        for op in ops
        for param in logit_cases.backend_params(op, backends)
    ]


def each(ops=OPS, backends=BACKENDS):
    return pytest.mark.parametrize(("op", "backend"), policy_losses(ops, backends))


@pytest.fixture(autouse=True)
def four_rows_a_chunk(monkeypatch, poisoned):
    """The longest sequence has three chunks."""
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)


def near(ours, truth, what, rounded=None, eager=None):
    """In fp64 to its rounding, else by the rule of tolerance.py."""
    truth = torch.as_tensor(truth, dtype=torch.float64).view(ours.shape)
    if ours.dtype == torch.float64:
        torch.testing.assert_close(
            ours.cpu(), truth, rtol=1e-11, atol=1e-13, msg=lambda m: f"{what}: {m}"
        )
    else:
        rounded = None if rounded is None else rounded.view(ours.shape)
        assert_near(ours, truth if eager is None else eager, truth, what, rounded)


def rounded_terms(answer):
    """The loss, off by an eps of fp32 of each of its terms, which stays where they cancel."""
    return torch.tensor(answer.loss + 2.0**-23 * answer.size, dtype=torch.float64)


def check_metrics(ours, answer, names, moved=None):
    """`moved`: how far the rounding of the log-probs may move them, in the order of the answer's."""
    assert set(ours) == names
    off = dict(zip(answer.metrics, [0.0] * 99 if moved is None else moved.tolist(), strict=False))
    for name in names:
        value, expected = ours[name], answer.metrics[name]
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad, name
        bar = 1e-7 + 2e-6 * abs(expected) + 2.0**-23 * answer.size + off[name]
        assert value.item() == pytest.approx(expected, rel=0, abs=bar), name


def on(backend, name):
    return functools.partial(sequence_cases.anywhere(getattr(fastrlhf, name)), backend=backend)


# ---- the three ops ------------------------------------------------------------------------------


def ppo_loss(backend, case, dtype):
    tensors = tokens(case, dtype)
    options, known = settings(case, dtype)
    coef = {"entropy_coef": 0.3}
    answer = oracle.policy_loss(lists(tensors), groups_of(case), **known, **coef)
    trained = [n for n in ("logprob", "values", "entropy") if n in tensors]
    given = {n: x.clone().requires_grad_() if n in trained else x for n, x in tensors.items()}
    given.setdefault("old_logprob", None)
    out = on(backend, "ppo_loss")(**given, **options, **coef, **placed(case))
    near(out.loss, answer.loss, "loss", rounded_terms(answer))
    check_metrics(out.metrics, answer, oracle.metric_names(known, tensors))
    grads = torch.autograd.grad(-1.7 * out.loss, [given[n] for n in trained])
    for name, grad in zip(trained, grads, strict=True):
        near(grad, -1.7 * torch.tensor(answer.grads[name], dtype=torch.float64), f"d {name}")


def softmax(logits, targets):
    """(log-prob, entropy, their gradients in the logits) of rows [N, V], in fp64."""
    z, index = logits.double().reshape(-1, V).numpy(), targets.flatten().numpy()
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    d_logprob = np.eye(V)[index] - p
    d_entropy = -p * (log_p + entropy[:, None])
    found = log_p[np.arange(len(p)), index], entropy, d_logprob, d_entropy
    return tuple(map(torch.from_numpy, found))


def poison(x, mask):
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), torch.nan)


def moved(answers, truth, logprob, dtype):
    """How far fp32's rounding of the log-probs may move each result, one row after another; 0 in fp64."""
    off = [torch.zeros_like(t) for t in truth]
    for row in torch.diag(2.0**-24 * logprob) if dtype == torch.float32 else ():
        for sums, now, t in zip(off, answers(row), truth, strict=True):
            sums += (now - t).abs()
    return off


def without_values(case, options):
    """Of the settings, those that token_loss takes: it has no value term."""
    drop = {"value_aggregation", "value_coef", "value_clip"}
    drop |= set() if case["aggregation"] == "token-mean" else {"num_tokens"}
    drop |= set() if case["aggregation"].startswith("seq-") else {"num_sequences"}
    drop |= set() if case["aggregation"].endswith("norm") else {"length"}
    return {name: x for name, x in options.items() if name not in drop}


def token_loss(backend, case, dtype):
    shape, mask, _, _ = policy_cases.where(case)
    logits = randn(*shape, V, seed=1, dtype=torch.float64, scale=1.5).to(dtype)
    targets = randint(V, shape, 2)
    logprob, _, d_logprob, _ = softmax(logits, targets)
    tensors = tokens(case, dtype, logprob)
    options, known = (without_values(case, x) for x in settings(case, dtype))
    given = {n: tensors[n] for n in tensors if n in CONSTANTS[:5]}
    upstream = randn(*targets.shape, seed=5, dtype=torch.float64)

    def answers(move=0.0):
        listed = lists(given) | {"logprob": (logprob + move).tolist()}
        answer = oracle.policy_loss(listed, groups_of(case), **known)
        grad = upstream.flatten() * torch.tensor(answer.grads["logprob"], dtype=torch.float64)
        return torch.tensor(answer.rows, dtype=torch.float64), grad[:, None] * d_logprob

    def run(on_backend):
        leaf = poison(logits, mask).requires_grad_()
        loss, found = on(on_backend, "token_loss")(
            leaf, targets, **given, **options, **placed(case)
        )
        return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(dtype))[0], found

    *ours, found = run(backend)
    eager = run("reference") if dtype == torch.float32 else ours
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    near(found, torch.where(keep, logprob.view(shape), 0.0), "logprob")
    truth = answers()
    off = moved(answers, truth, logprob, dtype)
    for what, o, t, m, e in zip(("loss", "dlogits"), ours, truth, off, eager, strict=False):
        near(o, t, what, t + m, e.view(o.shape))


def linear_ppo_loss(backend, case, dtype):
    shape, mask, _, _ = policy_cases.where(case)
    hidden = randn(*shape, H, seed=1, dtype=torch.float64).to(dtype)
    weight = randn(V, H, seed=3, dtype=torch.float64).to(dtype)
    targets = randint(V, shape, 2)
    x, w = hidden.double().reshape(-1, H), weight.double()
    logprob, entropy, d_logprob, d_entropy = softmax(x @ w.T, targets)
    tensors = tokens(case, dtype, logprob)
    options, known = settings(case, dtype)
    coef = {"entropy_coef": 0.3}
    given = {n: tensors[n] for n in tensors if n in (*CONSTANTS, "values")}

    def answer(move=0.0):
        listed = {"logprob": (logprob + move).tolist(), "entropy": entropy.tolist()}
        return oracle.policy_loss(lists(given) | listed, groups_of(case), **known, **coef)

    def results(answer):
        d = {n: torch.tensor(g, dtype=torch.float64) for n, g in answer.grads.items()}
        dlogits = d["logprob"][:, None] * d_logprob + d["entropy"][:, None] * d_entropy
        metrics = torch.tensor([*answer.metrics.values()], dtype=torch.float64)
        return (
            metrics,
            torch.tensor(answer.loss, dtype=torch.float64),
            dlogits @ w,
            dlogits.T @ x,
            d["values"],
        )

    def run(on_backend):
        leaves = {"hidden": poison(hidden, mask), "weight": weight.clone()}
        leaves |= {"values": given["values"].clone()} if "values" in given else {}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        call = on(on_backend, "linear_ppo_loss")
        more = {"old_logprob": None} | given | leaves | options | coef | placed(case)
        out = call(targets=targets, **more)
        return (
            out.loss.detach(),
            *torch.autograd.grad(out.loss, list(leaves.values())),
        ), out.metrics

    ours, metrics = run(backend)
    eager = run("reference")[0] if dtype == torch.float32 else ours
    found = answer()
    truth = results(found)
    off = moved(lambda move: results(answer(move)), truth, logprob, dtype)
    check_metrics(metrics, found, oracle.metric_names(known, tensors), off[0])
    off[1] += 2.0**-23 * found.size
    names = ("loss", "d hidden", "d weight", "d values")
    for what, o, t, m, e in zip(names, ours, truth[1:], off[1:], eager, strict=False):
        near(o, t, what, t + m, e.view(o.shape))


def check(op, backend, case, dtype=None):
    globals()[op](backend, case, dtype or case["dtype"])


def named(case):
    return f"{case['objective']}-{case['aggregation']}-{case['kl_estimator']}-{case['rollout']}"


# Under Triton's interpreter a call takes up to half a second: `make test` runs one case in so many; `make nightly` all
# of the covering and as few of the grid.
INTERPRETED = {"ppo_loss": 3, "token_loss": 12, "linear_ppo_loss": 25}


def covered():
    """(op, backend, case) as pytest parameters."""
    for param in policy_losses():
        op, backend = param.values
        for i, case in enumerate(COVERING):
            late = interpreted(backend) and i % INTERPRETED[op]
            marks = [*param.marks, *([pytest.mark.nightly] if late else [])]
            yield pytest.param(op, backend, case, id=f"{param.id}-{i}-{named(case)}", marks=marks)


@pytest.mark.parametrize(("op", "backend", "case"), covered())
def test_equals_the_loops(op, backend, case):
    check(op, backend, case, torch.float64 if backend == "reference" else None)


def test_the_interpreted_cases_have_each_objective():
    for every in (INTERPRETED["ppo_loss"], INTERPRETED["token_loss"]):
        assert {case["objective"] for case in COVERING[::every]} == set(FACTORS["objective"])


@pytest.mark.nightly
@each()
@pytest.mark.parametrize("aggregation", FACTORS["aggregation"])
@pytest.mark.parametrize("objective", FACTORS["objective"])
def test_the_grid(op, backend, objective, aggregation):
    cases = policy_cases.grid(objective, aggregation)
    if interpreted(backend):
        first = FACTORS["aggregation"].index(aggregation)
        cases = cases[first :: 5 * INTERPRETED[op]]
    for case in cases:
        try:
            check(op, backend, case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.nightly
@each(backends=BACKENDS[1:])
@pytest.mark.parametrize("seed", range(1, 6))
def test_coverings_in_fp32(op, backend, seed):
    for case in policy_cases.covering(seed)[:: INTERPRETED[op] if interpreted(backend) else 1]:
        try:
            check(op, backend, case, torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


# ---- the oracle itself --------------------------------------------------------------------------


def by_autograd(tensors, groups, s):
    """ppo_loss of lists in differentiable PyTorch, a sequence at a time -> (loss, leaves)."""
    s = oracle.DEFAULTS | s
    x = {name: torch.tensor(t, dtype=torch.float64) for name, t in tensors.items()}
    leaves = {n: x[n].requires_grad_() for n in ("logprob", "values", "entropy") if n in x}
    total, tokens = torch.zeros((), dtype=torch.float64), sum(map(len, groups))
    count = sum(1 for g in groups if g) if s["num_sequences"] is None else s["num_sequences"]
    tokens = tokens if s["num_tokens"] is None else s["num_tokens"]
    clip = s["clip"] if isinstance(s["clip"], tuple) else (s["clip"], s["clip"])
    low = -math.inf if clip[0] is None else 1 - clip[0]
    high = math.inf if clip[1] is None else 1 + clip[1]

    def summed(how, terms):
        if how.startswith("token"):
            return terms.sum() / (tokens if how == "token-mean" else 1)
        mean = terms.mean() if how == "seq-mean-token-mean" else terms.sum()
        return mean / count / (s["length"] if how.endswith("norm") else 1)

    for b, group in enumerate(groups):
        if not group:
            continue
        at = lambda n, b=b, g=group: x[n][g] if len(x[n]) == len(x["logprob"]) else x[n][b]  # noqa: E731
        lp, a = at("logprob"), at("advantages")
        old = at("old_logprob") if "old_logprob" in x else lp.detach()
        log_ratio = lp - old
        if s["objective"] == "gspo":
            log_ratio = log_ratio.mean().detach() + lp - lp.detach()
        rho = torch.exp(torch.clamp(log_ratio, -20, 20))
        if s["objective"] == "reinforce":
            policy = -a * lp
        elif s["objective"] == "sapo":
            tau = torch.where(
                a > 0, x["logprob"].new_tensor(s["tau_pos"]), x["logprob"].new_tensor(s["tau_neg"])
            )
            policy = -a * 4 / tau / (1 + torch.exp(-tau * (rho - 1)))
        elif s["objective"] == "cispo":
            policy = -a * rho.clamp(low, high).detach() * lp
        else:
            policy = torch.maximum(-a * rho, -a * rho.clamp(low, high))
            if s["dual_clip"] is not None:
                policy = torch.where(a < 0, torch.minimum(policy, -a * s["dual_clip"]), policy)
        if "rollout_weights" in x:
            policy = at("rollout_weights") * policy
        if "rollout_logprob" in x:
            d = (old - at("rollout_logprob")).detach()
            d = {"token": d, "sequence": d.sum(), "sequence_mean": d.mean()}[s["rollout_level"]]
            w, (least, most) = d.clamp(-20, 20).exp(), s["rollout_bounds"]
            least, most = 0.0 if least is None else least, math.inf if most is None else most
            w = (
                w.clamp(least, most)
                if s["rollout_mode"] == "truncate"
                else w * ((w >= least) & (w <= most))
            )
            policy = w * policy
        total = total + summed(s["aggregation"], policy)
        if "ref_logprob" in x:
            d = lp - at("ref_logprob")
            k3 = torch.exp(-d) - 1 + d
            if s["kl_clamp"]:
                k3 = (torch.exp(-d.clamp(-20, 20)) - 1 + d.clamp(-20, 20)).clamp(max=10)
            kl = {"k1": d, "k2": d**2 / 2, "k3": k3, "abs": d.abs()}[s["kl_estimator"]]
            if s["kl_gradient"] == "k2":
                kl = kl.detach() + d**2 / 2 - (d**2 / 2).detach()
            total = total + s["kl_coef"] * summed(
                s["aggregation"], rho * kl if s["kl_gradient"] == "ratio" else kl
            )
        if "values" in x:
            near_old = torch.clamp(
                at("values") - at("old_values"), -s["value_clip"], s["value_clip"]
            ) + at("old_values")
            error = torch.maximum(
                (at("values") - at("returns")) ** 2, (near_old - at("returns")) ** 2
            )
            how = s["value_aggregation"] or s["aggregation"]
            total = total + s["value_coef"] * summed(how, error / 2)
        total = total - s["entropy_coef"] * summed(s["aggregation"], at("entropy"))
    return s["scale"] * total, leaves


@pytest.mark.parametrize("case", COVERING, ids=named)
def test_the_loops_have_the_gradients_of_autograd(case):
    tensors = lists(tokens(case, torch.float64))
    known = settings(case, torch.float64)[1] | {"entropy_coef": 0.3}
    answer = oracle.policy_loss(tensors, groups_of(case), **known)
    loss, leaves = by_autograd(tensors, groups_of(case), known)
    assert loss.item() == pytest.approx(answer.loss, rel=1e-12)
    for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(grad.tolist(), answer.grads[name], rtol=1e-11, atol=1e-14)


def test_the_covering_has_every_pair():
    assert 60 < len(COVERING) < 110
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        seen = {(repr(case[a]), repr(case[b])) for case in COVERING}
        for x, y in itertools.product(xs, ys):
            kept = any(
                policy_cases.canonical(case | {a: x, b: y}).items() >= {a: x, b: y}.items()
                for case in COVERING
            )
            assert not kept or (repr(x), repr(y)) in seen, (a, x, b, y)


def test_the_grid_has_every_crossing():
    cases = policy_cases.grid("ppo", "token-mean")
    kl = {tuple(case[name] for name in GRID[:3]) for case in cases}
    assert len(cases) == len(kl) * len(FACTORS["rollout"]) and len(kl) == 1 + 4 * 2 * 3
    seen = {name: {repr(case[name]) for case in cases} for name in FACTORS}
    for name in (
        "clip",
        "dual_clip",
        "old",
        "rollout_bounds",
        "advantages",
        "layout",
        "counts",
        "values",
        "scale",
    ):
        assert seen[name] == set(map(repr, FACTORS[name])), name


# ---- single tokens and edges --------------------------------------------------------------------


def single(backend, given, **options):
    """(loss, d loss / d logprob, metrics) of a call with the tokens `given`, in fp64, and the oracle's Answer."""
    listed = {name: [float(x)] if not isinstance(x, list) else x for name, x in given.items()}
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in listed.items()}
    leaf = tensors.pop("logprob").requires_grad_()
    tensors.setdefault("old_logprob", None)
    count = leaf.numel()
    cu = torch.tensor([0, count], dtype=torch.int32)
    out = on(backend, "ppo_loss")(
        leaf, **tensors, **options, cu_seqlens=cu, aggregation="token-sum"
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    answer = oracle.policy_loss(listed, [list(range(count))], **options, aggregation="token-sum")
    return out, grad, answer


@each(("ppo_loss",))
@pytest.mark.parametrize("objective", FACTORS["objective"])
def test_log_ratios_at_their_limit(backend, op, objective):
    """At +-20 the gradient passes the clamp, beyond it does not; reinforce and cispo have none of it."""
    options = {"objective": objective}
    if objective in ("ppo", "gspo", "cispo"):
        options["clip"] = (None, None)
    limits = (-20.5, 20.0, 20.5, 500.0)
    for d in limits if interpreted(backend) else (-25.0, -20.0, -19.5, 19.5, *limits):
        for a in (-1.5, 0.7):
            given = {"logprob": d, "old_logprob": 0.0, "advantages": a}
            out, grad, answer = single(backend, given, **options)
            assert out.loss.item() == pytest.approx(answer.loss, rel=1e-12), (d, a)
            assert grad.tolist() == pytest.approx(answer.grads["logprob"], rel=1e-12), (d, a)
            if objective in ("ppo", "gspo"):
                assert (grad.item() == 0) == (abs(d) > 20)


@each(("ppo_loss",))
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("gradient", FACTORS["kl_gradient"])
@pytest.mark.parametrize("estimator", FACTORS["kl_estimator"][1:])
def test_kl_at_its_limits(backend, op, estimator, gradient, clamp):
    """Log-ratios at +-20, a k3 around 10, d = 0 (where the gradient of |d| is 0), and a ratio other than 1."""
    options = {
        "kl_coef": 1.0,
        "kl_estimator": estimator,
        "kl_gradient": gradient,
        "kl_clamp": clamp,
    }
    for ds in ([-2.7, -2.6, 0.0, 0.5, 10.9, 11.1], [-20.0, 20.0], [-25.0, 25.0]):
        given = {"logprob": [0.0] * len(ds), "old_logprob": [-0.1] * len(ds)}
        given |= {"ref_logprob": [-d for d in ds], "advantages": [0.0] * len(ds)}
        out, grad, answer = single(backend, given, **options)
        bar = {
            "rel": 1e-12,
            "abs": 1e-15 * math.exp(-ds[0]),
        }  # e^-d cancels in the gradient of rho k3
        assert out.loss.item() == pytest.approx(answer.loss, **bar), ds
        assert grad.tolist() == pytest.approx(answer.grads["logprob"], **bar), ds


@each(("ppo_loss",), ("cpu", "triton", "cuda"))
def test_the_gradient_of_a_ratio_times_k3_does_not_cancel(backend, op):
    """It is rho d: the e^-d of k3 and of its slope, which may overflow, are not in it. (Autograd rounds both.)"""
    ds = torch.tensor([-1.0, -12.0, -18.0, -25.0, -100.0, 5.0, 100.0])
    leaf = torch.zeros_like(ds).requires_grad_()
    rest = {"old_logprob": torch.full_like(ds, -0.1), "advantages": torch.zeros_like(ds)}
    given = {"ref_logprob": -ds, "kl_coef": 1.0, "kl_clamp": False, "kl_gradient": "ratio"}
    out = on(backend, op)(leaf, **rest, **given, aggregation="token-sum")
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert grad.tolist() == pytest.approx((math.exp(0.1) * ds.double()).tolist(), rel=1e-6)


@each(("ppo_loss",))
def test_an_infinite_kl_beyond_the_clamp(backend, op):
    """The ratio has no gradient there, and 0 times the KL is 0."""
    given = {"logprob": -math.inf, "old_logprob": 0.0, "ref_logprob": 0.0, "advantages": 0.5}
    out, grad, _ = single(backend, given, kl_coef=1.0, kl_estimator="k1", kl_gradient="ratio")
    assert out.loss == -math.inf and grad.item() == pytest.approx(math.exp(-20), rel=1e-12)


@each(("ppo_loss",))
def test_rollout_weights_at_their_limits(backend, op):
    """A sum of log-ratios beyond +-20 is clamped; a weight on a bound is inside it."""
    for mode, level in itertools.product(
        ("truncate", "mask"), ("token", "sequence", "sequence_mean")
    ):
        for steps, bounds in (([30.0, 1.0], (None, None)), ([-30.0, 2.0], (None, None)), ([0.0, 0.0], (1.0, 1.0)),
                              ([0.0, 0.0], (1.5, 2.0)), ([1.0, -1.0], (0.5, 1.0))):  # fmt: skip
            given = {
                "logprob": [-1.0, -2.0],
                "old_logprob": [-1.1, -1.8],
                "advantages": [1.0, -0.5],
            }
            given["rollout_logprob"] = [
                o - d for o, d in zip(given["old_logprob"], steps, strict=True)
            ]
            options = {"rollout_level": level, "rollout_mode": mode, "rollout_bounds": bounds}
            out, grad, answer = single(backend, given, **options)
            assert out.loss.item() == pytest.approx(answer.loss, rel=1e-12), (mode, level, steps)
            assert grad.tolist() == pytest.approx(answer.grads["logprob"], rel=1e-12)
            for name in ("rollout_weight_mean", "rollout_weight_max", "rollout_outside_fraction"):
                assert out.metrics[name].item() == pytest.approx(answer.metrics[name], rel=1e-6), (
                    name
                )


@each(("ppo_loss",))
def test_sapos_temperature_by_the_sign_of_the_advantage(backend, op):
    """tau_neg at A = 0 and below: the loss of A = 0 is 0 either way; the slope at rho = 1 is -A whatever tau."""
    for a, tau in ((1.0, 0.5), (-1.0, 2.0)):
        given = {"logprob": 0.3, "old_logprob": 0.0, "advantages": a}
        out, _, _ = single(backend, given, objective="sapo", tau_pos=0.5, tau_neg=2.0)
        sigmoid = 1 / (1 + math.exp(-tau * (math.exp(0.3) - 1)))
        assert out.loss.item() == pytest.approx(-a * 4 / tau * sigmoid, rel=1e-12)
        given["logprob"] = 0.0
        _, grad, _ = single(backend, given, objective="sapo", tau_pos=0.5, tau_neg=2.0)
        assert grad.item() == pytest.approx(-a, rel=1e-12)


@each(("ppo_loss",))
def test_gspo_shares_the_ratio_and_not_the_gradient(backend, op):
    """With one advantage a sequence the gradient equals that of s itself, -A s / n a token, times n."""
    given = {
        "logprob": [-1.0, -2.0, -0.5],
        "old_logprob": [-1.2, -1.9, -0.9],
        "advantages": [0.5, 0.5, 0.5],
    }
    out, grad, _ = single(backend, given, objective="gspo")
    s = math.exp((0.2 - 0.1 + 0.4) / 3)
    assert (
        out.metrics["ratio_mean"].item()
        == out.metrics["ratio_max"].item()
        == pytest.approx(s, rel=1e-6)
    )
    assert grad.tolist() == pytest.approx([-0.5 * s] * 3, rel=1e-12)
    given["advantages"] = [0.5, -0.5, 0.0]
    _, grad, _ = single(backend, given, objective="gspo")
    assert grad.tolist() == pytest.approx([-0.5 * s, 0.5 * s, 0.0], rel=1e-12)


@each(("ppo_loss",), BACKENDS[1:])
def test_sums_of_empty_sequences(backend, op):
    """At both ends; fresh memory holds NaN."""
    x = torch.tensor([0.5, 0.25, 3.0])
    given = x, None, torch.tensor([True, True, False]), sequence_cases.cu_of((0, 2, 1, 0, 0))
    given = sequence_cases.at(backend, list(given))
    sums = _policy.SUMS[backend](*given)
    assert sums.tolist() == [[0, 2, 0, 0, 0], [0, 0.75, 0, 0, 0]]


@each(("ppo_loss",))
def test_as_many_tokens_as_sequences(backend, op):
    """[N] with N = S is per token; what the op computes per sequence stays per sequence."""
    given = {
        "logprob": [-2.3, -0.4, -1.1],
        "old_logprob": [-2.0, -0.6, -1.0],
        "advantages": [-1.4, 0.2, 0.3],
    }
    given |= {"rollout_weights": [0.7, 2.8, 1.7], "ref_logprob": [-2.3, -0.7, -1.2]}
    options = {"objective": "gspo", "aggregation": "seq-mean-token-mean", "kl_coef": 0.2}
    answer = oracle.policy_loss(given, oracle.counted((1, 0, 2)), **options)
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in given.items()}
    out = on(backend, "ppo_loss")(**tensors, **options, cu_seqlens=sequence_cases.cu_of((1, 0, 2)))
    assert out.loss.item() == pytest.approx(answer.loss, rel=1e-12)
    assert out.metrics["ratio_mean"].item() == pytest.approx(answer.metrics["ratio_mean"], rel=1e-6)


@each()
@pytest.mark.parametrize("aggregation", FACTORS["aggregation"])
@pytest.mark.parametrize("lengths", [(), (0, 0), (3, 0, 2)])
def test_no_counted_token(op, backend, aggregation, lengths):
    """No sequence, empty ones, and a mask of zeros: the loss and every metric are 0, and so are the gradients."""
    count = sum(lengths)
    shape, where = (
        (count,),
        {"cu_seqlens": sequence_cases.cu_of(lengths).int(), "mask": torch.zeros(count, dtype=bool)},
    )
    x = torch.full(shape, math.nan)
    options = {"objective": "gspo", "aggregation": aggregation, "ref_logprob": x, "kl_coef": 0.1}
    options |= {"length": 7} if aggregation.endswith("norm") else {}
    options |= {"rollout_logprob": x, "rollout_level": "sequence"}
    call, advantages = on(backend, op), torch.full((len(lengths),), math.nan)
    if op == "ppo_loss":
        leaf = x.clone().requires_grad_()
        loss, metrics = call(leaf, x, advantages, **options, **where)
    elif op == "token_loss":
        leaf, metrics = torch.full((count, V), math.nan).requires_grad_(), {}
        targets = torch.zeros(shape, dtype=torch.int64)
        loss, _ = call(leaf, targets, advantages, old_logprob=x, **options, **where)
        loss = loss.sum()
    else:
        leaf, targets = (
            torch.full((count, H), math.nan).requires_grad_(),
            torch.zeros(shape, dtype=torch.int64),
        )
        loss, metrics = call(leaf, torch.ones(V, H), targets, x, advantages, **options, **where)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))
    assert all(value == 0 for value in metrics.values()), metrics


def micro_batches():
    """Uneven ones: the first two sequences, the next one alone, the rest; and each sequence alone."""
    return ([0, 1], [2], [3, 4, 5, 6]), tuple([b] for b in range(7))


@each(("ppo_loss",))
@pytest.mark.parametrize("aggregation", FACTORS["aggregation"])
def test_micro_batches_add_up(op, backend, aggregation):
    """The losses and gradients of parts, with the whole batch's counts, are those of the whole batch."""
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {
        "aggregation": aggregation,
        "kl_estimator": "k3",
        "rollout": "sequence, truncate",
        "objective": "gspo",
    }
    case |= {"advantages": "per sequence", "layout": "packed, masked", "values": aggregation}
    x = tokens(case, torch.float64)
    options = settings(case, torch.float64)[0] | {"entropy_coef": 0.3}
    where = placed(case)
    groups = groups_of(case)
    counts = (
        {} if aggregation == "token-sum" else {"num_sequences": float(sum(1 for g in groups if g))}
    )
    if aggregation == "token-mean":
        counts = {"num_tokens": torch.tensor(float(sum(map(len, groups))))}

    def run(tensors, mask, cu_seqlens, **more):
        leaf = tensors["logprob"].clone().requires_grad_()
        given = tensors | {"logprob": leaf, "mask": mask, "cu_seqlens": cu_seqlens}
        loss = on(backend, "ppo_loss")(**given, **options, **more).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    whole, grad = run(x, **where)
    ends = where["cu_seqlens"].tolist()
    for parts in micro_batches()[: 1 if interpreted(backend) else 2]:
        total, grads = 0.0, []
        for part in parts:
            rows = slice(ends[part[0]], ends[part[-1] + 1])
            piece = {n: t[rows] if len(t) == ends[-1] else t[part] for n, t in x.items()}
            cu = torch.tensor(
                [ends[b] - rows.start for b in (*part, part[-1] + 1)], dtype=torch.int32
            )
            loss, piece_grad = run(piece, where["mask"][rows], cu, **counts)
            total, grads = total + loss, [*grads, piece_grad]
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-12, atol=0)


@each(("ppo_loss",), BACKENDS[1:])
def test_new_tensors_of_every_dtype_and_stride(op, backend):
    """A cast to fp32 is exact: narrow, strided tensors give bitwise the same as wide, contiguous ones."""
    case = {name: values[0] for name, values in FACTORS.items()}
    case |= {
        "objective": "gspo",
        "aggregation": "seq-mean-token-mean",
        "kl_estimator": "k3",
        "layout": "padded, masked",
    }
    case |= {
        "rollout": "sequence, truncate",
        "rollout_bounds": (0.9, 1.1),
        "advantages": "per sequence",
    }
    x, options = tokens(case, torch.float32), settings(case, torch.float32)[0]
    narrow = ("ref_logprob", "rollout_logprob", "advantages", "old_logprob", "entropy")
    for i, name in enumerate(narrow):
        x[name] = x[name].to((torch.bfloat16, torch.float16)[i % 2])
    views = {name: sequence_cases.with_strides(t) for name, t in x.items()}
    wide = {name: t.float().contiguous() for name, t in x.items()}

    def run(given, mask):
        leaf = given["logprob"].detach().requires_grad_()
        out = on(backend, "ppo_loss")(**given | {"logprob": leaf}, **options, mask=mask)
        return [out.loss, *out.metrics.values(), *torch.autograd.grad(out.loss, leaf)]

    mask = placed(case)["mask"]
    for a, b in zip(run(views, mask.T.contiguous().T), run(wide, mask), strict=True):
        assert torch.equal(a, b)


@each(("ppo_loss",))
@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_tokens_of_any_rank(op, backend, shape):
    """Settings without sequences take tokens of any shape."""
    draws = sequence_cases.randn((5, *shape), 0)
    names = ("logprob", "old_logprob", "advantages", "ref_logprob", "rollout_logprob")
    x = dict(zip(names, draws, strict=True))
    options = {
        "objective": "cispo",
        "kl_coef": 0.1,
        "aggregation": "token-sum",
        "rollout_bounds": (0.5, 2.0),
    }

    def run(given):
        leaf = given["logprob"].clone().requires_grad_()
        out = on(backend, "ppo_loss")(**given | {"logprob": leaf}, **options)
        return out.loss, *out.metrics.values(), torch.autograd.grad(out.loss, leaf)[0].flatten()

    for a, b in zip(run(x), run({name: t.reshape(-1) for name, t in x.items()}), strict=True):
        assert torch.equal(a, b)
