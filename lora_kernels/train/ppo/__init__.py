"""PPO: roles, rollouts, the learner and the trainer. Its formulas are in `lora_kernels.train.rl`."""
