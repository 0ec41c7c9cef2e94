"""Preference pairs that a tiny model can learn: the chosen answer speaks of fruit, the rejected one of animals."""

import torch
from tiny_chat import tiny_tokenizer

from lora_kernels.data.pairs import build_pairs

FRUIT, ANIMALS = ["apple", "pear", "plum"], ["cat", "dog", "bird"]
NUMBERS = ["one", "two", "three", "four", "five"]


def tiny_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    def answer(words: list[str]) -> str:
        length = int(torch.randint(1, 5, (), generator=generator))
        return " ".join([pick(NUMBERS) for _ in range(length)] + [pick(words)])

    return [
        {"prompt": f"say {pick(NUMBERS)}", "chosen": answer(FRUIT), "rejected": answer(ANIMALS)} for _ in range(count)
    ]


def pairs(count=24, seed=0, pad_is_eos=True):
    records = [(record, f"data:{i}") for i, record in enumerate(tiny_pairs(count, seed))]
    return build_pairs(records, tiny_tokenizer(pad_is_eos=pad_is_eos), 128, "data")
