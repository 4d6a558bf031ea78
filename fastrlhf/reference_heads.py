"""The half of the specification that goes from logits or hidden states to log-probs: see `reference`.

Shapes: N rows, H hidden, V vocabulary; targets, mask and per-row outputs [...]. Bytes are per row, s bytes
a logit. Leaf module: imports torch alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = {"compact": 2**28, "fast": 2**30}  # fp32 logits held at a time


class LinearTokenLossOutput(NamedTuple):
    """`loss` is differentiable; logprob and entropy [...] (or None), metrics {name: [...]} are detached."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]


def upcast(x: Tensor) -> Tensor:
    """fp64 stays; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def token_logprob(
    logits,
    targets,
    *,
    temperature=1.0,
    softcap=None,
    mask=None,
    return_entropy=False,
    inplace_backward=False,
):
    """log softmax(z)[target] with z = softcap * tanh(logits / softcap) / temperature.

    Reads V*s per row, writes 4 (8 with the entropy); the backward reads and writes V*s per row.
    """
    del inplace_backward  # a licence to reuse the logits' memory, which autograd cannot take
    z = upcast(logits)
    targets = targets.long()
    if mask is not None:
        mask = mask.bool()
        z = z.masked_fill(~mask.unsqueeze(-1), 0.0)
        targets = targets.masked_fill(~mask, 0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        z = z / temperature.to(z.dtype).expand(targets.shape).unsqueeze(-1)
    elif temperature != 1.0:
        z = z / temperature
    logp = torch.log_softmax(z, dim=-1)
    logprob = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if mask is not None:
        logprob = logprob.masked_fill(~mask, 0.0)
    if not return_entropy:
        return logprob
    # A logit of -inf has p = 0 and adds nothing; its log p is replaced so that 0 * inf never appears.
    entropy = -(torch.exp(logp) * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    if mask is not None:
        entropy = entropy.masked_fill(~mask, 0.0)
    return logprob, entropy


def linear_logprob(
    hidden,
    weight,
    targets,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    return_entropy=False,
    process_group=None,
    workspace="fast",
):
    """`token_logprob` of hidden @ weight.T + bias, by chunks of rows that the backward recomputes.

    Never holds more than one chunk of fp32 logits; dX and dW are summed in fp32 and rounded once.
    Reads H*s + 4 per row, V*H*s per chunk, writes 4 (8) per row; 2*N*H*V FLOP, 8*N*H*V trained.
    """
    if process_group is not None:
        raise ValueError("process_group: a vocab-sharded weight is not supported; expected None")
    shape, (vocab, width) = targets.shape, weight.shape
    x, w = upcast(hidden).reshape(-1, width), upcast(weight)
    b = None if bias is None else upcast(bias)
    rows = [x, targets.reshape(-1)]
    rows.append(mask.reshape(-1) if mask is not None else None)
    if isinstance(temperature, Tensor):
        rows.append(temperature.expand(shape).reshape(-1))
        temperature = None
    else:
        rows.append(None)

    def chunk_logprob(x, targets, mask, row_temperature, w, b):
        logits = F.linear(x, w, b)
        return token_logprob(
            logits,
            targets,
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap,
            mask=mask,
            return_entropy=return_entropy,
        )

    size = max(1, _CHUNK_BYTES[workspace] // (w.element_size() * vocab))
    outputs = []
    for start in range(0, max(x.shape[0], 1), size):
        chunk = [None if row is None else row[start : start + size] for row in rows]
        if torch.is_grad_enabled():
            out = checkpoint(
                chunk_logprob, *chunk, w, b, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = chunk_logprob(*chunk, w, b)
        outputs.append(out if return_entropy else (out,))
    joined = [torch.cat(parts).reshape(shape) for parts in zip(*outputs, strict=True)]
    return tuple(joined) if return_entropy else joined[0]


def linear_cross_entropy(
    hidden,
    weight,
    targets,
    *,
    bias=None,
    ignore_index=-100,
    reduction="mean",
    temperature=1.0,
    softcap=None,
    process_group=None,
    workspace="fast",
):
    """-`linear_logprob`, 0 at `ignore_index`; "mean" is over the tokens that count (0 if none).

    Bytes and FLOP as `linear_logprob`.
    """
    counted = targets != ignore_index
    loss = -linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=counted,
        process_group=process_group,
        workspace=workspace,
    )
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def linear_token_loss(
    hidden,
    weight,
    targets,
    token_loss,
    *,
    rows=None,
    with_entropy=False,
    bias=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    reduction="mean",
    scale=1.0,
    accumulate_into=None,
    compact_rows=False,
    workspace="fast",
):
    """scale * mean, sum or rows of token_loss(logprob, [entropy,] **rows) -> LinearTokenLossOutput.

    `token_loss` gets [N] tensors of the rows that count. 8*N*H*V FLOP, as `linear_logprob`.
    """
    del accumulate_into, compact_rows  # where dW goes, and what work is saved on the way
    logprob, entropy = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        return_entropy=True,
        workspace=workspace,
    )
    keep = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    leaves = (logprob[keep], entropy[keep]) if with_entropy else (logprob[keep],)
    out = token_loss(*leaves, **{name: x[keep] for name, x in (rows or {}).items()})
    loss, metrics = out if isinstance(out, tuple) else (out, {})

    def spread(x):
        return torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_scatter(keep, x)

    if reduction != "none":
        total = loss.sum()
        loss = total / keep.sum().clamp(min=1) if reduction == "mean" else total
    else:
        loss = spread(loss)
    return LinearTokenLossOutput(
        scale * loss,
        logprob.detach(),
        entropy.detach() if with_entropy else None,
        {name: spread(x.detach()) for name, x in metrics.items()},
    )
