"""Rows of chats under pytest-benchmark: as many tokens in long chats as in short ones, which takes as long."""

import pytest
from chat_template_report import templates, tokenizer_for

from lora_kernels.data.dataset import build_dataset

TURNS = 320


@pytest.mark.parametrize("turns", [2, 20, 160])
def test_chats(benchmark, turns: int) -> None:
    question = {"role": "user", "content": "what is the weather like today in Paris " * 5}
    answer = {"role": "assistant", "content": "the weather is like Paris today " * 5}
    records = [({"messages": [question, answer] * (turns // 2)}, f"row {row}") for row in range(TURNS // turns)]
    tokenizer = tokenizer_for(templates()["qwen2_5"])
    benchmark.extra_info["tokens"] = int(build_dataset(records, tokenizer, 1 << 20, "data").lengths.sum())
    benchmark(build_dataset, records, tokenizer, 1 << 20, "data")
