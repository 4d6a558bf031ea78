"""What the tests of fastrlhf.integrations share: errors against fp64, and a tiny model with its tokenizer."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = "red blue green old new big small cat dog fox sits runs sleeps on by the a mat tree".split()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; pad, end and unknown."""
    vocab = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def config(**changes) -> LlamaConfig:
    """A one-layer Llama over the tokenizer's words."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    fixed = {"vocab_size": len(WORDS) + 3, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **ids, **fixed, **changes})


def causal_lm(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes))


def scorer(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=1))


def sentences(count: int, seed: int = 0, low: int = 3, high: int = 9) -> list[str]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randint(*size, generator=generator)

    lengths = draw(low, high, (count,)).tolist()
    return [" ".join(WORDS[i] for i in draw(0, len(WORDS), (n,)).tolist()) for n in lengths]


def error(values, truth) -> float:
    """Largest absolute error of a tensor against fp64."""
    return (values.detach().double() - truth.detach()).abs().max().item() if truth.numel() else 0.0


def assert_no_worse(ours, theirs, truth) -> None:
    """Our error against fp64 <= 2 x the host's + 2 eps of the dtype at the size of the truth.

    A maximum over few elements is luck: give it some hundred rows.
    """
    assert [x is None for x in ours] == [x is None for x in theirs]
    for place, (mine, host, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        if mine is None:
            continue
        assert mine.dtype == host.dtype
        assert mine.shape == host.shape
        assert mine.isfinite().all() or not host.isfinite().all()
        floor = 2 * torch.finfo(mine.dtype).eps * exact.abs().max().clamp(min=1e-3).item()
        errors = f"output {place}: our error {error(mine, exact):.3g}, the host's "
        errors += f"{error(host, exact):.3g}, floor {floor:.3g}"
        assert error(mine, exact) <= 2 * error(host, exact) + floor, errors


def losses(trainer) -> list[float]:
    """The loss of each logged step of a transformers trainer that has run."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
