"""Makes a chat format of a chat template (Jinja).

``examine`` renders a template once for a few short conversations. The results show whether the template writes tools
and tool calls, which token or text ends an answer, and how the model writes tool calls. ``chat_format`` makes a
``ChatFormat`` of that. If a built-in format equals the template, it encodes the conversations that it can express,
without starting a process. The template encodes those with tools, or with variables that only it reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from moesaic.errors import MoesaicError
from moesaic.text import syntax, template
from moesaic.text._mistral import short_id
from moesaic.text._turns import Variables
from moesaic.text.chat import ChatFormat
from moesaic.text.messages import Message
from moesaic.text.syntax import Syntax
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import ToolCall, Tools

NAME = "template"
"""Name of the chat format that runs the checkpoint's own template."""

SYSTEM, QUESTION, ANSWER, NEXT = "Kx7 system", "Qz4 question?", "Wv9 answer.", "Jy2 next?"
PROBE_DATE = "07 Mar 2031"
PROBE_TIME = datetime(2031, 3, 7, 12)
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool_5h",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
PROBE_CALL = ToolCall("abcdefghi", "probe_tool_5h", '{"key": "Rt6 value"}')
PROBE_RESULT = "Hn3 result"

ASKED: list[Message] = [{"role": "user", "content": QUESTION}]
TALKED: list[Message] = [*ASKED, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}]
INSTRUCTED: list[Message] = [{"role": "system", "content": SYSTEM}]
CALLED: list[Message] = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "content": PROBE_RESULT, "tool_call_id": PROBE_CALL.id, "name": PROBE_CALL.name},
]
CONVERSATIONS: Mapping[str, list[Message]] = {
    "asked": ASKED,
    "talked": TALKED,
    "instructed": [*INSTRUCTED, *ASKED],
    "instructed_talk": [*INSTRUCTED, *TALKED],
}
"""Test conversations without tools, by name. Each ends with a question."""

MIN_STOP_CHARS = 3
"""Minimum number of characters of a stop string that is taken from a template; a shorter text may occur in an answer.
"""


@dataclass(frozen=True)
class Examined:
    """What a template renders for the test conversations of this module."""

    source: str
    texts: Mapping[str, str]
    """Rendered texts by the names of ``CONVERSATIONS``, without those that the template rejects."""
    error: MoesaicError | None
    """Why the first conversation could not be rendered; None if it could."""
    native_tools: bool
    """Whether the template writes tools, tool calls and their results."""


def examine(source: str, tokenizer: Tokenizer) -> Examined:
    """Render a template for the test conversations of this module.

    Raises:
        InvalidRequest: the child process cannot be started.
        TemplateError: the template is too long, or takes too much time.
    """
    names = template.special_names(tokenizer)
    kwargs = {"date_string": PROBE_DATE}
    turns = {name: template.template_messages(turns) for name, turns in CONVERSATIONS.items()}
    jobs = [template.values(each, kwargs=kwargs, **names) for each in turns.values()]
    called = template.template_messages(CALLED)
    jobs += [template.values(each, tools=[PROBE_TOOL], kwargs=kwargs, **names) for each in (turns["asked"], called)]
    outcomes = template.render_all(source, jobs, PROBE_TIME)
    texts = {name: text for name, text in zip(turns, outcomes, strict=False) if isinstance(text, str)}
    offered, answered = (text if isinstance(text, str) else "" for text in outcomes[-2:])
    native = PROBE_CALL.name in offered and "Rt6 value" in answered and PROBE_RESULT in answered
    error = None if isinstance(outcomes[0], str) else outcomes[0]
    return Examined(source, texts, error, native)


def chat_format(
    examined: Examined, tokenizer: Tokenizer, base: ChatFormat | None = None, name: str = NAME
) -> ChatFormat:
    """Return the chat format of an examined template.

    Args:
        examined: the result of ``examine``.
        tokenizer: the tokenizer of the model.
        base: a built-in format that equals the template for conversations without tools; None: there is none.
        name: the name of the format if there is no ``base``.
    """
    own = OwnTemplate(examined.source, syntax.PLAIN, base)
    form = base or ChatFormat(name, own.build)
    inner = form.tool_syntax(tokenizer)
    kwargs = frozenset(re.findall(r"[^\W\d]\w*", examined.source)) | form.kwargs
    if inner is syntax.PLAIN and examined.native_tools:
        inner = call_syntax(examined.source, tokenizer)
        form, own = replace(form, native_tools=True, syntax=inner), replace(own, syntax=inner, writes_tools=True)
    if base is None:
        ends, stops, strip = _ends(examined, tokenizer)
        form = replace(form, end_tokens=ends, stop_strings=stops, strip_answer=strip)
    return replace(form, build=own.build, kwargs=kwargs)


@dataclass(frozen=True)
class OwnTemplate:
    """Encodes conversations with a template; ``base``, a built-in format, encodes those that it can express equally."""

    source: str
    syntax: Syntax
    base: ChatFormat | None = None
    writes_tools: bool = False
    """Whether the template, and not ``base``, encodes conversations with tools or calls."""

    def build(
        self, messages: list[Message], tokenizer: Tokenizer, tools: Tools | None, variables: Variables
    ) -> list[int]:
        """Return the token ids of a conversation.

        If the last message is the assistant's, the ids end with its text, so that the model continues it.
        """
        if self.base is not None and not self._beyond(self.base, messages, tools, variables):
            return self.base.build(messages, tokenizer, tools, variables)
        if self.syntax.short_ids:  # Mistral's templates reject other ids
            messages = [_with_short_ids(turn) for turn in messages]
        continued = messages[-1]["role"] == "assistant"
        return template.encode(
            self.source, messages, tokenizer, continue_final=continued, tools=tools, variables=variables
        )

    def _beyond(self, base: ChatFormat, messages: list[Message], tools: Tools | None, variables: Variables) -> bool:
        """Return whether the template can express something in this conversation that ``base`` cannot."""
        if self.writes_tools and (tools is not None or any(turn["role"] == "tool" for turn in messages)):
            return True
        return any(re.search(rf"\b{re.escape(name)}\b", self.source) for name in variables.kwargs.keys() - base.kwargs)


def _with_short_ids(turn: Message) -> Message:
    out: Message = {**turn}
    if "tool_calls" in turn:
        out["tool_calls"] = [replace(call, id=short_id(call.id)) for call in turn["tool_calls"]]
    if "tool_call_id" in turn:
        out["tool_call_id"] = short_id(turn["tool_call_id"])
    return out


def call_syntax(source: str, tokenizer: Tokenizer) -> Syntax:
    """Return the form in which a model with this template writes tool calls.

    The control tokens and tags in the template decide; without any, the form is plain JSON.
    """

    def has(*names: str) -> bool:
        return all(name in source and name in tokenizer.control for name in names)

    if has("[TOOL_CALLS]", "[ARGS]"):
        return syntax.MISTRAL_11 if has("[CALL_ID]") else syntax.MISTRAL_13
    if has("[TOOL_CALLS]"):
        return syntax.MISTRAL
    if "<tool_call>" in source and "</tool_call>" in source:
        return syntax.HERMES
    return syntax.LLAMA if has("<|python_tag|>") else syntax.PLAIN


def _ends(examined: Examined, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Return (control tokens that end an answer, texts that end it, value of ``ChatFormat.strip_answer``)."""
    talk = examined.texts.get("talked") or examined.texts.get("instructed_talk") or ""
    before, found, rest = talk.partition(ANSWER)
    if not found:
        return (), (), False
    asked = examined.texts.get("asked", "\0")
    strip = before.startswith(asked) and before[len(asked) :].isspace()
    between = rest.partition(NEXT)[0]
    token = next(tokenizer.find_special(between), None)
    text = between if token is None else between[: token.start()]
    if not text.strip():
        return (() if token is None else (token.group(),)), (), strip
    # The first line with a text, and the line break before it: the model writes no more of the markup for sure.
    line = re.search(r"\n?[^\n]*[^\s][^\n]*", text)
    stop = line.group().rstrip() if line else ""
    return (), (stop,) if len(stop.strip()) >= MIN_STOP_CHARS else (), strip
