"""The linear ops with a weight whose vocabulary rows are split over a process group.

Shapes: N rows, H hidden, V whole vocabulary, W ranks, V/W rows of a shard: rank r holds [r V/W, (r+1) V/W).

Forward: each rank runs the ordinary op on its shard, which gives four numbers per row: row_max, shifted_lse and
shifted_mean of its own softmax, and the log-prob of the target if it lies there. One all-gather of these 16 bytes a
row combines them. Unlike a MAX and a SUM reduction it waits once, and every rank adds up in rank order, so the
results are bitwise identical on all ranks.
Backward: dlogits of the shard follow from the combined row_max and shifted_lse. dW and db are local; dX is summed over
the ranks in fp32, a chunk at a time while the GEMMs of the next chunk run, and rounded once.
"""

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.ops import _agreement, _lse
from fastrlhf.ops._gemms import as_parameters, gemms_for
from fastrlhf.ops._linear import Gradients, Head, add_gradients
from fastrlhf.ops._register import differentiable, unkept, without_autocast
from fastrlhf.ops._rows import RowKernels, TokenLoss, local_targets, whole_rows
from fastrlhf.ops.linear_logprob import FWD


@torch.compiler.disable
def logprob(*arguments):
    """(logprob, entropy, lse, spread) of the checked arguments of linear_logprob_fwd, with the group for `keep`."""
    return _vocab_parallel(*arguments)[:4]


@torch.compiler.disable
def check_group(op: str, group: object, hidden: Tensor, weight: Tensor) -> int:
    """V. That the shards of all ranks have the same size is compared before the op's first collective."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: process_group must be a torch.distributed.ProcessGroup that this rank belongs to "
            f"(of a DeviceMesh: mesh.get_group()); got {type(group).__name__}"
        )
    rows = hidden.shape[:-1].numel()
    dtypes = [_DTYPES.index(x.dtype) for x in (hidden, weight)]
    # On a GPU reading the shapes is a host sync, so each shape is compared once.
    if hidden.device.type == "cpu":
        numbers = (rows, *weight.shape, *dtypes)
        _agreement.before_collectives(
            functools.partial(_same_operands, op, group, weight.device, numbers)
        )
    else:
        _same_operands_once(op, group, weight.device, (0, *weight.shape, *dtypes))
    return weight.shape[0] * group.size()


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _same_operands(op: str, group, device: torch.device, numbers: tuple[int, ...]) -> None:
    every = _agreement.compared(numbers, device, group)
    shards = [v for _, v, *_ in every]
    if len(set(shards)) > 1:
        raise ValueError(
            f"{op}: weight must have V / {group.size()} rows on every rank of process_group "
            f"(pad the vocabulary to a multiple of {group.size()}); got {shards} rows"
        )
    if any(one[:3] != every[0][:3] for one in every):
        raise ValueError(
            f"{op}: hidden must be the same on every rank of process_group; "
            f"got (rows, features) {[(n, h) for n, _, h, *_ in every]}"
        )
    if any(one != every[0] for one in every):
        raise ValueError(
            f"{op}: hidden and weight must have the same dtypes on every rank of process_group; "
            f"got {[(_DTYPES[x], _DTYPES[w]) for *_, x, w in every]}"
        )


_same_operands_once = functools.lru_cache(maxsize=256)(_same_operands)


def _forward(hidden, weight, targets, bias, row_t, class_weight, temperature, softcap, mask, *rest):
    """(logprob, entropy, lse, spread, row_stats) of the whole vocabulary, from this rank's shard of weight and bias."""
    num_rows, workspace, backend, op, with_lse, with_spread, group = rest
    kernels = ShardKernels(backend, temperature, softcap, group, weight.shape[0])
    flat = targets.reshape(-1)
    local, _ = local_targets(targets, kernels.columns)
    c = _lse.class_weights(kernels, weight.shape[0], class_weight)
    arguments = (hidden, weight, local, bias, row_t, c.each, temperature, softcap, mask)
    options = (num_rows, workspace, backend, op, with_spread, with_spread, False)
    logprob, _, own_lse, spread, row_stats, _ = FWD(*arguments, *options)
    flat_mask = None if mask is None else mask.reshape(-1)
    logprob, entropy, row_stats = kernels.over_ranks(logprob.view(-1), row_stats, flat, flat_mask)
    row_temperature = None if row_t is None else row_t.reshape(-1)
    lse = _lse.lse_of(kernels, row_stats, row_temperature, flat_mask)
    if with_spread:
        # Of the shard's own log-probs, whose lse is another.
        own = weight.shape[0] if c.each is None else c.each.sum()
        spread = kernels.whole_sum(spread.view(-1) + own * (own_lse.view(-1) - lse))
    found = (logprob, entropy, lse if with_lse else None, spread if with_spread else None)
    return *(x if x is None else x.view(targets.shape) for x in found), row_stats


def _setup(ctx, arguments, outputs):
    hidden, weight, targets, bias, row_t, class_weight, temperature, softcap, mask, *rest = (
        arguments
    )
    ctx.settings, ctx.op = (temperature, softcap, *rest), arguments[12]
    ctx.save_for_backward(hidden, weight, bias, targets, outputs[4], row_t, class_weight, mask)


def _gather(mine: Tensor, group) -> Tensor:
    """[W, ...]: the tensors of all ranks, in rank order."""
    _agreement.settle()
    return _agreement.gather(mine, group)


@without_autocast
def _gradients(
    hidden, weight, bias, targets, row_stats, row_t, class_weight, mask, upstream, needs, settings
):
    temperature, softcap, num_rows, workspace, backend, *_, group = settings
    gemms = gemms_for(hidden, weight)
    head = Head(gemms, hidden, weight, bias, targets, row_t, mask, workspace, num_rows)
    kernels = ShardKernels(backend, temperature, softcap, group, weight.shape[0])
    grads = Gradients(head, needs, sums=HiddenSums(group))
    c = None
    if upstream[3] is not None:
        c = _lse.class_weights(kernels, head.vocab, class_weight)
    add_gradients(head, kernels, grads, upstream, row_stats, c)
    return as_parameters(grads.finish(), (hidden, weight, bias), lambda like: like.dtype)


def _backward(ctx, *upstream):
    needs = ctx.needs_input_grad[:3]
    grads = _gradients(*ctx.saved_tensors, upstream, needs, ctx.settings)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


_vocab_parallel = differentiable(
    unkept(without_autocast(_forward)),
    op=lambda arguments: arguments[12],
    wrt=(0, 1, 3),
    gives=4,
    setup=_setup,
    backward=_backward,
)


class ShardKernels(RowKernels):
    """`RowKernels` of whole rows, from this rank's columns of their logits; targets are in [0, V)."""

    def __init__(self, backend: str, temperature: float, softcap: float, group, shard: int):
        super().__init__(backend, temperature, softcap)
        self.group, self.shard, self.vocab = group, shard, shard * group.size()
        self.columns = slice(group.rank() * shard, (group.rank() + 1) * shard)

    def forward(self, logits, targets, row_temperature, mask, with_entropy=True):
        local, _ = local_targets(targets, self.columns)
        logprob, _, row_stats = super().forward(logits, local, row_temperature, mask)
        return self.over_ranks(logprob, row_stats, targets, mask)

    def blocks(self, head):
        return None

    def whole_sum(self, sums: Tensor) -> Tensor:
        return _gather(sums, self.group).double().sum(0).to(sums.dtype)

    def over_ranks(self, logprob, row_stats, targets, mask):
        """(logprob [n], entropy [n], row_stats [3, n]) of the whole rows, bitwise identical on all ranks."""
        every = _gather(torch.cat((row_stats, logprob.unsqueeze(0))), self.group)
        logprob, entropy, row_stats = whole_rows(every, targets, self.shard, mask)
        wrong = self._wrong(targets) if mask is None else self._wrong(targets) & mask
        return logprob.masked_fill(wrong, math.nan), entropy, row_stats

    def loss(self, chunk, loss: TokenLoss, logprob, entropy, grad_logprob):
        # The ranks wait for each other between a row's statistics and its loss.
        self.loss_in_parts(chunk, loss, logprob, entropy, grad_logprob)

    def backward(self, grad_logprob, grad_entropy, logits, targets, row_stats, row_t, mask, out):
        local, mine = local_targets(targets, self.columns)
        if grad_logprob is not None:
            grad_logprob = grad_logprob.masked_fill(self._wrong(targets), math.nan)
        upstream, rest = (grad_logprob, grad_entropy), (row_stats, row_t, mask)
        # The row kernel takes column `local` for the target. For a target of another rank that is column 0, whose
        # gradient is computed separately, next to a copy that acts as the target; subtracting would lose digits.
        first = logits[:, :1].repeat(1, 2)
        super().backward(*upstream, first, torch.ones_like(local), *rest, first)
        super().backward(*upstream, logits, local, *rest, out)
        out[:, :1] = torch.where(mine.unsqueeze(1), out[:, :1], first[:, :1].to(out.dtype))

    def _wrong(self, targets):
        """Targets outside [0, V): refused on CPU, NaN on a GPU, where a check would be a host sync."""
        return (targets < 0) | (targets >= self.vocab)


class HiddenSums:
    """Sums dX over the ranks, a chunk at a time while the GEMMs of the next chunk run."""

    def __init__(self, group):
        self.group, self._under_way = group, []

    def start(self, rows: Tensor) -> None:
        """Starts the sum of some rows of dX."""
        self._under_way.append(dist.all_reduce(rows, group=self.group, async_op=True))

    def finish(self, hidden: Tensor, scattered: bool) -> None:
        """Waits for all sums. Scattered rows are complete only here, and are summed at once."""
        if scattered:
            dist.all_reduce(hidden, group=self.group)
        for work in self._under_way:
            work.wait()


# ---- backend="reference" ------------------------------------------------------------------------


class _WholeHead(torch.autograd.Function):
    """All rows of a parameter from its shards. Every rank computes the same gradient of all rows and keeps its own."""

    @staticmethod
    def forward(ctx, shard, group):
        ctx.group = group
        return torch.cat(list(_gather(shard.contiguous(), group)))

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


@torch.compiler.disable
def whole_head(group, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight [V, H] and bias [V] from the shards of all ranks."""
    return _WholeHead.apply(weight, group), None if bias is None else _WholeHead.apply(bias, group)
