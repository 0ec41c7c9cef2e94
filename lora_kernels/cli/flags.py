"""Command-line flags made from the settings of a trainer's config."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import typer

from lora_kernels.train.config import ADAPTER_SETTINGS, TrainConfig, described


def flags_of(config_class: type[TrainConfig]) -> Callable[..., Any]:
    """Give a function that takes **flags one option for each setting of a config; None means not given."""
    hints = typing.get_type_hints(config_class)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        for field in dataclasses.fields(config_class):
            if field.name in config_class.unused:
                continue
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            kind = next((kind for kind in kinds if kind in (bool, int, float, list[str])), str)
            panel, text, _ = described(config_class, field.name)
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
                None,
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                help=text.strip(),
                rich_help_panel=panel,
                show_default=False,
            )
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)
            )

        @functools.wraps(command)
        def wrapped(**kwargs: Any) -> None:
            for name, value in kwargs.items():
                if isinstance(value, list):  # of a flag that may be repeated
                    kwargs[name] = value[0] if len(value) == 1 else value or None
            command(**kwargs)

        vars(wrapped)["__signature__"] = inspect.Signature(parameters)
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate
