"""Files with saved conversations: JSON with messages and settings.

    {"moesaic": 1, "model": "...", "messages": [{"role": ..., "content": ...}, ...], "settings": {...}}

A file is replaced atomically, and a damaged file is rejected. This module does not depend on the meaning of the
settings.
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
MAX_BYTES = 64 << 20
"""Maximum size of a saved conversation's file in bytes; a larger file is refused."""


@dataclass(frozen=True)
class SavedConversation:
    """Contents of a saved conversation: messages, with the system prompt first if there is one, and settings."""

    messages: Sequence[Message]
    settings: Mapping[str, Any]


def write(path: Path, content: SavedConversation, model: str) -> None:
    """Write a conversation with ``model`` to a file that only its owner can read. An older conversation is replaced.

    Raises:
        InvalidRequest: the file cannot be written, or exists and is not a saved conversation.
    """
    _check_target(path)
    body = {"moesaic": VERSION, "model": model, "messages": content.messages, "settings": content.settings}
    text = json.dumps(body, ensure_ascii=True, indent=1)  # ASCII escapes also preserve unpaired surrogates
    try:
        _replace(path, text + "\n")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def _check_target(path: Path) -> None:
    """Raise InvalidRequest if ``path`` exists and is not a saved conversation."""
    try:
        if path.exists():
            read(path)
    except (InvalidRequest, NotFound) as error:
        raise InvalidRequest(f"{path} exists and is not a saved conversation: choose another name") from error
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


def read(path: Path) -> SavedConversation:
    """Return the saved conversation in the file ``path``.

    Raises:
        NotFound: the file does not exist.
        InvalidRequest: the file cannot be read, or is not a conversation.
        InvalidMessages: a message has an unknown role or no text.
        InvalidParameter: a setting has the wrong type.
    """
    body = _json(path)
    if not isinstance(body, dict) or body.get("moesaic") != VERSION:
        raise InvalidRequest(f"{path} is not a saved conversation: name a file that /save has written")
    unknown = sorted(body.keys() - {"moesaic", "model", "messages", "settings"})
    messages, settings = body.get("messages"), body.get("settings", {})
    if unknown or not isinstance(messages, list) or not isinstance(settings, dict):
        what = f"the unknown keys {unknown}" if unknown else "its messages or settings"
        raise InvalidRequest(f"{path} is damaged: {what} cannot be read")
    try:
        if messages:
            chat.validate(messages)
    except InvalidMessages as error:
        raise InvalidMessages(f"{path}: {error}") from error
    checked = [Message(role=message["role"], content=message["content"]) for message in messages]
    return SavedConversation(checked, {name: _convert(name, value) for name, value in settings.items()})


def _json(path: Path) -> Any:
    try:
        if not path.is_file():
            raise NotFound(f"{path}: no such file; /save FILE writes one")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"{path} is too large: the limit is {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{path} is not a saved conversation, or is damaged: name a file that /save has written"
        ) from error


def parse_setting(name: str, text: str) -> Any:
    """Return the value of the sampling parameter ``name``: "none" is None, JSON is parsed, other text is a string."""
    try:
        value = None if text.lower() == "none" else json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return _convert(name, value)


def _convert(name: str, value: Any) -> Any:
    """Convert a JSON value to the Python type that the sampling parameter ``name`` has, and return it."""
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "logit_bias" and isinstance(value, dict):
        try:
            return {int(token_id): bias for token_id, bias in value.items()}
        except ValueError as error:
            raise InvalidParameter(
                name, "expected a JSON object with token ids as keys and numbers as values"
            ) from error
    return tuple(value) if isinstance(value, list) else value
