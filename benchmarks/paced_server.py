"""Serve streams at a fixed rate, without a model, to measure a load generator.

Every stream gets the same small event at the given rate. Deviations in the load generator's figures are its own delays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from itertools import cycle
from typing import ClassVar

EXAMPLE = """example:
  python -m benchmarks.paced_server 8100 --rate 20 &
  moesaic bench serving http://127.0.0.1:8100 --concurrency 500 --requests 1000 --answer-tokens 400
"""
GROUPS = 10
"""Number of groups of streams. The groups get their events one after another, so that not all streams send at once."""
MODELS = json.dumps({"data": [{"id": "paced"}]}).encode()
MODELS_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(MODELS),
    MODELS,
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    """Return a server-sent event as an HTTP chunk, with the same fields around the text as vLLM sends."""
    common = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "paced"}
    data = f"data: {json.dumps(common | fields)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = event(choices=[{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}])
END = event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])


class Stream(asyncio.Protocol):
    """A client's connection. It belongs to a group of streams, which all get their next event at the same time."""

    groups: ClassVar[list[set[Stream]]] = [set() for _ in range(GROUPS)]
    next_group: ClassVar[Iterator[int]] = cycle(range(GROUPS))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.received, self.remaining = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if not blank:
            return
        if head.startswith(b"GET"):
            self.received = b""
            self.transport.write(MODELS_RESPONSE)
            return
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) >= length:
            self.received = b""
            self.tokens = self.remaining = json.loads(body)["max_tokens"]
            self.transport.write(STREAM_HEAD)
            self.group = self.groups[next(self.next_group)]
            self.group.add(self)

    def send_token(self) -> None:
        """Send the next token of this stream; after the last token, send the end of the stream."""
        self.transport.write(TOKEN)
        self.remaining -= 1
        if not self.remaining:
            self.group.discard(self)
            usage = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": self.tokens})
            self.transport.write(END + usage + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def connection_lost(self, error: Exception | None) -> None:
        if self.remaining:
            self.group.discard(self)


async def serve(port: int, rate: float) -> None:
    """Serve until cancelled, with ``rate`` events per second to each stream."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Stream, "127.0.0.1", port, backlog=4096)
    async with server:
        due = loop.time()
        for group in cycle(Stream.groups):
            due += 1 / rate / GROUPS
            await asyncio.sleep(due - loop.time())
            for stream in list(group):
                stream.send_token()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paced_server",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("port", type=int, help="port on 127.0.0.1")
    parser.add_argument("--rate", type=float, default=20.0, help="events per second to each stream (default 20)")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.rate))


if __name__ == "__main__":
    main()
