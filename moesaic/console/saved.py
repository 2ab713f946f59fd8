"""Conversations in files: JSON with messages and settings.

    {"moesaic": 1, "model": "...", "messages": [{"role": ..., "content": ...}, ...], "settings": {...}}

Knows how to write one so that it is there whole or not at all, and how to refuse one that is damaged.
Does not know what the settings mean.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import InvalidMessages, InvalidParameter, InvalidRequest, NotFound
from moesaic.text import chat
from moesaic.text.chat import Message

VERSION = 1
LARGEST = 64 << 20
"""Bytes of the largest file that is read."""


@dataclass(frozen=True)
class Saved:
    """What a file holds: all messages, a system prompt first, and the sampling values that were set."""

    messages: Sequence[Message]
    settings: Mapping[str, Any]


def write(path: Path, content: Saved, model: str) -> None:
    """Write a conversation, readable by its owner alone; an older conversation under that name is replaced.

    Raises:
        InvalidRequest: it cannot be written, or ``path`` is something else than a conversation.
    """
    _make_sure_of(path)
    body = {"moesaic": VERSION, "model": model, "messages": content.messages, "settings": content.settings}
    text = json.dumps(body, ensure_ascii=True, indent=1)  # ASCII also carries half characters safely
    try:
        _replace(path, text + "\n")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def _make_sure_of(path: Path) -> None:
    """Raise unless ``path`` is free, or an older conversation."""
    try:
        if path.exists():
            read(path)
    except (InvalidRequest, NotFound) as error:
        raise InvalidRequest(f"{path} exists and is no saved conversation: choose another name") from error
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> Saved:
    """Return the conversation in ``path``.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it cannot be read, or is no conversation.
        InvalidMessages: a message has an unknown role, or no text.
        InvalidParameter: a setting is of the wrong kind.
    """
    body = _json(path)
    if not isinstance(body, dict) or body.get("moesaic") != VERSION:
        raise InvalidRequest(f"{path} is no saved conversation")
    surplus = sorted(body.keys() - {"moesaic", "model", "messages", "settings"})
    messages, settings = body.get("messages"), body.get("settings", {})
    if surplus or not isinstance(messages, list) or not isinstance(settings, dict):
        raise InvalidRequest(f"{path} is a damaged conversation: {surplus or 'messages or settings'} is not understood")
    try:
        if messages:
            chat.validate(messages)
    except InvalidMessages as error:
        raise InvalidMessages(f"{path}: {error}") from error
    said = [Message(role=message["role"], content=message["content"]) for message in messages]
    return Saved(said, {name: _kind(name, value) for name, value in settings.items()})


def _json(path: Path) -> Any:
    try:
        if not path.is_file():
            raise NotFound(f"{path}: no such file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise InvalidRequest(f"{path} is too large for a conversation")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is no saved conversation, or a damaged one") from error


def typed(name: str, text: str) -> Any:
    """Return a setting as somebody types it: JSON where it is JSON, none for null, else the string itself."""
    try:
        value = None if text.lower() == "none" else json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return _kind(name, value)


def _kind(name: str, value: Any) -> Any:
    """Return a JSON value as the kind that the sampling parameter ``name`` has."""
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "logit_bias" and isinstance(value, dict):
        try:
            return {int(id): bias for id, bias in value.items()}
        except ValueError as error:
            raise InvalidParameter(name, "expected pairs of token id and number") from error
    return tuple(value) if isinstance(value, list) else value
