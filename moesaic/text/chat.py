"""Conversations as token ids: the chat formats of the released models, written as code.

Knows the formats by name, which of them a checkpoint was trained with, and how a conversation is cut
to fit. Never runs a checkpoint's own template (``template`` does, on request) and never lets the text
of a message become a control token: those are put in as ids, the text between them is encoded alone.

Mistral's formats follow mistral-common, version by version; ``llama3`` the Llama 3 model card;
``aime`` the worker interface of that name, which is Llama 2's form.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from moesaic.errors import InvalidMessages, InvalidRequest, NotFound, PromptTooLong
from moesaic.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
JOIN = "\n\n"  # between texts that become one message


class Message(TypedDict):
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str


Encoder = Callable[[list[Message], Tokenizer], list[int]]


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

    def fits(self, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer has the control tokens that this format is made of."""
        return all(token in tokenizer.control for token in self.needs)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, continue_final: bool = False
    ) -> list[int]:
        """Return the prompt's ids, from the beginning-of-text token to where the answer begins.

        With ``continue_final`` the last message is the assistant's and is to be continued.

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
        return self.build(turns, tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids that end an answer; a generation config may name more."""
        return tokenizer.eos_ids | {tokenizer.control[token] for token in self.ends if token in tokenizer.control}


def validate(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the conversation with consecutive turns of one role joined by an empty line.

    Raises:
        InvalidMessages: no messages, an unknown role, or content that is missing or no string.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InvalidMessages("messages must be a list of objects with role and content")
    if not messages:
        raise InvalidMessages("messages is empty: at least one is needed")
    turns: list[Message] = []
    for place, message in enumerate(messages):
        turn = _checked(place, message)
        if turns and turns[-1]["role"] == turn["role"]:
            turns[-1]["content"] += JOIN + turn["content"]
        else:
            turns.append(turn)
    return turns


def _checked(place: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidMessages(f"messages[{place}] must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidMessages(f"messages[{place}] has the role {role!r:.80}; it can be {', '.join(ROLES)}")
    if not isinstance(content, str):
        problem = "no content" if content is None else f"content of type {type(content).__name__}"
        raise InvalidMessages(f"messages[{place}] has {problem}; it must be a string")
    return {"role": role, "content": content}


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
        return get("llama3")
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
    system = "[SYSTEM_PROMPT]" in (template or "") if tokenizer.byte_level else True
    if (int(stated[1]) >= 7 if stated else system) and get("mistral-v7").fits(tokenizer):
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


def _mistral_v1(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
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


def _mistral_v3(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Return ids with ``[INST]`` as a control token and the system text in the last user turn (v2, v3)."""
    system, turns = _without_system(messages)
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
    return _mistral_turns(_into(turns, last, system), tokenizer)


def _mistral_turns(turns: list[Message], tokenizer: Tokenizer) -> list[int]:
    ids = _bos(tokenizer)
    marks = {"user": ("[INST]", "[/INST]"), "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")}
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            ids += tokenizer.encode(turn["content"].rstrip(" "))
            ids += _eos(tokenizer) if place < len(turns) - 1 else []
        else:
            begin, end = marks[turn["role"]]
            ids += [tokenizer.control[begin], *tokenizer.encode(turn["content"]), tokenizer.control[end]]
    return ids


def _llama3(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    control = tokenizer.control
    ids = _bos(tokenizer)
    opened: Message = {"role": "assistant", "content": ""}
    answered = messages[-1]["role"] == "assistant"
    for turn in messages if answered else [*messages, opened]:
        ids += [control["<|start_header_id|>"], *tokenizer.encode(turn["role"]), control["<|end_header_id|>"]]
        ids += [*tokenizer.encode("\n\n"), *tokenizer.encode(turn["content"].strip()), control["<|eot_id|>"]]
    return ids[:-1]  # the last turn is open


AIME_MARKS = re.compile(r"<<SYS>>|<</SYS>>|\[INST\]|\[/INST\]|<s>|</s>")


def _unmarked(text: str) -> str:
    # Again and again, since taking one away may put another together.
    while AIME_MARKS.search(text):
        text = AIME_MARKS.sub("", text)
    return text


def _aime(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
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


def _plain(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Return a dialogue as plain text, for models that were never taught a format."""
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    text = ""
    for turn in messages:
        text += names[turn["role"]] + turn["content"] + ("\n\n" if turn["role"] == "system" else "\n")
    text = text[:-1] if messages[-1]["role"] == "assistant" else text + "Assistant:"
    return tokenizer.encode(text, bos=True)


INST = ("[INST]", "[/INST]")
FORMATS: Mapping[str, ChatFormat] = {
    form.name: form
    for form in (
        ChatFormat("mistral-v1", _mistral_v1),
        ChatFormat("mistral-v2", _mistral_v3, needs=INST),
        ChatFormat("mistral-v3", _mistral_v3, needs=INST),
        ChatFormat("mistral-tekken", _mistral_v3, needs=INST),
        ChatFormat("mistral-v7", _mistral_turns, needs=(*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
        ChatFormat("aime", _aime),
        ChatFormat(
            "llama3",
            _llama3,
            needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        ),
        ChatFormat("plain", _plain, stop_strings=("\nUser:",)),
    )
}
