"""Built-in chat formats: conversations as token ids.

This module selects the format that a checkpoint was trained with, and truncates conversations to a token budget. It
never runs a checkpoint's own template; ``template`` does that on request. The text of a message never becomes a
control token: control tokens are inserted as ids, and the text between them is encoded separately.

Mistral's formats follow mistral-common for each version (``_mistral``). ``llama3`` and ``llama3.1`` follow Meta's
model cards (``_llama3``). ``aime`` follows the worker interface of AIME's API server, which uses the form of Llama 2.
For formats without tool support, the system prompt describes the tools and asks the model to write calls as JSON.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.errors import InvalidMessages, InvalidRequest, NotFound, PromptTooLong
from moesaic.text import _llama3, _mistral, syntax
from moesaic.text.grammar import Grammar
from moesaic.text.messages import JOIN, Message, validate
from moesaic.text.syntax import Syntax
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tool_parser import ToolCallParser
from moesaic.text.tools import Tools

__all__ = ["FORMATS", "ChatFormat", "Message", "choose_format", "get_format", "truncate", "validate"]

Encoder = Callable[[list[Message], Tokenizer, Tools | None], list[int]]

TOOL_PROMPT = (
    "You can call these functions:\n{tool_list}\n\nTo call one, answer with nothing but a line of JSON of this form: "
    '{{"name": "the function\'s name", "arguments": {{"an argument": "its value"}}}}. To call several, write such a '
    "line for each. Where no function helps, answer in plain words."
)


@dataclass(frozen=True)
class ChatFormat:
    """Chat format: how a conversation is encoded, and which tokens or strings end an answer.

    ``build`` returns the ids up to the start of the answer. If the last message is the assistant's, it returns the
    ids up to the end of that message, which is left open.
    """

    name: str
    build: Encoder
    required_tokens: tuple[str, ...] = ()
    """Control tokens that the tokenizer must have."""
    end_tokens: tuple[str, ...] = ()
    """Control tokens that end an answer, in addition to the tokenizer's end-of-text tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer, for formats without an end token."""
    syntax: Syntax = syntax.PLAIN
    """Form of the tool calls."""

    def supports(self, tokenizer: Tokenizer) -> bool:
        """Return whether the tokenizer has the control tokens that this format requires."""
        return all(token in tokenizer.control for token in self.required_tokens)

    def tool_syntax(self, tokenizer: Tokenizer) -> Syntax:
        """Return the form of tool calls: the format's own if the tokenizer has its control tokens, else plain JSON."""
        native = all(token in tokenizer.control for token in self.syntax.control_tokens)
        return self.syntax if native else syntax.PLAIN

    def tool_call_parser(self, tokenizer: Tokenizer, tools: Tools) -> ToolCallParser:
        """Return a parser that finds the tool calls in one answer."""
        return ToolCallParser(self.tool_syntax(tokenizer), tools)

    def forced_call_grammar(self, tokenizer: Tokenizer, tools: Tools) -> Grammar:
        """Return the grammar of an answer that must be a tool call.

        Raises:
            InvalidParameter: the schemas of the tools are too long for one grammar.
        """
        return syntax.forced_grammar(self.tool_syntax(tokenizer), tools, tokenizer.control)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        continue_final: bool = False,
        tools: Tools | None = None,
    ) -> list[int]:
        """Return the token ids of the prompt, from the beginning-of-text token to the start of the answer.

        Args:
            messages: the conversation.
            tokenizer: the tokenizer of the model.
            continue_final: whether to continue the last message, which must be the assistant's.
            tools: the tools that the answer may call.

        Raises:
            InvalidMessages: the messages are invalid (``validate``), or the last role contradicts ``continue_final``.
            InvalidRequest: the tokenizer lacks control tokens that this format requires.
        """
        turns = validate(messages)
        if not self.supports(tokenizer):
            usable = ", ".join(name for name, other in FORMATS.items() if other.supports(tokenizer))
            missing = next(token for token in self.required_tokens if token not in tokenizer.control)
            raise InvalidRequest(
                f"chat format {self.name!r} needs the token {missing}, which this tokenizer lacks; use {usable}"
            )
        ends_with_answer = turns[-1]["role"] == "assistant"
        if ends_with_answer and not continue_final:
            raise InvalidMessages("the last message is the assistant's: add a user message, or ask to continue it")
        if continue_final and not ends_with_answer:
            raise InvalidMessages("nothing to continue: the last message is not the assistant's")
        if self.tool_syntax(tokenizer) is syntax.PLAIN:
            turns, tools = _as_plain_text(turns, tools), None
        return self.build(turns, tokenizer, tools)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids of the tokens that end an answer; a generation config may name more."""
        return tokenizer.eos_ids | {tokenizer.control[token] for token in self.end_tokens if token in tokenizer.control}


def truncate(
    messages: Sequence[Mapping[str, Any]], count: Callable[[list[Message]], int], budget: int
) -> tuple[list[Message], int]:
    """Remove as few of the oldest messages as needed to fit a conversation into ``budget`` tokens.

    A user message is removed together with the answers to it. System messages and everything from the last user
    message on are kept.

    Args:
        messages: the conversation.
        count: returns the number of tokens of a conversation.
        budget: maximum number of tokens.

    Returns:
        The conversation that is left, and the number of messages that were removed.

    Raises:
        InvalidMessages: the messages are invalid (``validate``).
        PromptTooLong: the messages that must be kept exceed the budget.
    """
    turns = validate(messages)
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    # A cut at the first user message removes something only if the assistant opened the conversation.
    cuts = sorted({0, *users})

    def kept(cut: int) -> list[Message]:
        return validate([turn for index, turn in enumerate(turns) if index >= cut or turn["role"] == "system"])

    best = bisect.bisect_left(cuts, True, key=lambda cut: count(kept(cut)) <= budget)
    if best == len(cuts):
        raise PromptTooLong(count(kept(cuts[-1])), budget)
    dropped = sum(turn["role"] != "system" for turn in turns[: cuts[best]])
    return kept(cuts[best]), dropped


def get_format(name: str) -> ChatFormat:
    """Return the chat format with the given name.

    Raises:
        NotFound: the name is unknown; the message lists the available formats.
    """
    if name not in FORMATS:
        raise NotFound(f"unknown chat format {name!r}; available formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def choose_format(tokenizer: Tokenizer, *, architecture: str | None = None, template: str | None = None) -> ChatFormat:
    """Return the format that a checkpoint was trained with.

    The control tokens of the tokenizer decide. If it has none, the text of the chat template decides; the template is
    not run. If there is no template, ``architecture`` ("MixtralForCausalLM" or "mixtral") decides: Mistral's oldest
    format for Mistral's models, and plain dialogue for all others.

    Raises:
        NotFound: the chat template has a format that is not built in.
    """
    if get_format("llama3").supports(tokenizer):
        return get_format("llama3.1" if "ipython" in (template or "") else "llama3")
    if get_format("mistral-v3").supports(tokenizer):
        return get_format(_mistral_version(tokenizer, template))
    if template is not None and template.strip():
        for marker, name in (("<<SYS>>", "aime"), ("[INST]", "mistral-v1"), ("Assistant:", "plain")):
            if marker in template:
                return get_format(name)
        raise NotFound(f"this checkpoint's chat format is not built in: select one of {', '.join(FORMATS)}")
    family = (architecture or "").lower()
    return get_format("mistral-v1" if "mixtral" in family or "mistral" in family else "plain")


def _mistral_version(tokenizer: Tokenizer, template: str | None) -> str:
    stated = re.match(r"v(\d+)", tokenizer.version or "")
    # Every tekken file has the later control tokens, so for tekken only the stated version counts.
    if stated:
        for version in (13, 11, 7):
            if int(stated[1]) >= version and get_format(f"mistral-v{version}").supports(tokenizer):
                return f"mistral-v{version}"
    system = "[SYSTEM_PROMPT]" in (template or "") if tokenizer.byte_level else True
    if not stated and system and get_format("mistral-v7").supports(tokenizer):
        return "mistral-v7"
    if tokenizer.byte_level:
        return "mistral-tekken"
    return "mistral-v3" if "[PREFIX]" in tokenizer.control else "mistral-v2"


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _eos(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.eos_ids)[:1]


def _without_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """Return the joined system texts, and turns that begin with the user's; for formats without a system role."""
    system = JOIN.join(turn["content"] for turn in messages if turn["role"] == "system")
    turns = [turn for turn in messages if turn["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        turns = [{"role": "user", "content": ""}, *turns]
    return system, validate(turns)


def _prepend_system(turns: Sequence[Message], index: int, system: str) -> list[Message]:
    """Return the turns with the system text in front of the turn at ``index``."""
    if not system:
        return list(turns)
    turn = turns[index]
    return [*turns[:index], {"role": turn["role"], "content": system + JOIN + turn["content"]}, *turns[index + 1 :]]


def _as_plain_text(turns: list[Message], tools: Tools | None) -> list[Message]:
    """Return the conversation with calls and results as text, and the tools in the system prompt."""
    out: list[Message] = []
    for turn in turns:
        if turn["role"] == "tool":
            out.append({"role": "user", "content": f"Result of {turn['name']}: {turn['content']}"})
            continue
        calls = [f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in turn.get("tool_calls", ())]
        out.append({"role": turn["role"], "content": "\n".join((*filter(None, (turn["content"],)), *calls))})
    if tools is not None:
        tool_list = "\n".join(json.dumps(tool.to_openai()["function"], ensure_ascii=False) for tool in tools.offered)
        out.insert(turns[0]["role"] == "system", {"role": "system", "content": TOOL_PROMPT.format(tool_list=tool_list)})
    return validate(out)


def _mistral_v1(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None) -> list[int]:
    """Return ids with ``[INST]`` as plain text and the system text in the first user turn."""
    system, turns = _without_system(messages)
    ids = _bos(tokenizer)
    for index, turn in enumerate(_prepend_system(turns, 0, system)):
        if turn["role"] == "user":
            ids += tokenizer.encode(f"[INST] {turn['content']} [/INST]")
        else:
            ids += tokenizer.encode(turn["content"])
            ids += _eos(tokenizer) if index < len(turns) - 1 else []
    return ids


def _mistral_from(version: int) -> Encoder:
    """Return the encoder of one of Mistral's later versions; up to v3 the system text is in the last user turn."""

    def build(messages: list[Message], tokenizer: Tokenizer, tools: Tools | None) -> list[int]:
        if version < 7:
            system, turns = _without_system(messages)
            last = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
            messages = _prepend_system(turns, last, system)
        return _mistral.encode(messages, tokenizer, tools, version)

    return build


AIME_MARKERS = re.compile(r"<<SYS>>|<</SYS>>|\[INST\]|\[/INST\]|<s>|</s>")


def _remove_markers(text: str) -> str:
    # Repeated, because removing one marker can form another.
    while AIME_MARKERS.search(text):
        text = AIME_MARKERS.sub("", text)
    return text


def _aime(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None) -> list[int]:
    """Return the ids with a beginning-of-text token before each exchange; markers in the messages are removed."""
    system, turns = _without_system(messages)
    texts = [_remove_markers(turn["content"]) for turn in turns]
    if system:
        texts[0] = f"<<SYS>>\n{_remove_markers(system)}\n<</SYS>>\n\n{texts[0]}"
    ids: list[int] = []
    for index in range(0, len(texts), 2):
        answer = f" {texts[index + 1]} " if index + 1 < len(texts) else ""
        ids += _bos(tokenizer) + tokenizer.encode(f"[INST] {texts[index]} [/INST]{answer}")
        ids += _eos(tokenizer) if index + 2 < len(texts) else []
    return ids


def _plain(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None) -> list[int]:
    """Return the ids of a dialogue in plain text, for models that were not trained on a chat format."""
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    text = ""
    for turn in messages:
        text += names[turn["role"]] + turn["content"] + ("\n\n" if turn["role"] == "system" else "\n")
    text = text[:-1] if messages[-1]["role"] == "assistant" else text + "Assistant:"
    return tokenizer.encode(text, bos=True)


INST = ("[INST]", "[/INST]")
SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
FORMATS: Mapping[str, ChatFormat] = {
    form.name: form
    for form in (
        ChatFormat("mistral-v1", _mistral_v1),
        ChatFormat("mistral-v2", _mistral_from(2), required_tokens=INST, syntax=syntax.MISTRAL),
        ChatFormat("mistral-v3", _mistral_from(3), required_tokens=INST, syntax=syntax.MISTRAL),
        ChatFormat("mistral-tekken", _mistral_from(3), required_tokens=INST, syntax=syntax.MISTRAL),
        ChatFormat("mistral-v7", _mistral_from(7), required_tokens=(*INST, *SYSTEM), syntax=syntax.MISTRAL),
        ChatFormat(
            "mistral-v11", _mistral_from(11), required_tokens=(*INST, *SYSTEM, "[ARGS]"), syntax=syntax.MISTRAL_11
        ),
        ChatFormat(
            "mistral-v13", _mistral_from(13), required_tokens=(*INST, *SYSTEM, "[ARGS]"), syntax=syntax.MISTRAL_13
        ),
        ChatFormat("aime", _aime),
        ChatFormat("llama3", _llama3.encode_llama3, required_tokens=HEADERS, end_tokens=TURN_ENDS),
        ChatFormat(
            "llama3.1", _llama3.encode_llama31, required_tokens=HEADERS, end_tokens=TURN_ENDS, syntax=syntax.LLAMA
        ),
        ChatFormat("plain", _plain, stop_strings=("\nUser:",)),
    )
}
