"""Command-line flags made from the fields of a trainer's config, and what --help says of each."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lora_kernels.train.config import ADAPTER_SETTINGS, TrainConfig

# field of a trainer's config -> (panel, help). A field that is missing here still gets its flag.
FIELD_HELP = {
    "model": ("Model and data", "Directory or hub id of a causal LM, a Llama GGUF file, or smollm2-135m."),
    "data": (
        "Model and data",
        "Training data: .json, .jsonl, .json.gz, .jsonl.gz or .parquet; a file, a directory or a quoted pattern, "
        "several of them with commas or by repeating the flag.",
    ),
    "eval_data": ("Model and data", "Evaluation data, same forms; the adapter with the best loss on it is kept."),
    "output_dir": ("Model and data", "Gets the adapter, checkpoint-last/, metrics.jsonl, loss.png and config.yaml."),
    "chat_template": ("Model and data", "Jinja template, or a file with one, in place of the tokenizer's own."),
    "date": (
        "Model and data",
        "Today's date for chat templates that show it, as YYYY-MM-DD. Default: the day of the start.",
    ),
    "max_length": ("Model and data", "Tokens kept of each example; a longer preference pair is left out."),
    "method": ("Adapter", "lora, qlora (over 4-bit weights), dora, adalora, prefix, prompt (virtual tokens), or full."),
    "adapter": ("Adapter", "Adapter to go on from; r, target and the like are its own, lora_dropout may be another."),
    "double_quant": ("Adapter", "With qlora: quantise the 4-bit blocks' scales too, 4.13 instead of 4.5 bits."),
    "r": ("Adapter", "Rank of LoRA."),
    "lora_alpha": ("Adapter", "scaling = lora_alpha / r."),
    "lora_dropout": (
        "Adapter",
        "Dropout on the input of the low-rank branch. The base model's own acts in sft only.",
    ),
    "target": ("Adapter", "Modules: all-linear (default of lora), all (of full), names with commas, a regex."),
    "exclude_modules": ("Adapter", "Modules of these to leave out: names with commas, or a regex."),
    "use_rslora": ("Adapter", "scaling = lora_alpha / sqrt(r)."),
    "init": ("Adapter", "How adapters start; virtual tokens: vocab (default), text, random, zero (prefix only)."),
    "init_r": ("Adapter", "adalora: rank of each matrix at the start."),
    "target_r": ("Adapter", "adalora: average rank at the end."),
    "tinit": ("Adapter", "adalora: steps before ranks are taken away."),
    "tfinal": ("Adapter", "adalora: steps at the end, with the ranks settled and the tensors cut."),
    "delta_t": ("Adapter", "adalora: steps between two allocations of the ranks."),
    "beta1": ("Adapter", "adalora: of the moving average of importance."),
    "beta2": ("Adapter", "adalora: of the moving average of its uncertainty."),
    "orth_reg_weight": ("Adapter", "adalora: of the orthogonality term in the loss."),
    "num_virtual_tokens": ("Adapter", "Of prefix and prompt."),
    "init_text": ("Adapter", "Text that virtual tokens start as, with --init text."),
    "mlp_hidden": ("Adapter", "Width of the MLP that prefix is trained through; left out: none."),
    "center_coef": ("Reward model", "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0; try 0.01."),
    "normalize_samples": ("Reward model", "After training, scale rewards by so many answers of the base model; 0: no."),
    "normalize_data": ("Reward model", "Data with the prompts of these answers; left out: the training data."),
    "normalize_tokens": ("Reward model", "Longest of these answers, in tokens."),
    "loss": ("DPO", "sigmoid or ipo."),
    "beta": ("DPO", "How strongly the policy is held to the reference; larger is closer."),
    "label_smoothing": ("DPO", "Share of pairs that are taken to be labelled the wrong way round (sigmoid only)."),
    "precompute_ref": ("DPO", "Compute the reference's log-probabilities once, before the first step (the default)."),
    "epochs": ("Optimisation", "Passes over the data; may be fractional."),
    "max_steps": ("Optimisation", "Optimizer steps; decides instead of --epochs where given."),
    "batch_size": ("Optimisation", "Sequences, or preference pairs, per micro-batch and process."),
    "gradient_accumulation_steps": ("Optimisation", "Micro-batches per optimizer step."),
    "optimizer": ("Optimisation", "adamw or loraplus, which trains lora_b with lr * lr_ratio."),
    "lr_ratio": ("Optimisation", "Learning rate of lora_b over that of the rest, for loraplus."),
    "lr": ("Optimisation", "Peak learning rate of AdamW."),
    "lr_scheduler": ("Optimisation", "cosine, linear or constant."),
    "warmup_ratio": ("Optimisation", "Share of the steps over which the learning rate rises."),
    "weight_decay": ("Optimisation", "AdamW weight decay."),
    "max_grad_norm": ("Optimisation", "Clip the gradient to this norm; 0 turns it off."),
    "rollout_size": ("Rollout", "Answers sampled each step."),
    "rollout_batch_size": ("Rollout", "Answers sampled at a time."),
    "max_new_tokens": ("Rollout", "Longest answer, in tokens."),
    "temperature": ("Rollout", "Of the sampling, and of all log-probabilities."),
    "top_k": ("Rollout", "Sample from this many tokens; 0: all. Others than 0 are not what is learned."),
    "top_p": ("Rollout", "Sample from the tokens with this much of the probability; likewise."),
    "stop": ("Rollout", "A further token that ends an answer."),
    "eval_prompts": ("Rollout", "Prompts of --eval-data, or --data, that are answered at each evaluation."),
    "reward_adapter": ("Reward and reference", "Adapter of a reward model; the value model starts from it."),
    "reward": ("Reward and reference", "module:function or file.py:function of (prompts, responses[, records])."),
    "bad_rewards": ("Reward and reference", "error, or skip and count, where a reward is NaN or raises."),
    "missing_eos_penalty": ("Reward and reference", "Taken off the score of an answer that no stop token ended."),
    "kl_coef": ("Reward and reference", "Penalty on the KL divergence from the reference, token by token."),
    "kl_estimator": ("Reward and reference", "k1, k2 or k3."),
    "kl_target": ("Reward and reference", "Adapt --kl-coef towards this KL of an answer."),
    "kl_horizon": ("Reward and reference", "Answers over which it adapts."),
    "score_position": ("Reward and reference", "after the last token (as TRL), or last, at that token."),
    "whiten_rewards": ("Reward and reference", "Scale rewards to a standard deviation of 1."),
    "whiten_advantages": ("PPO", "Shift and scale advantages to mean 0, standard deviation 1."),
    "gamma": ("PPO", "Discount."),
    "lam": ("PPO", "Of generalised advantage estimation."),
    "ppo_epochs": ("PPO", "Passes over each rollout."),
    "minibatches": ("PPO", "Optimizer steps in each pass."),
    "cliprange": ("PPO", "Of the policy's ratio."),
    "cliprange_value": ("PPO", "Of the values."),
    "dual_clip": ("PPO", "Bound of the loss where the advantage is negative; left out: none."),
    "vf_coef": ("PPO", "Weight of the value loss."),
    "target_kl": ("PPO", "Leave a rollout when the policy has moved this far from the one that sampled."),
    "value_lr": ("PPO", "Learning rate of the value model. Default: that of the policy."),
    "seed": ("Optimisation", "Of the initial values, the order of the data, and dropout."),
    "eval_steps": ("Run", "Steps between evaluations; left out: once an epoch."),
    "save_steps": ("Run", "Steps between checkpoints; left out: once an epoch, and after 10 minutes."),
    "logging_steps": ("Run", "Steps between lines of metrics.jsonl."),
    "resume": ("Run", "Continue from checkpoint-last/ exactly where it stopped."),
    "tensorboard": ("Run", "Also write TensorBoard logs."),
    "dtype": ("Hardware", "auto, float32 or bfloat16; auto is bfloat16 where the hardware multiplies it natively."),
    "cuda_graphs": ("Hardware", "Queue the decoder's kernels as CUDA graphs: for small models on a GPU."),
    "gradient_checkpointing": ("Hardware", "Recompute activations in the backward pass: less memory, more time."),
    "fuse_decoder": (
        "Hardware",
        "On CPUs, compute RMSNorm, SwiGLU, rotary embedding and attention by kernels and keep less for backward.",
    ),
    "backend": ("Hardware", "Kernels to use; see lora-kernels doctor."),
}


def flags_of(config_class: type[TrainConfig], **texts: str) -> Callable[..., Any]:
    """Give a function that takes **flags one option for each field of a dataclass; None means not given.

    texts: {field: what it means to this trainer}, in place of the common help.
    """
    hints = typing.get_type_hints(config_class)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        for field in dataclasses.fields(config_class):
            if field.name in config_class.unused:
                continue
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            kind = next((kind for kind in kinds if kind in (bool, int, float, list[str])), str)
            panel, text = FIELD_HELP.get(field.name, ("Other", ""))
            text = texts.get(field.name, text)
            if field.default is dataclasses.MISSING:
                text += " Required, here or in --config."
            elif field.name == "lr":
                text += (
                    f" Default: {', '.join(f'{lr:g} ({name})' for name, lr in config_class.learning_rates.items())}."
                )
            elif (default := ADAPTER_SETTINGS.get(field.name, field.default)) is not None and kind is not bool:
                text += f" Default: {default}."
            flag = f"--{field.name.replace('_', '-')}"
            option = typer.Option(
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                help=text.strip(),
                rich_help_panel=panel,
                show_default=False,
            )
            annotation = Annotated[kind | None, option]
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )

        @functools.wraps(command)
        def wrapped(**kwargs: Any) -> None:
            for name, value in kwargs.items():
                if isinstance(value, list):  # of a flag that may be repeated
                    kwargs[name] = value[0] if len(value) == 1 else value or None
            command(**kwargs)

        wrapped.__signature__ = inspect.Signature(parameters)
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate
