"""The interactive session: reads what is typed, shows answers as they come.

Knows the terminal and its signals. What is said and done lies in ``conversation`` and ``commands``.
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
    """Return the line that says what is being talked to."""
    model = llm.loaded.model
    count = sum(math.prod(slot.shape) for slot in model.slots())
    form = "plain text" if plain else f"format {llm.format.name if llm.format else 'template'}"
    return (
        f"Moesaic {__version__} · {name} · {_short(count)} parameters · {str(model.dtype).removeprefix('torch.')}"
        f" · context {llm.context:,} · {form} · /help for commands"
    )


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}" if count < 100 * size else f"{count / size:.0f}{letter}"
    return str(count)


class Session:
    """A person at a terminal, talking to a model. For the main thread, whose signals it handles."""

    def __init__(self, conversation: Conversation, name: str) -> None:
        self._conversation, self._name = conversation, name
        self._editor = editing.line_editor()
        # Where answers are written to a file, everything else must not be in it.
        self._notes = sys.stdout if sys.stdout.isatty() else sys.stderr
        self._told = 0  # dropped messages that the user knows of
        self._broken = False

    def run(self) -> int:
        """Talk until the user leaves; return the exit status: 2 if the engine died on the way."""
        self._note(banner(self._conversation.llm, self._name, plain=self._conversation.plain))
        while True:
            try:
                text = editing.meant(self._editor.prompt())
            except KeyboardInterrupt:  # sent by another process: at the prompt the key only clears the line
                continue
            except EOFError:
                break
            if text.strip() and not self._heed(text):
                break
        return 2 if self._broken else 0

    def _heed(self, text: str) -> bool:
        """Do what one input asks for; return whether the session goes on."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                outcome = commands.run(self._conversation, text)
            else:
                outcome = commands.Outcome(turn=self._conversation.ask(text.removeprefix("/")))
            if outcome.text:
                self._note(outcome.text)
            if outcome.turn is not None:
                self._show(outcome.turn)
            return not outcome.leave
        except MoesaicError as error:
            self._note(one_line(str(error)), RED)
            if isinstance(error, EngineStopped):
                self._broken = True
                self._note("no more answers will come: /save FILE keeps the conversation, /exit leaves")
        except KeyboardInterrupt:
            self._note("stopped")
        return True

    def _show(self, turn: Turn) -> None:
        if turn.dropped > self._told:
            were = "message was" if turn.dropped == 1 else "messages were"
            self._note(f"the conversation is longer than the context: the oldest {turn.dropped} {were} left out")
        self._told = turn.dropped
        try:
            with turn, _stoppable(turn), _silent():
                for piece in turn:
                    sys.stdout.write(visible(piece))
                    sys.stdout.flush()
        finally:
            if not turn.text.endswith("\n"):
                print(flush=True)
            self._note(f"{turn.statistics}\n")
            if turn.reason in ("cancelled", "failed") and not turn.text:
                self._note("nothing came, so the question is not part of the conversation; /retry asks it again")

    def _note(self, text: str, color: str = DIM) -> None:
        """Show lines that are not the model's."""
        colored = self._notes.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        text = visible(text)
        print(f"{color}{text}{PLAIN}" if colored else text, file=self._notes, flush=True)


@contextmanager
def _stoppable(turn: Turn) -> Iterator[None]:
    """Let Ctrl-C stop the answer; a second one does not wait for the step that is running."""
    asked = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        turn.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _silent() -> Iterator[None]:
    """Do not show keys that are pressed during an answer; the prompt shows them afterwards."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
