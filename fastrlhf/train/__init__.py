"""The trainer: pretraining, SFT, reward model, PPO and PPO-ptx on top of the ops."""
