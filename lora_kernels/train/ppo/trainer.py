"""PPO (Schulman et al. 2017) on a causal LM with LoRA: policy, reference, value and reward model over one base."""

import dataclasses
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_kernels.backends import backend_option
from lora_kernels.data.chat import set_chat_template
from lora_kernels.data.dataset import digest_of
from lora_kernels.files import append
from lora_kernels.methods import trainable_summary
from lora_kernels.models.generate import stop_tokens
from lora_kernels.train import rl
from lora_kernels.train.activation_checkpointing import enable_checkpointing
from lora_kernels.train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_state,
    saying_what_is_left,
    weights_digest,
)
from lora_kernels.train.config import PPOConfig
from lora_kernels.train.metrics import METRICS, Callback, TensorBoard, read_metrics, truncate_metrics
from lora_kernels.train.output_dir import CONFIG, TEMPLATE
from lora_kernels.train.plots import plot_ppo
from lora_kernels.train.ppo.learner import Learner
from lora_kernels.train.ppo.reward_function import (
    FunctionReward,
    RewardError,
    RewardFunction,
    load_function,
)
from lora_kernels.train.ppo.roles import Roles
from lora_kernels.train.ppo.rollout import Episode, sample
from lora_kernels.train.reward import HEAD, attach_head
from lora_kernels.train.run import PromptRow, Run, start
from lora_kernels.train.steps import StepPlan
from lora_kernels.train.stopping import end_run
from lora_kernels.train.trainer import Trainer

SAMPLES, PLOT = "samples.jsonl", "ppo.png"
_EVALUATION = 1 << 31  # a step that none is, for the random numbers of evaluations


@dataclass
class PPOState:
    """What the run has done so far. episodes: answers learned from; skipped: those left out for a bad reward;
    evaluated: the last step that was evaluated; short: see `StepPlan`."""

    step: int = 0
    evaluated: int = -1
    episodes: int = 0
    tokens: int = 0
    skipped: int = 0
    kl_coef: float = 0.0
    short: int = 0


@dataclass
class PPOResult:
    """What a run did. score and kl are those of the last rollout, None where a resumed run had nothing left to do; the
    eval_scores are the means on the evaluation prompts before and after, None without any."""

    output_dir: Path
    steps: int
    episodes: int
    tokens: int
    trainable_parameters: int
    seconds: float
    score: float | None = None
    kl: float | None = None
    first_eval_score: float | None = None
    eval_score: float | None = None


def run_ppo(
    config: PPOConfig,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    reward: RewardFunction | None = None,
) -> PPOResult:
    """Train the policy that `config` describes on its prompts, and write everything to `config.output_dir`.

    reward: a function in place of the one that `config.reward`, then only recorded, names. `callbacks` get every record
    of metrics.jsonl. What is written: the policy's adapter as plain LoRA, checkpoint-last/, metrics.jsonl,
    samples.jsonl, ppo.png and config.yaml.

    Raises ValueError for bad settings, data or rewards (`RewardError`) and for more than one process, FileExistsError
    where output_dir holds another run, FloatingPointError where the loss is no longer finite. After any of them
    checkpoint-last/ can be resumed.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(f"WORLD_SIZE is {processes}: ppo runs in one process; start it without a launcher")
    if reward is not None and config.reward is None:
        raise ValueError("reward is a function and config.reward None; allowed: a name for it in config.reward")
    judge = None
    if config.reward is not None:
        judge = FunctionReward(reward or load_function(config.reward), skip=config.bad_rewards == "skip")
    run = start(config, progress)
    _set_template(run.tokenizer, config)
    prompts = run.load_prompts(config.data, "data", "max_new_tokens")
    shown = run.load_prompts(config.eval_data, "eval data", "max_new_tokens") if config.eval_data else prompts
    with backend_option(config.backend):
        roles = _roles(run)
        roles.lm.check(torch.tensor(prompts[0].ids))
        if config.gradient_checkpointing:
            enable_checkpointing(run.model)
        return PPOTrainer(run, roles, prompts, shown[: config.eval_prompts], judge, callbacks).run()


def _set_template(tokenizer: Any, config: PPOConfig) -> None:
    """The chat template that the policy's adapter was trained with, else the reward model's; one that was asked for
    stays. The reward model reads what the policy's template makes, so a warning where its own is another one."""
    files = [Path(adapter) / TEMPLATE for adapter in (config.adapter, config.reward_adapter) if adapter]
    found = [file for file in files if file.is_file()]
    if found and not config.chat_template:
        set_chat_template(tokenizer, str(found[0]))
    for file in found:
        if file.read_text(encoding="utf-8") != tokenizer.chat_template:
            warnings.warn(f"{file} is not the chat template in use, and its adapter was trained with it", stacklevel=2)


def _roles(run: Run[PPOConfig]) -> Roles:
    """Put the adapters of all roles into the run's model, their initial values a function of the seed alone."""
    config = run.config
    attach_head(run.model)
    run.adapt()
    value_config = dataclasses.replace(run.method, modules_to_save=[HEAD])
    roles = Roles(run.model, value_config, config.temperature, config.adapter, config.reward_adapter)
    run.model.to(run.accelerator.device)
    return roles


class PPOTrainer(Trainer):
    """The loop of PPO. A step samples, scores, and learns from rollout_size answers.

    What is drawn in a step, sampling and the order of learning, depends on the seed and the step alone, so a resumed
    run continues exactly, and one that failed in a reward can be saved as it was before that step.
    """

    config: PPOConfig

    def __init__(
        self,
        run: Run[PPOConfig],
        roles: Roles,
        prompts: list[PromptRow],
        shown: list[PromptRow],
        reward: FunctionReward | None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        config = run.config
        plan = StepPlan(len(prompts), config.rollout_size, 1, 1, config.epochs, config.max_steps, config.seed)
        super().__init__(plan, config, run.accelerator, callbacks, run.progress)
        self.setup, self.roles, self.reward, self.prompts, self.shown = run, roles, reward, prompts, shown
        self.model, self.device = run.model, run.accelerator.device
        self.stops = stop_tokens(run.model, run.tokenizer) | _stop_token(run.tokenizer, config.stop)
        if not self.stops:
            raise ValueError("the tokenizer has no end token; give one with stop")
        self.parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        # Now, not at the first checkpoint: the files of `adapter` may move while it trains.
        self.run_identity = self._identity()
        self.learner = Learner(roles, config)
        self.optimizer = self.learner.optimizer
        self.state = PPOState(kl_coef=config.kl_coef)
        self.saved: tuple[int, int] | None = None
        self.last: dict[str, float] = {}

    def _identity(self) -> dict[str, Any]:
        """What must agree for a resumed run to continue the same computation."""
        return {
            **self.config.identity,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "batch_size": self.config.batch_size,
            "prompts": len(self.prompts),
            "prompt tokens": sum(len(row.ids) for row in self.prompts),
            "prompt digest": digest_of([[np.array(row.ids, dtype=np.int64)] for row in self.prompts]),
            "reward function": (self.config.reward or "").rpartition(":")[2],
            "reward normalisation": [self.roles.gain, self.roles.bias],
            "digest of the frozen weights": weights_digest(self.model),
        }

    def run(self) -> PPOResult:
        """Train from the last checkpoint, if the configuration says to resume and there is one, to the end."""
        started = time.perf_counter()
        config = self.config
        self.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = find_checkpoint(self.output_dir) if config.resume else None
        if checkpoint:
            self.state, _ = load_state(checkpoint, self.run_identity, PPOState)
            self._prolong()
            load_checkpoint(checkpoint, self.parameters, self.optimizer, self.accelerator)
            self.saved = self.state.step, self.state.evaluated
        last_step = self.state.step if checkpoint else -1
        for name in (METRICS, SAMPLES):
            truncate_metrics(self.output_dir / name, last_step)
        config.save_yaml(self.output_dir / CONFIG)
        self.setup.say(str(trainable_summary(self.model)))
        board = TensorBoard(self.output_dir, first_step=last_step + 1) if config.tensorboard else None
        self.callbacks += [board] if board else []
        with saying_what_is_left(self.output_dir), board or nullcontext(), self.progress, self.stopper:
            self.progress.update(self.state.step)
            try:
                stop = self._evaluate_and_save()
                while not stop and self.state.step < self.plan.total_steps:
                    self._step()
                    stop = self._evaluate_and_save()
            except RewardError:
                # Nothing has been learned since the last step.
                self._checkpoint()
                raise
        if stop:
            end_run(stop, self.output_dir)
        plot_ppo(self.output_dir / METRICS, self.output_dir / PLOT)
        records = read_metrics(self.output_dir / METRICS)
        evaluations: list[Any] = [record["eval_score"] for record in records if "eval_score" in record] or [None]
        return PPOResult(
            output_dir=self.output_dir,
            steps=self.state.step,
            episodes=self.state.episodes,
            tokens=self.state.tokens,
            trainable_parameters=sum(parameter.numel() for parameter in self.parameters.values()),
            seconds=time.perf_counter() - started,
            score=self.last.get("objective/scores"),
            kl=self.last.get("objective/kl"),
            first_eval_score=evaluations[0],
            eval_score=evaluations[-1],
        )

    def _step(self) -> None:
        config, state = self.config, self.state
        clock = [time.perf_counter()]
        rows = [self.prompts[index] for index in self.plan.step_rows(state.step)]
        episodes = self._sample(rows, state.step)
        clock.append(time.perf_counter())
        scores = self._scores(rows, episodes, state.step + 1)
        kept = [index for index, score in enumerate(scores) if math.isfinite(score)]
        if not kept:
            raise RewardError(f"step {state.step + 1}: none of the {len(rows)} answers has a finite reward")
        sampled_tokens = sum(len(row.ids) + len(episode.response) for row, episode in zip(rows, episodes, strict=True))
        rollout = self.learner.rollout(
            [episodes[index] for index in kept], [scores[index] for index in kept], state.kl_coef
        )
        clock.append(time.perf_counter())
        lr = self._set_lr()
        learned = self.learner.learn(rollout, state.step + 1)
        clock.append(time.perf_counter())

        state.step += 1
        state.episodes += len(kept)
        state.skipped += len(rows) - len(kept)
        state.tokens += sampled_tokens
        seconds = dict(zip(("rollout", "score", "update"), np.diff(clock).tolist(), strict=True))
        self._log(
            {
                "step": state.step,
                "episode": state.episodes,
                **rollout.metrics,
                "objective/kl_coef": state.kl_coef,
                **learned,
                "val/empty_responses": sum(not text.strip() for text in self._texts(episodes)),
                "skipped": state.skipped,
                "lr": lr,
                "tokens": state.tokens,
                "tokens_per_second": round(sampled_tokens / sum(seconds.values()), 1),
                **{f"seconds/{name}": round(value, 3) for name, value in seconds.items()},
            }
        )
        self.last = rollout.metrics
        if config.kl_target is not None:
            kl = rollout.metrics["objective/kl"]
            state.kl_coef = rl.adaptive_kl_coef(state.kl_coef, kl, config.kl_target, len(kept), config.kl_horizon)
        self.progress.update(state.step)

    def _evaluate_and_save(self) -> int:
        """What is due after the state's step, or before the first; returns the signal that ends the run here, or 0."""
        state, end = self.state, self.state.step == self.plan.total_steps
        stop, overdue = self.stopper.agreed()
        if not stop and state.evaluated < state.step and (end or state.step % self.eval_steps == 0):
            self._evaluate()
            state.evaluated = state.step
            stop, overdue = self.stopper.agreed()
        if state.step and (stop or end or overdue or state.step % self.save_steps == 0):
            self._checkpoint()
            # A signal may have come while it was written, and after the last one nobody asks again.
            stop = stop or self.stopper.agreed()[0]
        return stop

    def _sample(self, rows: Sequence[PromptRow], step: int) -> list[Episode]:
        """An answer to each prompt; those of like length are sampled together."""
        config = self.config
        generator = torch.Generator(self.device).manual_seed(_seed(config.seed, step))
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        episodes: dict[int, Episode] = {}
        for at in range(0, len(order), config.rollout_batch_size):
            indices = order[at : at + config.rollout_batch_size]
            drawn = sample(
                self.roles.lm,
                [rows[index].ids for index in indices],
                self.stops,
                config.max_new_tokens,
                config.temperature,
                config.top_k,
                config.top_p,
                generator,
            )
            episodes |= zip(indices, drawn, strict=True)
        return [episodes[index] for index in range(len(rows))]

    @torch.no_grad()
    def _scores(self, rows: Sequence[PromptRow], episodes: Sequence[Episode], step: int) -> list[float]:
        """The reward of each answer, NaN for those to leave out."""
        texts = self._texts(episodes)
        if self.reward is not None:
            return self.reward([row.prompt for row in rows], texts, [row.record for row in rows], step)
        with self.roles.reward():
            scores = [
                score for _, batch in self.learner.batches(episodes) for score in self.roles.rewards(batch).tolist()
            ]
        for row, text, score in zip(rows, texts, scores, strict=True):
            if not math.isfinite(score) and self.config.bad_rewards == "error":
                raise RewardError(
                    f"step {step}: the reward model gave {score} for the prompt {row.prompt!r:.200} and the answer "
                    f"{text!r:.200}"
                )
        return scores

    def _texts(self, episodes: Sequence[Episode]) -> list[str]:
        """The answers without what ended them."""
        ids = [episode.response[: -1 if episode.ended else None] for episode in episodes]
        return self.setup.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _evaluate(self) -> None:
        """Samples answers to the evaluation prompts, the same random numbers each time; scores and shows them."""
        if not self.shown:
            return
        started = time.perf_counter()
        step = self.state.step
        episodes = self._sample(self.shown, _EVALUATION)
        scores = self._scores(self.shown, episodes, step)
        finite = [score for score in scores if math.isfinite(score)]
        lines = []
        for row, text, episode, score in zip(self.shown, self._texts(episodes), episodes, scores, strict=True):
            shown = {"step": step, "prompt": row.prompt, "response": text, "ended": episode.ended,
                     "score": score if math.isfinite(score) else None}  # fmt: skip
            lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
        append(self.output_dir / SAMPLES, "".join(lines))
        if finite:
            record = {
                "step": step,
                "eval_score": float(np.mean(finite)),
                "eval_score_std": float(np.std(finite)),
                "eval_response_length": float(np.mean([len(episode.response) for episode in episodes])),
                "eval_ended": float(np.mean([episode.ended for episode in episodes])),
                "eval_seconds": round(time.perf_counter() - started, 3),
            }
            self._log(record)

    def _checkpoint(self) -> None:
        done = self.state.step, self.state.evaluated
        if self.saved == done:
            return
        self.setup.save_adapter(self.model, self.output_dir)
        self._save_state(functools.partial(self.setup.save_adapter, self.model))
        self.saved = done


def _seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def _stop_token(tokenizer: Any, text: str | None) -> set[int]:
    if text is None:
        return set()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"stop {text!r} is {len(ids)} tokens; allowed: one")
    return set(ids)
