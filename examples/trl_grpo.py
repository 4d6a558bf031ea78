"""TRL's GRPOTrainer with its log-prob head and its loss on fastrlhf's ops: one added line.

    pip install trl==1.16.0
    python examples/trl_grpo.py

The model and its word vocabulary are tiny and random; nothing is downloaded.
"""

import logging
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import fastrlhf.integrations.trl

WORDS = "red blue green old new big small cat dog fox sits runs sleeps on by the a mat tree".split()
words = Tokenizer(
    models.WordLevel(
        {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}, unk_token="<unk>"
    )
)
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words.get_vocab()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )  # fmt: skip
)


def cats(completions, **_):
    """Higher for completions with more occurrences of "cat"."""
    return [text.split().count("cat") / 6 for text in completions]


logging.basicConfig(format="%(message)s")
logging.getLogger("fastrlhf.integrations").setLevel(logging.INFO)
patched = fastrlhf.integrations.trl.patch()  # the added line; `patched.unpatch()` undoes it

with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        max_steps=40, per_device_train_batch_size=16, num_generations=8, max_completion_length=6,
        learning_rate=5e-3, lr_scheduler_type="constant", logging_steps=1, logging_strategy="steps",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=cats,
        args=config,
        train_dataset=Dataset.from_dict(
            {"prompt": ["the big fox", "a small dog by the tree"] * 40}
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print(f"reward {sum(rewards[:3]) / 3:.3f} -> {sum(rewards[-3:]) / 3:.3f}")
for function, count in patched.calls.items():
    print(f"{function}: {count} calls on fastrlhf's op")
