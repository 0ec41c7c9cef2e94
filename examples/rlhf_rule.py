"""What a good reply to an order is, as a rule: the judge of the RLHF demo, and a reward function for PPO.

lora-kernels ppo ... --data examples/rlhf_prompts.jsonl --reward examples/rlhf_rule.py:score
"""

LONGEST = 20  # words


def rule_score(reply: str, item: str, day: str) -> float:
    """The share, in [0, 1], of four things that a reply should do: thank, name the item, name the day, and end with a
    question. 0 for one of more than LONGEST words, so that a reply can't win by saying everything."""
    words = reply.lower().split()
    if len(words) > LONGEST:
        return 0.0
    kept = ("thank" in reply.lower(), item.lower() in reply.lower(), day in reply, reply.rstrip().endswith("?"))
    return sum(kept) / len(kept)


def score(prompts: list, responses: list[str], records: list[dict]) -> list[float]:
    """`rule_score` of each response; the records of the prompts say which item and day."""
    return [
        rule_score(response, record["item"], record["day"]) for response, record in zip(responses, records, strict=True)
    ]
