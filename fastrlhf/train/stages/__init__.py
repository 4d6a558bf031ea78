"""The four stages of the paper, one file each: pretrain, sft, reward, ppo."""
