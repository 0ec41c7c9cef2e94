"""Training: `run_sft(SFTConfig(...))` from files, `train_sft` for a model and data already built; likewise
`run_reward`, `run_dpo` and `run_ppo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kernels.lazy import exports

if TYPE_CHECKING:
    from lora_kernels.data.dataset import build_dataset, load_dataset
    from lora_kernels.data.pairs import build_pairs, load_pairs
    from lora_kernels.ops.cross_entropy import chunked_cross_entropy, chunked_logprobs
    from lora_kernels.train.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
    from lora_kernels.train.dpo import run_dpo, train_dpo
    from lora_kernels.train.ppo.trainer import PPOResult, run_ppo
    from lora_kernels.train.reward import RewardModel, load_reward_model, run_reward, train_reward
    from lora_kernels.train.run import TrainResult
    from lora_kernels.train.sft import run_sft, train_sft

_HOME = {
    "DPOConfig": "config",
    "PPOConfig": "config",
    "PPOResult": "ppo.trainer",
    "RewardConfig": "config",
    "RewardModel": "reward",
    "SFTConfig": "config",
    "TrainResult": "run",
    "build_dataset": "lora_kernels.data.dataset",
    "build_pairs": "lora_kernels.data.pairs",
    "chunked_cross_entropy": "lora_kernels.ops.cross_entropy",
    "chunked_logprobs": "lora_kernels.ops.cross_entropy",
    "load_dataset": "lora_kernels.data.dataset",
    "load_pairs": "lora_kernels.data.pairs",
    "load_reward_model": "reward",
    "run_dpo": "dpo",
    "run_ppo": "ppo.trainer",
    "run_reward": "reward",
    "run_sft": "sft",
    "train_dpo": "dpo",
    "train_reward": "reward",
    "train_sft": "sft",
}
__all__ = [
    "DPOConfig",
    "PPOConfig",
    "PPOResult",
    "RewardConfig",
    "RewardModel",
    "SFTConfig",
    "TrainResult",
    "build_dataset",
    "build_pairs",
    "chunked_cross_entropy",
    "chunked_logprobs",
    "load_dataset",
    "load_pairs",
    "load_reward_model",
    "run_dpo",
    "run_ppo",
    "run_reward",
    "run_sft",
    "train_dpo",
    "train_reward",
    "train_sft",
]
__getattr__, __dir__ = exports(__name__, _HOME)
