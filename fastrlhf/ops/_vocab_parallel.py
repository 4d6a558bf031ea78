"""The linear ops with a weight whose vocabulary rows are shared out over a process group.

Shapes: N rows, H hidden, V whole vocabulary, W ranks, V/W rows of a shard: rank r holds [r V/W, (r+1) V/W).

Forward: each rank runs the ordinary op on its shard and has four numbers a row: max, log-sum and
mean distance from that max of its own softmax, and the log-prob of the target if it lies there. One
gather of these 16 bytes a row combines them. A gather and not a MAX with a SUM after it, because one collective
waits once, and because every rank then adds up in rank order: all of them hold the same bits.
Backward: dlogits of the shard from the combined max and log-sum; dW and db are local, dX is summed
over the ranks in fp32, a chunk's sum under way while the next chunk's GEMMs run, and rounded once.
"""

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.ops import _chunks
from fastrlhf.ops._gemms import gemms_for
from fastrlhf.ops._linear import Gradients, Head, add_gradients, as_parameters
from fastrlhf.ops._register import differentiable
from fastrlhf.ops._rows import RowKernels, local_targets, whole_rows
from fastrlhf.ops.linear_logprob import FWD
from fastrlhf.ops.token_logprob import check_target_values, run


@torch.compiler.disable
def logprob(op, hidden, weight, targets, bias, row_t, temperature, softcap, mask, *rest):
    """(logprob, entropy) of checked arguments; the last of `rest` is the process group."""
    vocab = check_group(op, rest[-1], hidden, weight)
    if hidden.device.type == "cpu":
        check_target_values(op, targets, vocab, mask)
    arguments = (hidden, weight, targets, bias, row_t, temperature, softcap, mask, *rest)
    return _vocab_parallel(*arguments)[:2]


def check_group(op: str, group: object, hidden: Tensor, weight: Tensor) -> int:
    """V, after every rank has shown that its shard is as large as the others'."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: process_group must be a torch.distributed.ProcessGroup that this rank belongs to "
            f"(of a DeviceMesh: mesh.get_group()); got {type(group).__name__}"
        )
    # On a GPU reading the shapes is a host sync, so a shard's shape is compared once.
    if hidden.device.type == "cpu":
        _same_shapes(op, group, weight.device, (hidden.shape[:-1].numel(), *weight.shape))
    else:
        _same_shapes_once(op, group, weight.device, (0, *weight.shape))
    return weight.shape[0] * group.size()


def _same_shapes(op: str, group, device: torch.device, shape: tuple[int, int, int]) -> None:
    mine = torch.tensor(shape, device=device)
    every = _gather(mine, group).tolist()
    shards = [v for _, v, _ in every]
    if len(set(shards)) > 1:
        raise ValueError(
            f"{op}: weight must have V / {group.size()} rows on every rank of process_group "
            f"(pad the vocabulary to a multiple of {group.size()}); got {shards} rows"
        )
    if any(one != every[0] for one in every):
        raise ValueError(
            f"{op}: hidden must be the same on every rank of process_group; "
            f"got (rows, features) {[(n, h) for n, _, h in every]}"
        )


_same_shapes_once = functools.lru_cache(maxsize=256)(_same_shapes)


def _forward(hidden, weight, targets, bias, row_t, temperature, softcap, mask, *rest):
    """(logprob, entropy), as `linear_logprob`, of a weight and bias shard; and the rows' statistics."""
    num_rows, workspace, backend, group = rest
    kernels = ShardKernels(backend, temperature, softcap, group, weight.shape[0])
    flat = targets.reshape(-1)
    local, _ = local_targets(targets, kernels.columns)
    arguments = (hidden, weight, local, bias, row_t, temperature, softcap, mask)
    logprob, _, stats, _ = run(
        "linear_logprob", FWD, (*arguments, num_rows, workspace, backend, False)
    )
    flat_mask = None if mask is None else mask.reshape(-1)
    logprob, entropy, stats = kernels.over_ranks(logprob.view(-1), stats, flat, flat_mask)
    return logprob.view(targets.shape), entropy.view(targets.shape), stats


def _setup(ctx, arguments, outputs):
    hidden, weight, targets, bias, row_t, temperature, softcap, mask, *rest = arguments
    ctx.settings = temperature, softcap, *rest
    ctx.save_for_backward(hidden, weight, bias, targets, outputs[2], row_t, mask)


def _gather(mine: Tensor, group) -> Tensor:
    """[W, ...]: everyone's tensor, in rank order."""
    every = mine.new_empty((group.size(), *mine.shape))
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    return every


@_chunks.without_autocast
def _gradients(
    grad_logprob,
    grad_entropy,
    saved,
    needs,
    temperature,
    softcap,
    num_rows,
    workspace,
    backend,
    group,
):
    hidden, weight, bias, targets, stats, row_t, mask = saved
    gemms = gemms_for(hidden, weight)
    head = Head(gemms, hidden, weight, bias, targets, row_t, mask, workspace, num_rows)
    kernels = ShardKernels(backend, temperature, softcap, group, weight.shape[0])
    grads = Gradients(head, needs, sums=HiddenSums(group))
    add_gradients(head, kernels, grads, (grad_logprob, grad_entropy), stats)
    return as_parameters(grads.finish(), (hidden, weight, bias), lambda like: like.dtype)


def _backward(ctx, *upstream):
    needs = ctx.needs_input_grad[:3]
    grads = _gradients(*upstream, ctx.saved_tensors, needs, *ctx.settings)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


_vocab_parallel = differentiable(
    _chunks.without_autocast(_forward),
    op="linear_logprob",
    wrt=(0, 1, 3),
    gives=2,
    setup=_setup,
    backward=_backward,
)


class ShardKernels(RowKernels):
    """`RowKernels` of whole rows, from this rank's columns of their logits; targets count in [0, V)."""

    def __init__(self, backend: str, temperature: float, softcap: float, group, shard: int):
        super().__init__(backend, temperature, softcap)
        self.group, self.shard, self.vocab = group, shard, shard * group.size()
        self.columns = slice(group.rank() * shard, (group.rank() + 1) * shard)

    def forward(self, logits, targets, row_temperature, mask, with_entropy=True):
        local, _ = local_targets(targets, self.columns)
        logprob, _, stats = super().forward(logits, local, row_temperature, mask)
        return self.over_ranks(logprob, stats, targets, mask)

    def blocks(self, head):
        return None

    def over_ranks(self, logprob, stats, targets, mask):
        """(logprob [n], entropy [n], stats [3, n]) of the whole rows, the same bits on every rank."""
        every = _gather(torch.cat((stats, logprob.unsqueeze(0))), self.group)
        logprob, entropy, stats = whole_rows(every, targets, self.shard, mask)
        wrong = self._wrong(targets) if mask is None else self._wrong(targets) & mask
        return logprob.masked_fill(wrong, math.nan), entropy, stats

    def loss(self, chunk, loss, logprob, entropy, grad_logprob):
        # The ranks wait for each other between a row's statistics and its loss.
        self.loss_in_parts(chunk, loss, logprob, entropy, grad_logprob)

    def backward(self, grad_logprob, grad_entropy, logits, targets, stats, row_t, mask, out):
        local, mine = local_targets(targets, self.columns)
        if grad_logprob is not None:
            grad_logprob = grad_logprob.masked_fill(self._wrong(targets), math.nan)
        upstream, rest = (grad_logprob, grad_entropy), (stats, row_t, mask)
        # The row kernel takes column `local` for the target. Where the target is another rank's, that is
        # column 0, whose gradient is made apart, beside a copy that is the target: subtracting would lose
        # digits. By the same backend, which alone knows what its statistics are.
        first = logits[:, :1].repeat(1, 2)
        super().backward(*upstream, first, torch.ones_like(local), *rest, first)
        super().backward(*upstream, logits, local, *rest, out)
        out[:, :1] = torch.where(mine.unsqueeze(1), out[:, :1], first[:, :1].to(out.dtype))

    def _wrong(self, targets):
        """On CPU such targets were refused; a GPU cannot tell without a host sync."""
        return (targets < 0) | (targets >= self.vocab)


class HiddenSums:
    """dX summed over the ranks, a chunk's sum under way while the next chunk's GEMMs run."""

    def __init__(self, group):
        self.group, self._under_way = group, []

    def start(self, rows: Tensor) -> None:
        """Rows of dX are there."""
        self._under_way.append(dist.all_reduce(rows, group=self.group, async_op=True))

    def finish(self, hidden: Tensor, scattered: bool) -> None:
        """Of scattered rows nobody knows until the end that they are there."""
        if scattered:
            dist.all_reduce(hidden, group=self.group)
        for work in self._under_way:
            work.wait()
