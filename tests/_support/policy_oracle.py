"""The policy losses in fp64, from their equations: loops over sequences and tokens that share no code with the package.

N tokens in the flat order of their memory, S sequences. Tensors come as lists of floats: per token, or per sequence
where their length is S and not N.
"""

import math
from typing import NamedTuple

LIMIT = 20.0  # of |log-ratio|
DEFAULTS = {
    "objective": "ppo", "clip": 0.2, "dual_clip": None, "tau_pos": 1.0, "tau_neg": 1.05,
    "kl_coef": 0.0, "kl_estimator": "k3", "kl_clamp": True, "kl_gradient": "estimator",
    "rollout_level": "token", "rollout_mode": "truncate", "rollout_bounds": (None, None),
    "aggregation": "token-mean", "value_aggregation": None, "length": None, "num_tokens": None, "num_sequences": None,
    "value_clip": 0.2, "value_coef": 0.5, "entropy_coef": 0.0, "scale": 1.0,
}  # fmt: skip


class Answer(NamedTuple):
    loss: float
    size: float  # of the loss: the sum of the absolute values of its terms, by which fp32 rounds
    rows: list[float]  # of token_loss: scale * weight * (policy term + kl_coef * KL)
    metrics: dict[str, float]
    grads: dict[str, list[float]]  # of the loss, by logprob, values, entropy


def counted(lengths, mask=None):
    """The counted tokens of each sequence, for sequences behind one another; `mask`: a list of N."""
    groups, start = [], 0
    for length in lengths:
        tokens = range(start, start + length)
        groups.append([i for i in tokens if mask is None or mask[i]])
        start += length
    return groups


def inside(x):
    """x in [-20, 20], and whether the clamp lets its gradient through."""
    return min(max(x, -LIMIT), LIMIT), abs(x) <= LIMIT


def term(s, logprob, log_ratio, advantage):
    """(loss, d loss / d logprob, rho, d rho / d logprob, names of the metrics that count this token)."""
    d, through = inside(log_ratio)
    ratio = math.exp(d)
    slope = ratio if through else 0.0
    if s["objective"] == "reinforce":
        return -advantage * logprob, -advantage, ratio, slope, set()
    if s["objective"] == "sapo":
        tau = s["tau_pos"] if advantage > 0 else s["tau_neg"]
        sigmoid = 1 / (1 + math.exp(-tau * (ratio - 1)))
        grad = -advantage * (4 / tau) * sigmoid * (1 - sigmoid) * tau * slope
        return -advantage * (4 / tau) * sigmoid, grad, ratio, slope, set()
    low, high = s["clip"] if isinstance(s["clip"], tuple) else (s["clip"], s["clip"])
    low = -math.inf if low is None else 1 - low
    high = math.inf if high is None else 1 + high
    limited = min(max(ratio, low), high)
    found = {"outside_fraction"} if ratio < low or ratio > high else set()
    side = "clip_fraction_low" if ratio < low else "clip_fraction_high"
    if s["objective"] == "cispo":
        found |= {"clip_fraction", side} if found else set()
        return -advantage * limited * logprob, -advantage * limited, ratio, slope, found
    loss, grad = -advantage * ratio, -advantage * slope
    if -advantage * limited > loss:
        loss, grad = -advantage * limited, 0.0
        found |= {"clip_fraction", side}
    if s["dual_clip"] is not None and advantage < 0 and -advantage * s["dual_clip"] < loss:
        loss, grad = -advantage * s["dual_clip"], 0.0
        found |= {"dual_clip_fraction"}
    return loss, grad, ratio, slope, found


def kl_term(s, logprob, ref_logprob, ratio, slope):
    """(KL, its gradient) of a token."""
    d = logprob - ref_logprob
    if s["kl_estimator"] == "k1":
        kl, grad = d, 1.0
    elif s["kl_estimator"] == "k2":
        kl, grad = d * d / 2, d
    elif s["kl_estimator"] == "abs":
        kl, grad = abs(d), math.copysign(1.0, d) if d else 0.0
    else:
        r, through = inside(-d) if s["kl_clamp"] else (-d, True)
        kl, grad = math.expm1(r) - r, -math.expm1(r) if through else 0.0
        if s["kl_clamp"] and kl > 10:
            kl, grad = 10.0, 0.0
    if s["kl_gradient"] == "k2":
        return kl, d
    if s["kl_gradient"] == "ratio":
        return ratio * kl, slope * kl + ratio * grad
    return kl, grad


def bounded(s, log_weight):
    """(rollout weight, whether it was outside the bounds)."""
    weight = math.exp(inside(log_weight)[0])
    low, high = s["rollout_bounds"]
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    if low <= weight <= high:
        return weight, False
    return 0.0 if s["rollout_mode"] == "mask" else min(max(weight, low), high), True


def weights(s, how, groups):
    """a_i of the aggregate sum a_i x_i, by counted token."""
    tokens = sum(map(len, groups))
    sequences = sum(1 for group in groups if group)
    tokens = max(tokens, 1) if s["num_tokens"] is None else s["num_tokens"]
    sequences = max(sequences, 1) if s["num_sequences"] is None else s["num_sequences"]
    found = {}
    for group in groups:
        each = {
            None: lambda: 1.0,
            "token-sum": lambda: 1.0,
            "token-mean": lambda: 1 / tokens,
            "seq-mean-token-sum": lambda: 1 / sequences,
            "seq-mean-token-mean": lambda group=group: 1 / (len(group) * sequences),
            "seq-mean-token-sum-norm": lambda: 1 / (s["length"] * sequences),
        }
        found |= {i: each[how]() for i in group}
    return found


def policy_loss(tensors, groups, **settings):
    """The Answer for lists `tensors` by name (absent: None) and the counted tokens `groups` of each sequence."""
    s = DEFAULTS | settings
    count = len(tensors["logprob"])
    owner = {i: b for b, group in enumerate(groups) for i in group}
    tokens = sorted(owner)

    def get(name, i, default=None):
        x = tensors.get(name)
        if x is None:
            return default
        return x[i] if len(x) == count else x[owner[i]]

    old = {i: get("old_logprob", i, tensors["logprob"][i]) for i in tokens}
    log_ratio = {i: tensors["logprob"][i] - old[i] for i in tokens}
    if s["objective"] == "gspo":
        means = [sum(log_ratio[i] for i in group) / max(len(group), 1) for group in groups]
        log_ratio = {i: means[owner[i]] for i in tokens}
    rollout = None
    if tensors.get("rollout_weights") is not None:
        rollout = {i: (get("rollout_weights", i), None) for i in tokens}
    elif tensors.get("rollout_logprob") is not None:
        rollout = {i: old[i] - tensors["rollout_logprob"][i] for i in tokens}
        if s["rollout_level"] != "token":
            sums = [sum(rollout[i] for i in group) for group in groups]
            if s["rollout_level"] == "sequence_mean":
                sums = [x / max(len(group), 1) for x, group in zip(sums, groups, strict=True)]
            rollout = {i: sums[owner[i]] for i in tokens}
        rollout = {i: bounded(s, x) for i, x in rollout.items()}

    a = weights(s, s["aggregation"], groups)
    grads = {name: [0.0] * count for name in ("logprob", "values", "entropy")}
    size, rows, m = 0.0, [0.0] * count, dict.fromkeys(("policy_loss", "kl"), 0.0)
    share = 1 / max(len(tokens), 1)
    ratios = []
    for name in ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction", "outside_fraction",
                 "approx_kl", "ratio_mean"):  # fmt: skip
        m[name] = 0.0
    for i in tokens:
        x, grad, ratio, slope, found = term(
            s, tensors["logprob"][i], log_ratio[i], get("advantages", i, 1.0)
        )
        w = 1.0 if rollout is None else rollout[i][0]
        kl, kl_grad = 0.0, 0.0
        if tensors.get("ref_logprob") is not None:
            kl, kl_grad = kl_term(s, tensors["logprob"][i], tensors["ref_logprob"][i], ratio, slope)
        m["policy_loss"] += a[i] * w * x
        m["kl"] += a[i] * kl
        rows[i] = s["scale"] * a[i] * (w * x + s["kl_coef"] * kl)
        size += a[i] * (abs(w * x) + abs(s["kl_coef"] * kl))
        grads["logprob"][i] = s["scale"] * a[i] * (w * grad + s["kl_coef"] * kl_grad)
        for name in found:
            m[name] += share
        m["approx_kl"] += share * (ratio - 1 - inside(log_ratio[i])[0])
        m["ratio_mean"] += share * ratio
        ratios.append(ratio)
    m["ratio_max"] = max(ratios, default=0.0)
    loss = m["policy_loss"] + s["kl_coef"] * m["kl"]
    if rollout is not None:
        m["rollout_weight_mean"] = share * sum(w for w, _ in rollout.values())
        m["rollout_weight_max"] = max((w for w, _ in rollout.values()), default=0.0)
        m["rollout_outside_fraction"] = share * sum(bool(out) for _, out in rollout.values())
    if tensors.get("values") is not None:
        more, grads["values"] = value_loss(
            tensors, tokens, s, weights(s, s["value_aggregation"] or s["aggregation"], groups)
        )
        m |= more
        loss += s["value_coef"] * m["value_loss"]
        size += s["value_coef"] * m["value_loss"]
    if tensors.get("entropy") is not None:
        m["entropy"] = sum(a[i] * tensors["entropy"][i] for i in tokens)
        for i in tokens:
            grads["entropy"][i] = -s["scale"] * s["entropy_coef"] * a[i]
        loss -= s["entropy_coef"] * m["entropy"]
        size += s["entropy_coef"] * m["entropy"]
    return Answer(s["scale"] * loss, abs(s["scale"]) * size, rows, m, grads)


def value_loss(tensors, tokens, s, a):
    """(metrics, gradients) of the clipped value loss."""
    values, returns = tensors["values"], tensors["returns"]
    grads, total, clipped = [0.0] * len(values), 0.0, 0
    for i in tokens:
        error = values[i] - returns[i]
        half, grad = error * error / 2, error
        if s["value_clip"] is not None:
            old = tensors["old_values"][i]
            near = min(max(values[i], old - s["value_clip"]), old + s["value_clip"]) - returns[i]
            if near * near / 2 > half:
                half, grad, clipped = near * near / 2, 0.0, clipped + 1
        total += a[i] * half
        grads[i] = s["scale"] * s["value_coef"] * a[i] * grad
    count = max(len(tokens), 1)

    def variance(xs):
        mean = math.fsum(xs) / count
        return math.fsum((x - mean) ** 2 for x in xs) / count

    spread = variance([returns[i] for i in tokens])
    noise = variance([returns[i] - values[i] for i in tokens])
    explained = 1 - noise / spread if spread > 0 else 0.0
    return {
        "value_loss": total, "value_clip_fraction": clipped / count, "explained_variance": explained,
    }, grads  # fmt: skip


def metric_names(s, tensors):
    """The metrics that a call reports."""
    s = DEFAULTS | s
    names = {"policy_loss"}
    if s["objective"] != "reinforce":
        names |= {"approx_kl", "ratio_mean", "ratio_max"}
    if s["objective"] in ("ppo", "gspo", "cispo"):
        names |= {
            "clip_fraction",
            "clip_fraction_low",
            "clip_fraction_high",
            "dual_clip_fraction",
            "outside_fraction",
        }
    given = {name for name, x in tensors.items() if x is not None}
    if "ref_logprob" in given:
        names |= {"kl"}
    if given & {"rollout_weights", "rollout_logprob"}:
        names |= {"rollout_weight_mean", "rollout_weight_max"}
    if "rollout_logprob" in given:
        names |= {"rollout_outside_fraction"}
    if "values" in given:
        names |= {"value_loss", "value_clip_fraction", "explained_variance"}
    return names | ({"entropy"} if "entropy" in given else set())
