"""docs/supported-models.md: that it is what its script makes, and that a few of its rows are still so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import environment
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import supported_models
from supported_models import (
    FAMILIES,
    LIMIT,
    STAGES,
    TABLE,
    Trial,
    Untested,
    Wrong,
    cell,
    compiled,
    outcome,
    read_results,
    report,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_kernels import LoRAConfig

TOOL = Path(supported_models.__file__)


def test_the_table_is_what_the_script_makes_of_its_results():
    results = read_results()
    assert set(results) == set(FAMILIES)
    assert all(list(result["stages"]) == list(STAGES) for result in results.values())
    assert TABLE.read_text(encoding="utf-8") == report(results)


def test_every_causal_language_model_of_transformers_has_a_row():
    assert set(FAMILIES) >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_every_cell_is_a_yes_or_a_reason():
    for family, result in read_results().items():
        for stage, text in result["stages"].items():
            kind, _, reason = text.partition(": ")
            assert text == "yes" or (kind in ("refused", "untested", "wrong", "error") and reason), (family, stage)


def test_rows_are_still_so(tmp_path):
    families = ("llama", "gpt_neo")
    results = tmp_path / "results.json"
    command = [sys.executable, TOOL, *families, "--results", results]
    variables = environment()
    variables.pop("LORA_KERNELS_BACKEND", None)
    subprocess.run(command, check=True, env=variables)
    found = json.loads(results.read_text(encoding="utf-8"))
    for family in families:
        assert found[family]["stages"] == read_results()[family]["stages"]
    assert results.with_suffix(".md").read_text(encoding="utf-8") == report(found)


CRASH = """
import os, signal, time, supported_models as tool
ended = {"first": lambda trial: None, "second": lambda trial: os.kill(os.getpid(), signal.SIGKILL), "third": print}
slow = {"first": lambda trial: time.sleep(60), "second": print}
for tool.STAGES, limit in ((ended, 60), (slow, 0.5)):
    print(tool.try_family("llama", limit))
"""


def test_a_crash_and_a_slow_stage_are_cells():
    command = [sys.executable, "-c", CRASH]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    crashed, slow = result.stdout.splitlines()[-2:]
    assert crashed == str({"first": "yes", **dict.fromkeys(("second", "third"), "error: process ended with -9")})
    assert slow == str({"first": "error: longer than 0.5 s", "second": "untested: an earlier stage took too long"})


def test_a_cell_says_whose_fault_it_is():
    def found(function):
        try:
            function()
        except Exception as error:
            return outcome(error)

    def wrong():
        raise Wrong("logits differ")

    def untested():
        raise Untested("PEFT: no  such\nin detail")

    assert found(wrong) == "wrong: logits differ"
    assert found(untested) == "untested: PEFT: no such"
    assert found(lambda: LoRAConfig(r=0)).startswith("refused: r ")
    assert found(lambda: int("x")).startswith("error: ValueError: invalid literal")
    assert cell("a|b\nc") == "a/b c" and len(cell("x" * 200)) == 100 and LIMIT > 0


class Traced(nn.Module):
    """A product whose values are multiplied by `factor` when traced, and whose weight then trains only if `trains`."""

    def __init__(self, factor=1, trains=True):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.factor, self.trains = factor, trains

    def forward(self, x):
        traced = torch.compiler.is_compiling()
        weight = self.weight.detach() if traced and not self.trains else self.weight
        return {"logits": (x * weight + self.bias) * (self.factor if traced else 1)}


class TracedTrial(Trial):
    def __init__(self, base, adapted):
        self.model, self.adapted, self.inputs = base, lambda: adapted, {"x": torch.ones(2, 3)}


@pytest.mark.parametrize(("fault", "reason"), [({"factor": 2}, "logits differ"), ({"trains": False}, "no gradient")])
def test_compilation_is_untested_where_the_base_model_compiles_wrongly(fault, reason):
    compiled(TracedTrial(Traced(), Traced()))
    with pytest.raises(Wrong, match=reason):
        compiled(TracedTrial(Traced(), Traced(**fault)))
    with pytest.raises(Untested, match=f"torch.compile of the base model: .*{reason}"):
        compiled(TracedTrial(Traced(**fault), Traced(**fault)))
