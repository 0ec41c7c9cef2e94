"""The settings of a training run: a dataclass for each trainer, its checks, and its YAML form."""

import dataclasses
import datetime
import hashlib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from lora_kernels.files import replacing
from lora_kernels.methods.registry import METHODS, settings_of

# What the files of an adapter say where a run goes on from one, and the defaults where it doesn't.
ADAPTER_SETTINGS = {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "use_rslora": False, "num_virtual_tokens": 20}
# Settings that may differ when a run resumes: where it reads and writes, how it is watched, how far it goes, and what
# the digests of the data and of the frozen weights stand for.
_NOT_IDENTITY = {
    *("model", "adapter", "reward_adapter", "reward"),
    *("data", "eval_data", "output_dir", "eval_steps", "save_steps", "logging_steps", "resume", "tensorboard"),
    *("backend", "cuda_graphs", "fuse_decoder", "gradient_checkpointing", "chat_template", "max_length", "dtype"),
    *("epochs", "max_steps", "adapter"),
    *("batch_size", "gradient_accumulation_steps", "normalize_samples", "normalize_data", "normalize_tokens"),
    *("bad_rewards", "eval_prompts"),
}
# What settings mean to trainers on preference pairs.
_PAIRS = "Preference pairs: .json, .jsonl, .json.gz, .jsonl.gz or .parquet; several as for sft."
_PAIRS_A_BATCH = (
    "Preference pairs per micro-batch and process; a step sees batch_size * gradient_accumulation_steps * processes."
)
_LONGEST_PAIR = "Longest prompt and answer, in tokens; a pair with a longer one is left out."
REQUIRED: Any = dataclasses.MISSING
_Config = TypeVar("_Config", bound="TrainConfig")


def setting(default: Any, panel: str, text: str, more: str = "") -> Any:
    """A field of a config. `panel` and `text` are its place and help on the command line; docs say `more` besides."""
    return dataclasses.field(default=default, metadata={"panel": panel, "text": text, "more": more})


def settings(config_class: type[_Config]) -> type[_Config]:
    """A dataclass whose fields are settings, with a line of its docstring for each."""
    lines = [config_class.__doc__ or "", ""]
    for name in (field.name for field in dataclasses.fields(config_class) if field.name not in config_class.unused):
        _, text, more = described(config_class, name)
        lines.append(f"{name}: {text} {more}".rstrip())
    config_class.__doc__ = "\n".join(lines)
    return config_class


def described(config_class: "type[TrainConfig]", name: str) -> tuple[str, str, str]:
    """The panel of a setting, its help, and what docs say besides. A trainer may change the default or the help."""
    fields = [vars(each).get("__dataclass_fields__", {}).get(name) for each in config_class.__mro__]
    metadata = next(field.metadata for field in fields if field is not None and field.metadata)
    if name in config_class.texts:
        return metadata["panel"], config_class.texts[name], ""
    return metadata["panel"], metadata["text"], metadata["more"]


def unused_without(methods: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that only methods other than these take."""
    return tuple(settings_of(METHODS) - settings_of(methods))


@settings
@dataclass
class TrainConfig:
    """Settings that all trainers share. The command line and the YAML file use the same names."""

    learning_rates: ClassVar[dict[str, float]] = {name: method.lr for name, method in METHODS.items()}
    unused: ClassVar[tuple[str, ...]] = ()  # settings that a trainer has no use for, and no flag
    texts: ClassVar[dict[str, str]] = {}  # what settings of all trainers mean to this one
    loss_unit: ClassVar[str] = "nats per target token"

    model: str = setting(
        REQUIRED, "Model and data", "Directory or hub id of a causal LM, a Llama GGUF file, or smollm2-135m."
    )
    data: str | list[str] = setting(
        REQUIRED,
        "Model and data",
        "Training data: .json, .jsonl, .json.gz, .jsonl.gz or .parquet; a file, a directory or a quoted pattern, "
        "several of them with commas or by repeating the flag.",
        "See `lora_kernels.data.records` for the files, and `lora_kernels.data.messages` for what they hold.",
    )
    eval_data: str | list[str] | None = setting(
        None, "Model and data", "Evaluation data, same forms; the adapter with the best loss on it is kept."
    )
    output_dir: str = setting(
        "outputs",
        "Model and data",
        "Gets the adapter, checkpoint-last/, metrics.jsonl, loss.png and config.yaml.",
        "With eval_data the adapter is that of the best evaluation. adalora also writes ranks.png.",
    )
    method: str = setting(
        "lora",
        "Adapter",
        "lora, qlora (over 4-bit weights), dora, adalora, prefix, prompt (virtual tokens), or full.",
        "qlora is LoRA with the frozen linear layers in NF4 (Dettmers et al. 2023); a bitsandbytes NF4 checkpoint "
        "stays in NF4 with any method. dora trains a magnitude for each row of the weight (Liu et al. 2024), "
        "adalora distributes the ranks over the modules while they train (Zhang et al. 2023), prefix and prompt "
        "train virtual tokens before each sequence, full the model's own weights.",
    )
    adapter: str | None = setting(
        None,
        "Adapter",
        "Adapter to go on from; r, target and the like are its own, lora_dropout may be another.",
        "LoRA, DoRA, prefix or prompt tuning, from any trainer or PEFT. A setting that contradicts its files, such as "
        "r or num_virtual_tokens, is refused. Only its weights are taken over: the optimizer starts anew.",
    )
    double_quant: bool = setting(
        False,
        "Adapter",
        "With qlora: quantise the 4-bit blocks' scales too, 4.13 instead of 4.5 bits.",
        "See `lora_kernels.quantize_nf4`.",
    )
    r: int | None = setting(None, "Adapter", "Rank of LoRA.")
    lora_alpha: float | None = setting(None, "Adapter", "scaling = lora_alpha / r.")
    lora_dropout: float | None = setting(
        None,
        "Adapter",
        "Dropout on the input of the low-rank branch. Dropout of the base model itself acts in sft only.",
        "The base model's dropout (resid_pdrop, attention_dropout, layerdrop and the like in its config) is off in "
        "DPO, where the policy would differ from its reference before the first step, and in PPO and reward models, "
        "where it would be noise in the rewards.",
    )
    target: str | list[str] | None = setting(
        None,
        "Adapter",
        "Modules: all-linear (default of lora), all (of full), names with commas, a regex.",
        "Names and expressions are of module paths.",
    )
    exclude_modules: str | list[str] | None = setting(
        None,
        "Adapter",
        "Modules of these to leave out: names with commas, or a regex.",
        "As in PEFT; with full, what is inside them too.",
    )
    use_rslora: bool | None = setting(None, "Adapter", "scaling = lora_alpha / sqrt(r).")
    init_r: int = setting(
        12,
        "Adapter",
        "adalora: rank of each matrix at the start.",
        "See `AdaLoRAConfig` for all of adalora's; lora_alpha and lora_dropout are among them.",
    )
    target_r: int = setting(8, "Adapter", "adalora: average rank at the end.")
    tinit: int = setting(0, "Adapter", "adalora: steps before ranks are taken away.")
    tfinal: int = setting(0, "Adapter", "adalora: steps at the end, with the ranks settled and the tensors cut.")
    delta_t: int = setting(1, "Adapter", "adalora: steps between two allocations of the ranks.")
    beta1: float = setting(0.85, "Adapter", "adalora: decay of the moving average of importance.")
    beta2: float = setting(0.85, "Adapter", "adalora: decay of the moving average of its uncertainty.")
    orth_reg_weight: float = setting(0.5, "Adapter", "adalora: weight of the orthogonality term in the loss.")
    init: str | None = setting(
        None,
        "Adapter",
        "How adapters start; virtual tokens: vocab (default), text, random, zero (prefix only).",
        "For LoRA see `FusedLoRALinear`, for virtual tokens `PrefixConfig`.",
    )
    num_virtual_tokens: int | None = setting(None, "Adapter", "Number of virtual tokens, of prefix and prompt.")
    init_text: str | None = setting(
        None,
        "Adapter",
        "Text that virtual tokens start as, with --init text.",
        "Needed with init text, and refused without.",
    )
    mlp_hidden: int | None = setting(
        None, "Adapter", "Width of the MLP that prefix is trained through; left out: none."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Hardware",
        "auto, float32 or bfloat16; auto is bfloat16 where the hardware multiplies it natively.",
        "Of the frozen weights and the activations. Adapters and optimizer state are always float32, and so is "
        "everything with method full.",
    )
    epochs: float = setting(1.0, "Optimisation", "Passes over the data; may be fractional.")
    max_steps: int | None = setting(None, "Optimisation", "Optimizer steps; decides instead of --epochs where given.")
    batch_size: int = setting(
        4,
        "Optimisation",
        "Sequences, or preference pairs, per micro-batch and process.",
        "One optimizer step sees batch_size * gradient_accumulation_steps * processes sequences, and its loss is "
        "the mean over all their answer tokens.",
    )
    gradient_accumulation_steps: int = setting(1, "Optimisation", "Micro-batches per optimizer step.")
    optimizer: Literal["adamw", "loraplus"] = setting(
        "adamw",
        "Optimisation",
        "adamw or loraplus, which trains lora_b with lr * lr_ratio.",
        "See `lora_kernels.optim.LoRAPlusAdamW`.",
    )
    lr_ratio: float = setting(
        16.0, "Optimisation", "Learning rate of lora_b over that of the rest, for loraplus.", "No effect on adamw."
    )
    lr: float | None = setting(None, "Optimisation", "Peak learning rate of AdamW.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "Optimisation", "cosine, linear or constant."
    )
    warmup_ratio: float = setting(0.03, "Optimisation", "Share of the steps over which the learning rate rises.")
    weight_decay: float = setting(0.0, "Optimisation", "AdamW weight decay.")
    max_grad_norm: float = setting(1.0, "Optimisation", "Clip the gradient to this norm; 0 turns it off.")
    max_length: int = setting(1024, "Model and data", "Tokens kept of each example, from its start.")
    seed: int = setting(0, "Optimisation", "Seed of the adapters' initial values, the order of the data, and dropout.")
    eval_steps: int | None = setting(
        None, "Run", "Steps between evaluations; left out: once an epoch.", "Also at the end."
    )
    save_steps: int | None = setting(
        None,
        "Run",
        "Steps between checkpoints; left out: once an epoch, and after 10 minutes.",
        "Also at the end. A signal (SIGINT, SIGTERM, SIGHUP) ends a run after the step that it is at and a checkpoint.",
    )
    logging_steps: int = setting(1, "Run", "Steps between lines of metrics.jsonl.")
    gradient_checkpointing: bool = setting(
        False, "Hardware", "Recompute activations in the backward pass: less memory, more time."
    )
    fuse_decoder: bool = setting(
        True,
        "Hardware",
        "On CPUs, compute RMSNorm, SwiGLU, rotary embedding and attention by kernels and keep less for backward.",
        "See `lora_kernels.models.fuse`; the results are the same up to rounding.",
    )
    resume: bool = setting(
        False,
        "Run",
        "Continue from checkpoint-last/ exactly where it stopped.",
        "Model, data and adapters may have moved; epochs and max_steps may ask for other steps than before, at "
        "least as many as are done (not with adalora, whose ranks follow them): the learning rate then follows "
        "the new number of steps from there on.",
    )
    tensorboard: bool = setting(False, "Run", "Also write TensorBoard logs.")
    backend: str = setting(
        "auto", "Hardware", "Kernels to use; see lora-kernels doctor.", "See `lora_kernels.use_backend`."
    )
    chat_template: str | None = setting(
        None, "Model and data", "Jinja template, or a file with one, in place of the tokenizer's own."
    )
    date: str | None = setting(
        None,
        "Model and data",
        "Today's date for chat templates that show it, as YYYY-MM-DD. Default: the day of the start.",
        "A run that is resumed later keeps it.",
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, _convert(field.name, getattr(self, field.name), hints[field.name]))
        self._check_choice("method", tuple(self.learning_rates))
        for name, hint in hints.items():
            if typing.get_origin(hint) is Literal:
                self._check_choice(name, typing.get_args(hint))
        self._resolve_method()
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in ("r", "num_virtual_tokens", "max_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, ">= 1 or left out")
        self._check("max_length", self.max_length >= 2, ">= 2")
        self._check("epochs", 0 < self.epochs < math.inf, "finite and > 0")
        self._check("lr", self.peak_lr > 0, "> 0")
        self._check(
            "optimizer",
            self.optimizer != "loraplus" or METHODS[self.method].has_lora_b,
            f"adamw with method {self.method}, which has no lora_b",
        )
        self._check("lr_ratio", 1 <= self.lr_ratio < math.inf, "finite and >= 1")
        self._check("lora_dropout", self.lora_dropout is None or 0 <= self.lora_dropout < 1, "in [0, 1)")
        self._check("warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        self._check("weight_decay", self.weight_decay >= 0, ">= 0")
        self._check("max_grad_norm", self.max_grad_norm >= 0, ">= 0 (0 turns clipping off)")
        self._check("seed", self.seed >= 0, ">= 0")
        self._check("date", self.date is None or _is_date(self.date), "a date as YYYY-MM-DD or left out")
        for field in dataclasses.fields(self):
            defaults = (field.default, ADAPTER_SETTINGS.get(field.name))
            given = field.name in self.unused and getattr(self, field.name) not in defaults
            self._check(field.name, not given, f"left out, since {type(self).__name__} has no use for it")
        self._check_own()

    def _check_own(self) -> None:
        """The checks of a trainer's own fields."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must have in common with the one it continues."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_IDENTITY}
        if self.adapter is not None:
            # Of its tensors, wherever they lie now.
            digest = hashlib.sha256()
            with (Path(self.adapter) / "adapter_model.safetensors").open("rb") as tensors:
                while part := tensors.read(1 << 20):
                    digest.update(part)
            values["adapter digest"] = digest.hexdigest()
        return values

    @property
    def describes_adapter(self) -> bool:
        """Whether r, target and the like are those of an adapter that the run makes, and not said by files."""
        return self.adapter is None

    @property
    def peak_lr(self) -> float:
        """`lr`, where it is left out the method's."""
        return self.learning_rates[self.method] if self.lr is None else self.lr

    def _resolve_method(self) -> None:
        """Fill in what depends on the method, and refuse what it has no use for."""
        method = METHODS[self.method]
        for name in sorted(settings_of(METHODS) - {*method.settings, *ADAPTER_SETTINGS}):
            default = getattr(TrainConfig, name)
            self._check(name, getattr(self, name) == default, f"left out with method {self.method}")
        for name in method.refuses:
            self._check(name, not getattr(self, name), f"left out with method {self.method}")
        self.lr = self.peak_lr
        if self.adapter is not None:
            continued = ", ".join(name for name, each in METHODS.items() if each.described)
            self._check("method", bool(method.described), f"one of {continued} with adapter")
        if self.describes_adapter:
            for name, default in {**ADAPTER_SETTINGS, **method.defaults}.items():
                setattr(self, name, default if getattr(self, name) is None else getattr(self, name))
        else:
            # As the config.yaml of the run that made it says.
            self.init = None if self.init == method.defaults["init"] else self.init
            for name in ("init", "init_text", "mlp_hidden"):
                allowed = "left out, or null in a file, with adapter, whose values are the start"
                self._check(name, getattr(self, name) is None, allowed)
        if method.dtype is not None:
            allowed = f"{method.dtype} with method {self.method}, whose updates fewer bits would round away"
            self._check("dtype", self.dtype in ("auto", method.dtype), allowed)
            self.dtype = method.dtype

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        self._check(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any], source: str = "config") -> _Config:
        """Build from a mapping; ValueError names an unknown or a missing field and `source`."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"{source}: unknown field {', '.join(map(repr, unknown))}; allowed: {', '.join(names)}")
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ValueError(f"{source}: missing field {', '.join(map(repr, missing))}")
        return cls(**values)

    @classmethod
    def from_yaml(cls: type[_Config], path: str | os.PathLike, **overrides: Any) -> _Config:
        """Read a YAML mapping of field names to values; `overrides` win over the file."""
        return cls.from_dict({**read_yaml(path), **overrides}, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save_yaml(self, path: str | os.PathLike) -> None:
        """Write every field, defaults too."""
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


@settings
@dataclass
class SFTConfig(TrainConfig):
    """Settings of `run_sft`."""

    output_dir: str = "outputs/sft"
    cuda_graphs: bool = setting(
        False,
        "Hardware",
        "Queue the decoder's kernels as CUDA graphs: for small models on a GPU.",
        "See `lora_kernels.train.graphs.DecoderGraphs`. It takes memory for the graphs, and is for lora, qlora, "
        "dora and full without accumulation or gradient checkpointing. A run that is resumed is the same up to "
        "rounding.",
    )

    def _check_own(self) -> None:
        if self.cuda_graphs:
            allowed = ", ".join(name for name, method in METHODS.items() if method.graphed)
            self._check("method", METHODS[self.method].graphed, f"one of {allowed} with cuda_graphs")
            self._check("gradient_accumulation_steps", self.gradient_accumulation_steps == 1, "1 with cuda_graphs")
            self._check("gradient_checkpointing", not self.gradient_checkpointing, "left out with cuda_graphs")


@settings
@dataclass
class RewardConfig(TrainConfig):
    """Settings of `run_reward`."""

    learning_rates: ClassVar[dict[str, float]] = {"dora": 1e-4, "lora": 1e-4, "qlora": 1e-4}
    unused: ClassVar[tuple[str, ...]] = unused_without(learning_rates)
    texts: ClassVar[dict[str, str]] = {
        "data": _PAIRS,
        "batch_size": _PAIRS_A_BATCH,
        "max_length": _LONGEST_PAIR,
        "method": "lora, qlora (over 4-bit weights) or dora, whose adapters have a place for the head.",
    }
    loss_unit: ClassVar[str] = "nats per pair"

    output_dir: str = "outputs/reward"
    center_coef: float = setting(
        0.0,
        "Reward model",
        "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0; try 0.01.",
        "See `reward_loss`.",
    )
    normalize_samples: int = setting(
        0,
        "Reward model",
        "After training, scale rewards by so many answers of the base model; 0: no.",
        "They give the gain and the bias with which rewards have mean 0 and standard deviation 1, and are sampled "
        "before training.",
    )
    normalize_data: str | list[str] | None = setting(
        None,
        "Reward model",
        "Data with the prompts of these answers; left out: the training data.",
        "A prompt that leaves no room in max_length for normalize_tokens is left out.",
    )
    normalize_tokens: int = setting(64, "Reward model", "Longest of these answers, in tokens.")

    def _check_own(self) -> None:
        self._check("center_coef", 0 <= self.center_coef < math.inf, "finite and >= 0")
        self._check("normalize_samples", self.normalize_samples == 0 or self.normalize_samples >= 2, "0 or >= 2")
        given = self.normalize_samples > 0
        self._check("normalize_data", given or self.normalize_data is None, "left out with normalize_samples 0")
        self._check("normalize_tokens", self.normalize_tokens >= 1, ">= 1")
        fits = not given or self.normalize_tokens < self.max_length
        self._check("normalize_tokens", fits, f"< max_length ({self.max_length})")


@settings
@dataclass
class DPOConfig(TrainConfig):
    """Settings of `run_dpo`."""

    learning_rates: ClassVar[dict[str, float]] = {name: method.lr / 10 for name, method in METHODS.items()}
    texts: ClassVar[dict[str, str]] = {
        "data": _PAIRS,
        "batch_size": _PAIRS_A_BATCH,
        "max_length": _LONGEST_PAIR,
        "adapter": "Adapter to start from, and the reference. r and the like are its own; the optimizer starts anew.",
    }
    loss_unit: ClassVar[str] = "nats per pair"

    output_dir: str = "outputs/dpo"
    loss: Literal["sigmoid", "ipo"] = setting(
        "sigmoid", "DPO", "sigmoid or ipo.", "See `dpo_loss` for this, beta and label_smoothing."
    )
    beta: float = setting(0.1, "DPO", "How strongly the policy is held to the reference; larger is closer.")
    label_smoothing: float = setting(
        0.0, "DPO", "Share of pairs that are taken to be labelled the wrong way round (sigmoid only)."
    )
    precompute_ref: bool = setting(
        True,
        "DPO",
        "Compute the reference's log-probabilities once, before the first step (the default).",
        "Else with each batch. The reference is the model without adapters, or as `adapter` was. So method full, "
        "which has no adapters to turn off, needs it, and so does an adapter of prefix or prompt, beside which "
        "there is no place for another.",
    )

    def _check_own(self) -> None:
        self._check("beta", 0 < self.beta < math.inf, "finite and > 0")
        self._check("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        self._check("label_smoothing", self.loss == "sigmoid" or not self.label_smoothing, "0 with loss ipo")
        self._check(
            "precompute_ref",
            self.precompute_ref or METHODS[self.method].keeps_base,
            f"true with method {self.method}, which has no adapters to turn off: its own start is the reference",
        )
        self._check(
            "precompute_ref",
            self.precompute_ref or self.adapter is None or METHODS[self.method].named,
            f"true with adapter and method {self.method}, of which a model holds no second one",
        )


@settings
@dataclass
class PPOConfig(TrainConfig):
    """Settings of `run_ppo`, where a step is one rollout and what is learned from it."""

    learning_rates: ClassVar[dict[str, float]] = {"lora": 5e-5, "qlora": 5e-5}
    texts: ClassVar[dict[str, str]] = {
        "data": "Prompts: .txt, one a line, or training records, whose answers are ignored; several as for sft.",
        "eval_data": "Prompts to answer and score before, during and after training, same forms.",
        "output_dir": "Gets the adapter, checkpoint-last/, metrics.jsonl, samples.jsonl, ppo.png and config.yaml.",
        "max_length": "Longest prompt and its answer, in tokens; longer prompts are left out and counted.",
        "method": "lora, or qlora (over 4-bit weights).",
        "adapter": "Adapter to start from; its frozen copy is the reference. r and the like are the value model's.",
        "epochs": "Passes over the prompts; may be fractional.",
        "max_steps": "Rollouts; decides instead of --epochs where given.",
        "batch_size": "Answers in a micro-batch.",
        "eval_steps": "Rollouts between evaluations; left out: once an epoch.",
        "save_steps": "Rollouts between checkpoints; left out: once an epoch, and after 10 minutes.",
    }
    # Dropout would have the policy that learns be another one than the one that sampled; batch_size, minibatches and
    # rollout_size say how gradients accumulate; and each step is logged.
    unused: ClassVar[tuple[str, ...]] = (
        *("lora_dropout", "gradient_accumulation_steps", "logging_steps"),
        *unused_without(learning_rates),
    )

    output_dir: str = "outputs/ppo"
    lr_scheduler: Literal["cosine", "linear", "constant"] = "linear"
    reward_adapter: str | None = setting(
        None, "Reward and reference", "Adapter of a reward model; the value model starts from it."
    )
    reward: str | None = setting(
        None,
        "Reward and reference",
        "module:function or file.py:function of (prompts, responses[, records]).",
        "It returns a number for each. Exactly one of reward and reward_adapter is given.",
    )
    bad_rewards: Literal["error", "skip"] = setting(
        "error",
        "Reward and reference",
        "error, or skip and count, where a reward is NaN or raises.",
        "With skip the answer is left out of the step.",
    )
    rollout_size: int = setting(64, "Rollout", "Answers sampled each step.")
    rollout_batch_size: int = setting(32, "Rollout", "Answers sampled at a time.")
    max_new_tokens: int = setting(64, "Rollout", "Longest answer, in tokens.")
    temperature: float = setting(0.7, "Rollout", "Temperature of the sampling, and of all log-probabilities.")
    top_k: int = setting(
        0,
        "Rollout",
        "Sample from this many tokens; 0: all. Others than 0 are not what is learned.",
        "Log-probabilities are those of the whole vocabulary at the temperature.",
    )
    top_p: float = setting(
        1.0,
        "Rollout",
        "Sample from the likeliest tokens with this much of the probability; others than 1 are not what is learned.",
    )
    stop: str | None = setting(None, "Rollout", "A further token that ends an answer.")
    missing_eos_penalty: float = setting(
        0.0, "Reward and reference", "Taken off the score of an answer that no stop token ended."
    )
    kl_coef: float = setting(
        0.05,
        "Reward and reference",
        "Penalty on the KL divergence from the reference, token by token.",
        "See `rl.kl_estimate`.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k1", "Reward and reference", "k1, k2 or k3.")
    kl_target: float | None = setting(
        None, "Reward and reference", "Adapt --kl-coef towards this KL of an answer.", "How fast, kl_horizon says."
    )
    kl_horizon: float = setting(10000.0, "Reward and reference", "Answers over which it adapts.")
    gamma: float = setting(1.0, "PPO", "Discount of later rewards.")
    lam: float = setting(0.95, "PPO", "Decay of generalised advantage estimation.")
    score_position: Literal["after", "last"] = setting(
        "after",
        "Reward and reference",
        "after the last token (as TRL), or last, at that token.",
        "See `rl.token_rewards`.",
    )
    whiten_rewards: bool = setting(False, "Reward and reference", "Scale rewards to a standard deviation of 1.")
    whiten_advantages: bool = setting(True, "PPO", "Shift and scale advantages to mean 0, standard deviation 1.")
    ppo_epochs: int = setting(4, "PPO", "Passes over each rollout.")
    minibatches: int = setting(
        1, "PPO", "Optimizer steps in each pass.", "batch_size is the number of answers in a micro-batch."
    )
    cliprange: float = setting(
        0.2, "PPO", "How far the policy's ratio may be from 1 before its loss is clipped.", "See `rl.policy_loss`."
    )
    cliprange_value: float = setting(
        0.2, "PPO", "How far a value may be from the old one before its loss is clipped.", "See `rl.value_loss`."
    )
    dual_clip: float | None = setting(None, "PPO", "Bound of the loss where the advantage is negative; left out: none.")
    vf_coef: float = setting(0.1, "PPO", "Weight of the value loss.")
    target_kl: float | None = setting(
        None,
        "PPO",
        "Leave a rollout when the policy has moved this far from the one that sampled.",
        "Tested before the optimizer step: the mean of (log ratio)²/2 of a minibatch.",
    )
    value_lr: float | None = setting(None, "PPO", "Learning rate of the value model. Default: that of the policy.")
    eval_prompts: int = setting(
        16, "Rollout", "Prompts of --eval-data, or --data, that are answered at each evaluation."
    )

    @property
    def describes_adapter(self) -> bool:
        return True

    def _check_own(self) -> None:
        for name in ("rollout_size", "rollout_batch_size", "max_new_tokens", "ppo_epochs", "minibatches"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in ("top_k", "missing_eos_penalty", "kl_coef", "vf_coef", "eval_prompts"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
        for name in ("temperature", "kl_horizon", "cliprange_value"):
            self._check(name, 0 < getattr(self, name) < math.inf, "finite and > 0")
        for name in ("kl_target", "target_kl", "value_lr"):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, "> 0 or left out")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._check("cliprange", 0 < self.cliprange < 1, "in (0, 1)")
        self._check("dual_clip", self.dual_clip is None or self.dual_clip > 1, "> 1 or left out")
        for name in ("gamma", "lam"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("max_length", self.max_length > self.max_new_tokens, f"> max_new_tokens ({self.max_new_tokens})")
        if (self.reward is None) == (self.reward_adapter is None):
            raise ValueError(
                f"give one of reward and reward_adapter, got reward {self.reward!r}, reward_adapter "
                f"{self.reward_adapter!r}"
            )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError where it holds something else, FileNotFoundError where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of field names to values, got {type(values).__name__}")
    return values


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint`. Numbers may come as text: YAML reads `2e-4` as a string."""
    if typing.get_origin(hint) is Literal:
        return value
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for hint in kinds:
        kind = typing.get_origin(hint) or hint
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                continue
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
        elif kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        elif kind is list and isinstance(value, list):
            return [_convert(name, item, *typing.get_args(hint)) for item in value]
        elif kind is str and isinstance(value, datetime.date):  # as YAML reads it
            return value.isoformat()
        elif isinstance(value, kind):
            return value
    wanted = " or ".join("nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")
