"""Tests of the limits of a key over HTTP, on all routes and after disconnects."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from moesaic.serve.app import App
from moesaic.serve.keys import Key, Keys, digest
from tests.support.backend import Script, ScriptedBackend
from tests.support.event_loop import run
from tests.support.http import CHAT, Raw, post
from tests.support.server import running
from tests.support.wait import eventually

PATH = "/v1/chat/completions"


def limited(**limits):
    return Keys((Key("anna", digest("k"), **limits), Key("ben", digest("b"))))


ANNA = {"authorization": "Bearer k"}
BEN = {"authorization": "Bearer b"}


def test_concurrency_is_limited_per_key():
    with running(lambda: ScriptedBackend(Script(held=True)), keys=limited(concurrent=1)) as server:
        with Raw(server) as raw:
            raw.post(CHAT | {"stream": True}, "Authorization: Bearer k").until(b"Hello")
            refused = post(server, PATH, CHAT, headers=ANNA)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            embedded = httpx.post(server.url + "/v1/embeddings", json={"input": "x"}, headers=ANNA)
            assert embedded.status_code == 429
            server.call(server.backend.go.set)
            raw.until(b"[DONE]")
            assert post(server, PATH, CHAT, headers=BEN).status_code == 200
            for _ in range(20):  # after the end of a reply, the client may send the next request at once
                response = post(server, PATH, CHAT | {"stream": True}, headers=ANNA)
                assert response.status_code == 200 and "[DONE]" in response.text
                assert post(server, PATH, CHAT, headers=ANNA).status_code == 200
                body = {"prompt": ["a", "b"]}
                assert httpx.post(server.url + "/v1/completions", json=body, headers=ANNA).status_code == 429
        eventually(lambda: not server.app.services.keys._running)


@pytest.mark.parametrize("path", [PATH, "/v1/embeddings", "/v1/classify", "/detokenize"])
def test_requests_per_minute_count_all_routes(path):
    with running(keys=limited(requests_per_minute=2)) as server:
        body = CHAT | {"input": "x", "tokens": [1]}
        responses = [httpx.post(server.url + path, json=body, headers=ANNA) for _ in range(3)]
        assert [response.status_code for response in responses] == [200, 200, 429]
        assert 1 <= int(responses[2].headers["retry-after"]) <= 30
        assert httpx.get(server.url + "/v1/models", headers=ANNA).status_code == 200


def test_a_disconnect_charges_the_generated_tokens():
    long = Script(pieces=("x",) * 50, held=False)
    with running(lambda: ScriptedBackend(long), keys=limited(tokens_per_minute=52)) as server:
        assert post(server, PATH, CHAT, headers=ANNA).status_code == 200
        assert post(server, PATH, CHAT, headers=ANNA).status_code == 429
    with running(lambda: ScriptedBackend(Script(held=True)), keys=limited(tokens_per_minute=1)) as server:
        with Raw(server) as raw:
            raw.post(CHAT | {"stream": True}, "Authorization: Bearer k").until(b"Hello")
        eventually(lambda: server.app.state.running == 0)
        assert server.app.services.keys._tokens["anna"].left == 1 - (2 + 1)  # two prompt tokens and one generated token
        assert post(server, PATH, CHAT, headers=ANNA).status_code == 429


@pytest.mark.parametrize("stream", [True, False])
def test_a_slot_is_free_before_the_reply_ends(stream):
    keys, running_at_end = limited(concurrent=1), []
    body = json.dumps(CHAT | {"stream": stream}).encode()
    fields = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"authorization", b"Bearer k")]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": fields, "query_string": b"", "root_path": ""}
    messages = [{"type": "http.request", "body": body}]

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        if b"[DONE]" in message.get("body", b"") or (
            b"chat.completion" in message.get("body", b"")[:200] and not stream
        ):
            running_at_end.append(dict(keys._running))

    async def main():
        await App(ScriptedBackend(), keys=keys)(scope, receive, send)

    run(main)
    assert running_at_end == [{}]


def test_a_client_cannot_raise_its_priority():
    with running(keys=limited(priority=5)) as server:
        for requested, priority in ((-100, 5), (None, 5), (3, 8)):
            assert post(server, PATH, CHAT | {"priority": requested}, headers=ANNA).status_code == 200
            assert server.backend.requests[-1].priority == priority


def test_the_tenant_is_the_name_of_the_key(server):
    with running(keys=limited()) as locked:
        post(locked, PATH, CHAT | {"user": "ben", "tenant": "ben", "cache_salt": "ben"}, headers=ANNA)
        assert locked.backend.requests[0].tenant == "anna"


PROMPTS = {
    PATH: CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": CHAT | {"max_tokens": 4},
    "/v1/responses": {"input": "Hi"},
    "/": {"inputs": "Hi"},
    "/generate": {"inputs": "Hi"},
    "/generate_stream": {"inputs": "Hi"},
}


@pytest.mark.parametrize("path", PROMPTS)
def test_clients_cannot_resume_replies(server, path):
    """Only a gateway may say which tokens a reply has already."""
    resume = {"resume": [[1, 2]]}
    for fields in ({}, resume, {"parameters": resume}, {"sampling": resume, "extra_body": resume, "user": "ben"}):
        assert httpx.post(server.url + path, json=PROMPTS[path] | fields, timeout=30).status_code in (200, 400, 422)
    assert server.backend.requests
    assert all(not request.resume and "resume" not in request.sampling for request in server.backend.requests)
