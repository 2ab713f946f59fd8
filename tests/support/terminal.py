"""Driver for the program in a pseudo terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

# The child makes the terminal its controlling terminal, so that Ctrl-C sends a signal, and then runs the program.
ADOPT_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "  # a shell ignores it for commands in the background
    "os.execv(sys.argv[1], sys.argv[1:])"
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>()][0-9AB]?|\x1b\][^\x07]*\x07")


class Terminal:
    """Runs ``moesaic`` in a pseudo terminal; ``type`` presses keys and ``expect`` reads the screen."""

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
            [sys.executable, "-c", ADOPT_TERMINAL, *command],
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
        """All output so far, without escape sequences."""
        return ESCAPES.sub("", self.raw).replace("\r", "").replace("\b", "")

    def type(self, text: str) -> None:
        """Press the keys of ``text``."""
        os.write(self._master, text.encode())

    def answer(self, text: str) -> None:
        """Wait for the prompt, then press the keys; outside of the prompt, the terminal would handle Ctrl-D itself."""
        self.expect("(?m)^>")
        self.type(text)

    def expect(self, pattern: str, seconds: float = 30.0) -> str:
        """Wait for ``pattern`` after the last match; return the output up to the end of the match."""
        deadline = time.monotonic() + seconds
        while not (match := re.compile(pattern).search(self.screen, self._seen)):
            assert time.monotonic() < deadline and self._read(deadline), (
                f"no {pattern!r} in {self.screen[self._seen :]!r}"
            )
        shown, self._seen = self.screen[self._seen : match.end()], match.end()
        return shown

    def end(self) -> int:
        """Wait until the program ends, and return its exit status."""
        while self._read(time.monotonic() + 20):
            pass
        return self.process.wait(10)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:  # the program has closed the terminal
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)
