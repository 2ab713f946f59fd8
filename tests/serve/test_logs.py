"""Tests of the logs: no prompts, no keys, and one line for each event."""

from __future__ import annotations

import io
import json
import logging

import httpx
import pytest

from moesaic.serve import keys, logs
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.backend import Script, ScriptedBackend
from tests.support.http import CHAT, Raw
from tests.support.server import running
from tests.support.wait import eventually

SECRET = "xylophone-of-the-secret-prompt"


@pytest.fixture(params=[True, False], ids=["json", "text"])
def log(request, monkeypatch):
    """Standard error of a server, in each log format."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    names = ("moesaic", "uvicorn.error")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    logs.set_up("info", as_json=request.param)
    stream.as_json = request.param
    yield stream
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines(log) -> list[str]:
    return log.getvalue().splitlines()


def test_prompts_and_keys_are_not_logged(log):
    key, anna = keys.new("anna")
    headers = {"authorization": f"Bearer {key}"}
    settings = Settings(failed_keys_per_minute=10**6)  # the test sends a wrong key to every route
    with running(lambda: ScriptedBackend(Script(pieces=(SECRET,))), settings, Keys((anna,))) as server:
        body = {"messages": [{"role": "user", "content": SECRET}], "prompt": SECRET, "input": SECRET, "user": SECRET}
        body |= {"stop": [SECRET], "inputs": SECRET, "guided_regex": SECRET, "response_format": {"type": SECRET}}
        plain = {name: value for name, value in body.items() if name not in ("guided_regex", "response_format")}
        with httpx.Client(base_url=server.url) as client:
            for endpoint in server.app.services.endpoints:
                path = endpoint.path.replace("{name:path}", "x")
                for content in (
                    plain,
                    plain | {"stream": True},
                    body,
                    body | {"temperature": SECRET},
                    {SECRET: SECRET},
                ):
                    client.request(endpoint.method, path, json=content, headers=headers)
                client.request(endpoint.method, path, headers={"authorization": f"Bearer x{SECRET}"})
        server.backend.script = Script(refusal=RuntimeError(SECRET))
        httpx.post(server.url + "/v1/chat/completions", json=plain, headers=headers)
        metrics = httpx.get(server.url + "/metrics", headers=headers).text
    for text in (log.getvalue(), metrics):
        assert text and SECRET not in text and key not in text and anna.sha256 not in text
    assert "endpoint failed" in log.getvalue()


def test_clients_cannot_forge_log_lines(log, server):
    evil = '\r\n{"event":"forged"}\x1b[2J\x00\u2028'
    for _ in range(2):
        httpx.post(server.url + "/v1/chat/completions", json=CHAT | {"model": evil})
        httpx.get(server.url + "/v1/models/" + "%0d%0a%7b%22event%22:%22forged%22%7d%1b%5b2J%00%e2%80%a8%85")
        with Raw(server) as raw:
            raw.get("/version", "User-Agent: forged", "X-Request-Id: a\tb", "Referer: forged").status()
    eventually(lambda: len(lines(log)) == 6)
    requests = [line for line in lines(log) if "request" in line]
    assert len(requests) == 6
    assert not any(ord(char) < 32 or char in "\u2028\x85\x7f" for line in requests for char in line)
    if log.as_json:
        assert {json.loads(line)["event"] for line in requests} == {"request"}


def test_a_log_line_identifies_its_request(log, server):
    httpx.get(server.url + "/version?key=hidden", headers={"x-request-id": "find-me"})
    eventually(lambda: lines(log))
    assert "hidden" not in lines(log)[0]
    if not log.as_json:
        assert all(word in lines(log)[0] for word in ("find-me", "GET", "/version", "200", "127.0.0.1"))
        return
    line = json.loads(lines(log)[0])
    assert line.items() >= {"id": "find-me", "method": "GET", "path": "/version", "status": 200}.items()
    assert line["client"] == "127.0.0.1" and line["ms"] > 0 and "hidden" not in str(line)


def test_a_long_path_is_truncated(log, server):
    httpx.get(server.url + "/" + "x" * 20_000)
    eventually(lambda: lines(log))
    assert len(lines(log)[0]) < 1000
