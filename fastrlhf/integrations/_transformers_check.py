"""The self-check of the transformers integration: what a patched model computes equals what transformers computes.

It runs at the first call of each class and config that the patch serves, on a small copy of the class (`_shrink`), in
fp32 on the model's device:

- a model with `attn_implementation="fastrlhf_varlen"`: packed rows against each row alone in eager attention, and a
  changed token leaves the tokens before it alone;
- a call whose logits are lazy: its loss against that of the unpatched model.

The model's own weights are not measured: they may be sharded, and a training loop may count their forwards.
"""

import inspect

import torch

from fastrlhf.errors import UserError
from fastrlhf.integrations import _self_check as measure
from fastrlhf.integrations import _shrink
from fastrlhf.integrations._self_check import Gap, Outputs

LOSS = "the loss differs from that of the unpatched model"
_failures: dict[tuple, str | None] = {}


def check_attention(model, implementation: str, packed: bool, log) -> None:
    """Measure packed attention once for the class and config of a causal LM, or of any model with a head if `packed`.

    The transformer inside a model with a head is called too; it is measured with the model.

    Raises:
        UserError: the packed rows mix, or see the future.
    """
    takes_ids = "input_ids" in inspect.signature(model.forward).parameters
    if model.base_model is not model and takes_ids and (packed or model.can_generate()):
        _once(model, implementation, _attention_gaps, log)


def check_loss(model, suspended, log) -> None:
    """Measure the loss of a call with `labels` once for the model's class and config.

    Args:
        suspended: makes a context in which transformers runs unpatched.

    Raises:
        UserError: the loss differs.
    """
    _once(model, "eager", lambda small, rows: _loss_gaps(small, rows, suspended), log)


def _once(model, implementation: str, gaps, log) -> None:
    kind = _own_class(model)
    if kind.__module__.startswith("transformers_modules"):  # code of a model folder
        key = (id(model), implementation)
    else:
        key = (kind, repr(model.config), implementation)
    if key not in _failures:
        with measure.measuring(model.device):
            _failures[key] = _measure(kind, model.config, implementation, model.device, gaps, log)
    if _failures[key] is not None:
        raise UserError(
            f"fastrlhf.integrations.transformers: {kind.__name__} fails the self-check: "
            f"{_failures[key]} (patch(self_check=False) skips the check)"
        )


def _own_class(model) -> type:
    """The class of a model without FSDP's."""
    return next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))


def _measure(kind, config, implementation, device, gaps, log) -> str | None:
    try:
        with torch.device("meta"):  # the layers of the class, without adapters or shards
            plain = kind._from_config(config)
        small = _shrink.shrunken(plain, implementation).to(device)
        rows = measure.random_rows(measure.COPY_ROWS, small.config, device)
        with torch.no_grad(), measure.eager(small):
            ids = torch.stack([rows[0], rows[0].flip(0)])
            if not torch.isfinite(_hidden(small, input_ids=ids)).all():
                raise _shrink.CannotShrink("its hidden states are not finite")
    except Exception as error:  # a class may fail in any way at sizes that it was not made for
        log.warning(
            "%s: no self-check, because no small copy of it could be run (%s)",
            kind.__name__,
            measure.line(error),
        )
        return None
    try:
        return measure.failures(gaps(small, rows))
    except Exception as error:
        return f"a small copy of it cannot run: {measure.line(error)}"


def _hidden(model, **arguments) -> torch.Tensor:
    return model.base_model(**arguments, use_cache=False).last_hidden_state


@torch.no_grad()
def _attention_gaps(small, rows) -> list[Gap]:
    def packed(rows, _):
        lengths = torch.tensor([len(row) for row in rows])
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(rows[0].device, torch.int32)
        longest = int(lengths.max())
        return _hidden(
            small,
            input_ids=torch.cat(rows)[None],
            position_ids=torch.cat([torch.arange(len(r), device=r.device) for r in rows])[None],
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=longest,
            max_length_k=longest,
        )[0]

    def own(ids):
        with measure.eager(small):
            return _hidden(small, input_ids=ids)

    outputs = Outputs(packed, lambda row: own(row[None])[0], own, shorter=0, unit="")
    ref = measure.reference(outputs, rows)
    limit = measure.fp32_limit(outputs, ref)
    packing = measure.packing(outputs, ref, limit)
    # If rows mix, a changed row changes the next one, whose past it is not.
    return [packing] if packing.failed else [packing, measure.future(outputs, rows, limit)]


@torch.enable_grad()
def _loss_gaps(small, rows, suspended) -> list[Gap]:
    ids = rows[-1][None]
    with suspended():
        own = float(small(input_ids=ids, labels=ids).loss)
    ours = float(small(input_ids=ids, labels=ids).loss)
    return [Gap(LOSS, abs(ours - own), 64 * torch.finfo(torch.float32).eps * max(1.0, abs(own)))]
