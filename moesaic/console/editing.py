"""Line editor of the chat: multi-line input, keys, and the history file.

The editor is built on prompt_toolkit. This module does not interpret the input.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

BLOCK = '"""'
HISTORY_BYTES = 1 << 20
"""Maximum size of the history file in bytes. When a session begins, only the newer half of a larger file is kept."""


def is_unfinished(text: str) -> bool:
    """Return whether Enter starts a new line instead of sending the input: after a backslash, and in triple quotes."""
    if text.lstrip().startswith(BLOCK):
        inner = text.strip()
        return len(inner) < 2 * len(BLOCK) or not inner.endswith(BLOCK)
    return text.endswith("\\")


def message_text(text: str) -> str:
    """Return the message in an input: without backslashes at line ends, and without enclosing triple quotes."""
    inner = text.strip()
    if inner.startswith(BLOCK) and inner.endswith(BLOCK) and len(inner) >= 2 * len(BLOCK):
        return inner[len(BLOCK) : -len(BLOCK)].strip("\n")
    return text.replace("\\\n", "\n").rstrip()


def history_path() -> Path:
    """Return the path of the file with the input history, as the XDG base directory specification defines it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moesaic" / "history"


class _TolerantFileHistory(FileHistory):
    """Input history in a file. An entry that cannot be written is kept in memory for this session."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def open_history(path: Path) -> History:
    """Return the input history in the file ``path``, made readable by its owner only; if that fails, one in memory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        if path.stat().st_size > HISTORY_BYTES:
            _halve(path)
    except OSError:
        return InMemoryHistory()
    return _TolerantFileHistory(str(path))


def _halve(path: Path) -> None:
    """Keep only the newer half of a history file, from the start of an entry: a line with ``#`` after an empty line."""
    tail = path.read_bytes()[-HISTORY_BYTES // 2 :]
    start = tail.find(b"\n\n#")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(tail[start + 1 :] if start >= 0 else b"")
    part.replace(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    @keys.add("c-d")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.delete()
        else:
            event.app.exit(exception=EOFError)

    return keys


def line_editor() -> PromptSession[str]:
    """Return the line editor of the chat, with history. It draws on standard error if stdout is not a terminal."""
    return PromptSession(
        FormattedText([("bold", "> ")]),
        multiline=True,
        reserve_space_for_menu=0,
        key_bindings=_keys(),
        history=open_history(history_path()),
        prompt_continuation=lambda width, _line, _wraps: "." * (width - 1) + " ",
        output=create_output(always_prefer_tty=True),
    )
