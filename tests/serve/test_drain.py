"""The server as a process: its end, its keys read again, its certificate."""

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
from tests.support.backend import Script, Scripted

async def opened(*_):
    door = Scripted(Script(held=True))
    async def watch():
        while not Path(sys.argv[1]).exists():
            await asyncio.sleep(0.01)
        door.go.set()
    door.watching = asyncio.ensure_future(watch())
    return door

serving.open_model = opened
sys.exit(cli.main(["serve", "--port", "0", *sys.argv[2:]]))
"""
"""``moesaic serve``, over a model that says one word and waits until a file is there."""


@dataclass
class Process:
    """A server that runs by itself."""

    process: subprocess.Popen[str]
    url: str
    lines: list[dict[str, Any]]
    go: Any

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def read_until(self, event: str) -> dict[str, Any]:
        """Return the next line of the log with that event."""
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
    begun: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **environment: str) -> Process:
        go = tmp_path / f"go{len(begun)}"
        command = [sys.executable, "-c", PROGRAM, str(go), *arguments]
        env = {name: value for name, value in os.environ.items() if name != "MOESAIC_API_KEYS"} | environment
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        begun.append(process)
        found = Process(process, "", [], go)
        found.url = found.read_until("serving")["url"]
        return found

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def streaming(server: Process) -> Raw:
    raw = Raw(server).post(CHAT | {"stream": True, "model": None})
    raw.until(b"Hello")
    return raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_finished_and_what_comes_is_refused(start, number):
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


def test_idle_it_ends_at_once_and_closes_what_is_kept_open(start):
    server = start()
    with Raw(server) as raw:
        raw.get().until(b'"ok"}')
        server.signal(signal.SIGTERM)
        assert raw.rest() == b""
    code, err = server.end()
    assert code == 0 and "Traceback" not in err


def test_what_is_not_finished_in_time_ends_with_an_error(start):
    server = start("--drain-timeout", "0.2")
    raw = streaming(server)
    server.signal(signal.SIGTERM)
    answer = raw.rest()
    assert b'"error"' in answer and b"stopping" in answer and b"[DONE]" not in answer
    code, err = server.end()
    assert code == 0 and "Traceback" not in err


def test_a_second_signal_ends_it_at_once(start):
    server = start("--drain-timeout", "600")
    raw = streaming(server)
    server.signal(signal.SIGTERM)
    server.read_until("draining")
    server.signal(signal.SIGTERM)
    assert b"[DONE]" not in raw.rest()
    assert server.end()[0] in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_keys_are_read_again(start, tmp_path):
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


def test_a_file_without_keys_lets_nobody_in(start, tmp_path):
    keys.write(tmp_path / "keys.json", ())
    server = start("--keys", str(tmp_path / "keys.json"))
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/ready").status_code == 200


def test_keys_of_the_environment(start):
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
    for place, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(tmp_path / "cert.pem", append=place > 0)
    server = start("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    port = int(server.url.rpartition(":")[2])
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return SimpleNamespace(server=server, port=port, trusting=trusting)


def test_a_certificate_is_shown_and_checked(secure):
    assert secure.server.url.startswith("https://")
    assert httpx.get(f"https://localhost:{secure.port}/health", verify=secure.trusting).status_code == 200
    with pytest.raises(httpx.ConnectError, match=r"(?i)mismatch|not valid for"):
        httpx.get(f"https://127.0.0.1:{secure.port}/health", verify=secure.trusting)
    with pytest.raises(httpx.ConnectError, match=r"(?i)verify failed"):
        httpx.get(f"https://localhost:{secure.port}/health")
    stream = httpx.post(
        f"https://localhost:{secure.port}/v1/embeddings", json={"input": "x" * 500_000}, verify=secure.trusting
    )
    assert stream.status_code == 200


def test_plain_text_and_old_tls_get_nowhere(secure):
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
    assert httpx.get(f"https://localhost:{secure.port}/health", verify=secure.trusting).status_code == 200
    secure.server.signal(signal.SIGTERM)
    code, err = secure.server.end()
    assert code == 0 and "Traceback" not in err


def test_a_reader_who_leaves_over_tls_is_noticed(secure):
    context = secure.trusting
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
def test_a_certificate_that_cannot_be_used_is_told(tmp_path, certificate, key):
    trustme = require_package("trustme")
    authority = trustme.CA()
    authority.issue_cert("localhost").cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other.pem")
    arguments = ["--tls-cert", str(tmp_path / certificate), *(["--tls-key", str(tmp_path / key)] if key else [])]
    done = subprocess.run([sys.executable, "-c", PROGRAM, "-", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "moesaic: error: " in done.stderr
