"""Tests of the application: JSON bodies, disconnects, timeouts and unexpected errors."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import httpx
import pytest

from moesaic.backend import Finished, ModelStats
from moesaic.errors import NumericalError, Overloaded
from moesaic.serve.settings import Settings
from tests.support.backend import Script, ScriptedBackend, ScriptedStream
from tests.support.http import CHAT, Raw, post
from tests.support.server import running
from tests.support.wait import eventually

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def shared_server():
    with running() as server:
        yield server


def send(server, content: bytes, headers=JSON):
    return httpx.post(server.url + PATH, content=content, headers=headers, timeout=30)


# Bodies

WHOLE = '{"messages": [{"role": "user", "content": "Hi"}], "x": %s}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{",
        b"{}}",
        b"{} {}",
        b"{'a': 1}",
        b"\xff\xfe{}",
        b'\xef\xbb\xbf{"messages": []}',
        '{"messages": []}'.encode("utf-16"),
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "a\nb"}]}',
        b'{"messages": [{"role": "user", "content": "\x00"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\uDC00 x"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "model": "\\ud83d"}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "\\udfff": 1}',
        b'{"messages": 1, "messages": [{"role": "user", "content": "Hi"}]}',
        b'{"messages": [{"role": "user", "role": "system", "content": "Hi"}]}',
        *(
            (WHOLE % value).encode()
            for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "01", "0x1", "1.", ".5", "+1")
        ),
        (WHOLE % ("[" * 40 + "]" * 40)).encode(),
        (WHOLE % ('{"a":' * 40 + "1" + "}" * 40)).encode(),
        b"[" * 1_000_000,
        b'{"a":' * 300_000,
        (WHOLE % ("[" * 100_000 + "]" * 100_000)).encode(),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_invalid_json_is_400(shared_server, content):
    before = len(shared_server.backend.requests)
    response = send(shared_server, content)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.content) < 1000
    assert len(shared_server.backend.requests) == before


@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "max_tokens", "n", "top_k", "priority", "min_p"])
@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 400, "1e308", "1e999", "NaN", "true", '"1"', "[]", "{}"])
def test_out_of_range_numbers_are_400(shared_server, field, value):
    response = send(
        shared_server, f'{{"messages": [{{"role": "user", "content": "Hi"}}], "{field}": {value}}}'.encode()
    )
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_request_switches_speculation_off(shared_server, path):
    content = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    content = {"input": "Hi"} if "responses" in path else content
    assert post(shared_server, path, content | {"speculation": False}).status_code == 200
    assert shared_server.backend.requests[-1].sampling["speculation"] is False
    assert post(shared_server, path, content | {"speculation": "no"}).status_code == 400


def test_surrogate_pairs_and_deep_json_are_accepted(shared_server):
    content = '{"messages": [{"role": "user", "content": "\\ud83d\\ude00 \\u0000 \U0001f600"}], "x": %s}'
    assert send(shared_server, (content % ("[" * 28 + "]" * 28)).encode()).status_code == 200
    assert shared_server.backend.requests[-1].messages[0]["content"] == "\U0001f600 \0 \U0001f600"


def test_a_long_body_is_accepted(shared_server):
    long = "tale " * 100_000
    assert post(shared_server, PATH, {"messages": [{"role": "user", "content": long}]}).status_code == 200
    assert shared_server.backend.requests[-1].messages[0]["content"] == long


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("more", ["", "; charset=utf-8"])
def test_other_content_types_are_415(shared_server, kind, more):
    response = send(shared_server, json.dumps(CHAT).encode(), {"content-type": kind + more})
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    for fine in ("application/json", "APPLICATION/JSON; charset=utf-8", "application/vnd.x+json"):
        assert send(shared_server, json.dumps(CHAT).encode(), {"content-type": fine}).status_code == 200
    with Raw(shared_server) as raw:
        data = json.dumps(CHAT)
        raw.send(f"POST {PATH} HTTP/1.1\r\nHost: {raw.host}\r\nContent-Length: {len(data)}\r\n\r\n{data}")
        assert raw.status() == 415


def test_invalid_request_ids_are_replaced(shared_server):
    assert post(shared_server, PATH, CHAT, headers={"x-request-id": "job-7.a_b"}).headers["x-request-id"] == "job-7.a_b"
    for request_id in ("a b", "x" * 65, "<script>", ""):
        returned = post(shared_server, PATH, CHAT, headers={"x-request-id": request_id}).headers["x-request-id"]
        assert returned != request_id and len(returned) == 16


def test_requests_cause_no_outgoing_connections(shared_server, monkeypatch):
    reached = []
    connect, client_thread = socket.socket.connect, threading.get_ident()

    def record_connect(self, address):
        if threading.get_ident() != client_thread:  # count only the connections of the server's threads
            reached.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record_connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: reached.append(address) or [])
    monkeypatch.setattr(shared_server.loop, "create_connection", lambda *address, **_: reached.append(address))
    target = "http://169.254.169.254/latest"
    bodies = [
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": target}}]}]},
        CHAT
        | {"messages": [{"role": "user", "content": f"![]({target})"}], "documents": [target], "chat_template": target},
        {"prompt": target, "input": target, "inputs": target, "url": target, "model": target, "lora_path": target},
        {"prompt": target, "input": target, "inputs": target},
    ]
    for endpoint in shared_server.app.services.endpoints:
        for body in bodies if endpoint.body else [b""]:
            with Raw(shared_server) as raw:
                head = (
                    f"{endpoint.method} {endpoint.path.replace('{name:path}', target)} HTTP/1.1\r\nHost: {raw.host}\r\n"
                )
                data = json.dumps(body) if body else ""
                head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
                assert raw.send(head + data).status() in (200, 400, 404, 422)
    assert reached == []


# Disconnects


def test_a_disconnect_cancels_a_stream(server):
    server.backend.script = Script(held=True)
    raw = Raw(server).post(CHAT | {"stream": True})
    raw.until(b"Hello")
    assert server.backend.cancelled == 0 and server.app.state.running == 1
    raw.socket.close()
    eventually(lambda: server.backend.cancelled == 1)
    eventually(lambda: server.app.state.running == 0)


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_a_disconnect_cancels_a_whole_reply(server, path):
    server.backend.script = Script(held=True)
    raw = Raw(server).post(CHAT | {"prompt": ["one", "two"], "n": 2}, path=path)
    count = 1 if path == PATH else 2
    eventually(lambda: len(server.backend.requests) == count)
    assert server.backend.cancelled == 0
    raw.socket.close()
    eventually(lambda: server.backend.cancelled == count)
    eventually(lambda: server.app.state.running == 0)


def test_a_disconnect_cancels_a_pending_generate_call(server):
    """The backend has not accepted the request yet: a model is loading, or the prompt is being tokenized."""
    entered, go, cancelled = threading.Event(), asyncio.Event(), []

    async def slow(request):
        entered.set()
        try:
            await go.wait()
        finally:
            cancelled.append(request)

    server.backend.generate = slow
    raw = Raw(server).post(CHAT)
    assert entered.wait(20)
    raw.socket.close()
    eventually(lambda: cancelled and server.app.state.running == 0)


# Timeouts


def test_an_idle_stream_sends_keep_alive_comments():
    quick = Settings(keep_alive_seconds=0.1)
    with running(lambda: ScriptedBackend(Script(held=True)), quick) as server, Raw(server) as raw:
        raw.post(CHAT | {"stream": True})
        raw.until(b": keep-alive\n\n")
        raw.until(b": keep-alive\n\n")
        server.call(server.backend.go.set)
        assert b"[DONE]" in raw.until(b"0\r\n\r\n")


class QueueingBackend(ScriptedBackend):
    """Backend that accepts requests and never starts them."""

    async def generate(self, request):
        await super().generate(request)
        return QueuedStream(self, request, self.script)


class QueuedStream(ScriptedStream):
    async def __aiter__(self):
        await asyncio.Event().wait()
        yield Finished(0, "stop", 1, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_queue_timeout_is_503(stream):
    with running(QueueingBackend, Settings(queue_seconds=0.2)) as server:
        response = post(server, PATH, CHAT | {"stream": stream})
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert server.backend.cancelled == 1


def test_a_generate_call_timeout_is_503():
    class BlockedBackend(ScriptedBackend):
        async def generate(self, request):
            await asyncio.Event().wait()

    with running(BlockedBackend, Settings(queue_seconds=0.2)) as server:
        response = post(server, PATH, CHAT)
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1


def test_the_queue_timeout_ends_when_the_prompt_is_read():
    with running(lambda: ScriptedBackend(Script(pause=0.1)), Settings(queue_seconds=0.2)) as server:
        assert post(server, PATH, CHAT).status_code == 200
    with running(
        lambda: ScriptedBackend(Script(held=True)), Settings(queue_seconds=0.2, request_seconds=0.8)
    ) as server:
        response = post(server, PATH, CHAT)
        assert response.status_code == 504 and server.backend.cancelled == 1


def test_a_request_timeout_ends_a_stream_with_an_error():
    with running(lambda: ScriptedBackend(Script(held=True)), Settings(request_seconds=0.3)) as server:
        response = post(server, PATH, CHAT | {"stream": True})
        assert response.status_code == 200 and "[DONE]" not in response.text
        last = json.loads(response.text.split("data: ")[-1])
        assert last["error"]["code"] == 504
        eventually(lambda: server.backend.cancelled == 1)


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_a_request_timeout_cancels_all_choices(path):
    with running(lambda: ScriptedBackend(Script(held=True)), Settings(request_seconds=0.3)) as server:
        body = CHAT | {"prompt": ["a", "b", "c"], "n": 2}
        response = httpx.post(server.url + path, json=body, timeout=30)
        assert response.status_code == 504
        streamed = httpx.post(server.url + path, json=body | {"stream": True}, timeout=30)
        assert "[DONE]" not in streamed.text and '"code":504' in streamed.text
        eventually(lambda: server.app.state.running == 0)


def test_a_request_timeout_applies_to_embeddings():
    class SlowBackend(ScriptedBackend):
        async def embed(self, model, texts, truncate=None):
            await asyncio.Event().wait()

    with running(SlowBackend, Settings(request_seconds=0.2)) as server:
        assert httpx.post(server.url + "/v1/embeddings", json={"input": "x"}, timeout=30).status_code == 504


# Errors


def test_a_full_queue_is_429(server):
    server.backend.script = Script(refusal=Overloaded("257 requests are waiting already"))
    response = post(server, PATH, CHAT)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"


class Panic(BaseException):
    """Stands in for the exception of a Rust panic in pyo3, which is no ``Exception`` either."""


@pytest.mark.parametrize("error", [RuntimeError("the secret text"), Panic("the secret text"), KeyError("the secret")])
@pytest.mark.parametrize("stream", [False, True])
def test_unexpected_errors_are_500_without_details(server, caplog, error, stream):
    server.backend.script = Script(refusal=error)
    response = post(server, PATH, CHAT | {"stream": stream})
    assert response.status_code == 500 and "secret" not in response.text
    server.backend.script = Script()
    assert post(server, PATH, CHAT).status_code == 200
    assert "secret" not in caplog.text and "endpoint failed" in caplog.text
    assert caplog.records[0].error == type(error).__name__


@pytest.mark.parametrize("error", [RuntimeError("the secret"), NumericalError("NaN"), Panic("the secret")])
def test_a_failed_stream_has_no_normal_end(server, error):
    server.backend.script = Script(error=error)
    with Raw(server) as raw:
        response = raw.post(CHAT | {"stream": True}, "Connection: close").rest()
    assert response.startswith(b"HTTP/1.1 200") and b"Hello" in response
    assert b"[DONE]" not in response and b'"stop"' not in response and b"secret" not in response
    assert b'"error"' in response or not response.endswith(b"0\r\n\r\n")


# Health


def test_health_and_readiness():
    now = [0.0]
    with running(settings=Settings(stall_seconds=10)) as server:
        server.app.services.readiness._clock = lambda: now[0]

        def states():
            return [httpx.get(f"{server.url}/{name}").status_code for name in ("health", "ready")]

        assert states() == [200, 200]
        server.backend.model_stats = {"scripted": ModelStats(running=1, steps=5)}
        assert states() == [200, 200]
        now[0] = 9
        assert states() == [200, 200]
        now[0] = 11
        assert states() == [200, 503]
        assert "stalled" in httpx.get(server.url + "/ready").json()["status"]
        server.backend.model_stats = {"scripted": ModelStats(running=1, steps=6)}
        assert states() == [200, 200]
        now[0] = 99
        server.backend.model_stats = {"scripted": ModelStats(steps=6)}  # an idle engine has not stalled
        assert states() == [200, 200]
        server.backend.model_stats = {"scripted": ModelStats(steps=6, waiting=1)}
        assert states() == [200, 200]
        server.backend.model_stats = {"scripted": ModelStats(alive=False)}
        assert states() == [503, 503]
        assert httpx.get(server.url + "/ready").headers["retry-after"]
