"""What is learned with the chat templates of today's models: docs/chat-templates.md.

The templates are those that TRL ships, as the vendors wrote them. Each renders conversations of several kinds with a
small tokenizer that knows its special tokens; no model is needed.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_kernels.data.chat import Renderer
from lora_kernels.data.messages import Conversation, to_conversation
from lora_kernels.files import replacing

_SPECIAL = re.compile(
    r"<[|｜][^<>\s]*?[|｜]?>|<[^<>\s|/]*\|>|</?(?:start|end)_of_\w+>|<(?:bos|eos|sop|image)>|\[gMASK\]|<\|?END_\w+\|?>"
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
_CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "PARIS"}}}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


_TWO_TURNS = [_user("QONE"), _assistant("AONE"), _user("QTWO"), _assistant("ATWO")]
# Texts in capitals, which no template has.
CASES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": _TWO_TURNS[:2]},
    "two turns": {"messages": _TWO_TURNS},
    "system": {"messages": [{"role": "system", "content": "SYSTEM"}, *_TWO_TURNS]},
    "reasoning": {"messages": [_user("QONE"), _assistant("AONE", reasoning_content="RONE")]},
    "reasoning, two turns": {
        "messages": [
            _user("QONE"),
            _assistant("AONE", reasoning_content="RONE"),
            _user("QTWO"),
            _assistant("ATWO", reasoning_content="RTWO"),
        ]
    },
    "reasoning in the text": {"messages": [_user("QONE"), _assistant("<think>\nRONE\n</think>\n\nAONE")]},
    "tools": {
        "tools": _TOOLS,
        "messages": [
            _user("QONE"),
            _assistant("", tool_calls=[_CALL]),
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "RESULT"},
            _assistant("ATWO"),
        ],
    },
}


def templates() -> dict[str, str]:
    """The templates that TRL ships, by name; those that it made for training end in "_training"."""
    import trl

    directory = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.jinja"))}


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has the template's special tokens."""
    special = dict.fromkeys(("<|endoftext|>", "<s>", "</s>", *sorted(set(_SPECIAL.findall(template)))))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + len(special),
            special_tokens=[*special],
            show_progress=False,
            initial_alphabet=alphabet,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = template
    return wrapped


def learned(tokenizer: Any, conversation: Conversation) -> list[str]:
    """The texts that are learned, in their order. ValueError where the conversation is refused."""
    ((ids, mask),) = Renderer(tokenizer).tokenize([conversation])
    texts: list[list[int]] = []
    before = False
    for token, inside in zip(ids, mask, strict=True):
        if inside:
            texts[len(texts) - 1 if before else len(texts) :] = [(texts[-1] if before else []) + [token]]
        before = inside
    return [tokenizer.decode(text) for text in texts]


def sweep() -> Iterator[tuple[str, str, Conversation, list[str] | ValueError]]:
    """(template's name, case, conversation, what is learned or why it is refused)."""
    for name, template in templates().items():
        tokenizer = tokenizer_for(template)
        for case, record in CASES.items():
            conversation = to_conversation(record, "record")
            try:
                yield name, case, conversation, learned(tokenizer, conversation)
            except ValueError as error:
                yield name, case, conversation, error


def report() -> str:
    rows: dict[str, list[str]] = {}
    for name, _, conversation, found in sweep():
        if not name.endswith("_training"):
            rows.setdefault(name, []).append(_cell(conversation, found))
    lines = [
        "# Chat templates",
        "",
        "What the trainers learn with the chat templates of today's models, as their vendors wrote them.",
        "Written by `python tools/chat_template_report.py`; a test compares it with the code.",
        "",
        "- **all**: exactly what the assistant says, tool calls and reasoning included, and the end token.",
        "- **1 of 2**: the template drops the reasoning of the first turn, so only the second is learned.",
        "  Training says how many answers were left out.",
        "- **no reasoning**, **no tools**, ...: the template does not show it, or refuses such a chat.",
        "  Training stops with an error that names the file and line. Pass `--chat-template`, or leave",
        "  that part out of the data.",
        "",
        f"| template | {' | '.join(CASES)} |",
        "|---" * (len(CASES) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(conversation: Conversation, found: list[str] | ValueError) -> str:
    if isinstance(found, list):
        answers = len(conversation.answers)
        return "all" if len(found) == answers else f"{len(found)} of {answers}"
    text = str(found)
    missing = next((word for word in ("reasoning", "tools", "tool calls", "text") if f"show the {word}" in text), None)
    if missing is None:
        return "refused"
    # Reasoning in the text is part of the text.
    return "no reasoning" if missing == "text" else f"no {missing}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/chat-templates.md"))
    with replacing(parser.parse_args().output) as path:
        path.write_text(report(), encoding="utf-8")
