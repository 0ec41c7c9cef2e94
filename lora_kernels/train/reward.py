"""Reward models: a causal LM's decoder with LoRA adapters and a scalar head, trained on preference pairs."""

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lora_kernels.backends import backend_option
from lora_kernels.data.chat import Renderer, set_chat_template
from lora_kernels.data.dataset import batches_by_length, collate
from lora_kernels.data.messages import Conversation, Message, asked
from lora_kernels.data.pairs import PairDataset, load_pairs
from lora_kernels.data.records import describe
from lora_kernels.files import write_json
from lora_kernels.io.adapters import load_adapter
from lora_kernels.io.models import load_model
from lora_kernels.io.peft import CONFIG_NAME, read_config
from lora_kernels.methods.modes import eval_mode, train_adapters
from lora_kernels.methods.virtual_tokens import context_length, find_decoder
from lora_kernels.models.generate import generate
from lora_kernels.train.causal_lm import check_context
from lora_kernels.train.config import RewardConfig
from lora_kernels.train.launch import computed_together, make_accelerator, wait_for_everyone
from lora_kernels.train.metrics import Callback
from lora_kernels.train.output_dir import TEMPLATE
from lora_kernels.train.plots import plot_rewards
from lora_kernels.train.rl import pair_sums, reward_loss
from lora_kernels.train.run import Run, TrainResult, start, train

HEAD = "score"
NORMALIZATION, EVALUATION, REWARDS = "reward_normalization.json", "reward_eval.json", "rewards.png"
_TEMPERATURE = 0.7


def attach_head(model: Any, seed: int = 0) -> nn.Module:
    """Gives a causal LM `model.score`, nn.Linear(d, 1) without bias, float32, where transformers' sequence classifiers
    have theirs, so that adapters and head go by the same paths there.

    Values are N(0, 1/√(d + 1)) (Stiennon et al. 2020), a function of the seed alone. Returns the model.
    Raises ValueError if it has such a module already.
    """
    if hasattr(model, HEAD):
        raise ValueError(f"model is a {type(model).__name__}, which has a module {HEAD!r}; allowed: a causal LM")
    # Not the config's hidden_size: OPT-350m projects what comes out of its decoder.
    d = model.get_output_embeddings().weight.shape[1]
    head = skip_init(nn.Linear, d, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        head.weight.normal_(std=1 / math.sqrt(d + 1), generator=torch.Generator().manual_seed(seed))
    model.add_module(HEAD, head.to(model.get_input_embeddings().weight.device))
    return model


def rewards(model: Any, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """What the head of `model` says of the last token of each row: float32 [B], not normalised.

    input_ids [B, T], padded on the right; lengths [B]. The last token is told by the length, so a pad token that is
    also the end token does no harm, and padding is never looked at.
    """
    hidden = find_decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    head = model.get_submodule(HEAD)
    return head(last.to(head.weight.dtype)).squeeze(-1).float()


class RewardModel(nn.Module):
    """A causal LM with adapters and a head, as a function from token ids to a reward, gain * rewards(...) + bias."""

    def __init__(self, model: nn.Module, gain: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.model: Any = model
        self.gain, self.bias = gain, bias

    def score(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """float32 [B] of input_ids [B, T], padded on the right, and lengths [B]; see `rewards`."""
        return self.gain * rewards(self.model, input_ids, lengths) + self.bias

    def score_conversations(
        self, tokenizer: Any, conversations: Sequence[list[Message] | Conversation], batch_size: int = 8
    ) -> Tensor:
        """float32 [n] of chats that end with the answer to judge, rendered as in training; without dropout."""
        rows = _render(tokenizer, conversations)
        scores = torch.empty(len(rows))
        for some in batches_by_length(np.array([len(ids) for ids in rows]), batch_size):
            scores[some] = self.score_rows([rows[index] for index in some])
        return scores

    @torch.no_grad()
    def score_rows(self, rows: Sequence[np.ndarray]) -> Tensor:
        """float32 [n] of token ids, scored in one batch; without dropout."""
        batch = collate([(ids, np.ones(len(ids), dtype=bool)) for ids in rows])
        device = self.model.get_input_embeddings().weight.device
        with eval_mode(self):
            return self.score(batch["input_ids"].to(device), batch["attention_mask"].sum(1).to(device)).cpu()


def _render(
    tokenizer: Any, conversations: Sequence[list[Message] | Conversation], **rendering: Any
) -> list[np.ndarray]:
    """Token ids of chats that end with an answer, as training has them."""
    told = [
        chat if isinstance(chat, Conversation) else asked(chat[:-1], f"conversation {index}", chat[-1]["content"])
        for index, chat in enumerate(conversations)
    ]
    return [np.array(ids, dtype=np.int32) for ids, _ in Renderer(tokenizer, whole=False, **rendering).tokenize(told)]


class RewardLoss(nn.Module):
    """A causal LM with a head, whose forward is the summed `reward_loss` of the pairs of a batch, in one forward.

    Training mode is for the adapters alone, see `train_adapters`: the base model's own dropout would be noise in the
    difference of two rewards.
    """

    def __init__(self, model: nn.Module, center_coef: float = 0.0) -> None:
        super().__init__()
        self.model, self.center_coef = model, center_coef

    def train(self, mode: bool = True) -> "RewardLoss":
        super().train(mode)
        train_adapters(self.model, mode)
        return self

    def forward(self, input_ids: Tensor, lengths: Tensor, margin: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sums over the pairs of a `PairDataset` batch, chosen rows first; the labels are not used."""
        chosen, rejected = rewards(self.model, input_ids, lengths).chunk(2)
        loss = reward_loss(chosen, rejected, margin, self.center_coef)
        return pair_sums(loss, chosen, rejected)


def run_reward(config: RewardConfig, callbacks: Sequence[Callback] = (), progress: bool = True) -> TrainResult:
    """Train a reward model on the pairs of `config.data`, and write everything to `config.output_dir`.

    Beside what every run writes, reward_eval.json and rewards.png tell how the adapter that was saved judges the
    evaluation pairs (without eval_data: the training pairs), and reward_normalization.json holds gain and bias where
    `normalize_samples` asks for them. Processes, callbacks and errors as for `run_sft`.
    """
    run = start(config, progress)
    train_set, eval_set = run.load(load_pairs)
    with backend_option(config.backend):
        samples = sample_chats(run) if config.normalize_samples else []
    attach_head(run.model, config.seed)
    run.adapt(HEAD)
    result = train_reward(run.model, train_set, eval_set, config, callbacks=callbacks, **run.options())
    with backend_option(config.backend):
        _finish(run, eval_set or train_set, samples)
    return result


def train_reward(
    model: nn.Module,
    train_set: PairDataset,
    eval_set: PairDataset | None,
    config: RewardConfig,
    **options: Any,
) -> TrainResult:
    """Train adapters and head of `model`, after `attach_head` and `inject`, on pairs; see `train_sft`."""
    check_context(model, (train_set, eval_set), config)
    return train(RewardLoss(model, config.center_coef), model, train_set, eval_set, config, **options)


def sample_chats(run: Run[RewardConfig]) -> list[np.ndarray]:
    """Token ids of `normalize_samples` chats whose answers the model gives as it is, before anything is injected.

    All processes share the work; what is drawn depends on the seed and the settings alone. A chat that is longer than
    max_length is left out and counted. Raises ValueError where no prompt leaves room for an answer, and where the chats
    are not at least two different ones, whose rewards can't be normalised.
    """
    config, model = run.config, run.model.to(run.accelerator.device)
    source = config.normalize_data or config.data
    prompts = run.load_prompts(source, "normalisation", "normalize_tokens")
    order = np.random.default_rng([config.seed, 1]).permutation(len(prompts))
    chosen = [prompts[i] for i in np.resize(order, config.normalize_samples)]
    batches = batches_by_length(np.array([len(row.ids) for row in chosen]), config.batch_size)
    limit = min(config.max_length, context_length(model) or config.max_length)

    def of_rows(rows: Sequence[int]) -> Tensor:
        torch.manual_seed(config.seed + rows[0])
        questions = [chosen[row].prompt for row in rows]
        answers = generate(
            model, run.tokenizer, questions, config.normalize_tokens, len(rows), temperature=_TEMPERATURE
        )
        chats = [asked(prompt, answer=answer) for prompt, answer in zip(questions, answers, strict=True)]
        found = torch.zeros(len(rows), limit, dtype=torch.int64)
        for row, ids in zip(found, _render(run.tokenizer, chats, **run.rendering), strict=True):
            if len(ids) <= limit:
                # 0 is where there is nothing.
                row[: len(ids)] = torch.from_numpy(ids) + 1
        return found

    found = computed_together(torch.zeros(len(chosen), limit, dtype=torch.int64), batches, of_rows, run.accelerator)
    chats = [(row[row > 0] - 1).int().numpy() for row in found if row.any()]
    left_out = f", {len(chosen) - len(chats)} left out, longer than {limit} tokens" if len(chats) < len(chosen) else ""
    text = f"normalisation: {len(chats)} answers{left_out}"
    if len({ids.tobytes() for ids in chats}) < 2:
        raise ValueError(f"{describe(source)}: normalize_samples needs at least 2 different answers: {text}")
    run.say(text)
    return chats


def _finish(run: Run[RewardConfig], pairs: PairDataset, samples: list[np.ndarray]) -> None:
    """Judge pairs with the adapter in output_dir, which the last step need not have been, and normalise its rewards.

    All processes share the judging; the main one writes.
    """
    config, accelerator, directory = run.config, run.accelerator, Path(run.config.output_dir)
    model = RewardModel(load_adapter(run.model, directory).eval())
    evaluation = evaluate_pairs(model, pairs, config.batch_size, accelerator)
    normalization = _normalization(model, samples, config.batch_size, accelerator) if samples else None
    name = describe(config.eval_data) if config.eval_data else f"{describe(config.data)} (training data)"
    if accelerator.is_main_process:
        write_json(directory / EVALUATION, {"data": name, **evaluation.summary()})
        if normalization:
            write_json(directory / NORMALIZATION, normalization)
        title = ", ".join(Path(part).name for part in name.split(","))
        plot_rewards(evaluation.chosen, evaluation.rejected, evaluation.calibration(), directory / REWARDS, title)
    run.say(f"{name}: {evaluation.describe()}")
    if normalization:
        run.say(f"rewards are normalised as {normalization['gain']:.4g} * reward + {normalization['bias']:.4g}")
    wait_for_everyone(accelerator)


def _normalization(
    model: RewardModel, samples: list[np.ndarray], batch_size: int, accelerator: Accelerator
) -> dict[str, float] | None:
    """Gain and bias that give the rewards of the samples mean 0 and standard deviation 1; None, and a warning, where
    there is no such gain."""
    batches = batches_by_length(np.array([len(ids) for ids in samples]), batch_size)
    scores = computed_together(
        torch.zeros(len(samples)),
        batches,
        lambda rows: model.score_rows([samples[row] for row in rows]),
        accelerator,
    ).double()
    mean, std = scores.mean().item(), scores.std().item()
    if not (math.isfinite(mean) and std > 0):
        warnings.warn(
            f"the rewards are not normalised: those of {len(samples)} samples have mean {mean} and deviation {std}",
            stacklevel=2,
        )
        return None
    return {"gain": 1 / std, "bias": -mean / std, "samples": len(samples), "mean": mean, "std": std}


@dataclass(frozen=True)
class Evaluation:
    """Rewards [n] of the two answers of each pair."""

    chosen: np.ndarray
    rejected: np.ndarray

    def calibration(self, bins: int = 10) -> list[tuple[float, float, int]]:
        """(mean predicted probability, share that was right, pairs) for each of `bins` equal parts of [0.5, 1].

        The prediction is that the answer with the higher reward was chosen, with probability σ(|r_c - r_r|). Parts
        without a pair are left out.
        """
        difference = self.chosen.astype(np.float64) - self.rejected
        predicted = 1 / (1 + np.exp(-np.abs(difference)))
        right = difference > 0
        part = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
        return [
            (float(predicted[part == i].mean()), float(right[part == i].mean()), int((part == i).sum()))
            for i in range(bins)
            if (part == i).any()
        ]

    def summary(self) -> dict[str, float]:
        """accuracy (a tie is wrong), mean margin, loss (without margin and centring) and expected calibration error
        (Guo et al. 2017), and the means of the rewards."""
        difference = self.chosen.astype(np.float64) - self.rejected
        error = sum(count * abs(right - predicted) for predicted, right, count in self.calibration())
        return {
            "pairs": len(difference),
            "accuracy": float((difference > 0).mean()),
            "margin": float(difference.mean()),
            "loss": float(np.logaddexp(0, -difference).mean()),
            "calibration_error": error / len(difference),
            "reward_chosen": float(self.chosen.mean()),
            "reward_rejected": float(self.rejected.mean()),
        }

    def describe(self) -> str:
        values = self.summary()
        return (
            f"accuracy {values['accuracy']:.3f} on {values['pairs']} pairs, mean margin {values['margin']:.3f}, "
            f"loss {values['loss']:.4f}, calibration error {values['calibration_error']:.3f}"
        )


@torch.no_grad()
def evaluate_pairs(
    reward_model: RewardModel, pairs: PairDataset, batch_size: int = 8, accelerator: Accelerator | None = None
) -> Evaluation:
    """Rewards of all pairs, without dropout; on all processes, which share the work."""
    device = reward_model.model.get_input_embeddings().weight.device

    def of_rows(rows: Sequence[int]) -> Tensor:
        batch = pairs.batch(rows)
        found = reward_model.score(batch["input_ids"].to(device), batch["lengths"].to(device))
        return found.view(2, -1).t()

    batches = batches_by_length(pairs.lengths, batch_size)
    with eval_mode(reward_model):
        scores = computed_together(torch.zeros(len(pairs), 2), batches, of_rows, accelerator or make_accelerator())
    return Evaluation(*scores.t().numpy())


def load_reward_model(
    directory: str | os.PathLike,
    model: str | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    double_quant: bool = False,
) -> tuple[RewardModel, Any]:
    """The reward model that `run_reward` or PEFT (task_type SEQ_CLS, one label) saved in `directory`, frozen and in
    eval mode, and its tokenizer, with the chat template that it was trained with.

    model: its base model, by default the one that the adapter names; dtype, quantize, double_quant: see `load_model`.
    Rewards are normalised as reward_normalization.json beside the adapter says, if it is there.
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    base = model or read_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} names no base model; pass model")
    network, tokenizer = load_model(base, dtype, quantize, double_quant)
    load_adapter(attach_head(network), directory, trainable=False)
    set_chat_template(tokenizer, str(directory / TEMPLATE) if (directory / TEMPLATE).is_file() else None)
    return RewardModel(network.eval(), *read_normalization(directory)).requires_grad_(False), tokenizer


def read_normalization(directory: str | os.PathLike) -> tuple[float, float]:
    """Gain and bias of the rewards of the adapter in `directory`: (1, 0) without a reward_normalization.json."""
    path = Path(directory) / NORMALIZATION
    if not path.is_file():
        return 1.0, 0.0
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return float(values["gain"]), float(values["bias"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold numbers gain and bias: {error!r}") from None
