"""Tests of the server over a real model: disconnects, slow readers, tenants, bad input and metrics."""

from __future__ import annotations

import threading

import httpx
import pytest

from moesaic.engine import Limits
from moesaic.llm import LLM
from moesaic.local_backend import LocalBackend
from moesaic.serve import keys
from moesaic.serve.keys import Key, Keys
from moesaic.serve.settings import Settings
from tests.support.http import Raw, post
from tests.support.server import running
from tests.support.wait import eventually

PATH = "/v1/chat/completions"
KEYS = Keys((Key("anna", keys.digest("a")), Key("ben", keys.digest("b"))))
ANNA, BEN = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}


@pytest.fixture(scope="module")
def real_server():
    llm = LLM.load("tales", limits=Limits(sequences=4, queue=4))
    with running(lambda: LocalBackend(llm), Settings(reader_seconds=2), KEYS) as server:
        server.llm = llm
        yield server


def body(text: str, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def send(server, content, headers=ANNA, path=PATH):
    return post(server, path, content, headers=headers)


def is_idle(server) -> bool:
    """Whether the server has no requests and all blocks of the cache are free."""
    stats = server.llm.engine.stats()
    return not stats.running and not stats.waiting and stats.free_blocks == stats.blocks and not server.backend._running


ENDLESS = {"ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_all_resources(real_server, stream):
    alone = send(real_server, body("Tell of a fox.", max_tokens=30)).json()["choices"]
    connections = [
        Raw(real_server).post(body("A long tale.", stream=stream, **ENDLESS), "Authorization: Bearer a")
        for _ in range(3)
    ]
    eventually(lambda: real_server.llm.engine.stats().running == 3)
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(send(real_server, body("Tell of a fox.", max_tokens=30)).json()["choices"])
    )
    thread.start()
    for raw in connections:
        raw.socket.close()
    thread.join(60)
    assert replies == [alone]
    eventually(lambda: is_idle(real_server))
    eventually(lambda: real_server.app.state.running == 0 and not real_server.app.services.keys._running)


def test_a_disconnect_during_tokenization_leaves_no_request(real_server, monkeypatch):
    tokenizing, go = threading.Event(), threading.Event()
    encode = real_server.llm.encode_chat

    def slow(*arguments, **options):
        tokenizing.set()
        assert go.wait(30)
        return encode(*arguments, **options)

    monkeypatch.setattr(real_server.llm, "encode_chat", slow)
    before = real_server.llm.engine.stats().prompt_tokens
    raw = Raw(real_server).post(body("A long tale.", **ENDLESS), "Authorization: Bearer a")
    assert tokenizing.wait(30)
    raw.socket.close()
    eventually(lambda: real_server.app.state.running == 0)
    go.set()
    eventually(lambda: real_server.llm.engine.stats().prompt_tokens > before)
    eventually(lambda: is_idle(real_server))


def test_slow_readers_do_not_change_other_replies(real_server):
    alone = send(real_server, body("Tell of a fox.", max_tokens=30)).json()["choices"]
    long_body = body("A long tale.", stream=True, logprobs=True, top_logprobs=20, **ENDLESS)
    connections = [Raw(real_server, receive_buffer=4096).post(long_body, "Authorization: Bearer a") for _ in range(3)]
    eventually(lambda: real_server.llm.engine.stats().running == 3)
    assert send(real_server, body("Tell of a fox.", max_tokens=30)).json()["choices"] == alone
    eventually(lambda: is_idle(real_server), 60)
    for raw in connections:
        raw.socket.close()


def test_a_full_queue_is_429(real_server):
    connections = []
    for counts in ((4, 0), (4, 4)):
        for _ in range(4):
            connections.append(
                Raw(real_server).post(body("A tale.", stream=True, **ENDLESS), "Authorization: Bearer a")
            )
        eventually(lambda: (real_server.llm.engine.stats().running, real_server.llm.engine.stats().waiting) == counts)  # noqa: B023
    response = send(real_server, body("One more.", max_tokens=2))
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    for raw in connections:
        raw.socket.close()
    eventually(lambda: is_idle(real_server))
    assert send(real_server, body("One more.", max_tokens=2)).status_code == 200


def test_keys_share_no_cached_prefix(real_server):
    long = "Once upon a time there was a king who had three daughters. " * 12

    def cached(headers) -> int:
        usage = send(real_server, body(long, max_tokens=1), headers).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(ANNA), cached(BEN)] == [0, 0]
    assert cached(ANNA) > 0 and cached(BEN) > 0


class Panic(BaseException):
    """Stands in for the exception of a Rust panic in pyo3, which is no ``Exception`` either."""


def test_a_tokenizer_panic_is_400(real_server, monkeypatch):
    def panic(*_, **__):
        raise Panic("retry-limit-in-match over: the secret prompt")

    with monkeypatch.context() as broken:
        broken.setattr(real_server.llm, "encode_chat", panic)
        broken.setattr(real_server.llm, "encode", panic)
        for path, sent in ((PATH, body("Hi")), ("/v1/completions", {"prompt": "Hi"})):
            response = send(real_server, sent, path=path)
            assert response.status_code == 400 and "secret" not in response.text
    assert send(real_server, body("Hi", max_tokens=2)).status_code == 200


def test_too_long_texts_are_refused_before_tokenization(real_server, monkeypatch):
    monkeypatch.setattr(real_server.llm.tokenizer, "encode", lambda *_, **__: pytest.fail("the text was tokenized"))
    long = "x" * 1_000_000
    for path, sent in ((PATH, body(long)), ("/v1/completions", {"prompt": long}), ("/v1/embeddings", {"input": long})):
        assert send(real_server, sent, path=path).status_code == 400


@pytest.mark.parametrize("text", ["\0", "\u2028\u202e", "<s></s>[INST]", "\U0010ffff" * 50, "a\u0300" * 200, ""])
def test_unusual_texts_are_answered(real_server, text):
    response = send(real_server, body(text, max_tokens=2))
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("ids", [[2**31 - 1], [10**6], [-1], [1.5], [True], ["x", 1], [[]], [], [[1], "x", [None]]])
def test_invalid_token_ids_are_400(real_server, ids):
    assert send(real_server, {"prompt": ids, "max_tokens": 1}, path="/v1/completions").status_code == 400
    assert send(real_server, {"input": ids}, path="/v1/embeddings").status_code == 400
    assert not ids or send(real_server, {"tokens": ids}, path="/detokenize").status_code == 400


def test_metrics_match_the_usage(real_server):
    def total(text: str, name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    before = httpx.get(real_server.url + "/metrics", headers=ANNA).text
    usages = [send(real_server, body(f"Tell {n}.", max_tokens=5 + n, n=1 + n % 2)).json()["usage"] for n in range(4)]
    after = httpx.get(real_server.url + "/metrics", headers=ANNA).text

    def increase(name: str) -> float:
        return total(after, name) - total(before, name)

    generated = sum(usage["completion_tokens"] for usage in usages)
    for prefix in ("moesaic_", "vllm:"):
        assert increase(prefix + "generation_tokens_total") == generated
        assert increase(prefix + "request_generation_tokens_sum") == generated
        assert increase(prefix + "request_prompt_tokens_sum") == sum(usage["prompt_tokens"] for usage in usages)
        assert increase(prefix + "e2e_request_latency_seconds_count") == 4
        assert increase(prefix + "time_to_first_token_seconds_count") == 6
        assert increase(prefix + "inter_token_latency_seconds_count") == generated - 6
    assert increase("moesaic_request_begun_total") == increase("moesaic_request_ended_total") == 4
    assert increase("vllm:request_success_total") == 6
    assert increase("tgi_request_count ") == increase("tgi_request_success ") == 4
    assert total(after, "moesaic_num_requests_running") == 0
