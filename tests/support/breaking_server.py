"""Server that breaks its connections as the path of a request says.

    /cut=17+40,how=reset,keyed=1/v1/chat/completions

The first connection of this request breaks after 17 bytes of the body, the second after 40, and a third is complete.
Connections with the same Idempotency-Key belong to one request. Run as a program, the server prints its port:

    python -m tests.support.breaking_server
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.threads import in_thread

TEXT = "Grüß dich, 🐇!"
ARGUMENTS = '{"city": "Århus"}'
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Plan:
    """Faults of the connections of a request. Values joined by + apply to one connection each."""

    cut: tuple[int, ...] = ()
    how: str = "eof"
    """How a connection breaks: "eof", "reset", "end" (as if the body were complete) or "hang"."""
    keyed: bool = False
    """Whether responses have the Idempotency-Replayed header."""
    forgets: bool = False
    """Whether only the first response has the Idempotency-Replayed header."""
    status: tuple[int, ...] = ()
    after: str = ""
    """Value of Retry-After."""
    drop: int = 0
    """Number of connections that are closed without a response."""
    other: str = ""
    """Part that differs in a replay: "text", "call", "arguments", "short" or "reason"."""
    beats: int = 0
    """Number of comments before the reply, one each tenth of a second."""
    body: str = ""
    """Invalid body that is sent instead of the reply: "html", "error", "junk", "undone" or "unreasoned"."""

    @classmethod
    def read(cls, text: str) -> Plan:
        fields: dict[str, Any] = {}
        for name, _, value in (part.partition("=") for part in text.split(",") if part):
            kind = cls.__dataclass_fields__[name].type
            if kind == "tuple[int, ...]":
                fields[name] = tuple(map(int, value.split("+")))
            else:
                fields[name] = value if kind == "str" else int(value)
        return cls(**fields)


def event(index: int, reason: str | None = None, **delta: Any) -> bytes:
    return frame({"choices": [{"index": index, "delta": delta} | ({"finish_reason": reason} if reason else {})]})


def frame(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def parts(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def stream(plan: Plan, number: int) -> bytes:
    """Return the body of connection ``number`` of a request. The size of its pieces depends on the number."""
    if plan.body == "html":
        return b"<html>Log in first</html>"
    if plan.body == "junk":
        return b"data: {\n\n"
    other, size = plan.other if number else "", 5 - number % 3
    text = "Gruß" if other == "text" else "Gr" if other == "short" else TEXT
    arguments = "{}" if other == "arguments" else ARGUMENTS
    out = [frame({"id": "a", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant"}}]})]
    out += [event(0, content=part) for part in parts(text, size)]
    if plan.body == "error":
        failed = {"message": "NaN", "type": "server_error", "param": None, "code": 500}
        return b"".join(out) + frame({"error": failed})
    head = {"index": 0, "id": "c2" if other == "call" else "c1", "type": "function"}
    out.append(event(1, tool_calls=[head | {"function": {"name": "weather", "arguments": ""}}]))
    out.append(b": keep-alive\n\n")
    out += [event(1, tool_calls=[{"index": 0, "function": {"arguments": part}}]) for part in parts(arguments, size + 5)]
    if plan.body != "unreasoned":
        out += [event(1, "tool_calls"), event(0, "length" if other == "reason" else "stop")]
    out.append(frame({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}))
    return b"".join(out) + (b"" if plan.body == "undone" else b"data: [DONE]\n\n")


WHOLE = {
    "id": "a",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 9},
}


@dataclass
class Breaking:
    """Running server; ``requests`` holds the idempotency key and the body of each request."""

    port: int = 0
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def url(self, **plan: Any) -> str:
        return f"http://127.0.0.1:{self.port}/" + ",".join(f"{name}={value}" for name, value in plan.items())

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        plan, key = Plan.read(first.split("/")[1]), headers.get("idempotency-key", "")
        number = sum(earlier == key for earlier, _ in self.requests)
        self.requests.append((key, json.loads(body or b"{}")))
        if number < plan.drop:
            return
        status = plan.status[number] if number < len(plan.status) else 200
        streamed = status == 200 and self.requests[-1][1].get("stream")
        content = stream(plan, number) if streamed else json.dumps(WHOLE if status == 200 else REFUSED).encode()
        writer.write(head(plan, number, status, bool(streamed) and plan.body != "html"))
        for _ in range(plan.beats):
            await send(writer, b": keep-alive\n\n")
            await asyncio.sleep(0.1)
        cut = plan.cut[number] if number < len(plan.cut) else None
        await send(writer, content[:cut])
        if cut is None or plan.how == "end":
            writer.write(b"0\r\n\r\n")
        elif plan.how == "hang":
            await reader.read()
        elif plan.how == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()


REFUSED = {"error": {"message": "not now", "type": "server_error", "param": None, "code": None}}


def head(plan: Plan, number: int, status: int, events: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} -", "connection: close", "transfer-encoding: chunked", "x-request-id: r1"]
    lines.append("content-type: " + ("text/event-stream" if events else "application/json"))
    if plan.keyed and not (number and plan.forgets):
        lines.append(f"idempotency-replayed: {'true' if number else 'false'}")
    if plan.after and status != 200:
        lines.append(f"retry-after: {plan.after}")
    return "\r\n".join([*lines, "", ""]).encode()


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()


@asynccontextmanager
async def listening() -> AsyncIterator[Breaking]:
    server = Breaking()
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0, backlog=1024)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


@contextmanager
def running() -> Iterator[Breaking]:
    """Run the server in a thread."""
    with in_thread(listening()) as server:
        yield server


if __name__ == "__main__":
    with running() as server:
        print(server.port, flush=True)
        input()  # until the parent process closes standard input
