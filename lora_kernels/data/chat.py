"""Conversations to token rows by the tokenizer's chat template, and which of a row's tokens are learned."""

import bisect
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_kernels.data.messages import (
    Conversation,
    Message,
    message,
    reasoning_of,
)

# The Alpaca layout in plain text, so that a base model needs no new tokens. {bos} is put in by `set_chat_template`.
DEFAULT_CHAT_TEMPLATE = (
    "{bos}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

# Characters of Unicode's private use, which a text hardly has, and a field that no template knows.
_BEGIN, _END, _PROBE = "\ue0a0", "\ue0a1", "\ue0a2"
_MARKS = re.compile(f"([{_BEGIN}{_END}])(\\d+):(\\d+);")
_INDEX = "lora_kernels_index"
_TAGS = re.compile(r"\{#.*?#\}|\{%([-+]?)\s*(for|endfor)\b(.*?)([-+]?)%\}", re.DOTALL)
_TARGET = re.compile(r"\s*(\w+)\s+in\b")
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# What of a message templates want in different ways: content as a list of parts, and a call's arguments as JSON text.
# What most of them want comes first.
_SPELLINGS = tuple((parts, text) for parts in (False, True) for text in (False, True))
Span = tuple[int, int]


def set_chat_template(tokenizer: Any, chat_template: str | None = None) -> None:
    """Give the tokenizer `chat_template` (Jinja text, or a file with it), or `DEFAULT_CHAT_TEMPLATE` if it has none.

    The default starts with the begin token where the tokenizer itself would add one. Raises ValueError where the
    default is needed and the tokenizer has no end token.
    """
    if chat_template is not None:
        if "{{" not in chat_template and "{%" not in chat_template:
            if not Path(chat_template).is_file():
                raise FileNotFoundError(f"chat_template is neither a Jinja template nor a file: {chat_template}")
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        tokenizer.chat_template = chat_template
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an end token; pass chat_template")
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE.replace("{bos}", "{{ bos_token }}" if adds_bos else "", 1)


class Renderer:
    """Conversations to text with the character spans of what is learned, and on to token ids with an answer mask.

    The template is rendered with an invisible mark wherever one of its loops goes on to another message, so that the
    text of each message is known by its position, whatever it says. A chat is rendered a few times, however many turns
    it has. What is learned of an assistant message begins after the part of it that the generation prompt already
    holds, and ends with the turn.

    chat_template: Jinja text, by default the tokenizer's own template. date: what templates take for today's date.
    vocab_size: rows of the model's embedding, beyond which no token may be. whole: leave out answers that the template
    does not show in full; else they are taken as it shows them. left_out: how many were left out until now.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        date: datetime.date | None = None,
        vocab_size: int | None = None,
        whole: bool = True,
    ) -> None:
        self.tokenizer, self.chat_template, self.date = tokenizer, chat_template, date
        self.vocab_size, self.whole = vocab_size, whole
        self.left_out = 0
        self._spelling = _SPELLINGS[0]

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """Special tokens as texts, the longest first."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        ends = {str(token) for token in added.values() if getattr(token, "special", False)}
        ends |= set(self.tokenizer.all_special_tokens)
        return tuple(sorted(filter(None, ends), key=len, reverse=True))

    def spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text up to the end of the last learned turn, and [start, end) of what is learned.

        Turns that the template does not show in full are left out, as when it drops the reasoning of all turns but the
        last. ValueError where none is left, and where it does not show the tools, or what was said to or by them.
        """
        rendering, missing = self._spelled(conversation)
        kept = [index for index in conversation.answers if not (self.whole and index in missing)]
        spans = [span for index in kept if (span := rendering.learned(index))]
        if not spans:
            why = next((missing[index] for index in conversation.answers if index in missing), "no answer is shown")
            raise ValueError(f"{conversation.where}: {why}; pass another chat_template")
        self.left_out += len(conversation.answers) - len(spans)
        return rendering.text[: spans[-1][1]], spans

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids after which the model's answer to a conversation without answers starts."""
        text = self._spelled(conversation, add_generation_prompt=True)[0].text
        ((ids, _),) = self._encode([text])
        self.check_ids(ids, conversation.where)
        return ids

    def _spelled(
        self, conversation: Conversation, add_generation_prompt: bool = False
    ) -> tuple["_Rendering", dict[int, str]]:
        """The conversation as the template shows most of it, and what of its messages is missing."""
        best, problems = None, []
        calls = any("tool_calls" in item for item in conversation.messages)
        for spelling in sorted(_SPELLINGS, key=lambda one: one != self._spelling):
            if spelling[1] and not calls:
                continue
            try:
                rendering = _Rendering(self, conversation, spelling, add_generation_prompt)
                missing = rendering.missing()
            except ValueError as error:
                problems.append(error)
                continue
            if best is None or len(missing) < len(best[1]):
                best = rendering, missing
            if not missing:
                self._spelling = spelling
                break
        if best is None:
            # What is missing says more than that another spelling is refused.
            raise next((problem for problem in problems if "refuses" not in str(problem)), problems[-1])
        return best

    def render(
        self,
        messages: Sequence[Message],
        conversation: Conversation,
        add_generation_prompt: bool = False,
        marked: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of `messages` with the tools and variables of `conversation`. ValueError where the template refuses
        them."""
        import jinja2

        template = self.tokenizer.get_chat_template(self.chat_template, conversation.tools)
        if (date := self.date) is not None:
            template = _NOW.sub(lambda call: json.dumps(date.strftime(call[2])), template)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=conversation.tools,
                chat_template=_marking(template) if marked else template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{**conversation.template_kwargs, **kwargs},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            where = conversation.where
            raise ValueError(f"{where}: the chat template refuses this conversation: {error}") from error

    def tokenize(self, conversations: Sequence[Conversation]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Token ids and answer mask of each conversation.

        Where a token reaches over a span's border, the text is tokenised piecewise instead, as it would be in use: the
        prompt is tokenised by itself there.
        """
        rendered = [self.spans(conversation) for conversation in conversations]
        # transformers can't tokenise nothing.
        encoded = self._encode([text for text, _ in rendered]) if rendered else ()
        for conversation, (text, spans), (ids, offsets) in zip(conversations, rendered, encoded, strict=True):
            where = conversation.where
            cuts = offsets and _token_cuts(offsets, spans)
            if not cuts:
                ids, cuts = self._piecewise(text, spans, ids, where)
            mask = np.zeros(len(ids), dtype=bool)
            for start, end in zip(cuts[::2], cuts[1::2], strict=True):
                mask[start:end] = True
            if not text.endswith(self.ends):
                if self.tokenizer.eos_token_id is None:
                    raise ValueError(
                        f"{where}: the chat template ends an answer without a special token, and the tokenizer has no "
                        "end token, so the model could not learn to stop"
                    )
                ids = [*ids, self.tokenizer.eos_token_id]
                mask = np.append(mask, True)
            self.check_ids(ids, where)
            yield ids, mask

    def check_ids(self, ids: Sequence[int], where: str) -> None:
        """ValueError for a token that the model's embedding has no row for."""
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            token = max(ids)
            raise ValueError(
                f"{where}: token {token} ({self._decode([token])!r}) is not in the model's embedding, which has "
                f"{self.vocab_size} rows; the tokenizer has tokens that the model was never enlarged for"
            )

    def _encode(self, texts: list[str]) -> list[tuple[list[int], list[Span] | None]]:
        """Token ids of each text, and their character spans, which only a fast tokenizer knows."""
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast
        )
        offsets = encoded["offset_mapping"] if fast else [None] * len(texts)
        return list(zip(encoded["input_ids"], offsets, strict=True))

    def _piecewise(self, text: str, spans: list[Span], whole: list[int], where: str):
        borders = [0, *(cut for span in spans for cut in span)]
        pieces = self._encode([text[start:end] for start, end in itertools.pairwise(borders)])
        ids = [token for piece, _ in pieces for token in piece]
        if self._decode(ids) != self._decode(whole):
            raise ValueError(
                f"{where}: the tokenizer joins the end of the prompt and the start of the answer into one token, and "
                "tokenising them apart changes the text; pass a chat_template that ends the prompt with a special token"
            )
        return ids, list(np.cumsum([len(piece) for piece, _ in pieces]))

    def common_start(self, one: str, other: str) -> int:
        """Characters of the whole tokens with which both texts begin."""
        (ids, _), (others, _) = self._encode([one, other])
        same = self._decode(os.path.commonprefix([ids, others]))
        return len(same) if one.startswith(same) else 0

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class _Rendering:
    """One conversation by the chat template: its text, and where in it the messages are."""

    def __init__(
        self,
        renderer: Renderer,
        conversation: Conversation,
        spelling: tuple[bool, bool],
        add_generation_prompt: bool = False,
    ) -> None:
        self.renderer, self.conversation, self.spelling = renderer, conversation, spelling
        self.asks = add_generation_prompt
        self.text, self.regions = self._render(conversation.messages, add_generation_prompt)
        self._prompts: dict[tuple[str, bool | None], str | None] = {}
        self._turns: dict[int, Span | None] = {}
        self._learned: dict[int, Span | None] = {}

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, **kwargs
    ) -> tuple[str, dict[int, Span]]:
        spelled = [_spell(item, *self.spelling) for item in messages]
        text = self.renderer.render(spelled, self.conversation, add_generation_prompt, False, **kwargs)
        numbered = [{**item, _INDEX: index} for index, item in enumerate(spelled)]
        unmarked, regions = _read_marks(
            self.renderer.render(numbered, self.conversation, add_generation_prompt, True, **kwargs)
        )
        # A template may have looked at the marks, or there are none.
        return text, regions if unmarked == text else {}

    def learned(self, index: int) -> Span | None:
        """[start, end) of what is learned of the assistant message `index`, or None where it can't be located."""
        if index not in self._learned:
            self._learned[index] = self._locate(index)
        return self._learned[index]

    def _locate(self, index: int) -> Span | None:
        region = self._turn(index)
        if region is None:
            return None
        start, end = region
        prompt = self._prompt_of_turn(index, self.text[start:end])
        if prompt is None:
            return None
        start += len(prompt)
        stripped = self.text[start:end].rstrip()
        return start, start + len(stripped) if stripped.endswith(self.renderer.ends) else end

    def _prompt_of_turn(self, index: int, turn: str) -> str | None:
        """What of a turn the generation prompt holds already, or None where that can't be told."""
        own = self._generation_prompt(index, None)
        if own is None:
            return None
        if own and turn.startswith(own):
            return own
        # Many templates have another prompt with enable_thinking; and some have none after a tool's result.
        others = [self._generation_prompt(index, thinking) for thinking in (True, False) if self._may_think]
        roles = [item["role"] for item in self.conversation.messages[:index]]
        others += [self._generation_prompt(roles.index("user") + 1, None)] if "user" in roles else []
        for prompt in others:
            if prompt and turn.startswith(prompt):
                return prompt
        if not own:
            return ""
        # The turn starts otherwise than the template has an answer start, as when only the last turn gets an empty
        # block of reasoning. What both begin with is no part of the answer.
        header = self._headers.get(index)
        return None if header is None else header[: self.renderer.common_start(header, own)]

    def missing(self) -> dict[int, str]:
        """Why a message counts as not shown, by its index: what an answer says, and what a user did. ValueError where
        tools, their calls or results, or what the system says are missing."""
        conversation, missing = self.conversation, {}
        where = conversation.where
        if conversation.tools and not self._shows_tools():
            raise ValueError(f"{where}: the chat template does not show the tools")
        spelled = [_spell(item, *self.spelling)["content"] for item in conversation.messages]
        if any(content and str(content) in self.text for content in spelled if isinstance(content, list)):
            raise ValueError(f"{where}: the chat template takes no content as parts")
        for index, item in enumerate(conversation.messages):
            turn = self._turn(index)
            # What a template moves to another place is somewhere in the text.
            shown = (_squeezed(self.text[slice(*turn)]) if turn else "") or self._squeezed
            what = f"the chat template does not show the {{}} of message {index}"
            if not all(_shows_call(shown, call["function"]) for call in item.get("tool_calls", ())):
                raise ValueError(f"{where}: {what.format('tool calls')}")
            if item["role"] != "assistant":
                # Templates may change a little of what they are given, but either end of a long text is there.
                if not any(part in shown for form in _forms(item["content"]) for part in (form[:16], form[-16:])):
                    missing[index] = what.format("text")
                    if item["role"] != "user":
                        raise ValueError(f"{where}: {missing[index]} (role {item['role']})")
            elif index in conversation.answers:
                span = self.learned(index)
                if span is None:
                    missing[index] = what.format("start")
                    continue
                shown = _squeezed(self.text[slice(*span)])
                # The generation prompt may hold the tag that opens the reasoning.
                said = _squeezed(item["content"]).replace("<think></think>", "").removeprefix("<think>")
                if not _shows(shown, said):
                    missing[index] = what.format("text")
                elif not _shows(shown, reasoning_of(item)):
                    missing[index] = what.format("reasoning")
        return missing

    @functools.cached_property
    def _squeezed(self) -> str:
        return _squeezed(self.text)

    def _shows_tools(self) -> bool:
        """Whether the text is another one without the tools."""
        without = dataclasses.replace(self.conversation, tools=None)
        spelled = [_spell(item, *self.spelling) for item in self.conversation.messages]
        try:
            return self.renderer.render(spelled, without, self.asks) != self.text
        except ValueError:
            return True

    def _turn(self, index: int) -> Span | None:
        """The text of a message with all that the template puts around it."""
        if index not in self._turns:
            self._turns[index] = self._find_turn(index)
        return self._turns[index]

    def _find_turn(self, index: int) -> Span | None:
        messages = self.conversation.messages
        region = self.regions.get(index)
        if region is None:
            if self.regions or index < len(messages) - 1 or messages[index]["role"] != "assistant":
                return None
            # The template has no loop that could be followed, but the last answer comes after its own prompt.
            prompt = self._try(messages[:index], True)
            return (len(prompt[0]), len(self.text)) if prompt and self.text.startswith(prompt[0]) else None
        if messages[index].get("tool_calls") and index + 1 < len(messages) and index + 1 not in self.regions:
            # Some templates put what the tool returned into the turn that called it. The model writes what is before.
            # To see where that ends, the messages since the last question are enough.
            user = max((i for i in range(index) if messages[i]["role"] == "user"), default=0)
            lead = messages[: user and messages[0]["role"] != "user"]
            few = [*lead, *messages[user : index + 1]]
            alone = self._try(few, False)
            if not alone or len(few) - 1 not in alone[1]:
                return None
            turns = [self.text[slice(*region)], alone[0][slice(*alone[1][len(few) - 1])]]
            return region[0], region[0] + len(os.path.commonprefix(turns))
        return region

    def _try(
        self, messages: Sequence[Message], add_generation_prompt: bool, **kwargs: Any
    ) -> tuple[str, dict[int, Span]] | None:
        try:
            return self._render(messages, add_generation_prompt, **kwargs)
        except ValueError:
            return None

    @property
    def _may_think(self) -> bool:
        return "enable_thinking" not in self.conversation.template_kwargs

    def _generation_prompt(self, index: int, thinking: bool | None) -> str | None:
        """What the template puts after the messages before `index` for the model to go on from.

        It is the same wherever the message before has the same role, so that each is made only once.
        """
        messages = self.conversation.messages
        key = messages[index - 1]["role"], thinking
        if key not in self._prompts:
            kwargs = {} if thinking is None else {"enable_thinking": thinking}
            before = self._try(messages[:index], True, **kwargs)
            self._prompts[key] = None if before is None else self._after_the_same(*before, index, kwargs)
        return self._prompts[key]

    def _after_the_same(self, text: str, regions: dict[int, Span], index: int, kwargs: dict[str, Any]) -> str:
        """What `text`, the messages before `index` and a generation prompt, has after those messages."""
        last = max((i for i in regions if i < index and i in self.regions), default=None)
        if last is None:
            turn = self._turn(index)
            rest, same = text, self.text[: turn[0] if turn else 0]
        else:
            rest, same = text[regions[last][0] :], self.text[slice(*self.regions[last])]
        if rest.startswith(same):
            return rest[len(same) :]
        # The messages are shown otherwise where they are the last.
        without = self._try(self.conversation.messages[:index], False, **kwargs)
        same = without[0] if without and text.startswith(without[0]) else os.path.commonprefix([text, self.text])
        return text[len(same) :]

    @functools.cached_property
    def _headers(self) -> dict[int, str]:
        """What the template puts before the text of each assistant message: found with another text in its place."""
        messages = [
            message("assistant", _PROBE) if item["role"] == "assistant" else item for item in self.conversation.messages
        ]
        text, regions = self._try(messages, False) or ("", {})
        turns = {index: text[slice(*region)] for index, region in regions.items()}
        return {index: turn.split(_PROBE)[0] for index, turn in turns.items() if _PROBE in turn}


@functools.lru_cache(maxsize=16)
def _marking(template: str) -> str:
    """The template, marking where each of its loops goes on to a message, and where it is through with it."""
    pieces, at, loops, count = [], 0, [], 0
    for tag in _TAGS.finditer(template):
        left, word, rest, right = tag.groups()
        if word == "for":
            target = _TARGET.match(rest)
            loops.append((count, target and target[1]))
            count += 1
            pieces += [template[at : tag.end()], _mark(_BEGIN, *loops[-1], "", right)]
            at = tag.end()
        elif word == "endfor" and loops:
            pieces += [template[at : tag.start()], _mark(_END, *loops.pop(), left, "")]
            at = tag.start()
    return "".join([*pieces, template[at:]])


def _mark(kind: str, loop: int, target: str | None, left: str, right: str) -> str:
    """A statement, since templates handle the white space around expressions in another way."""
    if target is None:
        return ""
    mark = f"'{kind}{loop}:' ~ {target}['{_INDEX}'] ~ ';'"
    return f"{{%{left} print {mark} if {target} is mapping and '{_INDEX}' in {target} else '' {right}%}}"


def _read_marks(text: str) -> tuple[str, dict[int, Span]]:
    """The text without its marks, and where each message is: from where a loop comes to it to where it is through with
    it, or where the loop goes on to the next message."""
    pieces, length, at = [], 0, 0
    stays: list[tuple[int, int, int]] = []  # loop, message, start; the innermost loop last
    regions: dict[int, Span] = {}

    def leave(loop: int) -> None:
        while any(stay[0] == loop for stay in stays):
            _, index, start = stays.pop()
            # Other loops look at a message, too, and print little or nothing.
            before = regions.get(index, (0, 0))
            if length - start > before[1] - before[0]:
                regions[index] = start, length

    for mark in _MARKS.finditer(text):
        pieces.append(text[at : mark.start()])
        length, at = length + len(pieces[-1]), mark.end()
        kind, loop, index = mark[1], int(mark[2]), int(mark[3])
        leave(loop)
        if kind == _BEGIN:
            stays.append((loop, index, length))
    pieces.append(text[at:])
    length += len(pieces[-1])
    for loop, *_ in stays[:1]:
        leave(loop)
    return "".join(pieces), regions


def _token_cuts(offsets: list[Span], spans: list[Span]) -> list[int] | None:
    """The tokens at which the spans start and end, or None where a token reaches over such a border."""
    starts, cuts = [start for start, _ in offsets], []
    for cut in (cut for span in spans for cut in span):
        index = bisect.bisect_left(starts, cut)
        # Some tokenizers leave the blank before a word out of its token's span.
        if (offsets[index - 1][1] if index else 0) != cut:
            return None
        cuts.append(index)
    return cuts


def _spell(item: Message, as_parts: bool, as_text: bool) -> Message:
    """A message with its content as a list of parts, and the arguments of its tool calls as JSON text; its reasoning by
    both names that templates read."""
    item = dict(item)
    if reasoning := reasoning_of(item):
        item |= {"reasoning_content": reasoning, "thinking": reasoning}
    if as_parts:
        item["content"] = [{"type": "text", "text": item["content"]}] if item["content"] else []
    if as_text and "tool_calls" in item:
        item["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in item["tool_calls"]
        ]
    return item


def _squeezed(text: str) -> str:
    """Without white space, which templates add and take away."""
    return "".join(text.split())


def _forms(value: str) -> Iterator[str]:
    """A value as it is, and as JSON has it."""
    yield _squeezed(value)
    for ascii_only in (False, True):
        yield _squeezed(json.dumps(value, ensure_ascii=ascii_only)[1:-1])


def _shows(squeezed: str, value: str) -> bool:
    return any(form in squeezed for form in _forms(value))


def _shows_call(squeezed: str, function: dict[str, Any]) -> bool:
    return all(_shows(squeezed, value) for value in (function["name"], *_leaves(function["arguments"])))


def _leaves(value: Any) -> Iterator[str]:
    """What the arguments of a call hold: names and texts. Numbers and the like are spelled in too many ways."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (name, *_leaves(item))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
