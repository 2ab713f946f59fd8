"""Tests of slow clients: they use little memory, are disconnected and delay no other client."""

from __future__ import annotations

from pathlib import Path

import httpx

from moesaic.serve.settings import Settings
from tests.support.backend import Script, ScriptedBackend
from tests.support.http import CHAT, Raw
from tests.support.server import running
from tests.support.wait import eventually

SHORT_TIMEOUTS = Settings(reader_seconds=0.4, idle_seconds=0.4)


def open_unread(server, count: int, body: dict) -> list[Raw]:
    return [Raw(server, receive_buffer=4096).post(body) for _ in range(count)]


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_slow_readers_use_little_memory_and_are_dropped():
    endless = Script(pieces=("x" * 16_000,) * 2000)
    with running(lambda: ScriptedBackend(endless), Settings(reader_seconds=2)) as server:
        httpx.post(server.url + "/v1/chat/completions", json=CHAT | {"max_tokens": 3})
        before = memory()
        connections = open_unread(server, 200, CHAT | {"stream": True})
        eventually(lambda: len(server.backend.requests) == 201)
        other = httpx.post(server.url + "/v1/chat/completions", json=CHAT | {"max_tokens": 3}).json()
        assert other["choices"][0]["message"]["content"] == "x" * 48_000
        eventually(lambda: server.app.state.running == 0, 60)
        assert memory() - before < 50 << 20
        assert server.backend.cancelled >= 200
        for raw in connections:
            assert b"[DONE]" not in raw.rest()[-1000:]
            raw.__exit__()


def test_an_unread_reply_is_dropped():
    huge = Script(pieces=("x" * (1 << 20),) * 24)
    with running(lambda: ScriptedBackend(huge), SHORT_TIMEOUTS) as server:
        [raw] = open_unread(server, 1, CHAT)
        connections = server.http.server_state.connections
        eventually(lambda: server.backend.cancelled)
        eventually(lambda: not connections)
        raw.__exit__()


def test_the_unread_rest_of_a_reply_is_dropped():
    """With one of these sizes, the socket buffers are full just before the end, so no later write reports an error."""
    pieces = Script(pieces=("x" * 32_000,) * 48)
    with running(lambda: ScriptedBackend(pieces), SHORT_TIMEOUTS) as server:
        connections = server.http.server_state.connections
        for max_tokens in range(4, 49):
            Raw(server, receive_buffer=4096).post(CHAT | {"max_tokens": max_tokens}, "Connection: close")
        eventually(lambda: len(server.backend.requests) == 45)
        eventually(lambda: not connections, 40)


def test_pipelined_requests_with_unread_replies_are_dropped():
    with running(settings=SHORT_TIMEOUTS) as server:
        connections = server.http.server_state.connections
        raw = Raw(server, receive_buffer=4096)
        raw.socket.settimeout(1)
        try:
            for _ in range(20_000):
                raw.get("/openapi.json")
        except OSError:
            pass
        eventually(lambda: not connections, 30)
        raw.__exit__()
