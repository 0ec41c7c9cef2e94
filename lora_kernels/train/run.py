"""What every trainer's run consists of, whatever it trains on: load, inject, train, save."""

import dataclasses
import datetime
import importlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from lora_kernels.backends import backend_option, return_freed_memory
from lora_kernels.data.chat import set_chat_template
from lora_kernels.data.messages import Prompt
from lora_kernels.data.prompts import encode_prompt, read_prompts
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
from lora_kernels.methods.virtual_tokens import context_length
from lora_kernels.models.fuse import fuse_decoder
from lora_kernels.models.generate import stop_at_turn_end
from lora_kernels.nn.wrappers import Model
from lora_kernels.train.activation_checkpointing import enable_checkpointing
from lora_kernels.train.adapter import check_adapter, go_on, method_config, target_modules
from lora_kernels.train.checkpoint import saved_run
from lora_kernels.train.config import TrainConfig
from lora_kernels.train.launch import make_accelerator, wait_for_everyone
from lora_kernels.train.loop import Dataset, Loop
from lora_kernels.train.metrics import METRICS, Callback, TensorBoard, summary_writer
from lora_kernels.train.output_dir import CONFIG, PLOT, RANKS, TEMPLATE, check_output_dir
from lora_kernels.train.plots import plot_loss, plot_ranks

_Config = TypeVar("_Config", bound=TrainConfig)


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
class Run(Generic[_Config]):
    """A model that is loaded for `config`, and what belongs to it; `adapt` puts the method's adapters into it.

    method: the config of the adapters that the run makes; None where it goes on from the config's adapter.
    """

    config: _Config
    method: Any
    accelerator: Accelerator
    model: Model
    tokenizer: Any
    own_template: str | None
    date: datetime.date
    progress: bool

    @property
    def rendering(self) -> dict[str, Any]:
        """What `lora_kernels.data.chat.Renderer` is to be told of the model and the run."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        return {"date": self.date, "vocab_size": rows}

    def load(self, load: Callable[..., Any]) -> tuple[Any, Any]:
        """The data set of `config.data` and that of `config.eval_data`, or None: load(path, tokenizer, max_length,
        **rendering)."""
        config, arguments = self.config, (self.tokenizer, self.config.max_length)
        train_set = load(config.data, *arguments, **self.rendering)
        eval_set = load(config.eval_data, *arguments, **self.rendering) if config.eval_data else None
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
            go_on(self.model, config, config.adapter, targets, excluded, head)
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


def start(config: _Config, progress: bool = True) -> Run[_Config]:
    """Load `config.model` after the checks that need no model.

    Raises FileExistsError where output_dir holds another run, FileNotFoundError where data do not exist, and ValueError
    for bad settings.
    """
    method = method_config(config) if config.describes_adapter else None
    if config.adapter is not None:
        check_adapter(config, config.adapter)
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
    date = datetime.date.fromisoformat(config.date)
    run = Run(config, method, accelerator, model, tokenizer, own_template, date, progress)
    if config.fuse_decoder and accelerator.device.type == "cpu" and (count := fuse_decoder(model)):
        run.say(f"{count} modules of the decoder are fused")
    return run


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
    logs = config.tensorboard and accelerator.is_main_process
    board = TensorBoard(output_dir, first_step=loop.state.step + 1) if logs else None
    loop.callbacks += [board] if board else []
    with backend_option(config.backend), board or nullcontext():
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
