"""The chunk loop of the heads that know their loss: linear_cross_entropy, linear_ppo_loss, linear_token_loss.

Shapes: N rows, n rows of a chunk, H hidden, V vocabulary. A chunk's logits become log-probs, its log-probs
become dL/dlogprob (the op says how), and these turn the logits into dlogits in place and into dX, dW and db:
three GEMMs, where a loss outside of the head needs the logits again, and four. The gradients are there when
the forward returns; the backward scales them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf.ops import _autograd, _checks, _chunks
from fastrlhf.ops._register import differentiable
from fastrlhf.ops._rows import RowMaths
from fastrlhf.ops.token_logprob import check_target_values

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# (which rows of the N, their log-probs [n], their entropies [n]) -> dL/dlogprob, dL/dentropy [n] or None.
Slopes = Callable[[slice | Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


class LossHead:
    """One call: `run` fills logprob and entropy [N] (0 where masked) and sums the gradients.

    `into` is added to instead of a new dW: chunk by chunk, or with `apart` only in `gradients`, so that
    an error on the way leaves it as it was. `group`: its ranks share out the vocabulary.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        mask: Tensor | None,
        workspace: str,
        backend: str,
        needs: tuple[bool, bool, bool],
        *,
        into: Tensor | None = None,
        apart: bool = False,
        compact: bool = False,
        group=None,
    ):
        self.parameters = hidden, weight, bias
        index = _chunks.counted_rows(mask)
        self.operands = ops = _chunks.Operands(hidden, weight, bias, index)
        self.maths, self.sums = RowMaths(backend, temperature, softcap), None
        self.trains = any(needs)
        self.compact = compact and self.trains and hidden.device.type == "cpu"
        self.grads = _chunks.Gradients(ops, needs, into=into, apart=apart, scattered=self.compact)
        self.targets, self.row_temperature = ops.take(targets), ops.take(row_temperature)
        self.mask = None if index is not None else ops.take(mask)
        self.step = _chunks.chunk_rows(workspace, weight.shape[0], ops.acc, hidden.device)
        self.options = {"dtype": ops.acc, "device": hidden.device}
        if group is not None:
            # torch.distributed: only where it is asked for
            from fastrlhf.ops import _vocab_parallel

            shard, scattered = weight.shape[0], self.compact or index is not None
            self.maths = _vocab_parallel.ShardMaths(backend, temperature, softcap, group, shard)
            self.sums = _vocab_parallel.HiddenSums(self.grads, group, scattered=scattered)
        self.count = targets.numel()
        self.logprob = self.entropy = None

    def run(self, slopes: Slopes) -> None:
        ops, vocab = self.operands, self.parameters[1].shape[0]
        chunks = _chunks.cuts(ops.rows, self.step)
        whole = len(chunks) == 1 and ops.index is None
        if not whole:
            buffer = _chunks.logits_rows(min(self.step, ops.rows), vocab, **self.options)
            self.logprob = torch.zeros(self.count, **self.options)
            self.entropy = torch.zeros_like(self.logprob)
        for rows in chunks:
            start, stop = rows.start, rows.stop
            x, y, t, m = (
                ops.hidden_chunk(start, stop),
                self.targets,
                self.row_temperature,
                self.mask,
            )
            if whole:
                where, logits = rows, ops.logits(x, None)
            else:
                where, logits = ops.where(rows), ops.logits(x, buffer[: stop - start])
                y, t, m = (None if v is None else v[rows] for v in (y, t, m))
            logprob, entropy, stats = self.maths.forward(logits, y, t, m)
            if whole:
                self.logprob, self.entropy = logprob, entropy
            else:
                self.logprob[where], self.entropy[where] = logprob, entropy
            g, h = slopes(where, logprob, entropy)
            if not self.trains or (g is None and h is None):
                continue
            if self.compact:
                kept = _pack(logits, g, h)
                where = torch.arange(start, stop)[kept] if ops.index is None else where[kept]
                logits, x, stats = logits[: len(kept)], x[kept], stats[:, kept]
                y, t, m, g, h = (None if v is None else v[kept] for v in (y, t, m, g, h))
                if not len(kept):
                    continue
            self.maths.backward_(g, h, logits, y, stats, t, m)
            self.grads.add(where, x, logits)
            if self.sums is not None:
                self.sums.start(rows)
        if self.sums is not None:
            self.sums.finish()

    def gradients(self, dtype_of: Callable[[Tensor], torch.dtype]) -> list[Tensor]:
        """(dX, dW, db), None where not needed; dW where it went `into` a tensor, too."""
        return self.grads.finish(*self.parameters, dtype_of)


def _pack(logits: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor:
    """Which rows carry a gradient, in the order in which their logits lie at the front afterwards.

    The logits of a row without one make room for those of a row from behind.
    """
    carries = None
    for slope in (g, h):
        if slope is not None:
            carries = slope != 0 if carries is None else carries | (slope != 0)
    count = int(carries.sum())
    order = torch.arange(len(carries))
    holes = (~carries[:count]).nonzero().squeeze(1)
    movers = carries[count:].nonzero().squeeze(1) + count
    for start in range(0, len(holes), 64):  # the copies on the way stay small
        to, of = holes[start : start + 64], movers[start : start + 64]
        logits.index_copy_(0, to, logits.index_select(0, of))
    order[holes] = movers
    return order[:count]


def kept_dtype(like: Tensor) -> torch.dtype:
    """Of a gradient between forward and backward: that of a sum passes 65504 before it is scaled down."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def fake_gradients(parameters, needs) -> list[Tensor | None]:
    """What a fake returns for `LossHead.gradients`."""
    return [
        like.new_empty(like.shape, dtype=kept_dtype(like)) if need else None
        for like, need in zip(parameters, needs, strict=True)
    ]


def scaled(ctx, grad_loss: Tensor, wanted) -> list[Tensor | None]:
    """The saved gradients times the upstream one, in ctx.dtypes; None where not wanted.

    In place where no later backward will want them: autograd is giving up the graph. (What traces a
    graph passes tensors of a type of its own.) Not at all where the upstream one is known to be 1, which
    a GPU would have to be asked.
    """
    keep = type(grad_loss) is not Tensor or _keeps_graph()
    one = not keep and grad_loss.is_cpu and grad_loss.item() == 1
    out = []
    for saved, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True):
        grad = None
        if want:
            if one:
                grad = saved
            else:
                grad = saved * grad_loss if keep else saved.mul_(grad_loss)
            if grad.dtype != dtype:
                grad = grad.to(dtype)
        out.append(grad)
    return out


def scaling(wrt: tuple[int, ...], first: int = 1) -> dict[str, Callable]:
    """setup and backward of an op whose outputs from `first` on are the gradients of its arguments `wrt`."""

    def setup(ctx, arguments, outputs):
        ctx.dtypes = [None if arguments[i] is None else arguments[i].dtype for i in wrt]
        ctx.save_for_backward(*outputs[first:])  # None where nobody needs it

    def backward(ctx, grad_loss):
        return scaled(ctx, grad_loss, ctx.needs_input_grad[: len(wrt)])

    return {"setup": setup, "backward": backward}


def _run_body(op, body, accumulated, hidden, weight, bias, values):
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, grads = body()
    return loss, *grads, *(None,) * (4 - len(grads))


def _setup(ctx, arguments, outputs):
    ctx.op, _, ctx.accumulated, *parameters = arguments
    ctx.spent = False
    ctx.dtypes = [None if p is None else p.dtype for p in parameters]
    ctx.save_for_backward(*outputs[1:])


def _backward(ctx, grad_loss):
    if torch.is_grad_enabled():
        _autograd.refuse(ctx.op, "; got create_graph=True")
    wanted = list(ctx.needs_input_grad[:-2])
    if ctx.accumulated:
        if ctx.spent:
            raise RuntimeError(
                f"{ctx.op}: with accumulate_into the backward runs once, for dW has been added once; "
                "got a second one (retain_graph=True)"
            )
        grad_loss = _one(ctx.op, grad_loss)
        ctx.spent, wanted[1] = True, False
    return scaled(ctx, grad_loss, wanted)


_with_gradients = differentiable(
    _run_body, op="linear", wrt=(3, 4, 5, 6), setup=_setup, backward=_backward, create_graph=True
)


def gradients_in_forward(op, body, accumulated, hidden, weight, bias, values=None) -> Tensor:
    """The loss that `body` returns, with its gradients [dX, dW, db, ...] of these parameters.

    Eager mode's way where an op cannot go: `body` holds Python functions, or adds to a tensor. With
    `accumulated`, dW has been added where it belongs, times an upstream gradient of 1.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: torch.func transforms (vmap, grad, ...) are not implemented for a Python "
            "token_loss, accumulate_into or process_group; loop over the batch, or use reduction='none' "
            "without accumulate_into"
        )
    return _with_gradients(op, body, accumulated, hidden, weight, bias, values)[0]


def _one(op: str, grad_loss: Tensor) -> Tensor:
    """An upstream gradient that must be 1; on a GPU another one becomes NaN, for asking would wait."""
    if grad_loss.device.type != "cpu":
        return grad_loss.masked_fill(grad_loss != 1, torch.nan)
    if grad_loss.item() != 1:
        raise RuntimeError(
            f"{op}: with accumulate_into the upstream gradient of the loss must be 1, for dW has been "
            f"added already; got {grad_loss.item():g}. Give the factor as scale= instead"
        )
    return grad_loss


def whole_vocab(op: str, group, hidden: Tensor, weight: Tensor) -> int:
    """V, of which `weight` may be this rank's part."""
    if group is None:
        return weight.shape[0]
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: process_group must be None under torch.compile, which cannot trace its collectives: "
            "put the call into a function with @torch.compiler.disable"
        )
    from fastrlhf.ops import _vocab_parallel  # torch.distributed: only where it is asked for

    return _vocab_parallel.check_group(op, group, hidden, weight)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def scale_argument(op: str, scale: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number, or a 0-d tensor, as a 0-d tensor of `dtype` that is a constant."""
    if not isinstance(scale, Tensor):
        return torch.full((), _checks.number(op, "scale", scale), dtype=dtype, device=device)
    _checks.float_tensor(op, "scale", scale)
    _checks.shape(op, "scale", scale, ())
    _checks.same_device(op, "scale", scale, device)
    _checks.constants(op, scale=scale)
    return scale.detach().to(dtype)


def check_accumulate(
    op: str, into: object, weight: Tensor, dtype: torch.dtype, inputs: dict[str, Tensor | None]
) -> None:
    """Refuses what `accumulate_into` could not be added to, before anything is written."""
    name = "accumulate_into"
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: {name} must be None under torch.compile, where dW is planned")
    _checks.tensor(op, name, into)
    _checks.whole_tensor(op, name, into)
    if into.dtype not in (weight.dtype, dtype):
        raise TypeError(f"{op}: {name} must be {dtype} or {weight.dtype}; got {into.dtype}")
    _checks.shape(op, name, into, weight.shape)
    _checks.same_device(op, name, into, weight.device)
    if not into.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous; got strides {into.stride()}")
    if into.requires_grad or not (weight.requires_grad or not torch.is_grad_enabled()):
        who = name if into.requires_grad else "weight"
        expected = "be a constant, as weight.grad is" if into.requires_grad else "require grad"
        raise ValueError(f"{op}: with {name}, {who} must {expected}")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if torch.is_grad_enabled() and hooks and hooks[0].__module__ == "torch.utils.checkpoint":
        raise ValueError(
            f"{op}: {name} must be None under torch.utils.checkpoint(use_reentrant=False), whose second "
            "forward would add dW again"
        )
    first, last = _extent(into)
    for other, value in inputs.items():
        if value is None:
            continue
        low, high = _extent(value)
        if low < last and first < high:
            raise ValueError(f"{op}: {name} must not share memory with {other}; it does")


def check_values(op: str, targets: Tensor, vocab: int, mask: Tensor | None, row_t) -> None:
    """On CPU: targets and temperatures that a kernel would refuse in a later chunk, refused at once."""
    if targets.device.type != "cpu":
        return
    check_target_values(op, targets, vocab, mask)
    if row_t is not None:
        row_t = row_t if mask is None else row_t[mask]
        if not bool((row_t > 0).all()):
            raise ValueError(f"{op}: temperature must be above 0; got {row_t.min():g}")


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    if not x.numel():
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (steps + 1) * x.element_size()
