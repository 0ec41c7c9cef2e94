"""Scores of sampled answers from any Python function."""

import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RewardFunction = Callable[..., Sequence[float]]


class RewardError(ValueError):
    """A reward that can't be learned from; says which prompt and step."""


def load_function(spec: str) -> RewardFunction:
    """The function that "module:function" or "file.py:function" names; modules are looked for in this directory too.

    Raises ValueError where there is no such module, or no such function in it.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"reward is {spec!r}; allowed: module:function or file.py:function")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"reward {spec}: {path} does not exist")
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise ValueError(f"reward {spec}: {path} can't be loaded as a Python module")
        module = importlib.util.module_from_spec(found)
        # Where pickle, dataclasses and the module's own imports look for it.
        sys.modules.setdefault(path.stem, module)
        found.loader.exec_module(module)
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"reward {spec}: can't import {place}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec}: {place} has no function {name!r}")
    return function


class FunctionReward:
    """Calls a reward function, and says what was wrong with what it returns.

    function(prompts, responses) or function(prompts, responses, records) returns a number for each; prompts are what
    the user gave (text or chat messages), responses texts without special tokens, records those of the prompts' file.
    skip: a reward that is not finite, or not there because the function raises for that answer alone too, becomes NaN
    instead of an error.
    """

    def __init__(self, function: RewardFunction, skip: bool = False) -> None:
        self.function, self.skip = function, skip
        self.name = getattr(function, "__qualname__", type(function).__name__)
        parameters = inspect.signature(function).parameters.values()
        self.takes_records = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) >= 3

    def __call__(self, prompts: list[Any], responses: list[str], records: list[Any], step: int) -> list[float]:
        """A number for each response. Raises RewardError naming the prompt and the step."""
        try:
            scores = self._call(prompts, responses, records)
        except Exception as error:
            scores = [self._alone(*row, step) for row in zip(prompts, responses, records, strict=True)]
            if not self.skip:
                raise RewardError(
                    f"step {step}: the reward function {self.name} raised {type(error).__name__}: {error}, for "
                    f"{len(prompts)} answers together, but not for any of them alone"
                ) from error
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            if not math.isfinite(score) and not self.skip:
                raise RewardError(
                    f"step {step}: the reward function {self.name} returned {score} for {_named(prompt, response)}"
                )
        return [score if math.isfinite(score) else math.nan for score in scores]

    def _alone(self, prompt: Any, response: str, record: Any, step: int) -> float:
        """After a failure: which answer is to blame."""
        try:
            return self._call([prompt], [response], [record])[0]
        except Exception as error:
            if self.skip:
                return math.nan
            raise RewardError(
                f"step {step}: the reward function {self.name} raised {type(error).__name__}: {error}, for "
                f"{_named(prompt, response)}"
            ) from error

    def _call(self, prompts: list[Any], responses: list[str], records: list[Any]) -> list[float]:
        arguments = (prompts, responses, records) if self.takes_records else (prompts, responses)
        scores = [float(score) for score in self.function(*arguments)]
        if len(scores) != len(responses):
            raise ValueError(f"it returned {len(scores)} numbers for {len(responses)} answers")
        return scores


def _named(prompt: Any, response: str) -> str:
    return f"the prompt {_short(prompt)} and the answer {_short(response)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
