"""Conversations as token ids: the chat formats of the released models, written as code.

Knows the formats by name, which of them a checkpoint was trained with, and how a conversation is cut
to fit. Never runs a checkpoint's own template (``template`` does, on request) and never lets the text
of a message become a control token: those are put in as ids, the text between them is encoded alone.

Mistral's formats follow mistral-common, version by version (``_mistral``); ``llama3`` and ``llama3.1`` the
model cards (``_llama3``); ``aime`` the worker interface of that name, which is Llama 2's form. A format
that knows no tools is told of them in words, and asked to write calls as JSON.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.errors import InvalidMessages, InvalidRequest, NotFound, PromptTooLong
from moesaic.text import _llama3, _mistral, syntax
from moesaic.text.calls import Calls
from moesaic.text.grammar import Grammar
from moesaic.text.messages import JOIN, Message, validate
from moesaic.text.syntax import Syntax
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

__all__ = ["FORMATS", "ChatFormat", "Message", "choose", "fit", "get", "validate"]

Encoder = Callable[[list[Message], Tokenizer, Tools | None], list[int]]

OFFER = (
    "You can call these functions:\n{listed}\n\nTo call one, answer with nothing but a line of JSON of this form: "
    '{{"name": "the function\'s name", "arguments": {{"an argument": "its value"}}}}. To call several, write such a '
    "line for each. Where no function helps, answer in plain words."
)


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes ids, and what ends an answer.

    ``build`` gives the ids up to where the answer begins; if the last message is the assistant's,
    up to the end of that message, left open.
    """

    name: str
    build: Encoder
    needs: tuple[str, ...] = ()  # control tokens without which there is no such format
    ends: tuple[str, ...] = ()  # control tokens that end an answer, besides the tokenizer's own
    stop_strings: tuple[str, ...] = ()  # text that ends an answer, where no token does
    syntax: Syntax = syntax.PLAIN  # how it writes calls of tools

    def fits(self, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer has the control tokens that this format is made of."""
        return all(token in tokenizer.control for token in self.needs)

    def calls_as(self, tokenizer: Tokenizer) -> Syntax:
        """Return how calls are written: the format's own way, if the tokenizer has the control tokens for it."""
        native = all(mark in tokenizer.control for mark in self.syntax.marks)
        return self.syntax if native else syntax.PLAIN

    def calls(self, tokenizer: Tokenizer, tools: Tools) -> Calls:
        """Return what finds the calls in one answer."""
        return Calls(self.calls_as(tokenizer), tools)

    def forced(self, tokenizer: Tokenizer, tools: Tools) -> Grammar:
        """Return the grammar of an answer that is a call of one of the wanted tools; errors as ``syntax.forced``."""
        return syntax.forced(self.calls_as(tokenizer), tools, tokenizer.control)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        continue_final: bool = False,
        tools: Tools | None = None,
    ) -> list[int]:
        """Return the prompt's ids, from the beginning-of-text token to where the answer begins.

        With ``continue_final`` the last message is the assistant's and is to be continued. ``tools`` are
        what the answer may call.

        Raises:
            InvalidMessages: see ``validate``; or ``continue_final`` and the last role do not agree.
            InvalidRequest: the tokenizer lacks this format's control tokens.
        """
        turns = validate(messages)
        if not self.fits(tokenizer):
            able = ", ".join(name for name, other in FORMATS.items() if other.fits(tokenizer))
            missing = next(token for token in self.needs if token not in tokenizer.control)
            raise InvalidRequest(f"chat format {self.name!r} needs the token {missing}, which is not here; use {able}")
        answered = turns[-1]["role"] == "assistant"
        if answered and not continue_final:
            raise InvalidMessages("the last message is the assistant's: add a user message, or ask to continue it")
        if continue_final and not answered:
            raise InvalidMessages("there is nothing to continue: the last message is not the assistant's")
        if self.calls_as(tokenizer) is syntax.PLAIN:
            turns, tools = _in_words(turns, tools), None
        return self.build(turns, tokenizer, tools)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids that end an answer; a generation config may name more."""
        return tokenizer.eos_ids | {tokenizer.control[token] for token in self.ends if token in tokenizer.control}


def fit(
    messages: Sequence[Mapping[str, Any]], count: Callable[[list[Message]], int], budget: int
) -> tuple[list[Message], int]:
    """Return (the conversation, how many messages went) so that ``count`` of it is at most ``budget`` tokens.

    The oldest user turn goes together with the answers to it, as few as are needed; system messages
    and everything from the last user turn on stay.

    Raises:
        InvalidMessages: see ``validate``.
        PromptTooLong: what has to stay is too long by itself.
    """
    turns = validate(messages)
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    # Cutting at the first user turn drops nothing unless an assistant opened the conversation.
    cuts = sorted({0, *users})

    def kept(cut: int) -> list[Message]:
        return validate([turn for place, turn in enumerate(turns) if place >= cut or turn["role"] == "system"])

    best = bisect.bisect_left(cuts, True, key=lambda cut: count(kept(cut)) <= budget)
    if best == len(cuts):
        raise PromptTooLong(count(kept(cuts[-1])), budget)
    dropped = sum(turn["role"] != "system" for turn in turns[: cuts[best]])
    return kept(cuts[best]), dropped


def get(name: str) -> ChatFormat:
    """Return the format of that name.

    Raises:
        NotFound: no such format; the message names what exists.
    """
    if name not in FORMATS:
        raise NotFound(f"no chat format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def choose(tokenizer: Tokenizer, *, architecture: str | None = None, template: str | None = None) -> ChatFormat:
    """Return the format a checkpoint was trained with.

    Its control tokens decide; where there are none, marks in the text of its chat template, which is
    looked at and never run; where there is no template, ``architecture`` ("MixtralForCausalLM",
    "mixtral"): Mistral's oldest format for its models, plain dialogue for all others.

    Raises:
        NotFound: the template is of a format that is not built in.
    """
    if get("llama3").fits(tokenizer):
        return get("llama3.1" if "ipython" in (template or "") else "llama3")
    if get("mistral-v3").fits(tokenizer):
        return get(_mistral_version(tokenizer, template))
    if template is not None and template.strip():
        for mark, name in (("<<SYS>>", "aime"), ("[INST]", "mistral-v1"), ("Assistant:", "plain")):
            if mark in template:
                return get(name)
        raise NotFound(f"this checkpoint's chat template is not built in: name one of {', '.join(FORMATS)}")
    family = (architecture or "").lower()
    return get("mistral-v1" if "mixtral" in family or "mistral" in family else "plain")


def _mistral_version(tokenizer: Tokenizer, template: str | None) -> str:
    stated = re.match(r"v(\d+)", tokenizer.version or "")
    # Every tekken file has the later control tokens, so only what is said counts there.
    if stated:
        for version in (13, 11, 7):
            if int(stated[1]) >= version and get(f"mistral-v{version}").fits(tokenizer):
                return f"mistral-v{version}"
    system = "[SYSTEM_PROMPT]" in (template or "") if tokenizer.byte_level else True
    if not stated and system and get("mistral-v7").fits(tokenizer):
        return "mistral-v7"
    if tokenizer.byte_level:
        return "mistral-tekken"
    return "mistral-v3" if "[PREFIX]" in tokenizer.control else "mistral-v2"


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _eos(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.eos_ids)[:1]


def _without_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """Return the joined system texts and turns that begin with a user's, for formats that know only two roles."""
    system = JOIN.join(turn["content"] for turn in messages if turn["role"] == "system")
    turns = [turn for turn in messages if turn["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        turns = [{"role": "user", "content": ""}, *turns]
    return system, validate(turns)


def _into(turns: Iterable[Message], place: int, system: str) -> list[Message]:
    """Return the turns with the system text in front of the turn at ``place``."""
    return [
        {"role": turn["role"], "content": system + JOIN + turn["content"]} if system and at == place else turn
        for at, turn in enumerate(turns)
    ]


def _in_words(turns: list[Message], tools: Tools | None) -> list[Message]:
    """Return the conversation without calls and results: both as text, and the tools in the system's."""
    out: list[Message] = []
    for turn in turns:
        if turn["role"] == "tool":
            out.append({"role": "user", "content": f"Result of {turn['name']}: {turn['content']}"})
            continue
        calls = [f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in turn.get("tool_calls", ())]
        out.append({"role": turn["role"], "content": "\n".join((*filter(None, (turn["content"],)), *calls))})
    if tools is not None:
        listed = "\n".join(json.dumps(tool.described()["function"], ensure_ascii=False) for tool in tools.offered)
        out.insert(turns[0]["role"] == "system", {"role": "system", "content": OFFER.format(listed=listed)})
    return validate(out)


def _mistral_v1(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None) -> list[int]:
    """Return ids with ``[INST]`` as plain text and the system text in the first user turn."""
    system, turns = _without_system(messages)
    ids = _bos(tokenizer)
    for place, turn in enumerate(_into(turns, 0, system)):
        if turn["role"] == "user":
            ids += tokenizer.encode(f"[INST] {turn['content']} [/INST]")
        else:
            ids += tokenizer.encode(turn["content"])
            ids += _eos(tokenizer) if place < len(turns) - 1 else []
    return ids


def _mistral_from(version: int) -> Encoder:
    """Return what writes one of Mistral's later versions; up to v3 the system text is in the last user turn."""

    def build(messages: list[Message], tokenizer: Tokenizer, tools: Tools | None) -> list[int]:
        if version < 7:
            system, turns = _without_system(messages)
            last = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
            messages = _into(turns, last, system)
        return _mistral.turns(messages, tokenizer, tools, version)

    return build


AIME_MARKS = re.compile(r"<<SYS>>|<</SYS>>|\[INST\]|\[/INST\]|<s>|</s>")


def _unmarked(text: str) -> str:
    # Again and again, since taking one away may put another together.
    while AIME_MARKS.search(text):
        text = AIME_MARKS.sub("", text)
    return text


def _aime(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None) -> list[int]:
    """Return one beginning-of-text token per exchange; the marks are taken out of what was said."""
    system, turns = _without_system(messages)
    said = [_unmarked(turn["content"]) for turn in turns]
    if system:
        said[0] = f"<<SYS>>\n{_unmarked(system)}\n<</SYS>>\n\n{said[0]}"
    ids: list[int] = []
    for place in range(0, len(said), 2):
        answer = f" {said[place + 1]} " if place + 1 < len(said) else ""
        ids += _bos(tokenizer) + tokenizer.encode(f"[INST] {said[place]} [/INST]{answer}")
        ids += _eos(tokenizer) if place + 2 < len(said) else []
    return ids


def _plain(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None) -> list[int]:
    """Return a dialogue as plain text, for models that were never taught a format."""
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
        ChatFormat("mistral-v2", _mistral_from(2), needs=INST, syntax=syntax.MISTRAL),
        ChatFormat("mistral-v3", _mistral_from(3), needs=INST, syntax=syntax.MISTRAL),
        ChatFormat("mistral-tekken", _mistral_from(3), needs=INST, syntax=syntax.MISTRAL),
        ChatFormat("mistral-v7", _mistral_from(7), needs=(*INST, *SYSTEM), syntax=syntax.MISTRAL),
        ChatFormat("mistral-v11", _mistral_from(11), needs=(*INST, *SYSTEM, "[ARGS]"), syntax=syntax.MISTRAL_11),
        ChatFormat("mistral-v13", _mistral_from(13), needs=(*INST, *SYSTEM, "[ARGS]"), syntax=syntax.MISTRAL_13),
        ChatFormat("aime", _aime),
        ChatFormat("llama3", _llama3.turns, needs=HEADERS, ends=TURN_ENDS),
        ChatFormat("llama3.1", _llama3.turns_31, needs=HEADERS, ends=TURN_ENDS, syntax=syntax.LLAMA),
        ChatFormat("plain", _plain, stop_strings=("\nUser:",)),
    )
}
