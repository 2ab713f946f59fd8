"""Tokens in answers: their bytes, their places in the text, and the likely tokens beside them."""

from __future__ import annotations

import json

import pytest

from moesaic.llm import LLM
from moesaic.local_backend import LocalBackend
from tests.support.byte_llama import write_byte_llama
from tests.support.cluster import running_cluster
from tests.support.http import events, post
from tests.support.server import running

TEXT = "A 世a b 😀é"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]
FORCED = {"guided_choice": [TEXT], "max_tokens": 60}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A server of a byte-level model, which is random."""
    llm = LLM.load(write_byte_llama(tmp_path_factory.mktemp("llama")))
    with running(lambda: LocalBackend(llm)) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """A gateway with one worker, which has the model tales."""
    llm = LLM.load("tales")

    async def backend():
        return LocalBackend(llm)

    with running_cluster(tmp_path_factory.mktemp("gateway") / "jobs.sqlite") as one:
        one.start_worker(one.run(backend()))
        yield one


@pytest.fixture(params=["tales", "llama", "gateway"])
def anywhere(request):
    return request.getfixturevalue(request.param)


def choices(server, path, body):
    """Return the choice of a whole answer, and those of the chunks of a streamed one."""
    [whole] = post(server, path, body).json()["choices"]
    *chunks, _ = events(post(server, path, body | {"stream": True}).text)
    return whole, [choice for chunk in map(json.loads, chunks) for choice in chunk["choices"]]


def joined(entries):
    return bytes(byte for entry in entries for byte in entry["bytes"])


def test_bytes_joined_are_the_answers_text(anywhere):
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, **FORCED}
    whole, chunks = choices(anywhere, CHAT, body)
    content = whole["logprobs"]["content"]
    assert whole["message"]["content"] == TEXT and joined(content) == TEXT.encode()
    assert [entry for chunk in chunks for entry in (chunk.get("logprobs") or {}).get("content", ())] == content


def test_bytes_of_a_responses_answer(tales):
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1, **FORCED}
    del body["max_tokens"]
    [part] = post(tales, "/v1/responses", body).json()["output"][0]["content"]
    assert part["text"] == TEXT and joined(part["logprobs"]) == TEXT.encode()


def test_bytes_of_an_unconstrained_chat_are_its_text(tales):
    body = {"messages": HELLO, "max_tokens": 30, "seed": 1, "logprobs": True}
    [choice] = post(tales, CHAT, body).json()["choices"]
    assert joined(choice["logprobs"]["content"]) == choice["message"]["content"].encode()


@pytest.mark.parametrize("prompt", ["Once", "  Once <s> 世", "<s>Once</s>upon", [1, 5], "世"])
@pytest.mark.parametrize("echo", [True, False])
def test_text_offsets_index_the_returned_text(anywhere, prompt, echo):
    body = {"prompt": prompt, "echo": echo, "logprobs": 1, **FORCED}
    whole, chunks = choices(anywhere, COMPLETIONS, body)
    text, logprobs = whole["text"], whole["logprobs"]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and text.endswith(TEXT)
    found = [
        piece for piece in zip(offsets, logprobs["tokens"], strict=True) if not piece[1].startswith(("bytes:", "<"))
    ]
    assert len(found) > 4
    assert all(text.startswith((token, token.removeprefix(" ")), offset) for offset, token in found)
    streamed = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert [offset for part in streamed for offset in part["text_offset"]] == offsets


def test_parts_of_a_character_have_its_offset(llama):
    body = {"prompt": "é", "echo": True, "logprobs": 1, "guided_choice": ["世"], "max_tokens": 9}
    logprobs = choices(llama, COMPLETIONS, body)[0]["logprobs"]
    assert logprobs["text_offset"][:6] == [0, 0, 0, 1, 1, 1]
    assert logprobs["tokens"][:6] == ["<|begin_of_text|>", *(rf"bytes:\x{byte:02x}" for byte in "é世".encode())]


@pytest.mark.parametrize("count", [1, 20])
def test_top_logprobs_are_complete_and_have_the_token(anywhere, count):
    body = {"temperature": 2, "seed": 3, "max_tokens": 12}
    old = post(anywhere, COMPLETIONS, body | {"prompt": "😀", "logprobs": count, "echo": True}).json()["choices"][0]
    for token, value, top in zip(
        *(old["logprobs"][key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert value is None or (top[token] == value and len(top) - count in (0, 1))
    body |= {"messages": HELLO, "logprobs": True, "top_logprobs": count}
    for entry in post(anywhere, CHAT, body).json()["choices"][0]["logprobs"]["content"]:
        names = [top["token"] for top in entry["top_logprobs"]]
        assert entry["token"] in names and len(names) - count in (0, 1)
        assert len({json.dumps(top["bytes"]) + top["token"] for top in entry["top_logprobs"]}) == len(names)


def test_tokens_can_be_shown_as_ids(llama):
    body = {"logprobs": 1, "guided_choice": ["AB"], "max_tokens": 5, "return_tokens_as_token_ids": True}
    logprobs = choices(llama, COMPLETIONS, body | {"prompt": "Hi"})[0]["logprobs"]
    assert logprobs["tokens"][:2] == ["token_id:65", "token_id:66"] and "token_id:65" in logprobs["top_logprobs"][0]
    body |= {"messages": HELLO, "logprobs": True, "top_logprobs": 1}
    entry = post(llama, CHAT, body).json()["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == "token_id:65" and entry["bytes"] == [65]
