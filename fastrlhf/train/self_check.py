"""A check of each model at load: what the trainer computes with it equals what transformers computes.

A model that the trainer serves wrongly would train without an error, on wrong numbers. So each model is measured before
it is used, on a small copy of its class (`fastrlhf.integrations._shrink`), in fp32:

- packing: packed rows against each row alone in transformers' eager attention;
- the future: a changed token leaves the output of the tokens before it alone;
- the head: hidden states times head against the model's own logits or score;
- dropout: training mode with dropout off equals evaluation mode;
- the sampler (policies): its log-probs against the training path, beyond the copy's attention windows.

Packing and head are also measured on the model's own weights, with 64 tokens. A class without a small copy is
measured there alone, and the verdict says so.

The verdict on a copy is kept for the process, by class and config. Code of a model folder is measured each time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from fastrlhf.errors import UserError
from fastrlhf.integrations import _self_check as measure
from fastrlhf.integrations import _shrink, attention
from fastrlhf.integrations._self_check import Gap, Outputs
from fastrlhf.train.data import Example, next_token_rows
from fastrlhf.train.heads import TokenLogprobs
from fastrlhf.train.models import Policy, RewardModel
from fastrlhf.train.packing import collate
from fastrlhf.train.sampler import HFSampler

# Prompts that end before, in and beyond the copy's window of 16 tokens while new tokens follow.
_PROMPTS = (13, 4, 21)
_NEW_TOKENS = 6
_RANDOM = re.compile(r"drop|jitter")
_verdicts: dict[tuple, "Verdict"] = {}


@dataclass(frozen=True)
class Verdict:
    """The result of a check: the property that failed and by how much, and what could not be measured and why.

    `differs`: the failure is a difference. Otherwise the model cannot be run, with the check or without it.
    """

    failure: str | None = None
    unchecked: str | None = None
    differs: bool = True


def examine(module: Policy | RewardModel, dtype: torch.dtype) -> Verdict:
    """Measure a model on its device, before it is sharded. Weights, modes and random states are unchanged.

    Args:
        dtype: that the model computes in.
    """
    with measure.measuring(_device(module)), torch.no_grad():
        verdict = _copy_verdict(module)
        return verdict if verdict.failure else _examine_weights(module, dtype, verdict)


def _device(module) -> torch.device:
    return next(module.parameters()).device


def transformer(module: Policy | RewardModel):
    """The transformers model inside."""
    return module.lm if isinstance(module, Policy) else module.model


# ---- the small copy ----


def _copy_verdict(module) -> Verdict:
    lm = transformer(module)
    if type(lm).__module__.startswith("transformers_modules"):  # code of a model folder
        return _examine_copy(module)
    fields = lm.config.to_dict()
    fields = {k: v for k, v in fields.items() if not k.startswith(("fastrlhf_", "_name"))}
    backend = module.backend if isinstance(module, Policy) else None
    key = (type(lm), repr(sorted(fields.items())), _device(module), backend)
    if key not in _verdicts:
        _verdicts[key] = _examine_copy(module)
    return _verdicts[key]


def _examine_copy(module) -> Verdict:
    try:
        small = _shrink.shrunken(transformer(module), attention.NAME).to(_device(module))
        rows = measure.random_rows(measure.COPY_ROWS, small.config, _device(module))
        with measure.eager(small):
            ids = torch.stack([rows[0], rows[0].flip(0)])
            if not torch.isfinite(small(input_ids=ids, use_cache=False).logits).all():
                raise _shrink.CannotShrink("its outputs are not finite")
    except Exception as error:  # a class may fail in any way at sizes that it was not made for
        return Verdict(unchecked=f"no small copy of it could be run ({measure.line(error)})")
    gaps: list[Gap] = []
    try:
        for gap in _copy_gaps(module, small, rows):
            gaps.append(gap)
    except Exception as error:  # the trainer cannot run the class, as on a mask that it edits
        found, reason = measure.failures(gaps), measure.line(error)
        if found is None and isinstance(error, UserError):
            return Verdict(reason, differs=False)
        reason = f"a small copy of it cannot run: {reason}"
        return Verdict("; ".join(filter(None, (found, reason))))
    return Verdict(measure.failures(gaps))


def _copy_gaps(module, small, rows) -> Iterator[Gap]:
    policy = isinstance(module, Policy)
    _raise_dropout(small)
    ours = (Policy(small, module.backend) if policy else RewardModel(small)).eval()
    outputs = _outputs(ours)
    ref = measure.reference(outputs, rows)
    limit = measure.fp32_limit(outputs, ref)
    packing = measure.packing(outputs, ref, limit)
    yield packing
    yield measure.head(outputs, ref, limit)
    if not packing.failed:  # else a changed row changes the next one, whose past it is not
        yield measure.future(outputs, rows, limit)
    still = outputs.packed(rows, rows)
    ours.train()
    # Twice, because dropped layers are few.
    noise = max(float((outputs.packed(rows, rows) - still).abs().max()) for _ in range(2))
    yield Gap(measure.DROPOUT, noise, limit, outputs.unit)
    ours.eval()
    if policy:
        try:
            amount = _sampler_gap(ours)
        except Exception as error:
            raise RuntimeError(f"in the sampler: {measure.line(error)}") from error
        yield Gap(measure.SAMPLER, amount, 2 * limit)


def _raise_dropout(lm) -> None:
    """Make what is random in a model frequent enough to be seen in one pass, if it is on."""
    for owner in (*lm.modules(), *measure.configs(lm)):
        for name, value in list(vars(owner).items()):
            known = _RANDOM.search(name) or isinstance(owner, nn.modules.dropout._DropoutNd)
            if known and isinstance(value, float) and 0 < value < 1:
                setattr(owner, name, 0.9)


def _sampler_gap(policy: Policy) -> float:
    rows = measure.random_rows(_PROMPTS, policy.config, _device(policy), seed=1)
    prompts = [row.tolist() for row in rows]
    tokenizer = SimpleNamespace(eos_token_id=-1)  # no response ends early
    samples = HFSampler(policy, tokenizer).generate(prompts, max_new_tokens=_NEW_TOKENS)
    examples = [
        Example(np.array([*p, *t], dtype=np.int64), len(p))
        for p, t in zip(prompts, samples.tokens, strict=True)
    ]
    batch, positions, targets = next_token_rows(examples, _device(policy))
    trained = policy(batch, positions, TokenLogprobs(targets)).float().cpu()
    return float((torch.from_numpy(np.concatenate(samples.logprobs)) - trained).abs().max())


# ---- the model's own weights ----


def _examine_weights(module, dtype: torch.dtype, copy: Verdict) -> Verdict:
    """The verdict on the model's own weights, after that on its copy.

    The mean difference counts, because single tokens of a 16-bit model may differ by much. The router of a mixture
    of experts may send a token to other experts after a difference of one ulp, so in 16 bits packing is left to the
    copy.
    """
    lm, training = transformer(module), module.training
    outputs = _outputs(module, dtype)
    eps = torch.finfo(dtype).eps
    module.eval()
    try:
        rows = measure.random_rows(measure.WEIGHT_ROWS, lm.config, _device(module))
        try:
            ref = measure.reference(outputs, rows)
        except UserError:
            raise
        except Exception as error:
            reason = f"transformers cannot run it on token ids alone ({measure.line(error)})"
            return Verdict(unchecked="; ".join(filter(None, (copy.unchecked, reason))))
        if not all(torch.isfinite(x).all() for x in ref.own):
            return Verdict("its outputs are not finite: a weight is NaN or infinite", differs=False)
        limit = (256 if eps < 1e-5 else 2) * eps * ref.size
        gaps = [measure.head(outputs, ref, limit, torch.mean)]
        if eps < 1e-5 or not _shrink.has_experts(lm.config):
            gaps.append(measure.packing(outputs, ref, limit, torch.mean))
    except Exception as error:
        return Verdict(measure.line(error))
    finally:
        module.train(training)
    missing = copy.unchecked and f"{copy.unchecked}: the future, dropout and sampler are unchecked"
    return Verdict(measure.failures(gaps), missing)


# ---- the ways to compute an output ----


def _outputs(module, dtype: torch.dtype = torch.float32) -> Outputs:
    lm, kind = transformer(module), _device(module).type

    def alone(compute):
        def run(argument):
            with measure.eager(lm), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                return compute(argument)

        return run

    if isinstance(module, Policy):
        return Outputs(
            packed=lambda rows, predicted: _logprobs(module, rows, predicted),
            alone=alone(lambda row: _logprobs(module, [row], [row])),
            own=alone(
                lambda ids: measure.causal_lm_logprobs(
                    lm(input_ids=ids, use_cache=False).logits, ids
                )
            ),
        )
    return Outputs(
        packed=lambda rows, _: _scores(module, rows),
        alone=alone(lambda row: _scores(module, [row])),
        own=alone(lambda ids: lm(input_ids=ids, use_cache=False).logits.float() + module.bias),
        shared=lambda scores: scores[-1:],
        shorter=0,
        unit="of the score",
    )


def _logprobs(policy: Policy, rows, predicted) -> torch.Tensor:
    examples = [Example(row.cpu().numpy(), 1) for row in rows]
    batch, positions, _ = next_token_rows(examples, rows[0].device)
    targets = torch.cat([row[1:] for row in predicted])
    return policy(batch, positions, TokenLogprobs(targets)).float()


def _scores(model: RewardModel, rows) -> torch.Tensor:
    batch = collate([row.cpu() for row in rows]).to(rows[0].device)
    return model(batch, torch.arange(len(batch.input_ids), device=rows[0].device)).float()
