"""Write demo_train.jsonl and demo_eval.jsonl: short sentences, English and Chinese, and the record each should become.

Three tasks (order, meeting, expense). The house format is this project's own, so a pretrained model has not seen it,
and an answer is right only when it is exactly the record. No record of the evaluation file occurs in the training file,
in either language.

    python examples/make_demo_data.py [--output-dir examples] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from lora_kernels.files import replacing

TRAIN_SIZE, EVAL_SIZE, CHINESE_SHARE = 360, 40, 0.2

DAYS = {
    "Monday": ("Mon", "周一"),
    "Tuesday": ("Tue", "周二"),
    "Wednesday": ("Wed", "周三"),
    "Thursday": ("Thu", "周四"),
    "Friday": ("Fri", "周五"),
    "Saturday": ("Sat", "周六"),
}
NUMBERS = {2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四"), 5: ("five", "五"), 6: ("six", "六"),
           8: ("eight", "八")}  # fmt: skip
ITEMS = {"apples": ("apple", "苹果"), "chairs": ("chair", "椅子"), "books": ("book", "书"), "lamps": ("lamp", "灯"),
         "pens": ("pen", "笔"), "cups": ("cup", "杯子")}  # fmt: skip
PEOPLE = {"Ana": "安娜", "Tom": "汤姆", "Mary": "玛丽", "Jack": "杰克", "Lucy": "露西", "David": "大卫"}
HOURS = {"9 am": ("09:00", "上午九点"), "10 am": ("10:00", "上午十点"), "1 pm": ("13:00", "下午一点"),
         "2 pm": ("14:00", "下午两点"), "3 pm": ("15:00", "下午三点"), "5 pm": ("17:00", "下午五点")}  # fmt: skip
THINGS = {"lunch": "午饭", "taxi": "打车", "hotel": "酒店", "paper": "纸", "coffee": "咖啡", "train": "火车"}
CURRENCIES = {"dollars": ("USD", "美元"), "euros": ("EUR", "欧元"), "pounds": ("GBP", "英镑"), "yuan": ("CNY", "元")}
AMOUNTS = (7, 9, 12, 15, 18, 24, 30, 36, 45, 60)

INSTRUCTIONS = {
    "order": "Order record",
    "meeting": "Meeting record",
    "expense": "Expense record",
}
ENGLISH = {
    "order": (
        "Please send {number} {items} on {day}.",
        "We need {qty} {items} by {day}.",
        "Could I have {number} {items} this {day}?",
        "{day}: {qty} more {items}, thanks.",
        "On {day} I want {number} new {items}.",
    ),
    "meeting": (
        "Meet {who} on {day} at {hour}.",
        "{who} comes at {hour} this {day}.",
        "Can we see {who} {day}, {hour}?",
        "At {hour} on {day} I talk to {who}.",
        "Call with {who}: {day} {hour}.",
    ),
    "expense": (
        "I paid {amount} {units} for {what}.",
        "{what} cost {amount} {units}.",
        "Spent {amount} {units} on {what} today.",
        "The {what} was {amount} {units}.",
        "{amount} {units} went to {what}.",
    ),
}
CHINESE = {
    "order": ("{day}送{number}个{items}。", "{day}要{qty}个{items}。"),
    "meeting": ("{day}{hour}见{who}。", "{who}{day}{hour}来。"),
    "expense": ("{what}花了{amount}{units}。", "{amount}{units}付{what}。"),
}


def make_example(rng: random.Random) -> dict[str, str]:
    """One {"instruction", "input", "output"} record drawn from `rng`."""
    task = rng.choice(sorted(INSTRUCTIONS))
    chinese = rng.random() < CHINESE_SHARE
    day, (day_code, day_zh) = rng.choice(list(DAYS.items()))
    if task == "order":
        items, (item, item_zh) = rng.choice(list(ITEMS.items()))
        qty, (number, number_zh) = rng.choice(list(NUMBERS.items()))
        output = f"item={item}; qty={qty}; day={day_code}"
        fields = {"items": items, "qty": qty, "number": number, "day": day}
        fields_zh = {"items": item_zh, "qty": qty, "number": number_zh, "day": day_zh}
    elif task == "meeting":
        who, who_zh = rng.choice(list(PEOPLE.items()))
        hour, (time, hour_zh) = rng.choice(list(HOURS.items()))
        output = f"who={who}; day={day_code}; time={time}"
        fields = {"who": who, "day": day, "hour": hour}
        fields_zh = {"who": who_zh, "day": day_zh, "hour": hour_zh}
    else:
        what, what_zh = rng.choice(list(THINGS.items()))
        units, (currency, units_zh) = rng.choice(list(CURRENCIES.items()))
        amount = rng.choice(AMOUNTS)
        output = f"what={what}; amount={amount}.00; currency={currency}"
        fields = {"what": what, "units": units, "amount": amount}
        fields_zh = {"what": what_zh, "units": units_zh, "amount": amount}
    text = rng.choice(CHINESE[task]).format(**fields_zh) if chinese else rng.choice(ENGLISH[task]).format(**fields)
    return {"instruction": INSTRUCTIONS[task], "input": text[0].upper() + text[1:], "output": output}


def make_data(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, eval) lists; inputs are unique and the two share no output."""
    rng = random.Random(seed)
    evaluation: dict[str, dict[str, str]] = {}
    while len(evaluation) < EVAL_SIZE:
        example = make_example(rng)
        evaluation.setdefault(example["output"], example)
    train: dict[str, dict[str, str]] = {}
    while len(train) < TRAIN_SIZE:
        example = make_example(rng)
        if example["output"] not in evaluation:
            train.setdefault(example["input"], example)
    return list(train.values()), list(evaluation.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, records in zip(("demo_train.jsonl", "demo_eval.jsonl"), make_data(arguments.seed), strict=True):
        path = arguments.output_dir / name
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    main()
