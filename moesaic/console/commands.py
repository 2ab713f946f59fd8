"""The words with a slash: what each does to the conversation, and what it says.

Knows no terminal: a command takes the text behind it and returns an ``Outcome``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from moesaic.console.conversation import Conversation, Turn
from moesaic.engine import Sampling
from moesaic.errors import InvalidRequest, NotFound


@dataclass(frozen=True)
class Outcome:
    """What came of a command: lines to show, an answer that was started, or the wish to leave."""

    text: str = ""
    turn: Turn | None = None
    leave: bool = False


@dataclass(frozen=True)
class Command:
    """One word: what it takes, what it is for, and what it does."""

    takes: str
    about: str
    run: Callable[[Conversation, str], Outcome]


def run(conversation: Conversation, line: str) -> Outcome:
    """Carry out ``line``, which begins with a slash.

    Raises:
        NotFound: there is no such command; the message names those that are like it.
        MoesaicError: whatever the command refuses; the conversation is as it was.
    """
    word, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(word)
    if command is None:
        hint = _hint(word, COMMANDS, "/", "/help lists all")
        raise NotFound(f"no command /{word:.40}: {hint} (to say it to the model, begin with //)")
    rest = rest.strip()
    if rest and not command.takes:
        raise InvalidRequest(f"/{word} takes nothing after it")
    return command.run(conversation, rest)


def _hint(word: str, known: Iterable[str], prefix: str, otherwise: str) -> str:
    """Return what somebody who wrote ``word`` may have meant."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(prefix + name for name in near)}?" if near else otherwise


def _help(_: Conversation, __: str) -> Outcome:
    width = max(len(name + command.takes) for name, command in COMMANDS.items()) + 4
    lines = [f"{f'/{name} {command.takes}':<{width}}{command.about}" for name, command in COMMANDS.items()]
    return Outcome("\n".join([*lines, "", *KEYS]))


def _system(conversation: Conversation, text: str) -> Outcome:
    if not text:
        return Outcome(conversation.system or "there is no system prompt")
    if conversation.plain:
        raise InvalidRequest("plain text has no system prompt")
    conversation.system = "" if text == "clear" else text
    return Outcome(
        "the system prompt is gone" if text == "clear" else "the system prompt holds from the next answer on"
    )


def _reset(conversation: Conversation, _: str) -> Outcome:
    conversation.reset()
    return Outcome("a new conversation; system prompt and settings stay")


def _undo(conversation: Conversation, _: str) -> Outcome:
    question = " ".join(conversation.undo().split())
    shown = question if len(question) <= 60 else question[:59] + "…"
    left = len(conversation.messages)
    return Outcome(f'took back "{shown}"; {_count(left, "message")} left')


def _retry(conversation: Conversation, _: str) -> Outcome:
    return Outcome(turn=conversation.retry())


def _save(conversation: Conversation, text: str) -> Outcome:
    path = _path(text)
    conversation.save(path)
    return Outcome(f"{_count(len(conversation.messages), 'message')} in {path}")


def _load(conversation: Conversation, text: str) -> Outcome:
    path = _path(text)
    conversation.load(path)
    held = _count(len(conversation.messages), "message")
    return Outcome(f"{held} and {_count(len(conversation.settings), 'setting')} from {path}")


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise InvalidRequest("name a file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidRequest(f"{text}: there is no such user") from error


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _set(conversation: Conversation, text: str) -> Outcome:
    name, _, value = text.partition(" ")
    if not name:
        return Outcome(_settings(conversation))
    if name not in Sampling.__dataclass_fields__:
        hint = _hint(name, Sampling.__dataclass_fields__, "", "/set lists all")
        raise NotFound(f"no setting {name:.40}: {hint}")
    if value.strip():
        conversation.set(name, value.strip())
    return Outcome(f"{name} = {_written(getattr(conversation.sampling, name))}")


def _settings(conversation: Conversation) -> str:
    lines = []
    for name, value in asdict(conversation.sampling).items():
        source = "set" if name in conversation.settings else "checkpoint" if name in conversation.llm.defaults else ""
        lines.append(f"{name:<20}{_written(value):<12}{source}".rstrip())
    return "\n".join(lines)


def _written(value: object) -> str:
    return "none" if value is None or value in ((), {}) else str(value)


def _stats(conversation: Conversation, _: str) -> Outcome:
    llm, stats = conversation.llm, conversation.llm.engine.stats()
    used = conversation.tokens()
    held = stats.blocks - stats.free_blocks
    return Outcome(
        "\n".join(
            (
                f"conversation   {_count(len(conversation.messages), 'message')}, {used:,} of {llm.context:,} tokens"
                + (", the oldest no longer shown to the model" if used > llm.context else ""),
                f"computed       {stats.prompt_tokens:,} prompt tokens, of them {stats.cached_tokens:,} from the cache",
                f"generated      {stats.generated_tokens:,} tokens in {stats.steps:,} steps",
                f"cache          {held:,} of {stats.blocks:,} blocks held, {_count(stats.preemptions, 'preemption')}",
            )
        )
    )


def _exit(_: Conversation, __: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT]", "show the system prompt, or set it; /system clear removes it", _system),
    "reset": Command("", "begin a new conversation", _reset),
    "undo": Command("", "take back the last question and its answer", _undo),
    "retry": Command("", "answer the last question anew (the same again if a seed is set)", _retry),
    "save": Command("FILE", "write the conversation and the settings to a file", _save),
    "load": Command("FILE", "go on with a saved conversation", _load),
    "set": Command("[NAME [VALUE]]", "list or set how answers are sampled; VALUE default undoes it", _set),
    "stats": Command("", "the context that is used, and what the engine did", _stats),
    "exit": Command("", "leave", _exit),
}

KEYS = (
    "Enter sends. Alt-Enter, or a \\ at the end of a line, begins a new line; so does Enter within",
    'a block that begins with """ and ends with """. Ctrl-C stops an answer or clears the line, Ctrl-D leaves.',
    "To send a text that begins with a slash, begin it with //.",
)
