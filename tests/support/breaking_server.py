"""A server whose connections break where they are told to; what is to happen stands in the path.

    /cut=17+40,how=reset,keyed=1/v1/chat/completions

lets the first connection of a request break after 17 bytes of its body and the second after 40; a third would be
whole. Connections belong to one request if their Idempotency-Key is the same. As a process of its own it says its
port:

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
    """What happens to the connections of a request; of several values joined by +, each has its connection."""

    cut: tuple[int, ...] = ()
    how: str = "eof"
    """How a cut looks: "eof", "reset", "end" (as if the body were whole) or "hang"."""
    keyed: bool = False
    """Whether the server says that it knows idempotency keys."""
    forgets: bool = False
    """Whether it says so only the first time."""
    status: tuple[int, ...] = ()
    after: str = ""
    """What stands in Retry-After."""
    drop: int = 0
    """So many connections are closed without an answer."""
    other: str = ""
    """What is different in a replay: "text", "call", "arguments", "short" or "reason"."""
    beats: int = 0
    """So many comments come before anything else, one in a tenth of a second."""
    body: str = ""
    """What is sent instead of an answer: "html", "error", "junk", "undone" or "unreasoned"."""

    @classmethod
    def read(cls, written: str) -> Plan:
        fields: dict[str, Any] = {}
        for name, _, value in (each.partition("=") for each in written.split(",") if each):
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


def stream(plan: Plan, place: int) -> bytes:
    """Return the body of a request's connection number ``place``, in pieces that are cut otherwise each time."""
    if plan.body == "html":
        return b"<html>Log in first</html>"
    if plan.body == "junk":
        return b"data: {\n\n"
    other, size = plan.other if place else "", 5 - place % 3
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
    out += [event(1, tool_calls=[{"index": 0, "function": {"arguments": each}}]) for each in parts(arguments, size + 5)]
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
    """The server; ``asked`` has the keys and bodies of what it was asked."""

    port: int = 0
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

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
        place = sum(each == key for each, _ in self.asked)
        self.asked.append((key, json.loads(body or b"{}")))
        if place < plan.drop:
            return
        status = plan.status[place] if place < len(plan.status) else 200
        streamed = status == 200 and self.asked[-1][1].get("stream")
        content = stream(plan, place) if streamed else json.dumps(WHOLE if status == 200 else REFUSED).encode()
        writer.write(head(plan, place, status, bool(streamed) and plan.body != "html"))
        for _ in range(plan.beats):
            await send(writer, b": keep-alive\n\n")
            await asyncio.sleep(0.1)
        cut = plan.cut[place] if place < len(plan.cut) else None
        await send(writer, content[:cut])
        if cut is None or plan.how == "end":
            writer.write(b"0\r\n\r\n")
        elif plan.how == "hang":
            await reader.read()
        elif plan.how == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()


REFUSED = {"error": {"message": "not now", "type": "server_error", "param": None, "code": None}}


def head(plan: Plan, place: int, status: int, events: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} -", "connection: close", "transfer-encoding: chunked", "x-request-id: r1"]
    lines.append("content-type: " + ("text/event-stream" if events else "application/json"))
    if plan.keyed and not (place and plan.forgets):
        lines.append(f"idempotency-replayed: {'true' if place else 'false'}")
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
    """Run a server in a thread."""
    with in_thread(listening()) as server:
        yield server


if __name__ == "__main__":
    with running() as own:
        print(own.port, flush=True)
        input()  # until whoever started it closes our standard input
