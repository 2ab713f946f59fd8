"""Interactive chat session: reads input and shows answers as they come.

This module handles the terminal and its signals. ``conversation`` and ``commands`` implement the rest.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moesaic import __version__
from moesaic.console import commands, editing
from moesaic.console.conversation import Conversation, Turn
from moesaic.console.visible import one_line, visible
from moesaic.errors import EngineStopped, MoesaicError
from moesaic.llm import LLM

DIM, RED, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


def banner(llm: LLM, name: str, *, plain: bool) -> str:
    """Return the first line of a session: the model's name, size, type of weights, context and chat format."""
    model = llm.loaded.model
    count = sum(math.prod(slot.shape) for slot in model.slots())
    form = "plain text" if plain else f"format {llm.format.name}"
    return (
        f"Moesaic {__version__} · {name} · {_short(count)} parameters · {_weights(llm)}"
        f" · context {llm.context:,} · {form} · /help for commands"
    )


def _weights(llm: LLM) -> str:
    """Return the type of most weights: as the file names it if they are kept, or else their format in memory."""
    if not llm.loaded.weights:
        return "packed"
    most = max(llm.loaded.weights, key=lambda group: group.weights)
    return most.format if most.error or not most.format.startswith("grouped") else most.stored


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}" if count < 100 * size else f"{count / size:.0f}{letter}"
    return str(count)


class Session:
    """Chat session in a terminal with the model ``name``. It handles signals, so it needs the main thread."""

    def __init__(self, conversation: Conversation, name: str) -> None:
        self._conversation, self._name = conversation, name
        self._editor = editing.line_editor()
        # If answers are redirected to a file, notices must not be in it.
        self._notices = sys.stdout if sys.stdout.isatty() else sys.stderr
        self._reported = 0  # dropped messages that were reported to the user
        self._engine_failed = False

    def run(self) -> int:
        """Run the session until the user exits; return the exit status: 2 if the engine has failed, else 0."""
        self._notice(banner(self._conversation.llm, self._name, plain=self._conversation.plain))
        while True:
            try:
                text = editing.message_text(self._editor.prompt())
            except (
                KeyboardInterrupt
            ):  # a signal from another process; at the prompt, the Ctrl-C key only clears the line
                continue
            except EOFError:
                break
            if text.strip() and not self._handle(text):
                break
        return 2 if self._engine_failed else 0

    def _handle(self, text: str) -> bool:
        """Run the command in ``text``, or ask ``text`` as a question; return whether the session continues."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                outcome = commands.run(self._conversation, text)
            else:
                outcome = commands.Outcome(turn=self._conversation.ask(text.removeprefix("/")))
            if outcome.text:
                self._notice(outcome.text)
            if outcome.turn is not None:
                self._show(outcome.turn)
            return not outcome.leave
        except MoesaicError as error:
            self._notice(one_line(str(error)), RED)
            if isinstance(error, EngineStopped):
                self._engine_failed = True
                self._notice("the model can give no more answers: save the conversation with /save FILE, then /exit")
        except KeyboardInterrupt:
            self._notice("stopped")
        return True

    def _show(self, turn: Turn) -> None:
        if turn.dropped > self._reported:
            were = "message was" if turn.dropped == 1 else "messages were"
            self._notice(f"the conversation is longer than the context: the oldest {turn.dropped} {were} left out")
        self._reported = turn.dropped
        try:
            with turn, _interruptible(turn), _no_echo():
                for piece in turn:
                    sys.stdout.write(visible(piece))
                    sys.stdout.flush()
        finally:
            if not turn.text.endswith("\n"):
                print(flush=True)
            self._notice(f"{turn.statistics}\n")
            if turn.reason in ("cancelled", "failed") and not turn.text:
                self._notice(
                    "there was no answer, so the question was not added to the conversation; /retry asks it again"
                )

    def _notice(self, text: str, color: str = DIM) -> None:
        """Print a notice, which is no part of an answer. ``color`` is an ANSI escape sequence."""
        colored = self._notices.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        text = visible(text)
        print(f"{color}{text}{PLAIN}" if colored else text, file=self._notices, flush=True)


@contextmanager
def _interruptible(turn: Turn) -> Iterator[None]:
    """Let Ctrl-C stop the answer after the engine's current step. A second Ctrl-C raises KeyboardInterrupt at once."""
    interrupted = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        turn.cancel()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _no_echo() -> Iterator[None]:
    """Do not echo keys that are typed during an answer; the next prompt shows them."""
    keyboard = sys.stdin.fileno()
    previous = termios.tcgetattr(keyboard)
    quiet = [*previous]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, previous)
