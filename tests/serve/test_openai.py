"""Tests of OpenAI's API: replies, streams, parameters, refusals and errors."""

from __future__ import annotations

import json

import httpx
import pytest

from moesaic.errors import NumericalError, Overloaded, PromptTooLong
from moesaic.serve import keys
from tests.support.backend import Script
from tests.support.http import events, post
from tests.support.server import running

JSON = {"content-type": "application/json"}
CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


def test_a_reply_has_openais_shape(server):
    reply = post(server, "/v1/chat/completions", CHAT).json()
    assert reply["object"] == "chat.completion" and reply["model"] == "scripted"
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world!"}
    assert choice["finish_reason"] == "stop"
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_stream_chunks_join_to_the_reply(server):
    body = CHAT | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    response = post(server, "/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index in (0, 1):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in choices) == "Hello, world!"
        assert [c["finish_reason"] for c in choices] == [None] * 5 + ["stop"]


def test_max_tokens_finishes_with_length(server):
    reply = post(server, "/v1/chat/completions", CHAT | {"max_tokens": 2}).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["choices"][0]["message"]["content"] == "Hello, "


def test_logprobs(server):
    reply = post(server, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1}).json()
    entries = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["Hello", ", ", "world", "!"]
    assert entries[0]["top_logprobs"] == [{"token": "Hello", "logprob": -0.25, "bytes": list(b"Hello")}]


def test_the_backend_receives_all_parameters(server):
    body = CHAT | {
        "temperature": 0.5,
        "top_p": 0,
        "top_k": -1,
        "stop": "END",
        "seed": 7,
        "logit_bias": {"12": -100},
        "max_completion_tokens": 9,
        "unknown": {"is": "ignored"},
    }
    assert post(server, "/v1/chat/completions", body).status_code == 200
    [request] = server.backend.requests
    assert request.sampling == {
        "temperature": 0.5,
        "top_p": 1e-9,
        "top_k": 0,
        "stop": ("END",),
        "seed": 7,
        "logit_bias": {12: -100.0},
        "max_tokens": 9,
    }
    assert request.messages == ({"role": "user", "content": "Hi"},)


def test_text_parts_are_joined_and_others_refused(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}).status_code == 200
    assert server.backend.requests[0].messages[0]["content"] == "Hello"
    image = [{"type": "image_url", "image_url": {"url": "http://example.org/x.png"}}]
    response = post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": image}]})
    assert response.status_code == 400 and "text only" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["scripted", "alias", "tgi", "dummy", "", None])
def test_names_of_the_default_model(server, name):
    assert post(server, "/v1/chat/completions", CHAT | {"model": name}).json()["model"] == "scripted"


def test_an_unknown_model_is_not_found(server):
    response = post(server, "/v1/chat/completions", CHAT | {"model": "gpt-4"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "scripted, other" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"n": 129}, "n"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"response_format": {"type": "poem"}}, "response_format"),
    ],
)
def test_an_invalid_parameter_is_named(server, change, param):
    response = post(server, "/v1/chat/completions", CHAT | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not server.backend.requests


def test_a_missing_field_is_named(server):
    error = post(server, "/v1/chat/completions", {"model": "scripted"}).json()["error"]
    assert (error["param"], "missing" in error["message"]) == ("messages", True)


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [(Overloaded("full"), 429, "1"), (PromptTooLong(9, 3), 400, None), (RuntimeError("secret"), 500, None)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_backend_refusals_become_http_errors(server, error, status, retry, stream):
    server.backend.script = Script(refusal=error)
    response = post(server, "/v1/chat/completions", CHAT | {"stream": stream})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry
    assert "secret" not in response.text


def test_an_error_event_ends_a_stream(server):
    server.backend.script = Script(error=NumericalError("the model computed NaN"))
    response = post(server, "/v1/chat/completions", CHAT | {"stream": True})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert json.loads(last)["error"]["message"] == "the model computed NaN"
    assert "[DONE]" not in response.text
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in json.loads(chunk)["choices"])
    whole = post(server, "/v1/chat/completions", CHAT)
    assert whole.status_code == 500 and "choices" not in whole.json()


def test_completions_of_several_prompts(server):
    body = {"model": "scripted", "prompt": ["one", [1, 2]], "n": 2, "max_tokens": 3}
    reply = post(server, "/v1/completions", body).json()
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [(i, "Hello, world") for i in range(4)]
    assert reply["usage"]["prompt_tokens"] == 4 and reply["usage"]["completion_tokens"] == 12
    assert [request.prompt for request in server.backend.requests] == ["one", (1, 2)]
    *chunks, done = events(post(server, "/v1/completions", body | {"stream": True}).text)
    texts = ["", "", "", ""]
    for chunk in map(json.loads, chunks):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert done == "[DONE]" and texts == ["Hello, world"] * 4


def test_prompt_logprobs_for_lm_eval(server):
    body = {"prompt": [[1, 5]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    [choice] = post(server, "/v1/completions", body).json()["choices"]
    assert choice["text"] == "1 5Hello"
    assert choice["logprobs"] == {
        "text_offset": [0, 0, 3],
        "token_logprobs": [None, -0.5, -0.25],
        "tokens": ["<s>", "Hi", "Hello"],
        "top_logprobs": [None, {"Hi": -0.5}, {"Hello": -0.25}],
    }
    [choice] = post(server, "/v1/completions", body | {"max_tokens": 0}).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["<s>", "Hi"] and choice["text"] == "1 5"


def test_embeddings(server):
    reply = post(server, "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}).json()
    assert [entry["embedding"] for entry in reply["data"]] == ["AACAPwAAAAAAAAAA"] * 2
    short = post(server, "/v1/embeddings", {"input": "a", "dimensions": 2}).json()
    assert short["data"][0]["embedding"] == [1.0, 0.0]
    assert post(server, "/v1/embeddings", {"input": []}).status_code == 400


def test_models(server):
    listed = httpx.get(server.url + "/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [("scripted", 100), ("other", 50)]
    assert httpx.get(server.url + "/v1/models/other").json()["id"] == "other"
    assert httpx.get(server.url + "/v1/models/none").status_code == 404


def test_classify(server):
    reply = post(server, "/v1/classify", {"input": "fine"}).json()
    assert reply["data"] == [
        {"index": 0, "label": "good", "probs": [0.75, 0.25], "scores": {"good": 0.75, "bad": 0.25}}
    ]


def test_streamed_and_whole_replies_are_equal(tales):
    body = {"messages": [{"role": "user", "content": "Tell a story."}], "temperature": 0, "max_tokens": 40}
    whole = post(tales, "/v1/chat/completions", body).json()
    *chunks, done = events(post(tales, "/v1/chat/completions", body | {"stream": True}).text)
    joined = "".join(c["delta"].get("content", "") for chunk in chunks for c in json.loads(chunk)["choices"])
    assert done == "[DONE]" and joined == whole["choices"][0]["message"]["content"] and len(joined) > 20
    prompt = {"prompt": "Once upon", "temperature": 0, "max_tokens": 8, "echo": True}
    assert post(tales, "/v1/completions", prompt).json()["choices"][0]["text"].startswith("Once upon a")


def test_embeddings_of_a_real_model_are_normalized(tales):
    reply = post(tales, "/v1/embeddings", {"input": ["a king", "a queen", "the sea"]}).json()
    vectors = [entry["embedding"] for entry in reply["data"]]
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)
    assert vectors[0] != vectors[1]


def test_integers_may_be_written_as_floats(server):
    raw = '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2.0, "temperature": 1.0, "top_k": 3e0}'
    assert httpx.post(server.url + "/v1/chat/completions", content=raw, headers=JSON).status_code == 200
    assert server.backend.requests[0].sampling == {"max_tokens": 2, "temperature": 1.0, "top_k": 3}
    for wrong in ("2.5", "1e400", "-1e400"):
        response = httpx.post(server.url + "/v1/chat/completions", content=raw.replace("2.0", wrong), headers=JSON)
        assert response.status_code == 400, wrong


def test_a_wrong_method_lists_the_allowed_ones(server):
    response = httpx.put(server.url + "/v1/responses/resp_1", json={})
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET, HEAD")


def test_openapi_declares_where_keys_are_required(server):
    described = httpx.get(server.url + "/openapi.json").json()
    assert "security" not in described["paths"]["/v1/models"]["get"]
    written, key = keys.new("anna")
    with running(keys=keys.Keys((key,))) as guarded:
        headers = {"x-api-key": written}
        described = httpx.get(guarded.url + "/openapi.json", headers=headers).json()
    assert described["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "security" not in described["paths"]["/health"]["get"]
    assert {entry["name"] for entry in described["paths"]["/v1/responses/{id}/input_items"]["get"]["parameters"]} == {
        *("id", "limit", "order", "after")
    }


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
    ],
)
def test_variables_of_the_chat_template_reach_the_model(server, path, more):
    for kwargs in ({"date_string": "03 Dec 2026", "enable_thinking": False}, None):
        assert post(server, path, {"model": "scripted", **more, "chat_template_kwargs": kwargs}).status_code == 200
        assert server.backend.requests[-1].chat_template_kwargs == (kwargs or {})
    assert post(server, path, {"model": "scripted", **more, "chat_template_kwargs": [1]}).status_code in (400, 422)
