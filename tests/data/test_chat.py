"""Records in all their forms to conversations, and conversations to rows by odd chat templates."""

import datetime
import itertools
import json

import numpy as np
import pytest
from tiny_chat import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from lora_kernels.data.chat import Renderer
from lora_kernels.data.check import check_file
from lora_kernels.data.dataset import build_dataset
from lora_kernels.data.messages import to_conversation
from lora_kernels.data.pairs import to_pair
from lora_kernels.data.prompts import encode_prompt, prompt_of

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def shown(record, template=CHATML, **rendering):
    """The row as text, what is learned of it in [[ ]]."""
    tokenizer = template if isinstance(template, PreTrainedTokenizerFast) else tiny_tokenizer(template)
    ((ids, mask),) = Renderer(tokenizer, **rendering).tokenize([to_conversation(record, "record")])
    borders = [0, *(np.flatnonzero(np.diff(mask.astype(int))) + 1), len(ids)]
    pieces = [tokenizer.decode(ids[start:end]) for start, end in itertools.pairwise(borders)]
    marks = [mask[start] for start in borders[:-1]]
    return "".join(f"[[{piece}]]" if mark else piece for piece, mark in zip(pieces, marks, strict=True))


def tool_chat(content=""):
    turns = [user("how warm"), assistant(content, tool_calls=[CALL]), {"role": "tool", "content": "22"}]
    return {"tools": TOOLS, "messages": [*turns, assistant("it is 22")]}


@pytest.mark.parametrize("content", ["", None])
def test_tool_calls_are_learned_and_tools_and_results_shown(content):
    row = shown(tool_chat(content), WITH_TOOLS)
    call = json.dumps(CALL["function"])
    assert f"Tools: {json.dumps(TOOLS)}" in row
    assert f"assistant\n[[<call>{call}</call><|im_end|>]]\n<|im_start|>tool\n22<|im_end|>" in row
    assert row.endswith("assistant\n[[it is 22<|im_end|>]]")


def test_other_spellings_of_tool_calls_and_tools_are_the_same():
    arguments = json.dumps(CALL["function"]["arguments"])
    spelled = [
        {"tool_calls": [{"id": None, **CALL, "function": {"name": "get_weather", "arguments": arguments}}]},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "get_weather", "arguments": arguments}},
    ]
    wanted = to_conversation(tool_chat(), "record")
    for fields in spelled:
        record = tool_chat()
        record["messages"][1] = {"role": "assistant", "content": None, **fields}
        assert to_conversation(record, "record") == wanted
    for tools in (
        {"tools": json.dumps(TOOLS)},
        {"tools": [TOOLS[0]["function"]]},
        {"functions": [TOOLS[0]["function"]]},
    ):
        assert to_conversation({"messages": tool_chat()["messages"], **tools}, "record") == wanted
    sharegpt = [
        {"from": "human", "value": "how warm"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "22"},
        {"from": "gpt", "value": "it is 22"},
    ]
    assert to_conversation({"tools": TOOLS, "conversations": sharegpt}, "record") == wanted


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        (CHATML, "does not show the tools"),
        (CHATML + "{{ tools | tojson if tools else '' }}", "does not show the tool calls of message 1"),
        (WITH_TOOLS.replace("m.content or ''", "'' if m.role == 'tool' else m.content or ''"), r"text of message 2"),
    ],
)
def test_a_template_that_does_not_show_tools_is_refused(template, missing):
    with pytest.raises(ValueError, match=f"^record: .*{missing}"):
        shown(tool_chat(), template)


def test_templates_get_the_spelling_that_they_take():
    parts = CHATML.replace("message['content']", "(message['content'] | map(attribute='text') | join)")
    assert shown({"messages": [user("cat"), assistant("dog")]}, parts).endswith("[[dog<|im_end|>]]")
    # As DeepSeek's.
    text = WITH_TOOLS.replace("c.function | tojson", "c.function.name + c.function.arguments")
    assert '[[<call>get_weather{"city": "Paris"}</call><|im_end|>]]' in shown(tool_chat(), text)


def test_content_as_parts_is_their_text():
    parts = [{"type": "text", "text": "the cat "}, {"type": "text", "text": "says"}]
    record = {"messages": [{"role": "user", "content": parts}, assistant(["red"])]}
    assert to_conversation(record, "r").messages == [user("the cat says"), assistant("red")]
    record["messages"][0]["content"] = [{"type": "image", "url": "x"}]
    with pytest.raises(ValueError, match=r"^r: messages\[0\]: content\[0\]: parts must be of type 'text', got 'image'"):
        to_conversation(record, "r")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_sharegpt(key):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    wanted = [{"role": "system", "content": "s"}, user("hi"), assistant("yo")]
    assert to_conversation({key: turns}, "r").messages == wanted
    assert to_conversation({key: wanted}, "r").messages == wanted
    with pytest.raises(ValueError, match=r"^r: .*\[0\]: 'from' must be one of human, user, .*got 'narrator'"):
        to_conversation({key: [{"from": "narrator", "value": "once"}, *turns]}, "r")


def test_system_and_history_beside_the_other_forms():
    system, turns = {"role": "system", "content": "SYS"}, [user("hi"), assistant("yo")]
    for record in ({"messages": turns}, {"prompt": "hi", "completion": "yo"}, {"instruction": "hi", "output": "yo"}):
        assert to_conversation({**record, "system": "SYS"}, "r").messages == [system, *turns]
    assert to_conversation({"messages": [system, *turns], "system": "SYS"}, "r").messages == [system, *turns]
    with pytest.raises(ValueError, match="^r: 'system' and the first message are two different system messages"):
        to_conversation({"messages": [{**system, "content": "OTHER"}, *turns], "system": "SYS"}, "r")
    record = {"instruction": "and", "output": "yo", "history": [["first", "one"], ["next", "two"]]}
    found = to_conversation(record, "r")
    assert [item["content"] for item in found.messages] == ["first", "one", "next", "two", "and", "yo"]
    assert found.answers == (1, 3, 5)
    with pytest.raises(ValueError, match=r"^r: 'history' must be a list of \[question, answer\]"):
        to_conversation({**record, "history": ["first"]}, "r")
    with pytest.raises(ValueError, match=r"^r: history\[0\]: 'text' must be a string, got int"):
        to_conversation({**record, "history": [["first", 1]]}, "r")


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("loss", False), ("training", 0)])
def test_messages_can_be_left_out_of_what_is_learned(key, value):
    turns = [user("hi"), assistant("BAD", **{key: value}), user("no"), assistant("GOOD")]
    row = shown({"messages": turns})
    assert "BAD" in row and row.count("[[") == 1 and row.endswith("[[GOOD<|im_end|>]]")
    assert row == shown({"messages": [*turns[:3], assistant("GOOD", **{key: 1})]})
    with pytest.raises(ValueError, match="^record: no assistant message to learn"):
        shown({"messages": turns[:2]})
    with pytest.raises(ValueError, match=f"^record: message 1: '{key}' must be 0 or 1, true or false, got 0.5"):
        shown({"messages": [user("hi"), assistant("BAD", **{key: 0.5})]})
    if key != "weight":
        with pytest.raises(ValueError, match=f"message 0: '{key}' is 1, but only assistant messages can be learned"):
            shown({"messages": [{**user("hi"), key: 1}, assistant("yo")]})


THINKING = CHATML.replace(
    "message['content'] +",
    "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '') + message['content'] +",
)


def test_reasoning_is_learned_or_the_record_refused():
    for name in ("reasoning_content", "reasoning", "thinking"):
        record = {"messages": [user("hi"), assistant("yo", **{name: "WHY"})]}
        assert shown(record, THINKING).endswith("[[<think>WHY</think>yo<|im_end|>]]")
        with pytest.raises(ValueError, match="^record: .*does not show the reasoning of message 1; pass another"):
            shown(record)


def test_turns_whose_reasoning_is_dropped_are_left_out_and_counted():
    """As templates of reasoning models do it with all turns before the last question."""
    last = THINKING.replace("if message.reasoning_content", "if message.reasoning_content and loop.last")
    turns = [user("one"), assistant("A", reasoning_content="R"), user("two"), assistant("B", reasoning_content="S")]
    tokenizer = tiny_tokenizer(last)
    assert shown({"messages": turns}, tokenizer).count("[[") == 1
    with pytest.warns(UserWarning, match="^data: 1 answers are not learned, since the chat template does not show all"):
        build_dataset([({"messages": turns}, "data:1")], tokenizer, 256, "data")


EMPTY_BLOCK = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize("first", ["A", "<b>bold</b>", "<", "", "\n", "think"])
def test_an_empty_block_of_reasoning_that_only_the_last_turn_has(first):
    """The answer is not searched for, so it may begin as the block would."""
    row = shown({"messages": [user("one"), assistant(first), user("two"), assistant("B")]}, EMPTY_BLOCK)
    assert f"<|im_start|>assistant\n[[{first}<|im_end|>]]\n<|im_start|>user\ntwo" in row
    assert row.endswith("<think>\n\n</think>\n\n[[B<|im_end|>]]")


HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize("answer", ["a", "c", "final", "assistant", "", "end", "|", "user"])
def test_a_short_answer_is_not_found_in_the_header(answer):
    tokenizer = tiny_tokenizer(HARMONY)
    special = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    row = shown({"messages": [user("pick"), assistant(answer), user("again"), assistant("b")]}, tokenizer)
    final = "assistant[[<|channel|>final<|message|>"
    assert row == (
        f"<|start|>user<|message|>pick<|end|><|start|>{final}{answer}<|end|>]]"
        f"<|start|>user<|message|>again<|end|><|start|>{final}b<|return|>]]"
    )


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +"),
        CHATML.replace("message['content'] +", "('' if message['role'] == 'assistant' else message['content']) +"),
    ],
)
def test_an_answer_that_the_template_cuts_is_refused(template):
    with pytest.raises(ValueError, match="^record: the chat template does not show the text of message 1"):
        shown({"messages": [user("hi"), assistant("<think>why</think>yo")]}, template)


def test_a_template_with_other_loops_and_without():
    record = {"messages": [user("one"), assistant("A"), user("two"), assistant("B")]}
    wanted = shown(record)
    start = "{% for message in messages %}"
    others = [
        start + "{% for other in messages[loop.index:] %}{% endfor %}",
        start + "{% if message.role == 'tool' %}{% continue %}{% endif %}",
        "{#- a comment with {% for x in y %} -#}" + start,
        "{%- for message in messages -%}",
        "{% set kept = messages[0:] %}{% for message in kept %}",
    ]
    for other in others:
        assert shown(record, CHATML.replace(start, other)) == wanted, other
    flat = (
        "Q: {{ messages[0].content }} A:{% if messages | length > 1 %} {{ messages[1].content }}<|im_end|>{% endif %}"
    )
    assert shown({"messages": record["messages"][:2]}, flat) == "Q: one A:[[ A<|im_end|>]]"


def test_the_work_for_a_row_grows_with_its_turns(monkeypatch):
    """Ten times as many would take a hundred times as much text if every prefix were rendered."""
    lengths, render = [], Renderer.render

    def noted(*args, **kwargs):
        text = render(*args, **kwargs)
        lengths.append(len(text))
        return text

    monkeypatch.setattr(Renderer, "render", noted)
    rendered = {}
    for turns in (10, 100):
        lengths.clear()
        shown({"messages": [user("one"), assistant("A")] * turns})
        rendered[turns] = sum(lengths)
    assert 0 < rendered[100] < 15 * rendered[10]


def test_the_date_of_a_template():
    template = "<|im_start|>{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
    record = {"messages": [user("hi"), assistant("yo")]}
    row = shown(record, template, date=datetime.date(2024, 2, 29))
    assert row.startswith("<|im_start|>29 Feb 2024<|im_end|>")
    assert shown(record, template).startswith(f"<|im_start|>{datetime.datetime.now():%d %b %Y}<|im_end|>")


def test_a_token_outside_the_embedding_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|tool|>"])
    record = {"messages": [user("call"), assistant("now <|tool|>")]}
    wrong = rf"token {rows} \('<\|tool\|>'\) is not in the model's embedding, which has {rows} rows"
    with pytest.raises(ValueError, match=f"^record: {wrong}"):
        shown(record, tokenizer, vocab_size=rows)
    shown(record, tokenizer, vocab_size=rows + 1)
    with pytest.raises(ValueError, match=f"^prompt: {wrong}"):
        encode_prompt(tokenizer, "<|tool|>", vocab_size=rows)
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [user("a"), assistant("b")]}) + "\n" + json.dumps(record) + "\n")
    (problem,) = check_file(path, tokenizer, vocab_size=rows).problems
    assert problem.startswith(f"{path}:2: token {rows}")


def test_fields_that_nobody_reads_are_named_once(tmp_path):
    records = [
        {"id": 1, "source": None, "messages": [user("a"), {**assistant("b"), "mood": "good", "recipient": "all"}]},
        {"id": 2, "messages": [user("c"), assistant("d")]},
    ]
    tokenizer = tiny_tokenizer(CHATML + "{{ messages[0].recipient }}")
    with pytest.warns(UserWarning, match="not used") as warned:
        build_dataset([(record, f"data:{i}") for i, record in enumerate(records)], tokenizer, 256, "data")
    assert [str(item.message) for item in warned] == ["data: fields that are not used: 'id', 'messages[].mood'"]
    (path := tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert check_file(path, tokenizer).notes == ["fields that are not used: 'id', 'messages[].mood'"]


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"messages": [user("a"), assistant("b")], "output": "c", "history": [["d", "e"]]}, {"output", "history"}),
        ({"instruction": "a", "output": "b", "completion": "c", "margin": 1}, {"completion", "margin"}),
        ({"prompt": "a", "completion": "b", "input": "c"}, {"input"}),
        ({"conversations": [user("a"), assistant("b")], "messages": None, "system": "s"}, set()),
    ],
)
def test_fields_of_another_form_are_not_used(record, unused):
    assert to_conversation(record, "r").unknown == unused


def test_fields_of_a_pair_that_are_not_used():
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "input": "d", "score_chosen": 3}
    assert to_pair(record, "r").chosen.unknown == {"input", "score_chosen"}


def test_further_variables_of_the_template():
    template = CHATML.replace("{{ '<|im_start|>assistant", "{{ '' if quick else '' }}{{ '<|im_start|>assistant")
    template = "{% if quick %}<|im_start|>quick<|im_end|>\n{% endif %}" + template
    record = {"messages": [user("hi"), assistant("yo")], "chat_template_kwargs": {"quick": True}}
    assert shown(record, template).startswith("<|im_start|>quick<|im_end|>")
    with pytest.raises(ValueError, match="^record: 'chat_template_kwargs' must be an object, got 'quick'"):
        shown({**record, "chat_template_kwargs": "quick"}, template)


def test_a_prompt_has_the_records_tools():
    tokenizer = tiny_tokenizer(WITH_TOOLS)
    record = tool_chat()
    prompt = prompt_of({**record, "messages": record["messages"][:3]}, "record")
    assert prompt == prompt_of(record, "record")
    text = tokenizer.decode(encode_prompt(tokenizer, prompt))
    assert text == shown(record, tokenizer).replace("[[", "").replace("]]", "").removesuffix("it is 22<|im_end|>")
    assert prompt_of({"instruction": "a"}, "record") == prompt_of({"conversations": [user("a")]}, "record") == "a"


def test_a_pair_of_whole_conversations_beside_its_prompt_as_text():
    system, question = {"role": "system", "content": "s"}, user("hi")
    record = {
        "prompt": "hi",
        "chosen": [system, question, assistant("yo")],
        "rejected": [system, question, assistant("no")],
    }
    pair = to_pair(record, "r")
    assert pair.prompt == [system, question]
    assert (pair.chosen.messages[-1], pair.rejected.messages[-1]) == (assistant("yo"), assistant("no"))
    with pytest.raises(ValueError, match="^r: chosen is a whole conversation, but none of its user messages"):
        to_pair({**record, "prompt": "other"}, "r")


def test_a_pair_of_tool_calls():
    other = {"type": "function", "function": {"name": "get_time", "arguments": {}}}
    record = {
        "tools": TOOLS,
        "prompt": "how warm",
        "chosen": [assistant(None, tool_calls=[CALL])],
        "rejected": [assistant(None, tool_calls=[other])],
    }
    pair = to_pair(record, "r")
    assert pair.void() is None and pair.chosen.tools == TOOLS
    assert to_pair({**record, "rejected": record["chosen"]}, "r").void() == "chosen and rejected are the same"


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([user(None), assistant("a")], "'content' is missing or null"),
        ([user("a"), {"role": "assistant"}], "'content' is missing or null"),
        ([user("a"), assistant("", tool_calls=[{"name": 3}])], r"tool_calls\[0\] must be"),
        ([user("a"), assistant("", tool_calls="{")], "'tool_calls' is text that is not JSON"),
        (
            [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "[1]"}])],
            "'arguments' must be an object or JSON text of one, got \\[1\\]",
        ),
        ([user("a"), assistant("b", reasoning_content=3)], "'reasoning_content' must be a string, got int"),
    ],
)
def test_bad_messages(messages, wrong):
    with pytest.raises(ValueError, match=rf"^f:7: messages\[\d\].*{wrong}"):
        to_conversation({"messages": messages}, "f:7")


@pytest.mark.parametrize("tools", ["{", [1], {"name": "f"}, [{"function": {}}]])
def test_bad_tools(tools):
    with pytest.raises(ValueError, match="^f:7: "):
        to_conversation({"messages": [user("a"), assistant("b")], "tools": tools}, "f:7")


def test_a_result_that_is_a_list_is_shown_as_json():
    for value in (["Paris", "Rome"], [{"text": "hi", "score": 0.9}], [], [{"type": "cafe"}], {"a": 1}):
        messages = [*tool_chat()["messages"][:2], {"role": "tool", "content": value}, assistant("done")]
        assert to_conversation({"messages": messages}, "r").messages[2]["content"] == json.dumps(value)
    messages[2]["content"] = [{"type": "text", "text": "22"}]
    assert to_conversation({"messages": messages}, "r").messages[2]["content"] == "22"


def test_a_call_keeps_its_id():
    call = {"id": "abcdefghi", "name": "f", "arguments": None}
    found = to_conversation({"messages": [user("a"), assistant(None, tool_calls=[call])]}, "r").messages[1][
        "tool_calls"
    ]
    assert found == [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}]


def test_the_reasoning_is_what_is_not_blank():
    record = {"messages": [user("hi"), assistant("yo", reasoning_content=" ", thinking="WHY")]}
    assert shown(record, THINKING).endswith("[[<think>WHY</think>yo<|im_end|>]]")


def test_tools_whose_names_stand_elsewhere_are_missed():
    tools = [{"type": "function", "function": {"name": "search"}}]
    with pytest.raises(ValueError, match="^record: the chat template does not show the tools"):
        shown({"tools": tools, "messages": [user("please search cats"), assistant("ok")]})


def test_an_answer_that_only_the_header_has_is_refused():
    silent = CHATML.replace("message['content'] +", "('' if message['role'] == 'assistant' else message['content']) +")
    with pytest.raises(ValueError, match="^record: the chat template does not show the text of message 1"):
        shown({"messages": [user("hi"), assistant("assistant")]}, silent)


def test_content_is_never_shown_as_a_list():
    """A template that changes what the user says makes no better of a list of parts."""
    template = CHATML.replace("message['content'] +", "(message['content'] | string)[:3] +")
    with pytest.raises(ValueError, match="^record: .*text of message 1"):
        shown({"messages": [user("a longer one"), assistant("a longer answer")]}, template)
    assert shown({"messages": [user("a longer one"), assistant("b")]}, template).endswith("[[b<|im_end|>]]")


@pytest.mark.parametrize("item", [{"role": None, "content": "x"}, {"from": None, "value": "x"}])
def test_messages_with_nulls_are_named(item):
    with pytest.raises(ValueError, match=r"^f:7: messages\[0\] must be"):
        to_conversation({"messages": [item, assistant("a")]}, "f:7")
    with pytest.raises(ValueError, match=r"^f:7: messages\[0\]: content\[0\]: 'text' must be a string, got NoneType"):
        to_conversation({"messages": [user([{"type": "text"}]), assistant("a")]}, "f:7")


def test_half_a_character_in_a_call_is_named():
    call = {"name": "get_weather", "arguments": {"city": "\ud83d"}}
    with pytest.raises(ValueError, match=r"^record: messages\[1\]: 'tool_calls' holds '.ud83d', half of a character"):
        shown({"tools": TOOLS, "messages": [user("a"), assistant("", tool_calls=[call])]}, WITH_TOOLS)


def test_variables_that_are_training_s_own_are_refused():
    record = {"messages": [user("hi"), assistant("yo")], "chat_template_kwargs": {"tokenize": True}}
    with pytest.raises(ValueError, match="^r: 'chat_template_kwargs' must not have 'tokenize'"):
        to_conversation(record, "r")


def test_flags_say_nothing_of_prompts():
    turns = [user("a"), assistant("b"), user("c"), assistant("d", weight=0)]
    assert prompt_of({"messages": turns}, "r") == [user("a"), assistant("b"), user("c")]
    assert prompt_of({"messages": [{**user("a"), "weight": 1}]}, "r") == "a"
    named = {**user("a"), "name": "Bob"}
    assert prompt_of({"messages": [named]}, "r") == [named]
    same = [user("a"), assistant("b", weight=0), user("c")]
    pair = to_pair(
        {"chosen": [*same, assistant("d")], "rejected": [user("a"), assistant("b"), *turns[2:3], assistant("e")]}, "r"
    )
    assert pair.prompt == [user("a"), assistant("b"), user("c")] and pair.rejected.answers == (3,)
