"""The chat templates of today's models, as TRL ships them: what is learned of every kind of conversation."""

import pytest
from places import ROOT

pytest.importorskip("trl")

from chat_template_report import CASES, report, sweep, templates, tokenizer_for

from lora_kernels.data.chat import Renderer
from lora_kernels.data.messages import to_conversation

DOCS = ROOT / "docs" / "chat-templates.md"
# What each case says, in the order in which it is learned; two lines are two turns.
SAID = {
    "one turn": ["AONE"],
    "two turns": ["AONE", "ATWO"],
    "system": ["AONE", "ATWO"],
    "reasoning": ["RONE AONE"],
    "reasoning, two turns": ["RONE AONE", "RTWO ATWO"],
    "reasoning in the text": ["RONE AONE"],
    "tools": ["get_weather PARIS", "ATWO"],
}
OTHERS = ("QONE", "QTWO", "SYSTEM", "RESULT")


@pytest.fixture(scope="module")
def found():
    return list(sweep())


def test_exactly_what_the_assistant_says_is_learned(found):
    assert len(found) == len(templates()) * len(CASES) and len(templates()) > 40
    refused = 0
    for name, case, _, texts in found:
        if isinstance(texts, ValueError):
            refused += 1
            assert case not in ("one turn", "two turns"), (name, case, texts)
            assert str(texts).startswith("record: the chat template "), (name, case, texts)
            continue
        # The last turns are learned; where a template drops the reasoning of earlier ones, those are not.
        for said, text in zip(SAID[case][-len(texts) :], texts, strict=True):
            positions = [text.find(word) for word in said.split()]
            assert -1 not in positions and positions == sorted(positions), (name, case, text)
            assert all(text.count(word) == 1 for word in said.split() if word.isupper()), (name, case, text)
            assert not any(word in text for word in OTHERS), (name, case, text)
        assert len(texts) == len(SAID[case]) or "two turns" in case, (name, case, texts)
    assert refused < len(found) / 3


def test_the_end_of_each_turn_is_learned(found):
    for name, case, _, texts in found:
        if isinstance(texts, ValueError):
            continue
        ends = Renderer(tokenizer_for(templates()[name])).ends
        # GLM's turns end where the next begins: only the last has an end token.
        for text in texts[-1:] if "glm" in name else texts:
            assert text.endswith(ends), (name, case, text)


def test_the_same_as_the_marked_parts_of_trls_templates():
    """TRL marks in its own versions what the assistant says. It counts what the generation prompt holds as part of it,
    and learns turns whose reasoning the template drops."""
    compared = 0
    for name, template in templates().items():
        # Not the vision models' templates and Phi's, which mark nothing of a text, or an end token of their own.
        if not name.endswith("_training") or name.startswith(("idefics3", "llava", "phi")):
            continue
        tokenizer = tokenizer_for(template)
        for case, record in CASES.items():
            conversation = to_conversation(record, "record")
            renderer = Renderer(tokenizer)
            try:
                text, spans = renderer.spans(conversation)
            except ValueError:
                continue
            marked = tokenizer.apply_chat_template(
                conversation.messages, tools=conversation.tools, return_dict=True, return_assistant_tokens_mask=True
            )
            turns, before = [], 0
            for token, inside in zip(marked["input_ids"], marked["assistant_masks"], strict=True):
                if inside and not before:
                    turns.append([])
                if inside:
                    turns[-1].append(token)
                before = inside
            turns = [tokenizer.decode(turn).rstrip() for turn in turns][-len(spans) :]
            assert len(turns) == len(spans), (name, case)
            for turn, (start, end) in zip(turns, spans, strict=True):
                ours = text[start:end].rstrip()
                # Gemma's turn with a call ends with the token that asks for the tool's response.
                ours = ours.removesuffix("<|tool_response>") if "gemma" in name and "PARIS" in ours else ours
                assert turn.endswith(ours.lstrip()), (name, case, turn, ours)
                assert not any(word in turn.removesuffix(ours.lstrip()) for word in SAID[case][0].split()), (name, case)
                compared += 1
    assert compared > 150


def spans_of(tokenizer, messages, **record):
    """{text before: learned text} of a conversation, or None where it is refused."""
    try:
        text, spans = Renderer(tokenizer).spans(to_conversation({"messages": messages, **record}, "record"))
    except ValueError:
        return None
    return {text[:start]: text[start:end] for start, end in spans}


def test_what_is_learned_of_a_turn_does_not_depend_on_the_others():
    """Nor is a turn's header learned where the model speaks twice, or the turn before is left out."""
    call, result, last = CASES["tools"]["messages"][1:]
    chats = [
        (
            {},
            [
                *CASES["two turns"]["messages"][:2],
                {"role": "assistant", "content": "MORE"},
                *CASES["two turns"]["messages"],
            ],
        ),
        ({"tools": CASES["tools"]["tools"]}, [CASES["tools"]["messages"][0], call, result, call, result, last]),
        (CASES["two turns"], CASES["two turns"]["messages"]),
    ]
    compared = 0
    for name, template in templates().items():
        tokenizer = tokenizer_for(template)
        prompt = [{"role": "user", "content": "QONE"}]
        before, after = (
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=asked)
            for asked in (False, True)
        )
        header = after.removeprefix(before).strip() if after.startswith(before) else ""
        for rest, messages in chats:
            tools = {"tools": rest["tools"]} if "tools" in rest else {}
            whole = spans_of(tokenizer, messages, **tools)
            answers = [index for index, item in enumerate(messages) if item["role"] == "assistant"]
            for left_out in answers[:-1]:
                some = [{**item, "weight": 0} if index == left_out else item for index, item in enumerate(messages)]
                found = spans_of(tokenizer, some, **tools)
                assert (found is None) == (whole is None), (name, left_out)
                assert found is None or (found.items() <= whole.items() and len(found) == len(whole) - 1), (name, found)
                compared += found is not None
            for text in (whole or {}).values():
                assert not (header and text.lstrip().startswith(header)), (name, text)
    assert compared > 150


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_are_shown_or_the_chat_refused(role):
    for name, template in templates().items():
        messages = [{"role": role, "content": "ALWAYS IN FRENCH"}, *CASES["one turn"]["messages"]]
        found = spans_of(tokenizer_for(template), messages)
        assert found is None or "ALWAYS IN FRENCH" in next(iter(found)), name


def test_the_table_of_the_docs_is_what_the_code_does():
    assert DOCS.read_text(encoding="utf-8") == report()
