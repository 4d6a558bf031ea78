"""The row maths of token_logprob on a chunk of logits, for the ops that make the logits themselves.

Shapes: n rows of a chunk, V vocabulary; fp32, or fp64 for fp64 inputs. `forward` and `backward_` are
one fused pass each on the kernel backends.
"""

import math

import torch
from torch import Tensor


class RowMaths:
    """log-probability, entropy and dlogits of [n, V] logits on one backend."""

    def __init__(self, backend: str, temperature: float, softcap: float):
        self.backend, self.temperature, self.softcap = backend, temperature, softcap
        if backend != "reference":
            prefix = "token_logprob_triton" if backend == "triton" else "token_logprob"
            ops = torch.ops.fastrlhf
            self._fwd, self._bwd_ = getattr(ops, f"{prefix}_fwd"), getattr(ops, f"{prefix}_bwd_")

    def forward(self, logits, targets, row_temperature, mask):
        """(logprob [n], entropy [n], stats [3, n]) of the chunk."""
        if self.backend != "reference":
            return self._fwd(
                logits, targets, row_temperature, self.temperature, self.softcap, mask, False
            )
        z = self._scaled(logits, row_temperature)
        top = z.amax(-1, keepdim=True)
        d = z - top.masked_fill(top == -torch.inf, 0.0)
        e = d.exp()
        total = e.sum(-1)
        log_sum = total.log()
        d = d.masked_fill(d == -torch.inf, 0.0)
        mean = (e * d).sum(-1) / total
        entropy = log_sum - mean
        top = top.squeeze(-1)
        index, wrong = self._index(targets, z.shape[-1], mask)
        logprob = (z.gather(-1, index.unsqueeze(-1)).squeeze(-1) - top) - log_sum
        logprob = logprob.masked_fill(wrong, math.nan)
        if mask is not None:
            logprob, entropy = logprob.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
        return logprob, entropy, torch.stack((top, log_sum, mean))

    def backward_(self, grad_logprob, grad_entropy, logits, targets, stats, row_t, mask):
        """Overwrites the chunk's logits with dL/dlogits; "reference" takes targets None: no column is one."""
        if self.backend != "reference":
            self._bwd_(
                grad_logprob,
                grad_entropy,
                logits,
                targets,
                stats,
                row_t,
                self.temperature,
                self.softcap,
                mask,
            )
            return
        chain = 1.0 / self.temperature
        if row_t is not None:
            chain = (1.0 / row_t).unsqueeze(-1)
        if self.softcap > 0:
            chain = chain * (1.0 - torch.tanh(logits / self.softcap).square())
        top, log_sum, mean = (s.unsqueeze(-1) for s in stats)
        away = self._scaled(logits, row_t) - top
        p = (away - log_sum).exp()
        grad = torch.zeros_like(logits)
        if grad_logprob is not None and targets is None:
            grad.sub_(grad_logprob.unsqueeze(-1) * p)
        elif grad_logprob is not None:
            index, wrong = self._index(targets, p.shape[-1], mask)
            g = grad_logprob.masked_fill(wrong, math.nan).unsqueeze(-1)
            grad.scatter_(-1, index.unsqueeze(-1), g).sub_(g * p)
        if grad_entropy is not None:
            # log p + entropy, without the rounding of log_sum that the whole row would share
            away = away.masked_fill(away == -torch.inf, 0.0)
            grad.sub_(grad_entropy.unsqueeze(-1) * p * (away - mean))
        grad.mul_(chain)
        logits.copy_(grad if mask is None else grad.masked_fill_(~mask.unsqueeze(-1), 0.0))

    @staticmethod
    def _index(targets, vocab, mask):
        """Targets that are safe to gather, and which were outside the vocabulary: those become NaN."""
        index = targets.long() if mask is None else targets.long().masked_fill(~mask, 0)
        wrong = (index < 0) | (index >= vocab)
        return index.masked_fill(wrong, 0), wrong

    def _scaled(self, logits: Tensor, row_temperature: Tensor | None) -> Tensor:
        z = logits
        if self.softcap > 0:
            z = self.softcap * torch.tanh(z / self.softcap)
        if row_temperature is not None:
            return z / row_temperature.unsqueeze(-1)
        return z / self.temperature if self.temperature != 1.0 else z
