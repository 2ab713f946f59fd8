"""Runs a file of requests through the application, without a socket, and writes a file of results.

Both files are in OpenAI's batch format, one JSON object per line:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

Each result is appended with one write as soon as it is complete. A killed process loses only running requests, and the
next run skips requests that have a result. This module does not depend on models.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from msgspec import Meta, Struct

from moesaic.errors import InvalidRequest
from moesaic.serve.app import App
from moesaic.serve.json_body import decode_json
from moesaic.serve.types import Message

MAX_ATTEMPTS = 20
"""Largest number of attempts at a request while the server answers with status 429 or 503."""

ProgressCallback = Callable[[int, int], None]


class BatchLine(Struct):
    """One line of the input file: a request."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    url: Annotated[str, Meta(pattern="^/")]
    body: dict[str, Any]
    method: Literal["POST"] = "POST"


@dataclass
class BatchCounts:
    """Numbers of requests with a result. ``failed`` counts errors and responses with a status of 400 or more."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    """Requests that had a result before this run. They are included in ``answered`` and ``failed``."""

    def add(self, result: dict[str, Any]) -> None:
        """Count one result, a decoded line of the output file, as answered or as failed."""
        response = result["response"]
        if response is not None and response["status_code"] < 400:
            self.answered += 1
        else:
            self.failed += 1


@dataclass
class BatchOutput:
    """The file of results, open for appending, and the requests that it has results for, as ``custom_id`` values."""

    file: BinaryIO
    ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    """Numbers of the input lines that are not valid requests; the file has an error as the result of each."""
    count: BatchCounts = field(default_factory=BatchCounts)

    def read(self, path: Path) -> None:
        """Read the results that the file has already, and cut off an incomplete last line.

        Args:
            path: path of the file, for error messages.

        Raises:
            InvalidRequest: a line is not a result. The file is left unchanged.
        """
        end = 0
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequest(f"{path}:{number}: not a batch result; choose another output file") from error
            end += len(line)
        self.file.truncate(end)
        self.file.seek(end)
        self.count.skipped = self.count.answered + self.count.failed

    def _add(self, result: dict[str, Any]) -> None:
        if result["custom_id"] is not None:
            self.ids.add(result["custom_id"])
        else:
            self.lines.add(result["error"]["line"])
        self.count.add(result)

    def write(self, custom_id: str | None, response: Any, error: Any) -> None:
        """Append one result to the file and count it.

        Args:
            custom_id: id of the request; None for an input line that is not a valid request.
            response: the response to the request; None if there is an error instead.
            error: why the line is not a valid request; None if there is a response.
        """
        result = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response}
        self.file.write(json.dumps(result | {"error": error}).encode() + b"\n")  # unbuffered: one write
        self._add(result | {"error": error})


async def run(
    app: App, source: Path, target: Path, concurrency: int = 16, progress: ProgressCallback | None = None
) -> BatchCounts:
    """Run the requests in ``source`` that have no result yet, and append their results to ``target``.

    The counts of all results in ``target``, including those of earlier runs, are returned.

    Args:
        app: the application that answers the requests.
        source: file of requests.
        target: file of results; it is created if it does not exist.
        concurrency: number of requests that run at the same time.
        progress: called with the number of results so far and the number of requests.

    Raises:
        InvalidRequest: a file cannot be read or written, another process writes to ``target``, or ``target`` has lines
            that are not results.
    """
    try:
        if target.exists() and target.samefile(source):
            raise InvalidRequest(f"{target}: the results cannot go into the file of requests")
        with source.open("rb") as requests, target.open("ab+", buffering=0) as results:
            _lock(results, target)
            results.seek(0)
            output = BatchOutput(results)
            output.read(target)
            batch = _BatchRun(app, output, progress, _count_lines(requests))
            await batch.run(_pending(requests, output), concurrency)
            return output.count
    except OSError as error:
        raise InvalidRequest(f"{error.filename or target}: {error.strerror}") from error


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file, so that no other process writes results to it. On Windows, do nothing.

    Raises:
        InvalidRequest: another process has locked the file.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InvalidRequest(f"{path}: another process is writing results to this file") from error


def _count_lines(requests: BinaryIO) -> int:
    count = sum(1 for line in requests if not _is_blank(line))
    requests.seek(0)
    return count


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _pending(requests: BinaryIO, output: BatchOutput) -> Iterator[BatchLine]:
    """Yield the requests that have no result in ``output``. For an invalid line, write an error as its result."""
    first: dict[str, int] = {}
    for number, line in enumerate(requests, 1):
        if _is_blank(line) or number in output.lines:
            continue
        try:
            entry: BatchLine = decode_json(line, BatchLine)
            if entry.custom_id in first:
                raise InvalidRequest(
                    f"custom_id {entry.custom_id!r:.80} is already used in line {first[entry.custom_id]}"
                )
            if entry.body.get("stream"):
                raise InvalidRequest("stream: is not supported in a batch")
        except InvalidRequest as error:
            problem = {"code": "invalid_line", "message": f"line {number}: {error}", "line": number}
            output.write(None, None, problem)
            continue
        first[entry.custom_id] = number
        if entry.custom_id not in output.ids:
            yield entry


class _BatchRun:
    """One run over a file of requests: several workers send the requests to the application."""

    def __init__(self, app: App, output: BatchOutput, progress: ProgressCallback | None, total: int) -> None:
        self._app, self._output, self._progress, self._total = app, output, progress, total

    async def run(self, requests: Iterator[BatchLine], concurrency: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._worker(requests))
        self._report()

    async def _worker(self, requests: Iterator[BatchLine]) -> None:
        for entry in requests:  # the iterator is shared by all workers
            self._report()
            self._output.write(entry.custom_id, await self._request(entry), None)

    def _report(self) -> None:
        if self._progress:
            count = self._output.count
            self._progress(count.answered + count.failed, self._total)

    async def _request(self, entry: BatchLine) -> dict[str, Any]:
        body = json.dumps(entry.body).encode()
        for left in reversed(range(MAX_ATTEMPTS)):
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
    """Send a POST request with a JSON body to the application, without a socket; return the response.

    The response is returned as its status, its headers and its body.
    """
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
            await asyncio.Event().wait()  # the client never disconnects
        return coming.pop()

    async def send(message: Message) -> None:
        begin.update(message if message["type"] == "http.response.start" else {})
        out.extend(message.get("body", b""))

    await app(scope, receive, send)
    return begin["status"], dict(begin["headers"]), bytes(out)
