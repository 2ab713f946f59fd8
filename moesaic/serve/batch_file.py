"""A file of requests, answered through the application without a socket, into a file of answers.

Both are in OpenAI's batch format, one JSON object on a line:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

Answers are written as they come, each with one write, so that a process that is killed loses only what was running;
what the file of answers has already is not asked again. Knows files and the application. Does not know models.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from msgspec import Meta, Struct

from moesaic.errors import InvalidRequest
from moesaic.serve.app import App
from moesaic.serve.exchange import Message
from moesaic.serve.json_body import decode_json

TRIES = 20
"""How often a request is repeated that the server has no room for."""

Shown = Callable[[int, int], None]


class BatchLine(Struct):
    """One request."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    url: Annotated[str, Meta(pattern="^/")]
    body: dict[str, Any]
    method: Literal["POST"] = "POST"


@dataclass
class BatchCounts:
    """What has become of the requests."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    """Of both: what was in the file of answers before."""

    def enter(self, result: dict[str, Any]) -> None:
        response = result["response"]
        if response is not None and response["status_code"] < 400:
            self.answered += 1
        else:
            self.failed += 1


@dataclass
class BatchOutput:
    """The file of answers: what it has, and its end, where more is written."""

    file: BinaryIO
    ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    """Of the requests: those that were none."""
    count: BatchCounts = field(default_factory=BatchCounts)

    def read(self, path: Path) -> None:
        """Take in what is there, and cut off a line that was not finished.

        Raises:
            InvalidRequest: it is another kind of file; nothing in it is changed then.
        """
        end = 0
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._enter(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequest(f"{path}:{number}: is no answer of a batch: name another file") from error
            end += len(line)
        self.file.truncate(end)
        self.file.seek(end)
        self.count.skipped = self.count.answered + self.count.failed

    def _enter(self, result: dict[str, Any]) -> None:
        if result["custom_id"] is not None:
            self.ids.add(result["custom_id"])
        else:
            self.lines.add(result["error"]["line"])
        self.count.enter(result)

    def write(self, custom_id: str | None, response: Any, error: Any) -> None:
        """Add an answer, for good."""
        shown = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response}
        self.file.write(json.dumps(shown | {"error": error}).encode() + b"\n")  # unbuffered: one write
        self._enter(shown | {"error": error})


async def run(
    app: App, source: Path, target: Path, concurrency: int = 16, progress: Shown | None = None
) -> BatchCounts:
    """Answer what ``source`` asks into ``target``, so many requests at a time.

    Raises:
        InvalidRequest: a file cannot be used.
    """
    try:
        if target.exists() and target.samefile(source):
            raise InvalidRequest(f"{target}: answers go into another file than the requests")
        with source.open("rb") as asked, target.open("ab+", buffering=0) as written:
            _lock(written, target)
            written.seek(0)
            answers = BatchOutput(written)
            answers.read(target)
            await _Run(app, answers, progress, _lines(asked)).all(_requests(asked, answers), concurrency)
            return answers.count
    except OSError as error:
        raise InvalidRequest(f"{error.filename or target}: {error.strerror}") from error


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep others from writing there as long as this process lives."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InvalidRequest(f"{path}: another process is writing answers there") from error


def _lines(asked: BinaryIO) -> int:
    count = sum(1 for line in asked if line.strip())
    asked.seek(0)
    return count


def _requests(asked: BinaryIO, answers: BatchOutput) -> Iterator[BatchLine]:
    """Yield what is to be asked; what is no request is answered on the spot."""
    first: dict[str, int] = {}
    for number, line in enumerate(asked, 1):
        if not line.strip() or number in answers.lines:
            continue
        try:
            entry: BatchLine = decode_json(line, BatchLine)
            if entry.custom_id in first:
                raise InvalidRequest(f"custom_id {entry.custom_id!r:.80} is in line {first[entry.custom_id]} already")
            if entry.body.get("stream"):
                raise InvalidRequest("stream: is not possible in a batch")
        except InvalidRequest as error:
            told = {"code": "invalid_line", "message": f"line {number}: {error}", "line": number}
            answers.write(None, None, told)
            continue
        first[entry.custom_id] = number
        if entry.custom_id not in answers.ids:
            yield entry


class _Run:
    """One go through a file."""

    def __init__(self, app: App, answers: BatchOutput, progress: Shown | None, total: int) -> None:
        self._app, self._answers, self._progress, self._total = app, answers, progress, total

    async def all(self, requests: Iterator[BatchLine], concurrency: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._some(requests))
        self._show()

    async def _some(self, requests: Iterator[BatchLine]) -> None:
        for entry in requests:  # shared with the others
            self._show()
            self._answers.write(entry.custom_id, await self._one(entry), None)

    def _show(self) -> None:
        if self._progress:
            count = self._answers.count
            self._progress(count.answered + count.failed, self._total)

    async def _one(self, entry: BatchLine) -> dict[str, Any]:
        body = json.dumps(entry.body).encode()
        for left in reversed(range(TRIES)):
            request_id = secrets.token_hex(8)
            status, headers, content = await post(self._app, entry.url, body, request_id)
            if status not in (429, 503) or not left:
                break
            await asyncio.sleep(float(headers.get(b"retry-after", b"1")))
        return {"status_code": status, "request_id": request_id, "body": _json(content)}


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


async def post(app: App, path: str, body: bytes, request_id: str) -> tuple[int, dict[bytes, bytes], bytes]:
    """Put a request to the application itself, as if it had come from this machine; return status, fields and body."""
    fields = {b"host": b"localhost", b"content-type": b"application/json", b"x-request-id": request_id.encode()}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path.partition("?")[0],
        "raw_path": path.encode(),
        "query_string": path.partition("?")[2].encode(),
        "root_path": "",
        "headers": list(fields.items()),
        "client": None,
        "server": None,
    }
    coming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    begin: Message = {}
    out = bytearray()

    async def receive() -> Message:
        if not coming:
            await asyncio.Event().wait()  # nobody leaves
        return coming.pop()

    async def send(message: Message) -> None:
        begin.update(message if message["type"] == "http.response.start" else {})
        out.extend(message.get("body", b""))

    await app(scope, receive, send)
    return begin["status"], dict(begin["headers"]), bytes(out)
