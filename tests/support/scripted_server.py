"""Server that follows a script over real sockets: known pieces of text, and faults in a known order.

It speaks all dialects of ``moesaic/bench/endpoints`` and needs the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from tests.support.threads import in_thread

CONTEXT = 4096
TEMPLATE = 3
"""Tokens of a prompt in addition to two for each word."""


@dataclass
class Script:
    """Behaviour of the server. Each generation request takes the next fault; "" and an empty queue mean no fault.

    Faults in place of the third piece: error sends an error; cut breaks the connection; short ends the stream; stuck
    sends nothing more; junk sends an event that is not JSON. Faults of the whole reply: refuse is status 429; silent
    ends normally without text; page sends HTML.
    """

    dialects: tuple[str, ...] = ("openai_chat", "openai", "tgi", "aime")
    pieces: int = 5
    counts: bool = True
    key: str | None = None
    faults: deque[str] = field(default_factory=deque)
    pause: float = 0.0
    """Seconds before each piece."""
    url: str = ""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Path, headers and body of each generation request."""
    running: int = 0
    max_running: int = 0
    """Largest number of requests that ran at the same time."""
    jobs: dict[str, list[Any]] = field(default_factory=dict)


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    """Serve ``script`` in a thread, on a free port."""
    with in_thread(_listening(script)):
        yield script


@asynccontextmanager
async def _listening(script: Script) -> AsyncIterator[None]:
    server = await asyncio.start_server(lambda reader, writer: _connection(script, reader, writer), "127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield
    finally:
        server.close()


class Broken(Exception):
    """Request to break the connection."""


async def _connection(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            method, target, _ = line.decode().split()
            headers = {}
            while (header := (await reader.readline()).strip()) != b"":
                name, _, value = header.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            await _respond(script, method, target, headers, json.loads(body or b"{}"), writer)
    except (Broken, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        writer.transport.abort()
    finally:
        writer.close()


async def _respond(
    script: Script,
    method: str,
    target: str,
    headers: dict[str, str],
    body: dict[str, Any],
    writer: asyncio.StreamWriter,
) -> None:
    path, _, query = target.partition("?")
    if script.key is not None and headers.get("authorization") != f"Bearer {script.key}":
        _reply(writer, 401, {"error": {"message": "invalid API key"}})
    elif method == "GET" and path.endswith("/progress"):
        await _progress(script, query, writer)
    elif method == "GET":
        page = _pages(script).get(path)
        _reply(writer, 200 if page is not None else 404, {"error": "no such page"} if page is None else page)
    else:
        script.requests.append((path, headers, body))
        script.running += 1
        script.max_running = max(script.max_running, script.running)
        try:
            await _generate(script, path, body, writer)
        finally:
            script.running -= 1


def _pages(script: Script) -> dict[str, Any]:
    """Return the replies to GET requests, by path."""
    pages: dict[str, Any] = {}
    if {"openai", "openai_chat"} & set(script.dialects):
        pages["/v1/models"] = {"object": "list", "data": [{"id": "tiny", "max_model_len": CONTEXT}]}
    if "tgi" in script.dialects:
        pages["/info"] = {"model_id": "tiny", "max_total_tokens": CONTEXT}
    if "aime" in script.dialects:
        pages["/api/endpoints"] = {"endpoints": ["tiny"]}
        pages["/api/endpoints/tiny"] = {"parameter_description": {"input": {"prompt_input": {}, "chat_context": {}}}}
        pages["/tiny/login"] = {"success": True, "client_session_auth_key": "session"}
    return pages


async def _generate(script: Script, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    fault = script.faults.popleft() if script.faults else ""
    if fault == "refuse":
        _reply(writer, 429, {"error": {"message": "too many"}}, "Retry-After: 7\r\n")
    elif fault == "page":
        _reply(writer, 200, "<html>hello</html>", kind="text/html")
    elif path == "/tiny":
        job = f"job#{len(script.jobs)}"
        script.jobs[job] = [fault, 0, _words(body)]
        _reply(writer, 200, {"success": True, "job_id": job})
    else:
        await _stream(script, path, body, fault, writer)


async def _stream(script: Script, path: str, body: dict[str, Any], fault: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    async for event in _events(script, path, body, fault):
        data = event if isinstance(event, str) else json.dumps(event)
        _chunk(writer, f"data: {data}\n\n".encode())
        await writer.drain()
    _chunk(writer, b"")


async def _events(script: Script, path: str, body: dict[str, Any], fault: str) -> AsyncIterator[Any]:
    """Yield the events of a stream in the dialect of ``path``."""
    native, chat = path == "/generate_stream", path == "/v1/chat/completions"
    if chat:
        yield {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}], "usage": None}
    pieces = 0 if fault == "silent" else script.pieces
    for number in range(pieces):
        if script.pause:
            await asyncio.sleep(script.pause)
        if fault and number == 2:
            if fault == "error":
                yield (
                    {"error": "it broke", "error_type": "generation"} if native else {"error": {"message": "it broke"}}
                )
                return
            if fault == "cut":
                raise Broken
            if fault == "short":
                return
            if fault == "stuck":
                await asyncio.sleep(3600)
            if fault == "junk":
                yield '{"error":{"generated_text":"'
        text = f' "content": "{number}"\n'
        if native:
            last = number == pieces - 1
            details = {"generated_tokens": pieces, "input_length": _tokens(body)} if script.counts else None
            yield {
                "token": {"id": 5, "text": text, "logprob": -0.1, "special": False},
                "generated_text": "whole" if last else None,
                "details": details if last else None,
            }
        else:
            yield {"choices": [{"delta": {"content": text}} if chat else {"text": text}], "error": None}
    if native:
        if not pieces:
            yield {"token": {"id": 2, "text": "", "special": True}, "generated_text": "", "details": None}
        return
    yield {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]}
    if script.counts and body.get("stream_options", {}).get("include_usage"):
        yield {"choices": [], "usage": {"prompt_tokens": _tokens(body), "completion_tokens": pieces}}
    yield "[DONE]"


async def _progress(script: Script, query: str, writer: asyncio.StreamWriter) -> None:
    """Reply to a progress request; each one has one more piece."""
    name = next(part.removeprefix("job_id=") for part in query.split("&") if part.startswith("job_id="))
    job = script.jobs[name.replace("%23", "#")]
    fault, number, words = job
    if fault and number == 2:
        if fault in ("cut", "short", "junk"):
            raise Broken
        if fault == "error":
            _reply(writer, 200, {"success": True, "job_state": "done", "job_result": {"error": "it broke"}})
            return
    if not (fault == "stuck" and number == 2):
        job[1] = number = number + 1
    done = number >= script.pieces
    progress: dict[str, Any] = {"text": "" if fault == "silent" else "word " * number}
    if script.counts:
        progress |= {"num_generated_tokens": number, "current_context_length": TEMPLATE + 2 * words + number}
    state = {"job_state": "done", "job_result": progress} if done else {"job_state": "processing"}
    _reply(writer, 200, {"success": True, "progress": {"progress_data": progress}} | state)


def _tokens(body: dict[str, Any]) -> int:
    return TEMPLATE + 2 * _words(body)


def _words(body: dict[str, Any]) -> int:
    texts = [message["content"] for message in body.get("messages", [])]
    texts += [body[name] for name in ("prompt", "inputs", "prompt_input") if name in body]
    return sum(len(text.split()) for text in texts)


def _reply(
    writer: asyncio.StreamWriter, status: int, body: Any, more: str = "", kind: str = "application/json"
) -> None:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n"
    head += f"{more}Content-Length: {len(data)}\r\n\r\n"
    with contextlib.suppress(ConnectionError):
        writer.write(head.encode() + data)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
