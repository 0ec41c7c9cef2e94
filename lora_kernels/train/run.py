"""What every trainer's run consists of, whatever it trains on: load, inject, train, save."""

import ctypes
import dataclasses
import datetime
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.backends import backend_option
from lora_kernels.backends.cpu import memory as recycling
from lora_kernels.data.chat import set_chat_template
from lora_kernels.data.messages import Prompt
from lora_kernels.data.records import (
    PROMPT_SUFFIXES,
    Source,
    describe,
    find_files,
)
from lora_kernels.files import replacing, replacing_files
from lora_kernels.io.adapters import save_adapter as save_to_directory
from lora_kernels.io.models import load_model
from lora_kernels.methods.apply import inject
from lora_kernels.methods.registry import METHODS
from lora_kernels.methods.virtual_tokens import context_length, learned_positions
from lora_kernels.models.fuse import fuse_decoder
from lora_kernels.models.generate import encode_prompt, read_prompts, stop_at_turn_end
from lora_kernels.train.adapter import check_adapter, go_on
from lora_kernels.train.checkpoint import find_checkpoint, saved_run
from lora_kernels.train.config import TrainConfig
from lora_kernels.train.launch import make_accelerator, wait_for_everyone
from lora_kernels.train.loop import METRICS, Callback, Dataset, Loop
from lora_kernels.train.plots import plot_loss, plot_ranks

_M_MMAP_THRESHOLD = -3  # of malloc.h
CONFIG, PLOT, RANKS, TEMPLATE = "config.yaml", "loss.png", "ranks.png", "chat_template.jinja"


@dataclass
class TrainResult:
    """What a run did. `loss` is the mean over the last logged steps (over answer tokens in SFT).

    A resumed run that had nothing left to do has no `loss` and no `eval_loss`.
    """

    output_dir: Path
    steps: int
    tokens: int
    trainable_parameters: int
    seconds: float
    loss: float | None
    eval_loss: float | None = None
    best_eval_loss: float | None = None


@dataclass
class PromptRow:
    """A prompt as the user gave it, the record that it came from, and its token ids."""

    prompt: Prompt
    record: Any
    ids: list[int]


@dataclass
class Run:
    """A model that is loaded for `config`, and what belongs to it; `adapt` puts the method's adapters into it.

    method: the config of the adapters that the run makes; None where it goes on from the config's adapter.
    """

    config: TrainConfig
    method: Any
    accelerator: Accelerator
    model: nn.Module
    tokenizer: Any
    own_template: str | None
    progress: bool

    @property
    def rendering(self) -> dict[str, Any]:
        """What `lora_kernels.data.chat.Renderer` is to be told of the model and the run."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        return {"date": datetime.date.fromisoformat(self.config.date), "vocab_size": rows}

    def load(self, load: Callable[..., Any]) -> tuple[Any, Any]:
        """The data set of `config.data` and that of `config.eval_data`, or None: load(path, tokenizer, max_length,
        **rendering)."""
        train_set, eval_set = (
            load(path, self.tokenizer, self.config.max_length, **self.rendering) if path else None
            for path in (self.config.data, self.config.eval_data)
        )
        self.say(f"data: {train_set.describe()}")
        if eval_set is not None:
            self.say(f"eval data: {eval_set.describe()}")
        return train_set, eval_set

    def load_prompts(self, source: Source, name: str, answer: str) -> list[PromptRow]:
        """The prompts of data files that leave room for an answer of as many tokens as the setting named `answer` says.

        Says how many do not. Raises ValueError if none does.
        """
        max_length, context = self.config.max_length, context_length(self.model)
        limit = min(max_length, context or max_length) - getattr(self.config, answer)
        rows = [
            PromptRow(
                prompt, record, encode_prompt(self.tokenizer, prompt, where=f"{name}: prompt {i}", **self.rendering)
            )
            for i, (prompt, record) in enumerate(read_prompts(source))
        ]
        kept = [row for row in rows if len(row.ids) <= limit]
        text = f"{name}: {len(kept)} prompts"
        if len(kept) < len(rows):
            text += (
                f"; {len(rows) - len(kept)} left out, longer than {limit} tokens (max_length {max_length}, context "
                f"{context}, less {answer} {getattr(self.config, answer)})"
            )
        if not kept:
            raise ValueError(f"{describe(source)}: no prompt leaves room for an answer: {text}")
        self.say(text)
        return kept

    def adapt(self, head: str | None = None) -> None:
        """Inject the method, its initial values a function of the seed alone, or go on from the config's adapter.

        head: a module that is trained in full beside it.
        """
        config = self.config
        set_seed(config.seed)
        if config.adapter is not None:
            named = (None, None) if config.describes_adapter else (config.target, config.exclude_modules)
            targets, excluded = map(target_modules, named)
            go_on(self.model, config, targets, excluded, head)
            return
        if head is not None:
            self.method = dataclasses.replace(self.method, modules_to_save=(head,))
        inject(self.model, self.method, self.tokenizer)

    def say(self, text: str) -> None:
        """Print a line in the main process, unless progress is off."""
        if self.progress and self.accelerator.is_main_process:
            print(text)

    def options(self) -> dict[str, Any]:
        """What `train` is to be told beside module, model, data and config."""
        return {"save_adapter": self.save_adapter, "accelerator": self.accelerator, "progress": self.progress}

    def save_adapter(self, model: nn.Module, directory: Path) -> None:
        """`lora_kernels.save_adapter`, and beside it what of the tokenizer is not the model's own."""
        # Before the adapter, whose config goes last: a directory that has one for the first time is complete.
        if METHODS[self.config.method].peft_type is None:
            stop_at_turn_end(model, self.tokenizer)
            with replacing_files(directory, last="tokenizer_config.json") as staged:
                self.tokenizer.save_pretrained(staged)
        elif self.tokenizer.chat_template != self.own_template:
            with replacing(directory / TEMPLATE) as path:
                path.write_text(self.tokenizer.chat_template, encoding="utf-8")
        save_to_directory(model, directory)


def start(config: TrainConfig, progress: bool = True) -> Run:
    """Load `config.model` after the checks that need no model.

    Raises FileExistsError where output_dir holds another run, FileNotFoundError where data do not exist, and ValueError
    for bad settings.
    """
    method = method_config(config) if config.describes_adapter else None
    if config.adapter is not None:
        check_adapter(config)
    return_freed_memory()
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        check_output_dir(config)
    if config.tensorboard:
        summary_writer()
    # The plots at the end need it, and a bad MPLBACKEND, for one, fails at the import.
    importlib.import_module("matplotlib.backends.backend_agg")
    if config.date is None:
        # A run that goes on the next day has the same prompts as before.
        before = saved_run(Path(config.output_dir)).get("date") if config.resume else None
        # All processes have the date of the first, also around midnight.
        (config.date,) = broadcast_object_list([before or datetime.date.today().isoformat()])
    for name in ("data", "eval_data", "normalize_data"):
        if source := getattr(config, name, None):
            find_files(source, PROMPT_SUFFIXES)
    model, tokenizer = load_model(
        config.model,
        config.dtype,
        quantize=METHODS[config.method].quantize,
        double_quant=config.double_quant,
        progress=progress and accelerator.is_main_process,
    )
    own_template = tokenizer.chat_template
    template = config.chat_template
    if template is None and config.adapter is not None and (Path(config.adapter) / TEMPLATE).is_file():
        # What the adapter was trained with.
        template = os.path.join(config.adapter, TEMPLATE)
    set_chat_template(tokenizer, template)
    run = Run(config, method, accelerator, model, tokenizer, own_template, progress)
    if config.fuse_decoder and accelerator.device.type == "cpu" and (count := fuse_decoder(model)):
        run.say(f"{count} modules of the decoder are fused")
    return run


def return_freed_memory() -> None:
    """Have glibc return a large tensor's memory when it is freed, unless MALLOC_MMAP_THRESHOLD_ is set; else nothing.

    glibc raises the size from which it does so to that of the largest tensor freed so far, up to 32 MiB. Activations
    then come from one heap, whose gaps between small allocations stay with the process: as much again as it uses. The
    large results of our own ops are recycled instead, since fresh pages for each of them would take longer.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(_M_MMAP_THRESHOLD, recycling.LARGE)
        recycling.enable()


def check_output_dir(config: TrainConfig) -> None:
    """FileExistsError where `output_dir` holds a run and the configuration does not say to resume it, PermissionError
    where it can't be written."""
    directory = Path(config.output_dir)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise FileExistsError(f"output_dir {directory}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {directory}: {there} can't be written to")
    found = [
        name for name in (METRICS, "adapter_model.safetensors", "model.safetensors") if (directory / name).exists()
    ]
    if find_checkpoint(directory):
        found.append("a checkpoint")
    if found and not config.resume:
        raise FileExistsError(
            f"output_dir {directory} holds another run ({', '.join(found)}); choose another one, "
            "or set resume to continue"
        )


def method_config(config: TrainConfig) -> Any:
    """The config of `lora_kernels.methods` that the settings of a run mean. Raises ValueError as its class does."""
    named = {name: target_modules(getattr(config, name)) for name in ("target", "exclude_modules")}
    return METHODS[config.method].make_config({**config.to_dict(), **named})


def target_modules(target: str | list[str] | None) -> str | list[str] | None:
    """A name, or names with commas between, as a list; "all", "all-linear" and regular expressions as they are."""
    if (
        target is None
        or isinstance(target, list)
        or target in ("all", "all-linear")
        or not re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*", target)
    ):
        return target
    return re.split(r"\s*,\s*", target)


def train(
    module: nn.Module,
    model: nn.Module,
    train_set: Dataset,
    eval_set: Dataset | None,
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    save_adapter: Callable[[nn.Module, Path], None] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `module`, the loss around the adapted `model`, by `Loop`; write everything to `config.output_dir`.

    save_adapter(model, directory) writes the adapter, `lora_kernels.save_adapter` by default. `callbacks` get every
    record of metrics.jsonl, in the main process. Raises FileExistsError where output_dir holds another run.
    """
    started = time.perf_counter()
    save_adapter = save_adapter or save_to_directory
    accelerator = accelerator or make_accelerator()
    output_dir = Path(config.output_dir)
    module.to(accelerator.device)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if accelerator.is_main_process:
        check_output_dir(config)
        output_dir.mkdir(parents=True, exist_ok=True)
    loop = Loop(
        module,
        train_set,
        eval_set,
        config,
        save_adapter=lambda directory: save_adapter(model, directory),
        accelerator=accelerator,
        callbacks=callbacks,
        show_progress=progress,
    )
    loop.restore()
    if accelerator.is_main_process:
        config.save_yaml(output_dir / CONFIG)
    board = nullcontext()
    if config.tensorboard and accelerator.is_main_process:
        board = TensorBoard(output_dir, first_step=loop.state.step + 1)
        loop.callbacks.append(board)
    with backend_option(config.backend), board:
        loop.run()
    if accelerator.is_main_process:
        plot_loss(output_dir / METRICS, output_dir / PLOT, unit=config.loss_unit)
        if loop.hook:
            plot_ranks(loop.hook.ranks(), output_dir / RANKS)
    wait_for_everyone(accelerator)
    return TrainResult(
        output_dir=output_dir,
        steps=loop.state.step,
        tokens=loop.state.tokens,
        trainable_parameters=sum(parameter.numel() for parameter in loop.parameters.values()),
        seconds=time.perf_counter() - started,
        loss=loop.last_loss,
        eval_loss=loop.last_eval_loss,
        best_eval_loss=loop.state.best_eval_loss,
    )


def check_context(model: nn.Module, datasets: Sequence[Dataset | None], config: TrainConfig) -> None:
    """ValueError where the virtual tokens and the longest row of the data are more than the model's context holds;
    without virtual tokens a warning, unless the positions are learned, of which there are no more."""
    virtual = getattr(getattr(model, "virtual_tokens", None), "num_virtual_tokens", 0)
    context, longest = context_length(model), max(data.longest for data in datasets if data is not None)
    if context is None or virtual + longest <= context:
        return
    text = f"the longest row of {longest} tokens exceeds the model's context of {context}"
    if virtual:
        raise ValueError(
            f"num_virtual_tokens {virtual} and {text.replace('exceeds', 'exceed')}; lower max_length "
            f"({config.max_length}) or num_virtual_tokens"
        )
    if learned_positions(model) is not None:
        raise ValueError(f"{text}; lower max_length ({config.max_length})")
    warnings.warn(f"{text}; with max_length {context} no row would go beyond what it was trained on", stacklevel=2)


def enable_checkpointing(model: nn.Module) -> None:
    """Have transformers' layers recompute their activations in backward. Twice does no harm.

    Not by transformers' own switch, which acts in training mode only: the base model of DPO, PPO and reward models is
    in evaluation mode. Raises ValueError for a model without such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers that can recompute activations")
    for layer in layers:
        if not hasattr(layer.forward, "recomputing"):
            layer.forward = MethodType(_recomputing(layer.forward.__func__), layer)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        # Not reentrant: a reentrant checkpoint whose inputs need no gradient, as with frozen embeddings, yields none.
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    wrapped.recomputing = True
    return wrapped


def summary_writer() -> type:
    """TensorBoard's class; ValueError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard is set, but the package tensorboard can't be imported: {error}") from error
    return SummaryWriter


class TensorBoard:
    """A callback that repeats every number of a record to TensorBoard.

    first_step: what an earlier run has written of this step and of later ones is hidden.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.writer = summary_writer()(os.fspath(directory / "tensorboard"), purge_step=first_step)

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.close()
