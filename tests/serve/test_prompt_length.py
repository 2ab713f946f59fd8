"""Prompts that are too long, in the words that clients look for, and truncation, on every route over a real model."""

from __future__ import annotations

import json

import pytest

from moesaic.errors import PromptTooLong
from moesaic.serve.settings import Settings
from tests.support.backend import Script, ScriptedBackend
from tests.support.http import events, post
from tests.support.server import running

SHORT = "word " * 1200
"""More tokens than the context holds."""
LONG = "word " * 6000
"""More characters than the context can hold: refused before it is tokenized."""
TURN = {"role": "user", "content": "Hi"}
OPENAI = {
    "/v1/chat/completions": lambda text: {"messages": [TURN | {"content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/responses": lambda text: {"input": text},
    "/v1/embeddings": lambda text: {"input": text},
}


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["tokens", "characters"])
@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize("stream", [False, True])
def test_openais_routes_say_context_length_exceeded(tales, path, text, stream):
    response = post(tales, path, OPENAI[path](text) | ({"stream": True} if stream and "embed" not in path else {}))
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (
        400,
        "invalid_request_error",
        "context_length_exceeded",
    )
    assert error["message"].startswith("This model's maximum context length is 1024 tokens, but you requested ")


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["tokens", "characters"])
def test_anthropics_and_tgis_routes_say_it_in_their_own_words(tales, text):
    for stream in (False, True):
        body = {"messages": [TURN | {"content": text}], "max_tokens": 5, "stream": stream}
        response = post(tales, "/v1/messages", body)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        head, _, rest = error["message"].partition(" tokens > 1023 maximum")
        assert head.startswith("prompt is too long: ") and int(head.split()[-1]) > 1023 and rest
    for path in ("/generate", "/generate_stream"):
        response = post(tales, path, {"inputs": text})
        assert response.status_code == 422
        assert "`inputs` must have less than 1023 tokens. Given: " in response.json()["error"]


def test_an_error_in_a_stream_that_has_begun_has_the_code(server):
    server.backend.script = Script(error=PromptTooLong(9, 3))
    codes = [
        json.loads(events(post(server, path, body | {"stream": True}).text)[-1])
        for path, body in (("/v1/chat/completions", {"messages": [TURN]}), ("/v1/responses", {"input": "Hi"}))
    ]
    assert codes[0]["error"]["code"] == codes[1]["response"]["error"]["code"] == "context_length_exceeded"


# Truncation


def ids(tales, text):
    return post(tales, "/tokenize", {"prompt": text}).json()["tokens"]


STORY = "Once there was a king who had a ship. " * 700
"""More characters than the context can hold, and its last tokens differ from one another."""


def completed(tales, **body):
    reply = post(tales, "/v1/completions", {"max_tokens": 6, "temperature": 0, "return_token_ids": True} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_truncated_prompt_is_its_beginning_of_text_token_and_its_last_tokens(tales):
    end = ids(tales, STORY[-300:])
    bos = ids(tales, "Hi")[0]
    kept = [bos, *end[-49:]]
    cut = completed(tales, prompt=STORY, truncate_prompt_tokens=50)
    assert cut["usage"]["prompt_tokens"] == 50
    assert cut["choices"][0]["token_ids"] == completed(tales, prompt=kept)["choices"][0]["token_ids"]
    as_ids = completed(tales, prompt=[bos, *end[1:]], truncate_prompt_tokens=50)
    assert as_ids["choices"][0]["token_ids"] == cut["choices"][0]["token_ids"]
    tgi = {"max_new_tokens": 6, "truncate": 50, "decoder_input_details": True, "details": True}
    details = post(tales, "/generate", {"inputs": STORY, "parameters": tgi}).json()["details"]
    assert [token["id"] for token in details["prefill"]] == kept


def test_minus_one_truncates_to_what_leaves_room_for_the_answer(tales):
    body = {"truncate_prompt_tokens": -1, "max_tokens": 24, "ignore_eos": True}
    for path, more in (
        ("/v1/completions", {"prompt": STORY}),
        ("/v1/chat/completions", {"messages": [TURN | {"content": STORY}]}),
    ):
        usage = post(tales, path, more | body).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1000, 24)


def test_a_truncated_chat_keeps_the_end_of_the_conversation(tales):
    turns = [TURN | {"content": STORY}, {"role": "assistant", "content": "Yes."}, TURN]
    body = {"messages": turns, "truncate_prompt_tokens": 40, "max_tokens": 2}
    assert post(tales, "/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == 40
    assert post(tales, "/v1/responses", {"input": STORY, "truncate_prompt_tokens": 40}).status_code == 200


def test_echo_returns_the_prompt_that_was_read(tales):
    [choice] = completed(tales, prompt=STORY, truncate_prompt_tokens=8, echo=True, logprobs=0)["choices"]
    read, answer = choice["logprobs"]["tokens"][:8], choice["logprobs"]["tokens"][8:]
    assert choice["text"] == "".join(read[1:]).lstrip() + "".join(answer) and len(choice["text"]) < 100
    assert "had a ship." in choice["text"]
    [whole] = completed(tales, prompt="Once upon", truncate_prompt_tokens=500, echo=True)["choices"]
    assert whole["text"].startswith("Once upon")


def test_embeddings_of_a_truncated_text_are_those_of_its_last_tokens(tales):
    end, bos = ids(tales, STORY[-300:]), ids(tales, "Hi")[0]

    def vector(text, **more):
        reply = post(tales, "/v1/embeddings", {"input": text} | more).json()
        return reply["usage"]["prompt_tokens"], reply["data"][0]["embedding"]

    assert vector(STORY, truncate_prompt_tokens=20) == vector([bos, *end[-19:]])
    assert vector(STORY, truncate_prompt_tokens=-1)[0] == 1024


def test_truncation_auto_of_responses_drops_turns_that_are_far_too_long(tales):
    items = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Yes."}, TURN]
    body = {"input": items, "truncation": "auto", "max_output_tokens": 4}
    reply = post(tales, "/v1/responses", body)
    assert reply.status_code == 200 and reply.json()["usage"]["input_tokens"] < 100


# Many inputs and answers


def test_an_embedding_request_may_have_2048_inputs():
    with running(ScriptedBackend) as server:
        assert len(post(server, "/v1/embeddings", {"input": ["a"] * 2048}).json()["data"]) == 2048
        assert post(server, "/v1/embeddings", {"input": ["a"] * 2049}).json()["error"]["param"] == "input"
    with running(ScriptedBackend, Settings(embedding_inputs=3)) as server:
        assert post(server, "/v1/embeddings", {"input": ["a"] * 4}).status_code == 400
