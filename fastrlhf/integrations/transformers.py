"""Causal-LM loss of transformers on `token_logprob`: one read of the logits, no fp32 copy of them.

with fastrlhf.integrations.transformers.patch():
    model(input_ids=ids, labels=ids).loss.backward()
"""

import logging
import threading

import torch
from transformers.loss import loss_utils

from fastrlhf.ops.token_logprob import token_logprob

KEY = "ForCausalLM"
_lock = threading.Lock()
_original = None
_log = logging.getLogger(__name__)


class patch:  # lower case: it reads as a function, patch() for good or `with patch():` for a while
    """Replace the causal-LM loss of every transformers model; `unpatch()` restores the very same function.

    Idempotent and thread-safe. Raises RuntimeError where transformers no longer has the function.
    """

    def __init__(self, backend: str = "auto"):
        global _original
        with _lock:
            if KEY not in loss_utils.LOSS_MAPPING:
                raise RuntimeError(
                    f"transformers.loss.loss_utils.LOSS_MAPPING has no {KEY!r}: nothing to patch"
                )
            self.owner = _original is None
            if self.owner:
                _original = loss_utils.LOSS_MAPPING[KEY]
                loss_utils.LOSS_MAPPING[KEY] = _loss_on(backend)
                _log.info("LOSS_MAPPING[%r] runs token_logprob, backend %s", KEY, backend)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.owner:
            unpatch()


def unpatch() -> None:
    """Put transformers' own function back; does nothing where it is in place."""
    global _original
    with _lock:
        if _original is not None:
            loss_utils.LOSS_MAPPING[KEY] = _original
            _original = None


def _loss_on(backend: str):
    def causal_lm_loss(
        logits: torch.Tensor,  # [..., T, V]
        labels: torch.Tensor | None,  # [..., T]
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        if shift_labels is None:
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.to(logits.device)
        kept = targets != ignore_index
        logprob = token_logprob(logits, targets.masked_fill(~kept, 0), mask=kept, backend=backend)
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        return -logprob.sum() / count

    return causal_lm_loss
