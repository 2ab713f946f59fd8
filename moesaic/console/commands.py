"""Slash commands of the chat.

This module does not depend on a terminal: a command gets the text after its name and returns an ``Outcome``.
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
    """Result of a command: a ``text`` to show, a ``turn`` whose answer was started, or ``leave`` to end the chat."""

    text: str = ""
    turn: Turn | None = None
    leave: bool = False


@dataclass(frozen=True)
class Command:
    """Slash command: its arguments and description for /help, and the function that runs it with its arguments."""

    arguments: str
    description: str
    run: Callable[[Conversation, str], Outcome]


def run(conversation: Conversation, line: str) -> Outcome:
    """Run the slash command in ``line`` on a conversation. ``line`` begins with the slash.

    Raises:
        NotFound: the command is unknown; the message names similar commands.
        MoesaicError: the command failed; the conversation is unchanged.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        hint = _hint(name, COMMANDS, "/", "type /help for a list")
        raise NotFound(f"unknown command /{name:.40}: {hint} (to send this text to the model, begin it with //)")
    rest = rest.strip()
    if rest and not command.arguments:
        raise InvalidRequest(f"/{name} takes no arguments")
    return command.run(conversation, rest)


def _hint(word: str, names: Iterable[str], prefix: str, default: str) -> str:
    """Return a question that suggests names similar to ``word``, each after ``prefix``; if none is, ``default``."""
    similar = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(prefix + name for name in similar)}?" if similar else default


def _help(_: Conversation, __: str) -> Outcome:
    width = max(len(name + command.arguments) for name, command in COMMANDS.items()) + 4
    lines = [f"{f'/{name} {command.arguments}':<{width}}{command.description}" for name, command in COMMANDS.items()]
    return Outcome("\n".join([*lines, "", *KEY_HELP]))


def _system(conversation: Conversation, text: str) -> Outcome:
    if not text:
        return Outcome(conversation.system or "there is no system prompt; /system TEXT sets one")
    if conversation.plain:
        raise InvalidRequest("a chat in plain text has no system prompt: start the chat without --plain-text")
    if text == "clear":
        conversation.system = ""
        return Outcome("system prompt removed")
    conversation.system = text
    return Outcome("system prompt set; it applies from the next answer on")


def _reset(conversation: Conversation, _: str) -> Outcome:
    conversation.reset()
    return Outcome("new conversation started; the system prompt and the settings stay")


def _undo(conversation: Conversation, _: str) -> Outcome:
    question = " ".join(conversation.undo().split())
    shown = question if len(question) <= 60 else question[:59] + "…"
    return Outcome(f'removed "{shown}" and its answer; {_count(len(conversation.messages), "message")} left')


def _retry(conversation: Conversation, _: str) -> Outcome:
    return Outcome(turn=conversation.retry())


def _save(conversation: Conversation, text: str) -> Outcome:
    path = _path(text)
    conversation.save(path)
    return Outcome(f"saved {_count(len(conversation.messages), 'message')} to {path}")


def _load(conversation: Conversation, text: str) -> Outcome:
    path = _path(text)
    conversation.load(path)
    messages = _count(len(conversation.messages), "message")
    return Outcome(f"loaded {messages} and {_count(len(conversation.settings), 'setting')} from {path}")


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise InvalidRequest("the file name is missing: add one, for example chat.json")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidRequest(f"{text}: there is no user of this name; write the full path") from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _set(conversation: Conversation, text: str) -> Outcome:
    name, _, value = text.partition(" ")
    if not name:
        return Outcome(_settings(conversation))
    if name not in Sampling.__dataclass_fields__:
        hint = _hint(name, Sampling.__dataclass_fields__, "", "type /set for a list")
        raise NotFound(f"unknown setting {name:.40}: {hint}")
    if value.strip():
        conversation.set(name, value.strip())
    return Outcome(f"{name} = {_value_text(getattr(conversation.sampling, name))}")


def _settings(conversation: Conversation) -> str:
    lines = []
    for name, value in asdict(conversation.sampling).items():
        source = "set" if name in conversation.settings else "checkpoint" if name in conversation.llm.defaults else ""
        lines.append(f"{name:<20}{_value_text(value):<12}{source}".rstrip())
    return "\n".join(lines)


def _value_text(value: object) -> str:
    return "none" if value is None or value in ((), {}) else str(value)


def _stats(conversation: Conversation, _: str) -> Outcome:
    llm, stats = conversation.llm, conversation.llm.engine.stats()
    tokens = conversation.tokens()
    used_blocks = stats.blocks - stats.free_blocks
    share = f" ({stats.accepted_tokens / stats.draft_tokens:.0%})" if stats.draft_tokens else ""
    return Outcome(
        "\n".join(
            (
                f"conversation   {_count(len(conversation.messages), 'message')}, {tokens:,} of {llm.context:,} tokens"
                + (" (too long: the oldest messages are not sent to the model)" if tokens > llm.context else ""),
                f"prompts        {stats.prompt_tokens:,} tokens, {stats.cached_tokens:,} of them from the cache",
                f"answers        {stats.generated_tokens:,} tokens in {stats.steps:,} steps",
                f"speculation    {stats.draft_tokens:,} tokens proposed, {stats.accepted_tokens:,} accepted{share}",
                f"cache          {used_blocks:,} of {stats.blocks:,} blocks used, "
                f"{_count(stats.preemptions, 'preemption')}",
            )
        )
    )


def _weights(conversation: Conversation, _: str) -> Outcome:
    loaded = conversation.llm.loaded
    if loaded.weights:
        return Outcome("\n".join(map(str, loaded.weights)))
    return Outcome("\n".join(("the weights were packed before they were loaded", *map(str, loaded.plan.weights))))


def _exit(_: Conversation, __: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS = {
    "help": Command("", "show this help", _help),
    "system": Command("[TEXT]", "show or set the system prompt; /system clear removes it", _system),
    "reset": Command("", "start a new conversation; keep the system prompt and the settings", _reset),
    "undo": Command("", "remove the last question and its answer", _undo),
    "retry": Command("", "answer the last question again (with a fixed seed the answer is the same)", _retry),
    "save": Command("FILE", "save the conversation and the settings to a file", _save),
    "load": Command("FILE", "continue a saved conversation", _load),
    "set": Command("[NAME [VALUE]]", "show or change sampling settings; /set NAME default resets one", _set),
    "stats": Command("", "show how much of the context is used, and engine statistics", _stats),
    "weights": Command("", "show types and formats of the weights, and the error that loading added", _weights),
    "exit": Command("", "end the chat", _exit),
}

KEY_HELP = (
    "Enter sends the message. Alt-Enter starts a new line; so does Enter after a \\ at the end of a line.",
    'A message that begins with """ may have several lines; it ends with """.',
    "Ctrl-C stops an answer or clears the line. Ctrl-D ends the chat.",
    "To send a message that begins with a slash, begin it with //.",
)
