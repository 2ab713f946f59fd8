"""The server's log: one line for each event, as JSON or as readable text.

Prompts, answers and keys are never logged. Control characters in client data are escaped, so they cannot forge a line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback

MAX_TRACE_FRAMES = 30
"""Largest number of stack frames that are logged for an error: the innermost ones."""
STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JSONFormatter(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in STANDARD_FIELDS}
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {"time": f"{at}.{record.msecs:03.0f}Z", "level": record.levelname.lower(), "event": record.getMessage()}
        entry |= extra
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Formats a log record as one readable line."""

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{name}={value!r}" for name, value in vars(record).items() if name not in STANDARD_FIELDS)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()!r:.400} {extra}"
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def trace(error: BaseException) -> dict[str, object]:
    """Return fields for a log record: an error's class name and stack, not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_TRACE_FRAMES:]
    return {
        "error": type(error).__name__,
        "trace": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def set_up(level: str = "info", *, as_json: bool = True) -> None:
    """Configure logging to standard error: our own records from ``level`` on, and uvicorn's from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if as_json else TextFormatter())
    for name, minimum in (("moesaic", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(minimum)
