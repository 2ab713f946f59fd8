"""Tests of clients that speak HTTP/1.0: health checks, old proxies and command-line tools. They know no chunks."""

from __future__ import annotations

import json

import pytest

from moesaic.errors import NumericalError
from tests.support.backend import Script
from tests.support.http import CHAT, Raw, events

STREAMS = (
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"prompt": "Hi", "stream": True}),
    ("/v1/messages", CHAT | {"stream": True, "max_tokens": 5}),
    ("/v1/responses", {"input": "Hi", "stream": True}),
    ("/generate_stream", {"inputs": "Hi"}),
)


def exchange(server, path: str, body: object = None, *fields: str) -> tuple[str, bytes]:
    """Send one request of HTTP/1.0, read until the end of the connection, and return head and body of the response."""
    data = b"" if body is None else json.dumps(body).encode()
    with Raw(server) as raw:
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.0", f"Host: {raw.host}", *fields]
        lines += [f"Content-Length: {len(data)}", "Content-Type: application/json"] * bool(data)
        head, _, rest = raw.send("\r\n".join(lines).encode() + b"\r\n\r\n" + data).rest().partition(b"\r\n\r\n")
    return head.decode().lower(), rest


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_stream_has_no_chunks(server, path, body, fields):
    head, data = exchange(server, path, body, *fields)
    assert "200 ok" in head and "transfer-encoding" not in head and "content-length" not in head
    assert "connection: close" in head
    assert not [
        line for line in data.decode().split("\n") if line and not line.startswith(("data:", "event:", "id:", ":"))
    ]
    assert [json.loads(event) for event in events(data.decode()) if event != "[DONE]"]


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
def test_a_whole_response_has_its_length(server, fields):
    head, data = exchange(server, "/v1/chat/completions", CHAT, *fields)
    assert "transfer-encoding" not in head and f"content-length: {len(data)}" in head and "connection: close" in head
    assert json.loads(data)["choices"]
    head, data = exchange(server, "/health", None, *fields)
    assert f"content-length: {len(data)}" in head and json.loads(data)["status"] == "ok"
    head, data = exchange(server, "/nothing", None, *fields)
    assert " 404 " in head and f"content-length: {len(data)}" in head


def test_no_100_continue_is_sent(server):
    head, data = exchange(server, "/v1/chat/completions", CHAT, "Expect: 100-continue")
    assert " 200 ok" in head.splitlines()[0] and json.loads(data)["choices"]


def test_a_stream_that_breaks_ends_with_an_error(scripted):
    scripted.backend.script = Script(error=NumericalError("the model computed NaN"))
    head, data = exchange(scripted, "/v1/chat/completions", CHAT | {"stream": True})
    assert " 200 ok" in head and "transfer-encoding" not in head
    *_, last = events(data.decode())
    assert "NaN" in json.loads(last)["error"]["message"]


def test_clients_of_http_11_get_chunks(server):
    with Raw(server) as raw:
        response = raw.post(CHAT | {"stream": True}).until(b"0\r\n\r\n")
    assert b"transfer-encoding: chunked" in response and b"connection: close" not in response
