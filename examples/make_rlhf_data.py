"""Write the data of the RLHF demo: rlhf_sft.jsonl, rlhf_pairs.jsonl, rlhf_pairs_eval.jsonl and rlhf_prompts.jsonl.

Prompts are orders, replies are put together from parts that a customer would like or not. The replies of rlhf_sft.jsonl
have each good part half of the time, so a model trained on them knows all ways of replying and prefers none. Of a
preference pair's two replies `rlhf_rule.rule_score` chose the better one. No prompt is in two of the files.

    python examples/make_rlhf_data.py [--output-dir examples] [--seed 0]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from rlhf_rule import rule_score

from lora_kernels.files import replacing

SIZES = {"rlhf_sft": 320, "rlhf_pairs": 240, "rlhf_pairs_eval": 40, "rlhf_prompts": 96}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBERS = ("two", "three", "four", "five", "six", "eight", "ten")
ITEMS = ("apples", "chairs", "books", "lamps", "pens", "cups", "plates", "shirts", "boxes", "clocks", "tables", "hats")
ORDERS = (
    "Please send {number} {item} on {day}.",
    "We need {number} {item} by {day}.",
    "Could I have {number} {item} this {day}?",
)
# (good, bad) parts in their order.
PARTS = (
    (("Thank you.", "Thanks a lot.", "Thank you for the order."), ("OK.", "Fine.", "Noted.")),
    (("You get {number} {item}", "{number} {item} will come", "We send {number} {item}"),
     ("You get it", "It will come", "We send it")),
    ((" on {day}.", " this {day}."), (" soon.", " some day.")),
    ((" Anything else?", " Can we help more?"), ("", " Bye.")),
)  # fmt: skip


def reply(rng: random.Random, order: dict[str, str]) -> str:
    """A reply that has each good part half of the time."""
    parts = [rng.choice(rng.choice(part)) for part in PARTS]
    text = f"{parts[0]} {parts[1].format(**order)[0].upper()}{parts[1].format(**order)[1:]}"
    return text + parts[2].format(**order) + parts[3]


def pair(rng: random.Random, order: dict[str, str]) -> tuple[str, str]:
    """Two replies, the better one first."""
    while True:
        replies = sorted((reply(rng, order) for _ in range(2)), key=lambda text: judge(text, order))
        if judge(replies[0], order) < judge(replies[1], order):
            return replies[1], replies[0]


def judge(text: str, order: dict[str, str]) -> float:
    return rule_score(text, order["item"], order["day"])


def make(seed: int) -> dict[str, list[dict[str, str]]]:
    """The records of each file."""
    rng = random.Random(seed)
    orders = [
        {"prompt": text.format(number=number, item=item, day=day), "number": number, "item": item, "day": day}
        for text, number, item, day in itertools.product(ORDERS, NUMBERS, ITEMS, DAYS)
    ]
    rng.shuffle(orders)
    files, taken = {}, iter(orders)
    for name, size in SIZES.items():
        records = []
        for order in itertools.islice(taken, size):
            if name == "rlhf_sft":
                records.append({"prompt": order["prompt"], "completion": reply(rng, order)})
            elif name == "rlhf_prompts":
                records.append({name: order[name] for name in ("prompt", "item", "day")})
            else:
                chosen, rejected = pair(rng, order)
                records.append({"prompt": order["prompt"], "chosen": chosen, "rejected": rejected})
        files[name] = records
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, records in make(arguments.seed).items():
        with replacing(arguments.output_dir / f"{name}.jsonl") as temporary:
            lines = (json.dumps(record) + "\n" for record in records)
            temporary.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
