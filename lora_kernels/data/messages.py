"""Records to conversations: the forms in which people keep chats, as one list of messages.

A record of training data has one of these forms:

- {"messages": [message, ...]} or {"conversations": [message, ...]}: every assistant turn is learned
- {"instruction": str, "input": str (optional), "output": str, "history": [[question, answer], ...] (optional)}: the
  answers of the history are learned too
- {"prompt": ..., "completion": ...}: each a string (a user turn, an assistant turn) or a list of messages; only the
  completion's assistant turns are learned

and may have besides

- "system": the system message
- "tools": the tools that may be called, as a list of JSON schemas or as JSON text of one ("functions" is the same)
- "chat_template_kwargs": further variables of the chat template, such as {"enable_thinking": false}

A message is {"role", "content"} or ShareGPT's {"from", "value"}. "content" is a text, a list of text parts, or null
beside "tool_calls". "weight" 0, or "train", "training" or "loss" false, leaves an assistant message out of what is
learned. Reasoning goes into "reasoning_content" ("reasoning" and "thinking" are the same). All other fields of a
message are handed to the chat template.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMS = (
    '{"instruction", "input" (optional), "output"}',
    '{"messages": [{"role", "content"}, ...]}',
    '{"prompt", "completion"}',
)
# Roles by other names.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    "system": "system",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("weight", "train", "training", "loss")
_MESSAGE_FIELDS = {
    *("role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call"),
    *_FLAGS,
    *REASONING,
}
# What a record of any form may have.
_SHARED_FIELDS = {"system", "tools", "functions", "chat_template_kwargs"}

# What training itself tells the template.
_OWN_KWARGS = {
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation"),
}

Message = dict[str, Any]
# The text of one user turn, messages, or {"messages", and maybe "tools" and "chat_template_kwargs"}.
Prompt = str | Sequence[Message] | dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, of which those with an index in `answers` are learned.

    tools: JSON schemas, or None. template_kwargs: further variables of the chat template. where: the record's place,
    for messages to the user. unknown: the record's fields that mean nothing here, "messages[].x" for a message's x.
    """

    messages: list[Message]
    answers: tuple[int, ...]
    where: str
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()

    @property
    def blank(self) -> bool:
        """Whether the answers say nothing."""
        return not any(said(self.messages[i]).strip() for i in self.answers)


def said(message: Message) -> str:
    """What a message says as one text: its reasoning, content and tool calls."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return "\n".join(filter(None, (reasoning_of(message), message["content"], calls)))


def reasoning_of(message: Message) -> str:
    """The reasoning before a message's answer; "" without."""
    return next((text for name in REASONING if (text := message.get(name, "").strip())), "")


def to_conversation(record: Any, where: str) -> Conversation:
    """The record's messages; ValueError starting with `where` for a bad record."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    first, fields = 0, {"instruction", "input", "output", "history"}
    if (name := turns_field(record)) is not None:
        messages, fields = message_list(record[name], name, where), {name}
    elif record.get("instruction") is not None and "output" in record:
        messages = [*history(record, where), user_turn(record, where)]
        messages.append(message("assistant", text_field(record, "output", where)))
    elif "prompt" in record and "completion" in record:
        messages, fields = turns_of(record, "prompt", "user", where), {"prompt", "completion"}
        first = len(messages)
        messages += turns_of(record, "completion", "assistant", where)
    else:
        found = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{where}: expected one of {'; '.join(FORMS)}; got the fields {found}")
    before = len(messages)
    messages = with_system(record, messages, where)
    return conversation_of(record, messages, first + len(messages) - before, where, fields)


def turns_field(record: dict) -> str | None:
    """The field that holds a whole chat, if there is one."""
    return next((name for name in ("messages", "conversations") if record.get(name) is not None), None)


def conversation_of(record: dict, messages: list[Message], first: int, where: str, fields: set[str]) -> Conversation:
    """The conversation of a record's messages, in which assistant turns from `first` on are learned, unless they say
    otherwise; `fields` are those of the record's form."""
    wanted = [_wanted(item, f"{where}: message {index}") for index, item in enumerate(messages)]
    answers = tuple(i for i in range(first, len(messages)) if messages[i]["role"] == "assistant" and wanted[i])
    if not answers:
        raise ValueError(f"{where}: no assistant message to learn")
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where}: the first message must not be the assistant's")
    unknown = {name for name, value in record.items() if value is not None} - fields - _SHARED_FIELDS
    unknown |= {f"messages[].{name}" for item in messages for name in item.keys() - _MESSAGE_FIELDS}
    messages = without_flags(messages[: answers[-1] + 1])
    return Conversation(
        messages, answers, where, tools_of(record, where), template_kwargs_of(record, where), frozenset(unknown)
    )


def without_flags(messages: Iterable[Message]) -> list[Message]:
    """The messages without what says whether they are learned."""
    return [{name: value for name, value in item.items() if name not in _FLAGS} for item in messages]


def _wanted(item: Message, where: str) -> bool:
    """Whether a message's own flags leave it among what is learned."""
    wanted = True
    for name in _FLAGS:
        value = item.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise ValueError(f"{where}: {name!r} must be 0 or 1, true or false, got {value!r}")
        if value and item["role"] != "assistant" and name != "weight":
            raise ValueError(f"{where}: {name!r} is {value!r}, but only assistant messages can be learned")
        wanted = wanted and bool(value)
    return wanted


def prompt_of(record: Any, where: str) -> Prompt:
    """The prompt of a training record, which may have no answer; ValueError starting with `where` for a bad record."""
    if isinstance(record, dict) and (name := turns_field(record)) is not None:
        messages = without_flags(with_system(record, message_list(record[name], name, where), where))
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not messages:
            raise ValueError(f"{where}: the first message must not be the assistant's")
    else:
        conversation = to_conversation(with_empty_answer(record) if isinstance(record, dict) else record, where)
        messages = conversation.messages[: conversation.answers[-1]]
    return prompt_with(messages, tools_of(record, where), template_kwargs_of(record, where))


def prompt_with(messages: list[Message], tools: Any = None, template_kwargs: dict[str, Any] | None = None) -> Prompt:
    """A prompt in its shortest form."""
    if tools or template_kwargs:
        return {"messages": messages, "tools": tools, "chat_template_kwargs": template_kwargs or {}}
    return messages[0]["content"] if messages == [message("user", messages[0]["content"])] else messages


def asked(prompt: Prompt, where: str = "prompt", answer: str | None = None) -> Conversation:
    """The conversation of a prompt, and of an answer to it. Raises ValueError for a prompt in none of its forms."""
    record = prompt if isinstance(prompt, dict) else {"messages": prompt}
    if isinstance(prompt, str):
        record = {"messages": [message("user", prompt)]}
    messages = message_list(list(record["messages"]), "messages", where)
    tools, kwargs = tools_of(record, where), template_kwargs_of(record, where)
    if answer is None:
        return Conversation(messages, (), where, tools, kwargs)
    return Conversation([*messages, message("assistant", answer)], (len(messages),), where, tools, kwargs)


def with_empty_answer(record: dict) -> dict:
    """A record with a prompt alone gets an empty answer; any other is returned as it is."""
    forms = (("instruction", "output"), ("prompt", "completion"))
    given = {name for name, value in record.items() if value is not None}
    if not any({*form} <= given for form in forms):
        for prompt, answer in forms:
            if prompt in given:
                return {**record, answer: ""}
    return record


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def with_system(record: dict, messages: list[Message], where: str) -> list[Message]:
    """The messages after the record's "system", if it has one."""
    if not record.get("system"):
        return messages
    system = message("system", text_field(record, "system", where))
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0]["content"].strip() != system["content"].strip():
        raise ValueError(f"{where}: 'system' and the first message are two different system messages")
    return messages


def user_turn(record: dict, where: str) -> Message:
    """What the user says in a record with an instruction and maybe an input."""
    content = text_field(record, "instruction", where)
    if record.get("input"):
        content += "\n\n" + text_field(record, "input", where)
    return message("user", content)


def history(record: dict, where: str) -> list[Message]:
    """The turns before the instruction."""
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        raise ValueError(f"{where}: 'history' must be a list of [question, answer], got {turns!r:.80}")
    messages = []
    for index, turn in enumerate(turns):
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append(message(role, text_field({"text": text}, "text", f"{where}: history[{index}]")))
    return messages


def text_field(record: dict, name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = value[error.start : error.end]
        raise ValueError(f"{where}: {name!r} holds {half!r}, half of a character, at {error.start}") from None
    return value


def turns_of(record: dict, name: str, role: str, where: str) -> list[Message]:
    """The messages of a field that holds a text, said by `role`, or messages."""
    if isinstance(record[name], str):
        return [message(role, text_field(record, name, where))]
    return message_list(record[name], name, where)


def message_list(value: Any, name: str, where: str) -> list[Message]:
    """A list of messages as the chat templates know them: "role", and "content" as one text.

    Fields that are null are left out, since files with columns have every field in every message.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name!r} must be a non-empty list of messages, got {value!r:.80}")
    return [_message(item, f"{name}[{index}]", where) for index, item in enumerate(value)]


def _message(item: Any, name: str, where: str) -> Message:
    given = item
    item = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    if not ({"role"} <= item.keys() or {"from", "value"} <= item.keys()):
        raise ValueError(f'{where}: {name} must be {{"role", "content"}}, got {given!r:.80}')
    where = f"{where}: {name}"
    sharegpt = "role" not in item
    role = text_field({"role": item.pop("from") if sharegpt else item.pop("role")}, "role", where)
    if sharegpt and role not in _ROLES:
        raise ValueError(f"{where}: 'from' must be one of {', '.join(_ROLES)}, got {role!r}")
    role = _ROLES.get(role, role)
    content = item.pop("value" if sharegpt else "content", None)
    if role == "function_call":
        role, item["tool_calls"], content = "assistant", content, None
    calls = item.pop("tool_calls", None)
    if calls is None and (call := item.pop("function_call", None)) is not None:
        calls = [call]
    if calls and (calls := _tool_calls(calls, where)):
        item["tool_calls"] = calls
    for name in REASONING:
        if name in item and not text_field(item, name, where).strip():
            del item[name]
    if content is None and not (calls or reasoning_of(item)):
        raise ValueError(f'{where} must be {{"role", "content"}}: its \'content\' is missing or null')
    return {"role": role, "content": _content(content, role, where), **item}


def _content(value: Any, role: str, where: str) -> str:
    """One text of what `content` may be."""
    if value is None:
        return ""
    is_parts = isinstance(value, list) and all(isinstance(part, (str, dict)) for part in value)
    if role == "tool" and not isinstance(value, str):
        # What the tool returned may be any list.
        is_texts = is_parts and all(isinstance(part, dict) and {*part} == {"type", "text"} for part in value)
        if not (value and is_texts and all(part["type"] == "text" for part in value)):
            return _as_json(value, "content", where)
    if not is_parts:
        return text_field({"content": value}, "content", where)
    texts = []
    for index, part in enumerate(value):
        place = f"{where}: content[{index}]"
        part = {"text": part} if isinstance(part, str) else part
        if (kind := part.get("type") or "text") != "text":
            raise ValueError(f"{place}: parts must be of type 'text', got {kind!r}")
        texts.append(text_field({"text": part.get("text")}, "text", place))
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """[{"type": "function", "function": {"name", "arguments": {...}}, ...}] of a call or a list of calls."""
    value = _from_json(value, "tool_calls", where)
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else [value]):
        place = f"{where}: tool_calls[{index}]"
        # Without "function", its fields stand among the call's own.
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{place} must be {{"function": {{"name", "arguments"}}}}, got {call!r:.80}')
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _from_json({} if arguments in (None, "") else arguments, "arguments", place) or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"{place}: 'arguments' must be an object or JSON text of one, got {arguments!r:.80}")
        own = {"type", "function", "name", "arguments", "parameters"}
        rest = {name: item for name, item in call.items() if name not in own and item is not None}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}, **rest})
    _as_json(calls, "tool_calls", where)
    return calls


def tools_of(record: dict, where: str) -> list[dict[str, Any]] | None:
    """The record's tools as chat templates know them: [{"type": "function", "function": {...}}, ...], or None."""
    name = next((name for name in ("tools", "functions") if record.get(name)), None)
    if name is None:
        return None
    tools = _from_json(record[name], name, where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: {name!r} must be a list of JSON schemas, or JSON text of one, got {tools!r:.80}")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for index, tool in enumerate(tools):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise ValueError(f"{where}: {name}[{index}] must have a 'name', got {tool!r:.80}")
    _as_json(tools, name, where)
    return tools or None


def template_kwargs_of(record: dict, where: str) -> dict[str, Any]:
    """The record's further variables of the chat template."""
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"{where}: 'chat_template_kwargs' must be an object, got {kwargs!r:.80}")
    if taken := sorted(_OWN_KWARGS & kwargs.keys()):
        raise ValueError(f"{where}: 'chat_template_kwargs' must not have {', '.join(map(repr, taken))}")
    return {name: value for name, value in kwargs.items() if value is not None}


def _as_json(value: Any, name: str, where: str) -> str:
    return text_field({name: json.dumps(value, ensure_ascii=False)}, name, where)


def _from_json(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {name!r} is text that is not JSON: {error.msg}, in {value!r:.80}") from None


def unread(unknown: Iterable[str], template: str) -> list[str]:
    """Those of a conversation's unknown fields that the chat template does not read either."""
    return sorted(name for name in unknown if "[]." not in name or name.split("[].")[1] not in template)
