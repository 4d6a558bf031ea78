"""The stages of training, one file each: pretrain, sft, reward, ppo."""
