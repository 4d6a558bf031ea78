"""A tokenizer's ids beside the rows of a model: rows without a token, end tokens, and PAD.

Shapes: V rows of the model's vocabulary; S (S <= V) is the tokenizer's highest id + 1; H hidden size.
"""

import copy
from dataclasses import dataclass

import torch

from fastrlhf.errors import UserError

PAD = "<|pad|>"  # the token that a reward model gets if its tokenizer pads with EOS


@dataclass(frozen=True)
class Vocabulary:
    """The ids that have a token: 0 to `size` - 1 without `holes`. All other rows of a model have probability 0.

    Models pad their vocabulary to a multiple of 64 or more, and a tokenizer may skip ids. The weights of such rows
    are arbitrary, so without this they take part in every softmax and the sampler draws them.
    """

    size: int  # S
    holes: tuple[int, ...]  # ids below `size` without a token

    @classmethod
    def of(cls, tokenizer) -> "Vocabulary":
        """The ids of a tokenizer."""
        ids = set(tokenizer.get_vocab().values())
        size = max(ids) + 1
        return cls(size, tuple(sorted(set(range(size)) - ids)))

    def unembedding(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head (weight [V, H], bias [V] or None) without the rows that have no token: ([S, H], [S] or None).

        Padding is cut off: the result is a view, and the gradient of the other rows is 0. Holes stay as rows with a
        bias of -inf, which has probability 0.
        """
        if len(weight) > self.size:
            weight = weight[: self.size]
            bias = None if bias is None else bias[: self.size]
        if self.holes:
            bias = weight.new_zeros(self.size) if bias is None else bias
            bias = bias.index_fill(0, torch.tensor(self.holes, device=bias.device), -torch.inf)
        return weight, bias


def end_tokens(tokenizer, lm) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's EOS, then the others of the model's generation_config."""
    named = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else named or []
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *named]))


def with_pad(tokenizer, model):
    """Give a sequence classifier a PAD that is not EOS; return the tokenizer that pads with it.

    transformers reads the score at the last token that is not PAD. Our sequences end with EOS, so with PAD = EOS it
    would read the token before. A tokenizer that has a PAD of its own is returned as it is. Otherwise a copy gets
    the token PAD, in a padded row of the vocabulary or in one more row. Call it before the model is sharded.

    Raises:
        UserError: the tokenizer gives the new token an id that is taken.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        before = set(tokenizer.get_vocab().values())
        known = tokenizer.get_vocab().get(PAD)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"pad_token": PAD})
        if known is None and tokenizer.pad_token_id in before:
            raise UserError(
                f"tokenizer: PAD must differ from EOS, and the new token {PAD!r} got id "
                f"{tokenizer.pad_token_id}, which has a token; give the tokenizer a PAD token"
            )
    pad = tokenizer.pad_token_id
    if pad >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
        with torch.no_grad():  # the fresh row is random, and would differ between ranks
            model.get_input_embeddings().weight[pad] = 0
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
    return tokenizer
