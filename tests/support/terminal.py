"""A program in a pseudo terminal, as a person sees and uses it."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

# The child makes the terminal its own, so that Ctrl-C becomes a signal, and then is the program.
ADOPT = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>()][0-9AB]?|\x1b\][^\x07]*\x07")


class Terminal:
    """Runs ``moesaic`` with these arguments; ``type`` and ``expect`` are what a person does."""

    def __init__(self, *arguments: str | Path, state: Path) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 200))
        env = os.environ | {
            "TERM": "xterm",
            "XDG_STATE_HOME": str(state),
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        command = [sys.executable, "-m", "moesaic.cli", *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", ADOPT, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        self.raw, self._seen = "", 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def screen(self) -> str:
        """All that was shown so far, without escape sequences."""
        return ESCAPES.sub("", self.raw).replace("\r", "").replace("\b", "")

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def answer(self, text: str) -> None:
        """Wait for the prompt, then press these keys: a terminal that is not read raw takes Ctrl-D for itself."""
        self.expect("(?m)^>")
        self.type(text)

    def expect(self, pattern: str, seconds: float = 30.0) -> str:
        """Wait until ``pattern`` is shown after what was expected last; return what stood up to its end."""
        until = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.screen, self._seen)):
            assert time.monotonic() < until and self._read(until), f"no {pattern!r} in {self.screen[self._seen :]!r}"
        shown, self._seen = self.screen[self._seen : found.end()], found.end()
        return shown

    def end(self) -> int:
        """Wait until the program has ended and return its exit code."""
        while self._read(time.monotonic() + 20):
            pass
        return self.process.wait(10)

    def _read(self, until: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, until - time.monotonic()))
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:  # the program has closed the terminal
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)
