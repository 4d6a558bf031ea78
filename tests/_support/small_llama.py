"""A one-layer Llama with random weights, and a tokenizer of one token per word."""

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
    """One token per word, and <pad>, <eos>, <unk>."""
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
    """One layer over the vocabulary of `tokenizer`."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    fixed = {"vocab_size": len(WORDS) + 3, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **ids, **fixed, **changes})


def causal_lm(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes))


def reward_model(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=1))


def sentences(count: int, seed: int = 0, low: int = 3, high: int = 9) -> list[str]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randint(*size, generator=generator)

    lengths = draw(low, high, (count,)).tolist()
    return [" ".join(WORDS[i] for i in draw(0, len(WORDS), (n,)).tolist()) for n in lengths]
