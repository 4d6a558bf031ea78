"""Inputs, eager maths and the check against float64 for the tests of token_loss."""

import torch

from _support import logit_cases as cases
from _support.logit_cases import randn
from _support.tolerance import assert_near
from fastrlhf import token_loss

# Losses; each is a function of (eager log-probabilities of the rows, device).
LOSSES = {
    "cross_entropy": lambda logprob, device: {},
    "policy_gradient": lambda logprob, device: {"advantages": advantages(logprob, device)},
    "clipped": lambda logprob, device: {
        "advantages": advantages(logprob, device),
        "old_logprob": old_logprob(logprob, device),
        "clip": 0.3,
    },
    "dual_clip": lambda logprob, device: {
        "advantages": advantages(logprob, device),
        "old_logprob": old_logprob(logprob, device) - 1.0,
        "dual_clip": 1.5,
        "scale": 0.25,
    },
    "scaled": lambda logprob, device: {
        "old_logprob": old_logprob(logprob, device),
        "scale": torch.tensor(-0.125, device=device),
    },
}


def advantages(logprob, device):
    return randn(*logprob.shape, seed=11, device=device)


def old_logprob(logprob, device):
    return (logprob.detach().float().cpu() + randn(*logprob.shape, seed=12, scale=0.4)).to(device)


def eager(
    logits,
    targets,
    advantages=None,
    *,
    old_logprob=None,
    clip=0.2,
    dual_clip=None,
    temperature=1.0,
    softcap=None,
    mask=None,
    scale=1.0,
):
    """log_softmax, gather and the loss, as a trainer writes them: in fp32, whatever the logits."""
    z = logits.float() if logits.dtype != torch.float64 else logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.unsqueeze(-1)
    logp = torch.log_softmax(z / temperature, dim=-1)
    logprob = logp.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    a = 1.0 if advantages is None else advantages
    if old_logprob is None:
        loss = -a * logprob
    else:
        ratio = torch.exp(logprob - old_logprob)
        loss = torch.max(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
        if dual_clip is not None:
            a = torch.as_tensor(a, device=loss.device)
            loss = torch.where(a < 0, torch.min(loss, -a * dual_clip), loss)
    loss = scale * loss
    if mask is not None:
        loss, logprob = loss * mask, logprob * mask
    return loss, logprob.detach()


def gradient(function, logits, *args, g=None, **kwargs):
    """(loss, logprob, dL/dlogits) for the upstream gradient g of the loss, or of ones."""
    logits = logits.detach().requires_grad_()
    loss, logprob = function(logits, *args, **kwargs)
    g = torch.ones_like(loss) if g is None else g.to(loss.device, loss.dtype)
    return loss.detach(), logprob, torch.autograd.grad(loss, logits, g)[0]


def check_against_truth(backend, logits, targets, kwargs, g=None):
    ours = gradient(token_loss, logits, targets, g=g, backend=backend, **kwargs)
    theirs = gradient(eager, logits, targets, g=g, **kwargs)
    double = cases.to_double(kwargs)
    truth = gradient(eager, logits.cpu().double(), targets.cpu(), g=g, **double)
    # The ratio exp(logprob - old_logprob) passes the rounding of the log-prob on to the loss and gradient of its row.
    rounded = truth
    if "old_logprob" in double:
        off = double["old_logprob"] - 2.0**-24 * truth[1]
        rounded = gradient(
            eager, logits.cpu().double(), targets.cpu(), g=g, **{**double, "old_logprob": off}
        )
    names = ("loss", "logprob", "gradient")
    for what, o, e, t, r in zip(names, ours, theirs, truth, rounded, strict=True):
        assert_near(o, e, t, what, r)
    if backend == "cuda" and ours[1].dtype == torch.float32:
        # And that rounding is an ulp of the log-prob, beside what half an ulp of tanh moves z.
        ulp = torch.finfo(torch.float32).eps * 2 ** truth[1].abs().clamp(min=1.0).log2().floor()
        tanh = (
            2.0**-24
            * (double.get("softcap") or 0.0)
            / torch.as_tensor(double.get("temperature", 1.0))
        )
        assert ((ours[1].cpu().double() - truth[1]).abs() <= ulp + tanh).all()
    return ours
