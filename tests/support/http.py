"""A client that is allowed everything: bytes over a socket."""

from __future__ import annotations

import json
import socket
from time import monotonic
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import httpx

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


class Raw:
    """A connection to a server; closed at the end of the test at the latest."""

    opened: ClassVar[list[Raw]] = []

    def __init__(self, server: Any, receive_buffer: int | None = None) -> None:
        found = urlsplit(server.url)
        assert found.hostname and found.port
        self.host = f"{found.hostname}:{found.port}"
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((found.hostname, found.port))
        self.socket.settimeout(20)
        self.opened.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes | str) -> Self:
        self.socket.sendall(data if isinstance(data, bytes) else data.encode("latin-1"))
        return self

    def get(self, path: str = "/health", *fields: str, host: str | None = None) -> Self:
        lines = [f"GET {path} HTTP/1.1", f"Host: {self.host if host is None else host}", *fields]
        return self.send("\r\n".join(lines) + "\r\n\r\n")

    def post(self, body: bytes | Any, *fields: str, path: str = "/v1/chat/completions", length: bool = True) -> Self:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", f"Host: {self.host}", "Content-Type: application/json", *fields]
        lines += [f"Content-Length: {len(data)}"] * length
        return self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data)

    def rest(self) -> bytes:
        """Return all that comes until the other side closes."""
        out = b""
        try:
            while piece := self.socket.recv(65536):
                out += piece
        except ConnectionError:
            pass
        return out

    def until(self, mark: bytes) -> bytes:
        """Return what comes up to ``mark``."""
        out = b""
        while mark not in out:
            piece = self.socket.recv(65536)
            assert piece, out
            out += piece
        return out

    def status(self) -> int:
        """Return the status of the next answer."""
        return int(self.until(b"\r\n")[9:12])

    def drip(self, data: bytes, pause: float, most: float) -> float:
        """Send byte by byte; return after how many seconds the other side had enough."""
        began = monotonic()
        self.socket.settimeout(pause)
        place = 0
        while monotonic() - began < most:
            try:
                self.socket.sendall(data[place % len(data) :][:1])
                place += 1
                if not self.socket.recv(65536):
                    return monotonic() - began
            except TimeoutError:
                continue
            except OSError:
                return monotonic() - began
        raise AssertionError("still open")


def post(server: Any, path: str, body: Any, **options: Any) -> httpx.Response:
    """Post a JSON body to a path of a server."""
    return httpx.post(server.url + path, json=body, timeout=60, **options)


def events(text: str) -> list[str]:
    """Return the data of the server-sent events in a whole answer."""
    return [line[6:] for line in text.split("\n") if line.startswith("data: ")]
