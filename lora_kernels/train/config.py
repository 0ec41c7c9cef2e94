"""The settings of a training run: a dataclass for each trainer, its checks, and its YAML form."""

import dataclasses
import datetime
import hashlib
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from lora_kernels.io.files import replacing

# Peak learning rates that work with AdamW. Schulman et al. 2025 find LoRA's best about ten times that of full
# fine-tuning; virtual tokens need far more (Lester et al. 2021 take 0.3 with Adafactor).
LEARNING_RATES = {
    "adalora": 1e-3,
    "dora": 2e-4,
    "full": 2e-5,
    "lora": 2e-4,
    "prefix": 5e-3,
    "prompt": 3e-2,
    "qlora": 2e-4,
}
METHODS = tuple(LEARNING_RATES)
# Fields that are AdaLoRAConfig's too, beside lora_alpha and lora_dropout.
ADALORA = ("init_r", "target_r", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
# Fields of prefix and prompt alone.
VIRTUAL_TOKENS = ("num_virtual_tokens", "init_text", "mlp_hidden")
# What the files of an adapter say where a run goes on from one, and the defaults where it doesn't.
ADAPTER_SETTINGS = {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "use_rslora": False, "num_virtual_tokens": 20}
_INITS = {"dora": "default", "lora": "default", "prefix": "vocab", "prompt": "vocab", "qlora": "default"}
_TARGETS = {"full": "all"} | dict.fromkeys(("adalora", "dora", "lora", "qlora"), "all-linear")
CONTINUED = ("dora", "lora", "prefix", "prompt", "qlora")  # what goes on from an adapter
_GRAPHED = ("lora", "qlora", "dora", "full")  # what cuda_graphs takes
DTYPES = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "loraplus")
SCHEDULERS = ("cosine", "linear", "constant")
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
# Methods that train lora_b, of which LoRA+ speaks.
WITH_LORA_B = ("lora", "qlora", "dora", "adalora")
_Config = TypeVar("_Config", bound="TrainConfig")


@dataclass
class TrainConfig:
    """Settings that all trainers share. The command line and the YAML file use the same names.

    model: directory or hub id of a causal language model.
    data, eval_data: .json, .jsonl or .parquet file, a directory or a pattern of them, or several with commas between or
        as a list; see `lora_kernels.train.records`, and `lora_kernels.train.messages` for what they hold.
    output_dir: gets the adapter (with eval_data that of the best evaluation), `checkpoint-last/`, metrics.jsonl,
        loss.png and config.yaml; ranks.png with adalora.
    method: "lora"; "qlora", the same with the frozen linear layers in NF4 (Dettmers et al. 2023), where a bitsandbytes
        NF4 checkpoint stays with any method; "dora", LoRA with a trained magnitude for each row of the weight (Liu et
        al. 2024); "adalora", low-rank updates whose ranks are distributed over the modules
        while they train (Zhang et al. 2023); "prefix" or "prompt", learned virtual tokens before each sequence; "full",
        the model's own weights.
    adapter: directory of an adapter (LoRA, DoRA, prefix or prompt tuning, from any trainer or PEFT) to go on from. What
        it is, such as r, lora_alpha, target and num_virtual_tokens, its files say; a setting that says otherwise is
        refused, and lora_dropout alone may differ. Only its weights are taken over: the optimizer starts anew.
    double_quant: of qlora, quantise the 4-bit blocks' scales too; see `lora_kernels.quantize_nf4`.
    r, lora_alpha, lora_dropout, use_rslora: of LoRA's adapters. Dropout that the base model has of its own
        (resid_pdrop, attention_dropout, layerdrop and the like in its config) acts in supervised training. It is off in
        DPO, where the policy would differ from its reference before the first step, and in PPO and reward models, where
        it would be noise in the rewards.
    init_r, target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight: of adalora, see `AdaLoRAConfig`; lora_alpha
        and lora_dropout are its own too.
    target: modules that get a LoRA adapter ("all-linear" by default) or are trained by "full" ("all"): a module name, a
        comma-separated list of names, or a regular expression over module paths.
    exclude_modules: modules of these that are left out, named in the same ways, as in PEFT; with "full" what is inside
        them too.
    init: how adapters start, by default "default" for LoRA (see `FusedLoRALinear`), "vocab" for virtual tokens, which
        may also be "text" (init_text, a required text), "random", or "zero" (prefix only); see `PrefixConfig`.
    num_virtual_tokens, init_text: of prefix and prompt; mlp_hidden: of prefix, its reparametrisation.
    dtype: of the frozen weights and the activations; "auto" is bfloat16 where the hardware multiplies it natively,
        else float32. Adapters and optimizer state are always float32, and so is everything with method "full".
    epochs: passes over the data, may be fractional; max_steps, where given, decides instead.
    batch_size: sequences per micro-batch and process. One optimizer step sees
        batch_size * gradient_accumulation_steps * processes sequences, and its loss is the mean over all their answer
        tokens.
    optimizer: "adamw", or "loraplus": AdamW with the learning rate lr * lr_ratio for lora_b (see
        `lora_kernels.optim.LoRAPlusAdamW`). lr_ratio has no effect on "adamw".
    lr, lr_scheduler, warmup_ratio, weight_decay, max_grad_norm: AdamW; lr is by default that of `learning_rates`;
        max_grad_norm 0 turns clipping off.
    max_length: tokens kept of each row, from its start.
    seed: of the adapters' initial values, the order of the data, and dropout.
    eval_steps, save_steps: steps between evaluations and checkpoints; None means once per epoch, and for checkpoints
        also after 10 minutes without one. Both also happen at the end. A signal (SIGINT, SIGTERM, SIGHUP) ends a run
        after the step that it is at and a checkpoint.
    logging_steps: steps between lines of metrics.jsonl.
    resume: continue from `checkpoint-last/` exactly where it stopped. Model, data and adapters may have moved; epochs
        and max_steps may ask for other steps than before, at least as many as are done (not with adalora, whose ranks
        follow them): the learning rate then follows the new number of steps from there on.
    fuse_decoder: on CPUs, compute RMSNorm, SwiGLU, rotary position embedding and attention by kernels and keep less
        for backward, see `lora_kernels.nn.fused_decoder`; the results are the same up to rounding.
    backend: kernels to use, see `lora_kernels.use_backend`.
    chat_template: a Jinja template, or a file that holds one, in place of the tokenizer's own.
    date: what chat templates that show today's date take for it, as YYYY-MM-DD; by default the day on which the run
        starts, also when it is resumed later.
    """

    learning_rates: ClassVar[dict[str, float]] = LEARNING_RATES
    unused: ClassVar[tuple[str, ...]] = ()  # fields above that a trainer has no use for, and no flag
    loss_unit: ClassVar[str] = "nats per target token"

    model: str
    data: str | list[str]
    eval_data: str | list[str] | None = None
    output_dir: str = "outputs"
    method: str = "lora"
    adapter: str | None = None
    double_quant: bool = False
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    target: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    use_rslora: bool | None = None
    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    init: str | None = None
    num_virtual_tokens: int | None = None
    init_text: str | None = None
    mlp_hidden: int | None = None
    dtype: str = "auto"
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "loraplus"] = "adamw"
    lr_ratio: float = 16.0
    lr: float | None = None
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    seed: int = 0
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 1
    gradient_checkpointing: bool = False
    fuse_decoder: bool = True
    resume: bool = False
    tensorboard: bool = False
    backend: str = "auto"
    chat_template: str | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, _convert(field.name, getattr(self, field.name), hints[field.name]))
        self._check_choice("method", tuple(self.learning_rates))
        self._check_choice("dtype", DTYPES)
        self._check_choice("lr_scheduler", SCHEDULERS)
        self._check_choice("optimizer", OPTIMIZERS)
        self._resolve_method()
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in ("r", "num_virtual_tokens", "max_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, ">= 1 or left out")
        self._check("max_length", self.max_length >= 2, ">= 2")
        self._check("epochs", 0 < self.epochs < math.inf, "finite and > 0")
        self._check("lr", self.lr > 0, "> 0")
        self._check(
            "optimizer",
            self.optimizer != "loraplus" or self.method in WITH_LORA_B,
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

    def _resolve_method(self) -> None:
        """Fill in what depends on the method, and refuse what it has no use for."""
        method = self.method
        self._check("double_quant", method == "qlora" or not self.double_quant, f"left out with method {method}")
        for name in () if method == "adalora" else ADALORA:
            self._check(name, getattr(self, name) == getattr(TrainConfig, name), f"left out with method {method}")
        self.lr = self.learning_rates[method] if self.lr is None else self.lr
        for name in ("target", "exclude_modules"):
            given = getattr(self, name) is not None
            self._check(name, method in _TARGETS or not given, f"left out with method {method}")
        if self.adapter is not None:
            self._check("method", method in CONTINUED, f"one of {', '.join(CONTINUED)} with adapter")
        if self.describes_adapter:
            defaults = {**ADAPTER_SETTINGS, "init": _INITS.get(method), "target": _TARGETS.get(method)}
            for name in (name for name in defaults if getattr(self, name) is None):
                setattr(self, name, defaults[name])
        else:
            # As the config.yaml of the run that made it says.
            self.init = None if self.init == _INITS[method] else self.init
            for name in ("init", "init_text", "mlp_hidden"):
                allowed = "left out, or null in a file, with adapter, whose values are the start"
                self._check(name, getattr(self, name) is None, allowed)
        self._check("mlp_hidden", method == "prefix" or self.mlp_hidden is None, f"left out with method {method}")
        self._check(
            "init_text", method in ("prefix", "prompt") or self.init_text is None, f"left out with method {method}"
        )
        if method in ("adalora", "full"):
            self._check("init", self.init is None, f"left out with method {method}")
        if method == "adalora":
            self._check("use_rslora", not self.use_rslora, "left out with method adalora")
        if method == "full":
            self._check(
                "dtype", self.dtype != "bfloat16", "float32 with method full, whose updates bfloat16 rounds away"
            )
            self.dtype = "float32"

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


@dataclass
class SFTConfig(TrainConfig):
    """Settings of `run_sft`: those of `TrainConfig`, and

    cuda_graphs: run the decoder as CUDA graphs (see `lora_kernels.train.graphs.DecoderGraphs`), for models that are so
        small, or batches, that the GPU waits for Python. It takes memory for the graphs, and is for lora, qlora, dora
        and full without accumulation or gradient checkpointing. A run that is resumed is the same up to rounding.
    """

    output_dir: str = "outputs/sft"
    cuda_graphs: bool = False

    def _check_own(self) -> None:
        if self.cuda_graphs:
            self._check("method", self.method in _GRAPHED, f"one of {', '.join(_GRAPHED)} with cuda_graphs")
            self._check("gradient_accumulation_steps", self.gradient_accumulation_steps == 1, "1 with cuda_graphs")
            self._check("gradient_checkpointing", not self.gradient_checkpointing, "left out with cuda_graphs")


@dataclass
class RewardConfig(TrainConfig):
    """Settings of `run_reward`: those of `TrainConfig`, data and eval_data being preference pairs, and

    center_coef: weight of (r_chosen + r_rejected)² in the loss, which keeps rewards around 0; see `reward_loss`.
    normalize_samples: after training, so many answers of the base model give the gain and the bias with which rewards
        have mean 0 and standard deviation 1; 0 leaves them as they are. They are sampled before training.
    normalize_data: files of their prompts, by default the training data. A prompt that leaves no room in max_length for
        normalize_tokens is left out.
    normalize_tokens: longest of these answers.
    batch_size: counts pairs, so that a micro-batch has twice as many rows.
    max_length: a pair with an answer that, with its prompt, is longer is left out.
    method: "lora", "qlora" or "dora", whose adapters have a place for the head.
    """

    learning_rates: ClassVar[dict[str, float]] = {"dora": 1e-4, "lora": 1e-4, "qlora": 1e-4}
    unused: ClassVar[tuple[str, ...]] = (*ADALORA, *VIRTUAL_TOKENS)
    loss_unit: ClassVar[str] = "nats per pair"

    output_dir: str = "outputs/reward"
    center_coef: float = 0.0
    normalize_samples: int = 0
    normalize_data: str | list[str] | None = None
    normalize_tokens: int = 64

    def _check_own(self) -> None:
        self._check("center_coef", 0 <= self.center_coef < math.inf, "finite and >= 0")
        self._check("normalize_samples", self.normalize_samples == 0 or self.normalize_samples >= 2, "0 or >= 2")
        given = self.normalize_samples > 0
        self._check("normalize_data", given or self.normalize_data is None, "left out with normalize_samples 0")
        self._check("normalize_tokens", self.normalize_tokens >= 1, ">= 1")
        fits = not given or self.normalize_tokens < self.max_length
        self._check("normalize_tokens", fits, f"< max_length ({self.max_length})")


@dataclass
class DPOConfig(TrainConfig):
    """Settings of `run_dpo`: those of `TrainConfig`, data and eval_data being preference pairs, and

    loss: "sigmoid" or "ipo", beta, label_smoothing: see `dpo_loss`.
    precompute_ref: compute the reference model's log-probabilities of all pairs before the first step, and keep them;
        else with each batch. The reference is the model without adapters, or as `adapter` was. So method "full", which
        has no adapters to turn off, needs it, and so does an adapter of prefix or prompt, beside which there is no
        place for another.
    batch_size: counts pairs, so that a micro-batch has twice as many rows.
    max_length: a pair with an answer that, with its prompt, is longer is left out.
    """

    learning_rates: ClassVar[dict[str, float]] = {method: lr / 10 for method, lr in LEARNING_RATES.items()}
    loss_unit: ClassVar[str] = "nats per pair"

    output_dir: str = "outputs/dpo"
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    precompute_ref: bool = True

    def _check_own(self) -> None:
        self._check_choice("loss", ("sigmoid", "ipo"))
        self._check("beta", 0 < self.beta < math.inf, "finite and > 0")
        self._check("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        self._check("label_smoothing", self.loss == "sigmoid" or not self.label_smoothing, "0 with loss ipo")
        self._check(
            "precompute_ref",
            self.precompute_ref or self.method != "full",
            "true with method full, which has no adapters to turn off: its own start is the reference",
        )
        self._check(
            "precompute_ref",
            self.precompute_ref or self.adapter is None or self.method not in ("prefix", "prompt"),
            f"true with adapter and method {self.method}, of which a model holds no second one",
        )


@dataclass
class PPOConfig(TrainConfig):
    """Settings of `run_ppo`: those of `TrainConfig`, where a step is one rollout and what is learned from it.

    data: prompts: .txt files, one a line, or training records, whose answers are ignored. eval_data: prompts to show
        and score before, during and after training; by default the first eval_prompts of data.
    adapter: the policy starts from it, and its frozen copy is the reference; r, lora_alpha, target and the like then
        are those of a new value model alone. Without one the reference is the base model.
    reward_adapter: directory of a reward model's adapter; the value model starts from it, too. Or
    reward: "module:function" or "file.py:function", called with a list of prompts, one of responses (texts) and, if it
        takes a third argument, one of the prompts' records; returns a number for each. Exactly one of the two.
    bad_rewards: of a reward that is not finite, or a function that raises: "error", or "skip" to leave that answer out
        and count it.
    rollout_size: answers sampled each step. rollout_batch_size: how many at a time.
    max_new_tokens, temperature, top_k, top_p: of the sampling. Log-probabilities are those of the whole vocabulary at
        that temperature, so that top_k and top_p other than 0 and 1 sample something else than what is learned.
    stop: further token that ends an answer, as text. missing_eos_penalty: taken off the score of an answer that none
        ended.
    kl_coef, kl_estimator: of the penalty on each token, see `rl.kl_estimate`. kl_target: adapt kl_coef so that the KL
        of an answer nears it over kl_horizon episodes.
    gamma, lam: of the advantage estimation. score_position: see `rl.token_rewards`. whiten_rewards, whiten_advantages.
    ppo_epochs, minibatches: passes over a rollout, and optimizer steps in each. batch_size: answers in a micro-batch.
    cliprange, cliprange_value, dual_clip, vf_coef: of the losses, see `rl.policy_loss` and `rl.value_loss`.
    target_kl: leave a rollout, before the optimizer step, when the mean (log ratio)²/2 of a minibatch exceeds this.
    value_lr: of the value model, by default lr.
    max_length: the longest prompt and its answer, in tokens; longer prompts are left out and counted.
    """

    learning_rates: ClassVar[dict[str, float]] = {"lora": 5e-5, "qlora": 5e-5}
    # Dropout would have the policy that learns be another one than the one that sampled; batch_size, minibatches and
    # rollout_size say how gradients accumulate; and each step is logged.
    unused: ClassVar[tuple[str, ...]] = (
        *("lora_dropout", "gradient_accumulation_steps", "logging_steps", *ADALORA, *VIRTUAL_TOKENS),
    )

    output_dir: str = "outputs/ppo"
    lr_scheduler: Literal["cosine", "linear", "constant"] = "linear"
    reward_adapter: str | None = None
    reward: str | None = None
    bad_rewards: Literal["error", "skip"] = "error"
    rollout_size: int = 64
    rollout_batch_size: int = 32
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    stop: str | None = None
    missing_eos_penalty: float = 0.0
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    score_position: Literal["after", "last"] = "after"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    ppo_epochs: int = 4
    minibatches: int = 1
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    dual_clip: float | None = None
    vf_coef: float = 0.1
    target_kl: float | None = None
    value_lr: float | None = None
    eval_prompts: int = 16

    @property
    def describes_adapter(self) -> bool:
        return True

    def _check_own(self) -> None:
        for name in ("bad_rewards", "kl_estimator", "score_position"):
            self._check_choice(name, typing.get_args(typing.get_type_hints(type(self))[name]))
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
