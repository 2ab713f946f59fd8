"""HTTP clients: one that can send any bytes over a socket, and helpers for JSON and server-sent events."""

from __future__ import annotations

import json
import socket
from time import monotonic
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import httpx

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


class Raw:
    """Connection that can send any bytes. A fixture closes it at the end of the test."""

    opened: ClassVar[list[Raw]] = []

    def __init__(self, server: Any, receive_buffer: int | None = None) -> None:
        address = urlsplit(server.url)
        assert address.hostname and address.port
        self.host = f"{address.hostname}:{address.port}"
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((address.hostname, address.port))
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
        """Return all bytes until the server closes the connection."""
        out = b""
        try:
            while piece := self.socket.recv(65536):
                out += piece
        except ConnectionError:
            pass
        return out

    def until(self, marker: bytes) -> bytes:
        """Return the bytes that arrive until they contain ``marker``."""
        out = b""
        while marker not in out:
            piece = self.socket.recv(65536)
            assert piece, out
            out += piece
        return out

    def status(self) -> int:
        """Return the status of the next response."""
        return int(self.until(b"\r\n")[9:12])

    def drip(self, data: bytes, pause: float, seconds: float) -> float:
        """Send ``data`` byte by byte; return the seconds until the server closes the connection."""
        started = monotonic()
        self.socket.settimeout(pause)
        position = 0
        while monotonic() - started < seconds:
            try:
                self.socket.sendall(data[position % len(data) :][:1])
                position += 1
                if not self.socket.recv(65536):
                    return monotonic() - started
            except TimeoutError:
                continue
            except OSError:
                return monotonic() - started
        raise AssertionError("the server has not closed the connection")


def post(server: Any, path: str, body: Any, **options: Any) -> httpx.Response:
    """Post a JSON body to a path of a server and return the response."""
    return httpx.post(server.url + path, json=body, timeout=60, **options)


def events(text: str) -> list[str]:
    """Return the data of the server-sent events in the text of a response."""
    return [line[6:] for line in text.split("\n") if line.startswith("data: ")]
