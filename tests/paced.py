"""A server that does nothing but send: every stream gets the same small event at an even pace.

For measuring the load generator itself, which `moesaic bench serving` puts beside its figures:

    python -m tests.paced 8100 --rate 20 &
    moesaic bench serving http://127.0.0.1:8100 --concurrency 500 --requests 1000 --answer-tokens 400
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from itertools import cycle
from typing import ClassVar

SLOTS = 10
"""Streams do not all speak at once: so many groups, one after the other."""
MODELS = json.dumps({"data": [{"id": "paced"}]}).encode()
CARD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(MODELS), MODELS)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    """Return a server-sent event as a chunk, with as much around the text as vLLM sends."""
    about = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "paced"}
    data = f"data: {json.dumps(about | fields)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


PIECE = event(choices=[{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}])
END = event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])


class Stream(asyncio.Protocol):
    slots: ClassVar[list[set[Stream]]] = [set() for _ in range(SLOTS)]
    places: ClassVar[Iterator[int]] = cycle(range(SLOTS))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.bytes, self.left = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        self.bytes += data
        head, blank, body = self.bytes.partition(b"\r\n\r\n")
        if not blank:
            return
        if head.startswith(b"GET"):
            self.bytes = b""
            self.transport.write(CARD)
            return
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) >= length:
            self.bytes = b""
            self.tokens = self.left = json.loads(body)["max_tokens"]
            self.transport.write(HEAD)
            self.slot = self.slots[next(self.places)]
            self.slot.add(self)

    def speak(self) -> None:
        self.transport.write(PIECE)
        self.left -= 1
        if not self.left:
            self.slot.discard(self)
            usage = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": self.tokens})
            self.transport.write(END + usage + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def connection_lost(self, error: Exception | None) -> None:
        if self.left:
            self.slot.discard(self)


async def play(port: int, rate: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Stream, "127.0.0.1", port, backlog=4096)
    async with server:
        due = loop.time()
        for slot in cycle(Stream.slots):
            due += 1 / rate / SLOTS
            await asyncio.sleep(due - loop.time())
            for stream in list(slot):
                stream.speak()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=20.0, help="events a second to each stream")
    args = parser.parse_args()
    asyncio.run(play(args.port, args.rate))
