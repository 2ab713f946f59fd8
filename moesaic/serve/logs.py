"""What a server writes about itself: one line of JSON for each event, or one that is pleasant to read.

Prompts, answers and keys are never in it; control characters in what clients send cannot make a new line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback

FRAMES = 30
"""Of a trace, the innermost."""
USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Lines(logging.Formatter):
    """Formats records as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in USUAL}
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {"time": f"{at}.{record.msecs:03.0f}Z", "level": record.levelname.lower(), "event": record.getMessage()}
        entry |= extra
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Readable(logging.Formatter):
    """Formats records for a person."""

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{name}={value!r}" for name, value in vars(record).items() if name not in USUAL)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()!r:.400} {extra}"
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def trace(error: BaseException) -> dict[str, object]:
    """Return where an error came from, for a record. What it says is left out: it may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return {"error": type(error).__name__, "trace": [f"{each.filename}:{each.lineno} {each.name}" for each in frames]}


def set_up(level: str = "info", *, as_json: bool = True) -> None:
    """Send our own records, and the server library's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines() if as_json else Readable())
    for name, least in (("moesaic", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
