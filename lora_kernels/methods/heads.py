"""Task heads: what a model has on top of its base model, and often with new, random weights."""

from __future__ import annotations

import re

from torch import nn

from lora_kernels.nn.wrappers import unwrapped

# At the top of a model of any class, as in PEFT.
CLASSIFIERS = ("score", "classifier")
# Where transformers' class has no part that is the base model.
_NAMES = (*CLASSIFIERS, "classification_head", "ctc_head", "fc", "head", "projector", "qa_outputs")
# Classes of transformers that are made for one task, by their own head.
_TASKS = r"For(\w*Classification\w*|\w*QuestionAnswering\w*|MultipleChoice|NextSentencePrediction|CTC|XVector)$"


def task_heads(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of the heads that an adapter for the model's task is to be trained with, and of what else the model has
    on top of its base model, modules and parameters.

    Heads are those of transformers' classes for classification, question answering, multiple choice, next sentence
    prediction, CTC and speaker verification, and `score` and `classifier` of any other model. A model with output
    embeddings, as every language model, has none; these embeddings are not listed as anything else either.
    """
    embeddings = getattr(model, "get_output_embeddings", None)
    output = embeddings() if embeddings is not None else None
    output = unwrapped(output) if output is not None else None
    children = {
        name: unwrapped(child) for name, child in model.named_children() if any(True for _ in child.parameters())
    }
    base = unwrapped(model.base_model) if hasattr(model, "base_model_prefix") else model
    has_task = re.search(_TASKS, type(model).__name__) is not None
    if base is model:
        known = _NAMES if has_task else CLASSIFIERS
        top = [] if output is not None else [name for name in children if name in known]
        heads = tuple(name for name in top if _is_trainable(children[name]))
        return heads, tuple(name for name in top if name not in heads)
    top = [name for name, child in children.items() if child is not base and not _contains(child, output)]
    loose = (name for name, _ in model.named_parameters(recurse=False))
    heads = ()
    if output is None:
        likely = (name for name in top if has_task or name in CLASSIFIERS)
        heads = tuple(name for name in likely if _is_trainable(children[name]) and _has_own_name(model, name, top))
    return heads, (*(name for name in top if name not in heads), *loose)


def _contains(module: nn.Module, part: nn.Module | None) -> bool:
    return any(each is part for each in module.modules())


def _is_trainable(head: nn.Module) -> bool:
    """Whether it can be one of the modules_to_save: it has a forward, and its parameters can have gradients."""
    lists = isinstance(head, (nn.ModuleList, nn.ModuleDict))
    return not lists and all(parameter.is_floating_point() for parameter in head.parameters())


def _has_own_name(model: nn.Module, name: str, top: list[str]) -> bool:
    """Whether PEFT's format can name it: that takes every path that ends in the name."""
    return not any(path.endswith(name) and path not in top for path, _ in model.named_modules())
