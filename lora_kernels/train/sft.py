"""Supervised fine-tuning of a causal language model on the answers of instructions and chats."""

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.backends import backend_option
from lora_kernels.io.files import replacing
from lora_kernels.train.checkpoint import find_checkpoint
from lora_kernels.train.config import ADALORA, SFTConfig
from lora_kernels.train.data import TokenDataset, load_dataset, set_chat_template
from lora_kernels.train.loop import METRICS, Callback, Loop, make_accelerator
from lora_kernels.train.losses import chunked_cross_entropy

CONFIG, PLOT, RANKS, TEMPLATE = "config.yaml", "loss.png", "ranks.png", "chat_template.jinja"
_CHECK_TOKENS = 8


@dataclass
class SFTResult:
    """What a run did. Losses are means over answer tokens; `loss` is that of the last logged steps.

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


class AnswerLoss(nn.Module):
    """A causal LM whose forward is the summed cross-entropy of the labels, without ever making all logits.

    Raises ValueError for a model whose logits are not `softcap(scale * lm_head(decoder(input_ids)))`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A PEFT model's wrapper has other ideas of what its base model is; the adapters live inside.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._parts = (inner.get_decoder(), inner.get_output_embeddings())
        head = self._parts[1]
        if type(head) is not nn.Linear:
            found = "nothing" if head is None else type(head).__name__
            raise ValueError(
                f"the model's output embedding must be an nn.Linear without adapter, got {found}; "
                "leave it out of target"
            )
        config = inner.config
        self.logit_softcap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Summed loss of labels [B, T] (not shifted; -100 is ignored) after input_ids [B, T].

        `attention_mask` is not used: with padding on the right only, causal attention never looks at a pad, and
        without a mask the attention runs its causal path, which is the fast one.
        """
        decoder, head = self._parts
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        loss, _ = chunked_cross_entropy(
            hidden.to(head.weight.dtype),
            head.weight,
            labels[:, 1:],
            head.bias,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
        )
        return loss

    @torch.no_grad()
    def check(self, input_ids: Tensor) -> None:
        """ValueError unless the loss of a short row is the one from the model's own logits."""
        training = self.training
        self.eval()
        row = input_ids.reshape(1, -1)[:, :_CHECK_TOKENS].to(next(self.model.parameters()).device)
        logits = self.model(input_ids=row, use_cache=False).logits[0, :-1].float()
        expected = F.cross_entropy(logits, row[0, 1:], reduction="sum")
        found = self(row, row)
        self.train(training)
        # Logits of 16 bits are rounded at other places on the two ways.
        tolerance = 1e-3 if self._parts[1].weight.dtype in (torch.float32, torch.float64) else 3e-2
        if not torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance * row.numel()):
            raise ValueError(
                f"{type(self.model).__name__} computes its logits in a way that is not supported: the loss from its "
                f"own logits is {expected.item():.4f}, from its decoder and output embedding {found.item():.4f}"
            )


def check_output_dir(config: SFTConfig) -> None:
    """FileExistsError where `output_dir` holds a run and the configuration does not say to resume it."""
    directory = Path(config.output_dir)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"output_dir {directory} is a file")
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


def run_sft(config: SFTConfig, callbacks: Sequence[Callback] = (), progress: bool = True) -> SFTResult:
    """Load `config.model`, inject the method, train it on `config.data`, and write everything to `config.output_dir`.

    Runs in one process, or in each of those that `accelerate launch` or `torchrun` started. `callbacks` get every
    record of metrics.jsonl, in the main process. Raises FileExistsError where output_dir holds another run, and
    ValueError for bad settings or data. A chat template that is not the model's own is saved beside the adapter, the
    whole tokenizer beside a fully fine-tuned model.
    """
    from lora_kernels.io.adapters import save_adapter
    from lora_kernels.io.models import load_model
    from lora_kernels.methods import inject

    method = method_config(config)
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        check_output_dir(config)
    model, tokenizer = load_model(
        config.model,
        config.dtype,
        quantize="nf4" if config.method == "qlora" else None,
        double_quant=config.double_quant,
        progress=progress and accelerator.is_main_process,
    )
    own_template = tokenizer.chat_template
    set_chat_template(tokenizer, config.chat_template)
    train_set = load_dataset(config.data, tokenizer, config.max_length)
    eval_set = load_dataset(config.eval_data, tokenizer, config.max_length) if config.eval_data else None
    set_seed(config.seed)
    inject(model, method, tokenizer)
    if accelerator.is_main_process and progress:
        print(f"data: {train_set.describe()}")
        if eval_set is not None:
            print(f"eval data: {eval_set.describe()}")

    def save(trained: nn.Module, directory: Path) -> None:
        save_adapter(trained, directory)
        if config.method == "full":
            tokenizer.save_pretrained(directory)
        elif tokenizer.chat_template != own_template:
            with replacing(directory / TEMPLATE) as path:
                path.write_text(tokenizer.chat_template, encoding="utf-8")

    return train_sft(
        model,
        tokenizer,
        train_set,
        eval_set,
        config,
        callbacks=callbacks,
        save_adapter=save,
        accelerator=accelerator,
        progress=progress,
    )


def method_config(config: SFTConfig) -> Any:
    """The config of `lora_kernels.methods` that the settings of a run mean. Raises ValueError as its class does."""
    from lora_kernels.methods import adalora, full, lora, prefix, prompt

    if config.method in ("lora", "qlora"):
        return lora.LoRAConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=target_modules(config.target),
            use_rslora=config.use_rslora,
            init=config.init,
        )
    if config.method == "adalora":
        return adalora.AdaLoRAConfig(
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=target_modules(config.target),
            **{name: getattr(config, name) for name in ADALORA},
        )
    if config.method == "full":
        return full.FullConfig(target_modules(config.target))
    tokens = {name: getattr(config, name) for name in ("num_virtual_tokens", "init", "init_text")}
    if config.method == "prefix":
        return prefix.PrefixConfig(**tokens, mlp_hidden=config.mlp_hidden)
    return prompt.PromptConfig(**tokens)


def target_modules(target: str | list[str]) -> str | list[str]:
    """A name, or names with commas between, as a list; "all", "all-linear" and regular expressions as they are."""
    if (
        isinstance(target, list)
        or target in ("all", "all-linear")
        or not re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*", target)
    ):
        return target
    return re.split(r"\s*,\s*", target)


def train_sft(
    model: nn.Module,
    tokenizer: Any,
    train_set: TokenDataset,
    eval_set: TokenDataset | None,
    config: SFTConfig,
    *,
    callbacks: Sequence[Callback] = (),
    save_adapter: Callable[[nn.Module, Path], None] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> SFTResult:
    """Train the parameters of `model` that require gradients, on the answer tokens of `train_set`.

    model: a causal LM with its adapters in place. `config.model`, `config.data` and the adapter settings are only
    recorded. save_adapter(model, directory) writes the adapter, `lora_kernels.save_adapter` by default. Files, errors
    and callbacks as for `run_sft`.
    """
    if save_adapter is None:
        from lora_kernels.io.adapters import save_adapter
    _check_context(model, train_set, config)
    accelerator = accelerator or make_accelerator()
    output_dir = Path(config.output_dir)
    started = time.perf_counter()
    module = AnswerLoss(model)
    with backend_option(config.backend):
        module.to(accelerator.device).check(torch.from_numpy(train_set.input_ids[0]).long())
    if config.gradient_checkpointing:
        _enable_checkpointing(model)
    if accelerator.is_main_process:
        check_output_dir(config)
        output_dir.mkdir(parents=True, exist_ok=True)
    board = _TensorBoard(output_dir) if config.tensorboard and accelerator.is_main_process else None
    loop = Loop(
        module,
        train_set,
        eval_set,
        config,
        save_adapter=lambda directory: save_adapter(model, directory),
        accelerator=accelerator,
        callbacks=[*callbacks, board] if board else callbacks,
        show_progress=progress,
    )
    loop.restore()
    if accelerator.is_main_process:
        config.save_yaml(output_dir / CONFIG)
    with backend_option(config.backend), board or nullcontext():
        loop.run()
    if accelerator.is_main_process:
        from lora_kernels.report import plot_loss, plot_ranks

        plot_loss(output_dir / METRICS, output_dir / PLOT)
        if loop.hook:
            plot_ranks(loop.hook.ranks(), output_dir / RANKS)
    accelerator.wait_for_everyone()
    return SFTResult(
        output_dir=output_dir,
        steps=loop.state.step,
        tokens=loop.state.tokens,
        trainable_parameters=sum(parameter.numel() for parameter in loop.parameters.values()),
        seconds=time.perf_counter() - started,
        loss=loop.last_loss,
        eval_loss=loop.last_eval_loss,
        best_eval_loss=loop.state.best_eval_loss,
    )


def _check_context(model: nn.Module, train_set: TokenDataset, config: SFTConfig) -> None:
    from lora_kernels.methods.virtual_tokens import context_length

    virtual = getattr(getattr(model, "virtual_tokens", None), "num_virtual_tokens", 0)
    context, longest = context_length(model), int(train_set.lengths.max())
    if virtual and context is not None and virtual + longest > context:
        raise ValueError(
            f"num_virtual_tokens {virtual} and the longest row of {longest} tokens exceed the model's context of "
            f"{context}; lower max_length ({config.max_length}) or num_virtual_tokens"
        )


def _enable_checkpointing(model: nn.Module) -> None:
    # Not reentrant: the embeddings are frozen, and a reentrant checkpoint whose inputs need no gradient yields none.
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


class _TensorBoard:
    """A callback that repeats every number of a record to TensorBoard."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"tensorboard is set, but the package tensorboard can't be imported: {error}") from error
        self.writer = SummaryWriter(os.fspath(directory / "tensorboard"))

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def __enter__(self) -> "_TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.close()
