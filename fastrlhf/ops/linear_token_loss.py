"""linear_token_loss: a user's loss of the tokens' log-probs, straight from hidden states.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V]; every other tensor [...]; n rows of a chunk.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _backend, _checks, _linear_loss, token_logprob
from fastrlhf.ops._gemms import as_parameters, gemms_for
from fastrlhf.ops._linear import Head
from fastrlhf.ops._register import choose, needs, on_all_ranks
from fastrlhf.ops.linear_logprob import rows_of
from fastrlhf.reference import LinearTokenLossOutput

OP = "linear_token_loss"


@on_all_ranks
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: Callable,
    *,
    per_token: Mapping[str, Tensor] | None = None,
    with_entropy: bool = False,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    scale: float | Tensor = 1.0,
    accumulate_into: Tensor | None = None,
    compact_rows: bool = False,
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> LinearTokenLossOutput:
    """scale * mean (or sum) over the rows of ``loss_fn(logprob, **per_token)``, without the N x V logits.

    `loss_fn` is a Python function of [n] tensors. It is called once a chunk with the log-probs of its
    rows; autograd differentiates it on these [n] numbers, and the chunk's logits are turned into
    dlogits, dX and dW at once: 6 N H V FLOP for forward and backward instead of 8. The backward only
    scales. Example, GRPO with a clip::

        def grpo(logprob, old_logprob, advantage):
            ratio = (logprob - old_logprob).exp()
            return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)

        per_token = {"old_logprob": old_logprob, "advantage": advantage}
        linear_token_loss(hidden, weight, targets, grpo, per_token=per_token, mask=mask).loss.backward()

    A row's loss must depend on that row alone: compute what needs the whole batch (such as a group's
    mean) before the call and pass it in `per_token`. Under torch.compile, and for "none", `loss_fn` is
    called once on `linear_logprob`'s result.

    Args:
        hidden, weight, targets, bias, temperature, softcap, workspace: as in `linear_logprob`.
        loss_fn: ``(logprob [n], **per_token) -> loss [n]``, or ``(loss [n], {name: [n]})`` with metrics;
            ``(logprob, entropy, **per_token)`` with `with_entropy`. Loss and log-prob are float32 (float64).
        per_token: {name: tensor [...]}, constants of any dtype, cut into chunks for `loss_fn`. (A tensor in
            the closure of `loss_fn` is not cut and does not match the log-probs of n rows.)
        mask: [...], True (or non-zero) where a row counts. Other rows enter no GEMM and are not passed
            to `loss_fn`, which is called with n = 0 if none count. While a CUDA graph is captured they
            are passed, with log-prob 0, and their results are dropped.
        reduction: "mean" over the rows that count (0 if none do), "sum" or "none".
        scale: as in `linear_cross_entropy`.
        accumulate_into: as there. An error of `loss_fn` must leave it unchanged, so dW is summed
            separately and added at the end of the forward, which holds two dW until then.
        compact_rows, num_rows, process_group: as in `linear_ppo_loss`; every rank calls `loss_fn`.
        backend: runs the row kernels; the GEMMs are PyTorch's.

    Returns:
        LinearTokenLossOutput(loss, logprob, entropy, metrics). loss: 0-d, or [...] for "none"; the
        others are constants: logprob [...], entropy [...] or None, metrics {name: [...]}, 0 where
        masked. Gradients flow to hidden, weight and bias, once.

    Raises:
        TypeError, ValueError: as `linear_logprob`; also for `per_token`, and for what `loss_fn` returns: a
            wrong type or shape, other metrics than for the previous chunk, no gradient to the log-prob, a
            gradient to a tensor of its closure (allowed for "none"), an argument changed in place, on CPU
            a value that is not finite (on a GPU, where the check would be a sync, it enters the loss).

    Source: the gradients in the forward follow Liger Kernel (arXiv:2410.10989).

    >>> linear_token_loss(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, 3]), torch.neg).loss
    tensor(1.3863)
    """
    acc = _checks.linear_head(OP, hidden, weight, bias, workspace)
    row_temperature, temperature_number, cap, mask = _checks.logit_rows(
        *(OP, hidden, targets, temperature, softcap, mask),
        vocab=weight.shape[0],
        sharded=process_group is not None,
    )
    if not callable(loss_fn):
        raise TypeError(f"{OP}: loss_fn must be callable; got {type(loss_fn).__name__}")
    _checks.reduction(OP, reduction)
    per_token = _check_per_token(per_token, targets)
    _checks.flag(OP, "with_entropy", with_entropy)
    _checks.flag(OP, "compact_rows", compact_rows)
    if num_rows is not None:
        num_rows = _checks.num_rows(OP, num_rows, mask, targets)
    factor = _checks.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        if reduction == "none":
            raise ValueError(f"{OP}: accumulate_into must be None with reduction='none'")
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, **per_token}
        inputs |= {"temperature": row_temperature, "scale": factor}
        _linear_loss.check_accumulate(OP, accumulate_into, weight, acc, inputs)
    chosen = choose(OP, backend, hidden, weight, bias)
    vocab = _linear_loss.whole_vocab(OP, process_group, hidden, weight)
    _checks.row_values(OP, targets, vocab, mask, row_temperature)
    if reduction == "none" or torch.compiler.is_compiling() or _checks.valueless(hidden):
        rows = (targets, bias, row_temperature, temperature_number, cap, mask)
        options = (num_rows, workspace, chosen, process_group)
        head = rows_of(OP, hidden, weight, *rows, *options, with_entropy=True)[:2]
        if factor is None:
            factor = torch.ones((), dtype=acc, device=hidden.device)
        if reduction == "mean":
            count = targets.numel() if mask is None else mask.sum()
            factor = factor / torch.as_tensor(count, device=hidden.device).clamp(min=1)
        return _after(head, loss_fn, per_token, with_entropy, mask, factor, reduction)
    if chosen == "reference":
        checked = functools.partial(_checked, loss_fn, mask)

        def loss(hidden, weight, bias, _):
            return reference.linear_token_loss(
                hidden,
                weight,
                targets,
                checked,
                per_token=per_token,
                with_entropy=with_entropy,
                bias=bias,
                temperature=temperature_number if row_temperature is None else row_temperature,
                softcap=cap or None,
                mask=mask,
                reduction=reduction,
                scale=1.0 if factor is None else factor,
                num_rows=num_rows,
                workspace=workspace,
            )

        parameters = (hidden, weight, bias, None)
        options = {"into": accumulate_into, "group": process_group}
        return _linear_loss.by_reference(OP, loss, parameters, **options)
    parameters = (hidden, weight, bias)
    wanted = needs(*parameters)
    if not any(wanted):
        accumulate_into = None
    found = {}

    def body(into):
        gemms = gemms_for(hidden, weight)
        per_row = (targets, row_temperature, mask)
        head = Head(gemms, *parameters, *per_row, workspace, num_rows)
        work = _linear_loss.work_of(
            head,
            temperature_number,
            cap,
            chosen,
            wanted,
            into=into,
            apart=True,
            compact=compact_rows,
            group=process_group,
        )
        scale = _linear_loss.scale_of(head, factor, mean=reduction == "mean")
        tokens = _Tokens(work, loss_fn, per_token, with_entropy, scale)
        tokens.run(compact_rows)
        found.update(tokens.of_all_rows(targets.shape))
        total = tokens.loss.sum() * scale
        if work.grads is None:
            return total, [None] * 3
        return total, as_parameters(work.grads.finish(), parameters, _linear_loss.kept_dtype)

    loss = _linear_loss.gradients_in_forward(OP, body, chosen, accumulate_into, *parameters)
    return LinearTokenLossOutput(loss, **found)


def _check_per_token(per_token, targets) -> dict[str, Tensor]:
    if per_token is None:
        return {}
    if not isinstance(per_token, Mapping) or not all(isinstance(name, str) for name in per_token):
        raise TypeError(
            f"{OP}: per_token must be a dict of tensors by name; got {type(per_token).__name__}"
        )
    for name, value in per_token.items():
        _checks.tensor(OP, f"per_token[{name!r}]", value)
        _checks.shape(OP, f"per_token[{name!r}]", value, targets.shape)
        _checks.same_device(OP, f"per_token[{name!r}]", value, targets.device)
        _checks.constants(OP, **{f"per_token[{name!r}]": value})
    return dict(per_token)


def _call(loss_fn, logprob, entropy, per_token) -> tuple[Tensor, dict[str, Tensor]]:
    """Calls the user's function with [n] tensors and checks its result: (loss, metrics)."""
    given = {"logprob": logprob} | ({} if entropy is None else {"entropy": entropy}) | per_token
    before = _writes(given)
    try:
        out = loss_fn(logprob, *(() if entropy is None else (entropy,)), **per_token)
    except (RuntimeError, TypeError) as error:
        error.add_note(
            f"{OP}: loss_fn was called with {logprob.numel()} rows and {', '.join(given)}; tensors of one "
            "number per row reach it through per_token=, cut to the same rows"
        )
        raise
    if changed := [name for name, count in _writes(given).items() if count != before[name]]:
        raise ValueError(f"{OP}: loss_fn must not write into {changed[0]}; it changed it in place")
    loss, metrics = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    expected = "loss_fn must return a tensor [n], or (tensor, dict of tensors)"
    if not isinstance(loss, Tensor) or not isinstance(metrics, Mapping):
        raise TypeError(f"{OP}: {expected}; got {type(out).__name__}")
    if not all(isinstance(x, Tensor) for x in metrics.values()):
        raise TypeError(f"{OP}: {expected}; got a metric that is no tensor")
    if not loss.is_floating_point():
        raise TypeError(f"{OP}: loss_fn must return a float tensor; got {loss.dtype}")
    for name, value in (("", loss), *metrics.items()):
        what = f"metric {name!r} of " if name else ""
        if value.shape != logprob.shape:
            raise ValueError(
                f"{OP}: {what}loss_fn must have shape {tuple(logprob.shape)}, one number per row; "
                f"got {tuple(value.shape)}"
            )
    if logprob.requires_grad and not loss.requires_grad:
        raise ValueError(
            f"{OP}: loss_fn must depend on logprob; its result has no gradient (was it detached, or "
            "computed under no_grad?)"
        )
    return loss.to(logprob.dtype), {name: x.detach() for name, x in metrics.items()}


def _checked(loss_fn, mask, logprob, /, *entropy, **per_token):
    """`_call` on all rows that count, as reference.py calls `loss_fn`, with the checks of `_Tokens`."""
    loss, metrics = _call(loss_fn, logprob, entropy[0] if entropy else None, per_token)
    if logprob.requires_grad:
        _only_rows(loss, [logprob, *entropy])
    if loss.is_cpu and not bool(loss.isfinite().all()):
        _refuse(loss, logprob, None if mask is None else mask.reshape(-1).nonzero().squeeze(1))
    return loss, metrics


def _refuse(loss, logprob, where):
    """`where`: indices of the rows, None or a slice for consecutive ones."""
    first = int((~loss.isfinite()).nonzero()[0])
    row = int(where[first]) if isinstance(where, Tensor) else first + (where.start if where else 0)
    raise ValueError(
        f"{OP}: loss_fn must return finite numbers; got {loss[first].item():g} at row {row}, "
        f"where logprob = {logprob[first].item():g}"
    )


def _writes(tensors: dict[str, Tensor]) -> dict[str, int]:
    """How often each was written to in place, if torch counts it."""
    if torch.compiler.is_compiling():
        return {}
    return {name: x._version for name, x in tensors.items() if not x.is_inference()}


def _only_rows(loss: Tensor, leaves: list[Tensor]) -> None:
    """Refuses a loss that depends on other tensors that require grad: no gradient would reach them."""
    nodes, seen = [loss.grad_fn], {leaf.grad_fn for leaf in leaves}
    variables = [loss] if loss.is_leaf else []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            variables.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    for variable in variables:
        if all(variable is not leaf for leaf in leaves):
            raise ValueError(
                f"{OP}: loss_fn must depend on no tensor that requires grad but its arguments, for "
                f"no gradient would reach it (detach it, or use reduction='none'); got one of shape "
                f"{tuple(variable.shape)}"
            )


def _same_metrics(metrics: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Refuses metrics of a chunk with other names or dtypes, which would leave rows unset or rounded."""
    got, expected = ({name: x.dtype for name, x in each.items()} for each in (metrics, before))
    if got != expected:
        raise ValueError(
            f"{OP}: loss_fn must return the same metrics, in the same dtypes, for every chunk of rows; "
            f"got {got} after {expected}"
        )


class _Tokens:
    """The user's loss, chunk by chunk; collects logprob, entropy, loss and metrics [R] of the rows that count."""

    def __init__(self, work, loss_fn, per_token, with_entropy, scale):
        self.work, self.loss_fn, self.with_entropy, self.scale = (
            work,
            loss_fn,
            with_entropy,
            scale,
        )
        self.head = head = work.head
        self.per_token = {name: head.take(x) for name, x in per_token.items()}
        self.logprob, self.entropy = head.new_rows(), head.new_rows()
        self.loss, self.metrics = head.new_rows(), {}

    def of_all_rows(self, shape: torch.Size) -> dict:
        """The constant outputs, [...] of `shape`."""
        whole = lambda x: self.head.scatter(x).reshape(shape)  # noqa: E731
        return {
            "logprob": whole(self.logprob),
            "entropy": whole(self.entropy) if self.with_entropy else None,
            "metrics": {name: whole(x) for name, x in self.metrics.items()},
        }

    def run(self, compact: bool) -> None:
        head, kernels, grads = self.work
        if not head.rows:  # for the checks and the names of the metrics
            empty = head.new_rows()
            self._of_rows(slice(0, 0), empty, empty, None)
        for chunk in head.chunks(grads):
            given = (chunk.targets, chunk.row_temperature, chunk.mask)
            logprob, entropy, row_stats = kernels.forward(chunk.logits, *given, True)
            self.logprob[chunk.rows], self.entropy[chunk.rows] = logprob, entropy
            g, h = self._of_rows(chunk.rows, logprob, entropy, chunk.mask)
            if grads is None:
                continue
            if compact:
                carries = [x != 0 for x in (g, h) if x is not None]
                chunk.carries = carries[0] if len(carries) == 1 else carries[0] | carries[1]
            kernels.backward(g, h, chunk.logits, *given[:1], row_stats, *given[1:], chunk.dlogits)

    def _of_rows(self, part, logprob, entropy, mask):
        """(dL/dlogprob, dL/dentropy) [n] of the rows `part`; None for 0."""
        trains = self.work.grads is not None
        leaves = [logprob.detach()] + ([entropy.detach()] if self.with_entropy else [])
        per_token = {name: x[part] for name, x in self.per_token.items()}
        with torch.set_grad_enabled(trains):
            leaves = [x.requires_grad_(trains) for x in leaves]
            ours = (leaves[0], leaves[1] if self.with_entropy else None)
            loss, metrics = _call(self.loss_fn, *ours, per_token)
            if loss.is_cpu and not bool(loss.isfinite().all()):
                _refuse(loss, logprob, self.head.where(part))
            if mask is not None:
                loss = loss.masked_fill(~mask, 0.0)
            grad_logprobs = [None, None]
            if trains:
                _only_rows(loss, leaves)
                up = self.scale.expand_as(loss)
                grad_logprobs = list(torch.autograd.grad(loss, leaves, up, allow_unused=True))
                if all(g is None for g in grad_logprobs):  # a Function may return None
                    grad_logprobs[0] = torch.zeros_like(logprob)
                wrong = self.head.wrong
                if wrong is not None:  # a clip would turn the scale's NaN into 0
                    grad_logprobs = [
                        g if g is None else g.masked_fill(wrong, torch.nan) for g in grad_logprobs
                    ]
        self.loss[part] = loss.detach()
        if part.start:
            _same_metrics(metrics, self.metrics)
        for name, value in metrics.items():
            if mask is not None:
                value = value.masked_fill(~mask, 0)
            whole = self.metrics.setdefault(name, value.new_empty(self.loss.shape))
            whole[part] = value
        grad_logprobs = [None if g is None else g.contiguous() for g in grad_logprobs]
        return grad_logprobs[0], grad_logprobs[1] if self.with_entropy else None


def _after(head, loss_fn, per_token, with_entropy, mask, factor, reduction):
    """The loss of `linear_logprob`'s results, on all rows at once."""
    shape = head[0].shape
    logprob, entropy = (x.reshape(-1) for x in head)
    flat = {name: x.reshape(-1) for name, x in per_token.items()}
    loss, metrics = _call(loss_fn, logprob, entropy if with_entropy else None, flat)
    if mask is not None:
        idle = ~mask.reshape(-1)
        loss = loss.masked_fill(idle, 0.0)
        metrics = {name: x.masked_fill(idle, 0) for name, x in metrics.items()}
    loss = loss.reshape(shape) if reduction == "none" else loss.sum()
    return LinearTokenLossOutput(
        loss * factor,
        head[0].detach(),
        head[1].detach() if with_entropy else None,
        {name: x.reshape(shape) for name, x in metrics.items()},
    )


_backend.provide(OP, _backend.kernels(token_logprob.OP), gradient=True)
