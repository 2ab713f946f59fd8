"""Tests of the HTTP server against hostile clients: slow, oversized, malformed, smuggled or too many requests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from time import monotonic

import httpx
import pytest

from moesaic.serve import server
from moesaic.serve.connection import LINGER_SECONDS
from moesaic.serve.keys import Key, Keys
from moesaic.serve.settings import Settings
from tests.support.http import CHAT, Raw
from tests.support.require import require_program
from tests.support.server import running
from tests.support.wait import eventually

MARGIN = 5.0
"""Seconds that a loaded machine may be late."""
SHORT_TIMEOUTS = Settings(header_seconds=0.4, body_seconds=0.4, idle_seconds=0.4, reader_seconds=0.4)
POST = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
JSON = {"content-type": "application/json"}
LOCKED = Keys((Key("anna", "0" * 64),))


@pytest.fixture(scope="module")
def quick():
    with running(settings=SHORT_TIMEOUTS) as server:
        yield server


@pytest.fixture(scope="module")
def shared_server():
    with running() as server:
        yield server


def assert_refused(raw: Raw, status: int) -> None:
    """Check that the response is one error in JSON, and that the connection is closed after it."""
    response = raw.rest()
    head, _, body = response.partition(b"\r\n\r\n")
    assert int(head[9:12]) == status, response
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]
    assert response.count(b"HTTP/1.1 ") == 1


# Headers


@pytest.mark.parametrize(
    "fields",
    [
        [f"X-Long: {'x' * 33_000}"],
        [f"X-{number}: {'x' * 1000}" for number in range(40)],
        [f"{'X' * 33_000}: 1"],
        [f"X-Long: {'x' * 500_000}"],
        [f"X-{number}: 1" for number in range(101)],
        [f"X-{number}: 1" for number in range(5000)],
    ],
)
def test_too_large_headers_are_431(shared_server, fields):
    with Raw(shared_server) as raw:
        assert_refused(raw.get("/health", *fields), 431)


def test_headers_of_the_largest_size_are_accepted(shared_server):
    fields = [f"X-Long: {'x' * 31_000}", *[f"X-{number}: 1" for number in range(90)]]
    with Raw(shared_server) as raw:
        assert raw.get("/health", *fields).status() == 200
    with Raw(shared_server) as raw:
        assert_refused(raw.get("/" + "x" * 33_000), 431)


def test_endless_headers_are_431(shared_server):
    with Raw(shared_server) as raw:
        started = monotonic()
        raw.send("GET /health HTTP/1.1\r\nX-Long: ")
        try:
            for _ in range(64):
                raw.send(b"x" * 2**20)
        except OSError:
            pass
        assert monotonic() - started < 20
    with Raw(shared_server) as raw:
        raw.send("GET /health HTTP/1.1\r\nX-Long: " + "x" * 40_000)
        assert_refused(raw, 431)


def test_slow_headers_are_cut_off(quick):
    with Raw(quick) as raw:
        assert raw.drip(b"GET /health HTTP/1.1\r\nX-Slow: " + b"x" * 9999, 0.05, 10) < 0.4 + LINGER_SECONDS + MARGIN
    with Raw(quick) as raw:
        raw.send("GET /hea")
        assert_refused(raw, 408)


def test_a_silent_connection_is_closed(quick):
    with Raw(quick) as raw:
        started = monotonic()
        assert raw.rest() == b"" and monotonic() - started < 0.4 + MARGIN


@pytest.mark.parametrize("dripped", [b"GET /health HTTP/1.1\r\nX: " + b"x" * 9999, b"\r\n", b"\n"])
def test_slow_bytes_on_a_kept_connection_are_cut_off(quick, dripped):
    """Line breaks count too, although they belong to no request and cause no parser event."""
    with Raw(quick) as raw:
        raw.get().until(b'"ok"}')
        assert raw.drip(dripped, 0.05, 10) < 0.4 + LINGER_SECONDS + MARGIN


def test_an_idle_connection_is_closed(quick):
    with Raw(quick) as raw:
        raw.get().until(b'"ok"}')
        started = monotonic()
        assert raw.rest() == b"" and monotonic() - started < 0.4 + MARGIN


# Bodies


def test_a_slow_body_is_refused(quick):
    with Raw(quick) as raw:
        raw.send(f"POST /v1/embeddings HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\n")
        raw.send("Content-Length: 5000\r\n\r\n{")
        started = monotonic()
        assert_refused(raw, 400)
        assert monotonic() - started < 0.4 + LINGER_SECONDS + MARGIN


@pytest.mark.parametrize(
    ("head", "access"),
    [
        ("POST /v1/embeddings", "locked"),
        ("GET /v1/models", "locked"),
        ("GET /health", "open"),
        ("POST /nothing", "open"),
        ("POST /health", "open"),
    ],
)
def test_an_unread_body_holds_no_connection(head, access):
    """A refusal, or a route without a body, is answered first. The server must not wait for the rest of the body."""
    with (
        running(settings=SHORT_TIMEOUTS, keys=LOCKED if access == "locked" else None) as running_server,
        Raw(running_server) as raw,
    ):
        raw.send(
            f"{head} HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
        )
        response = raw.until(b"}")
        assert b"connection: close" in response.lower()
        assert raw.drip(b"x", 0.05, 15) < LINGER_SECONDS + MARGIN


def test_a_too_large_content_length_is_refused_unread(shared_server):
    with Raw(shared_server) as raw:
        raw.send(f"POST /v1/embeddings HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\n")
        raw.send(f"Expect: 100-continue\r\nContent-Length: {300 << 20}\r\n\r\n")
        assert_refused(raw, 413)
    response = httpx.post(shared_server.url + "/v1/embeddings", content=b"x" * (6 << 20), headers=JSON)
    assert response.status_code == 413, "the refusal must be sent while the client is still writing"


def test_bytes_after_a_refusal_are_read_for_a_while(shared_server):
    """A close with unread data resets the connection, and the client may lose the response."""
    with Raw(shared_server) as raw:
        raw.send(POST + "Content-Length: 5000000\r\n\r\n")
        raw.until(b"}")
        for _ in range(64):
            raw.send(b"x" * 16_384)
        assert raw.socket.recv(1) == b""


def test_chunks_beyond_the_limit_are_cut_off(shared_server):
    with Raw(shared_server) as raw:
        raw.send(f"POST /v1/embeddings HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\n")
        raw.send("Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 300 << 20:
                raw.send(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
        except OSError:
            pass
        assert sent < 64 << 20
        assert b" 413 " in raw.rest()[:20]


def test_a_body_of_exactly_the_limit_is_accepted(shared_server):
    body = json.dumps({"input": "x"}).encode()
    body += b" " * (shared_server.app.services.settings.body_bytes - len(body))
    assert httpx.post(shared_server.url + "/v1/embeddings", content=body, headers=JSON).status_code == 200
    assert httpx.post(shared_server.url + "/v1/embeddings", content=body + b" ", headers=JSON).status_code == 413


def test_trailers_of_a_chunked_body_are_ignored():
    with running(keys=LOCKED) as server, Raw(server) as raw:
        raw.send(f"POST /v1/embeddings HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\n")
        raw.send('Transfer-Encoding: chunked\r\n\r\nd\r\n{"input":"x"}\r\n0\r\nAuthorization: Bearer x\r\n\r\n')
        assert raw.status() == 401
    with running() as server, Raw(server) as raw:
        raw.send(f"POST /v1/embeddings HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\n")
        raw.send(
            'Transfer-Encoding: chunked\r\n\r\nd\r\n{"input":"x"}\r\n0\r\nHost: evil\r\nContent-Encoding: gzip\r\n\r\n'
        )
        assert raw.status() == 200, "a trailer must not count as a second Host header"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "x"])
def test_compressed_bodies_are_refused(shared_server, coding):
    response = httpx.post(
        shared_server.url + "/v1/embeddings", content=b"{}", headers=JSON | {"content-encoding": coding}
    )
    assert response.status_code == 415


# Smuggling

SMUGGLED = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        POST + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
        POST + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + SMUGGLED,
        POST + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
        POST + "Content-Length: 2, 3\r\n\r\n{}" + SMUGGLED,
        POST + "Content-Length: +2\r\n\r\n{}" + SMUGGLED,
        POST + "Content-Length: -2\r\n\r\n{}" + SMUGGLED,
        POST + "Content-Length: 0x2\r\n\r\n{}" + SMUGGLED,
        POST + f"Content-Length: {2**64 + 2}\r\n\r\n{{}}" + SMUGGLED,
        POST + "Content-Length : 2\r\n\r\n{}" + SMUGGLED,
        POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
        POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        POST + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nx" + SMUGGLED,
        POST + "Transfer-Encoding: chunked\r\n\r\n-1\r\nx" + SMUGGLED,
        POST + "Transfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n" + SMUGGLED,
        POST + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\n" + SMUGGLED,
        POST + "Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n" + SMUGGLED,
        POST.replace("v1/embeddings", "nothing") + "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + "X: 1\r\n folded\r\nContent-Length: 2\r\n\r\n{}",
        POST + "X\0: 1\r\nContent-Length: 2\r\n\r\n{}",
        POST + "X: a\0b\r\nContent-Length: 2\r\n\r\n{}",
        POST + "X: a\rb\r\nContent-Length: 2\r\n\r\n{}",
        POST + ": 1\r\nContent-Length: 2\r\n\r\n{}",
        POST.replace("\r\n", "\n") + "Content-Length: 2\n\n{}" + SMUGGLED,
        "GET /version\r\n\r\n",
        "GET /version HTTP/9.9\r\n\r\n",
        "GET /ver sion HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /\xe4 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "\0" * 100,
    ],
)
def test_request_smuggling_is_400_and_closed(shared_server, caplog, sent):
    with Raw(shared_server) as raw:
        assert_refused(raw.send(sent), 400)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "there must be one response only"


def test_a_broken_body_is_answered_once():
    """The headers were valid, and the request was running, when the body turned out to be malformed."""
    with running() as server, Raw(server) as raw:
        raw.send(POST + "Transfer-Encoding: chunked\r\n\r\n")
        eventually(lambda: server.app.state.running)
        assert_refused(raw.send("zz\r\n"), 400)
        eventually(lambda: not server.app.state.running)


def test_pipelined_requests_are_answered_in_order(shared_server):
    with Raw(shared_server) as raw:
        for path in ("/version", "/nothing", "/health"):
            raw.get(path)
        response = raw.get("/v1/models", "Connection: close").rest()
    assert [int(part[:3]) for part in response.split(b"HTTP/1.1 ")[1:]] == [200, 404, 200, 200]


def test_protocol_upgrades_are_ignored_or_refused(shared_server):
    for kind in ("websocket", "h2c"):
        upgrade = (f"Upgrade: {kind}", "Connection: Upgrade", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
        with Raw(shared_server) as raw:
            response = raw.get("/health", *upgrade).rest()
            assert response.startswith(b"HTTP/1.1 200") and b"connection: close" in response
        with Raw(shared_server) as raw:
            assert_refused(raw.post({"input": "x"}, *upgrade, path="/v1/embeddings"), 400)


# Connections


def test_connections_per_address_are_limited():
    with running(settings=Settings(connections_per_address=3)) as server:
        connections = [Raw(server).get() for _ in range(3)]
        for raw in connections:
            raw.until(b'"ok"}')
        with Raw(server) as raw:
            assert raw.rest().startswith(b"HTTP/1.1 503")
        connections.pop().__exit__()

        def is_admitted() -> bool:
            with Raw(server) as raw:
                return raw.get().status() == 200

        eventually(is_admitted)
        for raw in connections:
            raw.__exit__()
        eventually(lambda: not server.app.state.running)


def test_connections_are_limited_in_total():
    settings = Settings(connections=3, connections_per_address=1, trusted_proxies=("127.0.0.1",))
    with running(settings=settings) as server:
        connections = [Raw(server).get() for _ in range(3)]  # trusted proxies are exempt from the limit per address
        for raw in connections:
            raw.until(b'"ok"}')
        with Raw(server) as raw:
            response = raw.rest()
            assert response.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in response
        for raw in connections:
            raw.__exit__()


# Listening sockets


def listening_addresses() -> set[str]:
    """Return the addresses on which this process listens."""
    output = subprocess.run([require_program("ss"), "-Hltnp"], capture_output=True, text=True, check=True).stdout
    return {line.split()[3] for line in output.splitlines() if f"pid={os.getpid()}," in line}


def test_the_server_listens_on_one_socket(shared_server):
    before = listening_addresses()
    with running() as server:
        for path in ("/health", "/v1/models", "/openapi.json", "/metrics"):
            httpx.get(server.url + path)
        httpx.post(server.url + "/v1/chat/completions", json=CHAT)
        assert listening_addresses() - before == {server.url.removeprefix("http://")}
        assert server.url.startswith("http://127.0.0.1:")


def test_accepted_connections_send_small_packets_at_once(shared_server):
    """Otherwise the body of each response waits until the client acknowledges the head, up to 40 ms."""
    with Raw(shared_server) as raw:
        raw.get("/version").status()
        sockets = [
            connection._raw.get_extra_info("socket") for connection in shared_server.http.server_state.connections
        ]
        assert sockets and all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)


def test_a_port_in_use_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(server.InvalidRequest, match="cannot listen"):
            server.bind(Settings(port=taken.getsockname()[1]))


def test_the_open_file_limit_fits_the_connections():
    program = (
        "import resource\n"
        "from moesaic.serve import server\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "server.prepare_process(200)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["456", "0"]
