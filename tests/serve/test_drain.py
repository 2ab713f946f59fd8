"""Tests of the server process: draining, signals, reloading of keys, and TLS."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from moesaic.serve import keys
from tests.support.http import CHAT, Raw
from tests.support.require import require_package

PROGRAM = """
import asyncio, sys
from pathlib import Path
from moesaic import cli
from moesaic.cli import serving
from tests.support.backend import Script, ScriptedBackend

async def open_model(*_):
    backend = ScriptedBackend(Script(held=True))
    async def watch():
        while not Path(sys.argv[1]).exists():
            await asyncio.sleep(0.01)
        backend.go.set()
    backend.watcher = asyncio.ensure_future(watch())
    return backend

serving.open_model = open_model
sys.exit(cli.main(["serve", "tales", "--port", "0", *sys.argv[2:]]))
"""
"""Runs ``moesaic serve`` with a model that sends one word and then waits until a file exists."""


@dataclass
class Process:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    lines: list[dict[str, Any]]
    go: Any
    """Path of the file that lets the model continue."""

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def read_until(self, event: str) -> dict[str, Any]:
        """Return the next log line with this event."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"{event!r} is not in {self.lines}")

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def start(tmp_path) -> Iterator[Any]:
    processes: list[subprocess.Popen[str]] = []

    def start_server(*arguments: str, **environment: str) -> Process:
        go = tmp_path / f"go{len(processes)}"
        command = [sys.executable, "-c", PROGRAM, str(go), *arguments]
        env = {name: value for name, value in os.environ.items() if name != "MOESAIC_API_KEYS"} | environment
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        processes.append(process)
        server = Process(process, "", [], go)
        server.url = server.read_until("serving")["url"]
        return server

    yield start_server
    for process in processes:
        process.kill()
        process.communicate()


def streaming(server: Process) -> Raw:
    raw = Raw(server).post(CHAT | {"stream": True, "model": None})
    raw.until(b"Hello")
    return raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_draining_finishes_streams_and_refuses_new_requests(start, number):
    server = start("--drain-timeout", "20")
    raw = streaming(server)
    assert httpx.get(server.url + "/ready").status_code == 200
    server.signal(number)
    server.read_until("draining")
    ready = httpx.get(server.url + "/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "draining"
    assert httpx.get(server.url + "/health").status_code == 200
    refused = httpx.post(server.url + "/v1/chat/completions", json=CHAT | {"model": None})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    server.go.touch()
    assert b"[DONE]" in raw.rest()
    assert server.end()[0] == 0


def test_an_idle_server_closes_connections_and_exits(start):
    server = start()
    with Raw(server) as raw:
        raw.get().until(b'"ok"}')
        server.signal(signal.SIGTERM)
        assert raw.rest() == b""
    code, err = server.end()
    assert code == 0 and "Traceback" not in err


def test_the_drain_timeout_ends_streams_with_an_error(start):
    server = start("--drain-timeout", "0.2")
    raw = streaming(server)
    server.signal(signal.SIGTERM)
    response = raw.rest()
    assert b'"error"' in response and b"stopping" in response and b"[DONE]" not in response
    code, err = server.end()
    assert code == 0 and "Traceback" not in err


def test_a_second_signal_ends_the_server_at_once(start):
    server = start("--drain-timeout", "600")
    raw = streaming(server)
    server.signal(signal.SIGTERM)
    server.read_until("draining")
    server.signal(signal.SIGTERM)
    assert b"[DONE]" not in raw.rest()
    assert server.end()[0] in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_sighup_reloads_the_keys(start, tmp_path):
    file = tmp_path / "keys.json"
    (first, anna), (second, ben) = keys.new("anna"), keys.new("ben")
    keys.write(file, (anna,))
    server = start("--keys", str(file))

    def status(key: str) -> int:
        return httpx.get(server.url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert (status(first), status(second)) == (200, 401)
    keys.write(file, (ben,))
    assert (status(first), status(second)) == (200, 401)
    server.signal(signal.SIGHUP)
    server.read_until("API keys reloaded")
    assert (status(first), status(second)) == (401, 200)
    for broken in ('{"keys": [', '{"keys": [1]}', ""):
        file.write_text(broken)
        server.signal(signal.SIGHUP)
        assert "keys.json" in server.read_until("API keys not reloaded")["why"]
        assert (status(first), status(second)) == (401, 200)
    file.unlink()
    server.signal(signal.SIGHUP)
    server.read_until("API keys not reloaded")
    assert status(second) == 200
    keys.write(file, ())
    server.signal(signal.SIGHUP)
    server.read_until("API keys reloaded")
    assert (status(first), status(second), status("none")) == (401, 401, 401)
    assert first not in str(server.lines) and second not in str(server.lines)


def test_sighup_reloads_the_presets(start, tmp_path):
    file = tmp_path / "presets.toml"
    file.write_text("[one]\nbase = 'tales'\n")
    server = start("--presets", str(file))

    def names() -> list[str]:
        return [model["id"] for model in httpx.get(server.url + "/v1/models").json()["data"]]

    assert names() == ["tales", "one"]
    for content, event, expected in (
        ("[two]\nbase = 'tales'\n", "presets reloaded", ["tales", "two"]),
        ("[three]\nbase = 'none'\n", "presets not reloaded", ["tales", "two"]),
    ):
        file.write_text(content)
        server.signal(signal.SIGHUP)
        line = server.read_until(event)
        assert names() == expected
    assert "unknown base 'none'" in line["why"]


def test_an_empty_key_file_admits_no_request(start, tmp_path):
    keys.write(tmp_path / "keys.json", ())
    server = start("--keys", str(tmp_path / "keys.json"))
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/ready").status_code == 200


def test_keys_from_the_environment(start):
    server = start(MOESAIC_API_KEYS="one,two")
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/v1/models", headers={"authorization": "Bearer two"}).status_code == 200


# TLS


@pytest.fixture
def secure(start, tmp_path):
    trustme = require_package("trustme")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for index, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(tmp_path / "cert.pem", append=index > 0)
    server = start("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    port = int(server.url.rpartition(":")[2])
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return SimpleNamespace(server=server, port=port, context=context)


def test_clients_verify_the_certificate(secure):
    assert secure.server.url.startswith("https://")
    assert httpx.get(f"https://localhost:{secure.port}/health", verify=secure.context).status_code == 200
    with pytest.raises(httpx.ConnectError, match=r"(?i)mismatch|not valid for"):
        httpx.get(f"https://127.0.0.1:{secure.port}/health", verify=secure.context)
    with pytest.raises(httpx.ConnectError, match=r"(?i)verify failed"):
        httpx.get(f"https://localhost:{secure.port}/health")
    stream = httpx.post(
        f"https://localhost:{secure.port}/v1/embeddings", json={"input": "x" * 500_000}, verify=secure.context
    )
    assert stream.status_code == 200


def test_plain_http_and_old_tls_are_refused(secure):
    with socket.create_connection(("127.0.0.1", secure.port)) as plain:
        plain.settimeout(20)
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" not in plain.recv(1000)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{secure.port}/health")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", secure.port)) as plain, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(plain)
    assert httpx.get(f"https://localhost:{secure.port}/health", verify=secure.context).status_code == 200
    secure.server.signal(signal.SIGTERM)
    code, err = secure.server.end()
    assert code == 0 and "Traceback" not in err


def test_a_disconnect_over_tls_ends_the_request(secure):
    context = secure.context
    with socket.create_connection(("127.0.0.1", secure.port)) as plain:
        wrapped = context.wrap_socket(plain, server_hostname="localhost")
        data = json.dumps(CHAT | {"model": None, "stream": True})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        wrapped.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        while b"Hello" not in wrapped.recv(65536):
            pass
        wrapped.close()
    line = secure.server.read_until("request")
    assert line["path"] == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("certificate", "key"), [("none.pem", "none.pem"), ("cert.pem", "other.pem"), ("cert.pem", None)]
)
def test_an_unusable_certificate_is_a_usage_error(tmp_path, certificate, key):
    trustme = require_package("trustme")
    authority = trustme.CA()
    authority.issue_cert("localhost").cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other.pem")
    arguments = ["--tls-cert", str(tmp_path / certificate), *(["--tls-key", str(tmp_path / key)] if key else [])]
    done = subprocess.run([sys.executable, "-c", PROGRAM, "-", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "moesaic: error: " in done.stderr
