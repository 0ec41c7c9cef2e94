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
    embeddings, as every language model, has none.
    """
    embeddings = getattr(model, "get_output_embeddings", None)
    if embeddings is not None and embeddings() is not None:
        return (), ()
    children = {
        name: unwrapped(child) for name, child in model.named_children() if any(True for _ in child.parameters())
    }
    base = unwrapped(model.base_model) if hasattr(model, "base_model_prefix") else model
    has_task = re.search(_TASKS, type(model).__name__) is not None
    if base is model:
        return tuple(name for name in children if name in (_NAMES if has_task else CLASSIFIERS)), ()
    top = [name for name, child in children.items() if child is not base]
    heads = tuple(name for name in top if (has_task or name in CLASSIFIERS) and _fits_files(model, name, top))
    loose = (name for name, _ in model.named_parameters(recurse=False))
    return heads, (*(name for name in top if name not in heads), *loose)


def _fits_files(model: nn.Module, name: str, top: list[str]) -> bool:
    """Whether it can be trained, and PEFT's format can name it: that takes every path that ends in the name."""
    others = (path for path, _ in model.named_modules() if path.endswith(name) and path not in top)
    return not any(others) and all(parameter.is_floating_point() for parameter in getattr(model, name).parameters())
