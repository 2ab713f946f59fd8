"""Fields of bodies: null means missing, unknown fields are named or refused, and routes agree about one request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import inspect

from moesaic.serve import keys
from moesaic.serve.app import dialect_endpoints
from moesaic.serve.keys import Key, Keys
from moesaic.serve.settings import Settings
from tests.support.backend import Script, ScriptedBackend
from tests.support.http import events, post
from tests.support.server import running

TURN = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
SMALLEST: dict[str, dict[str, Any]] = {
    "/": {"inputs": "Hi", "parameters": {}},
    "/v1": {"inputs": "Hi", "parameters": {}},
    "/v1/": {"inputs": "Hi", "parameters": {}},
    "/generate": {"inputs": "Hi", "parameters": {}},
    "/generate_stream": {"inputs": "Hi", "parameters": {}},
    "/vertex": {"instances": [{"inputs": "Hi", "parameters": {}}]},
    "/tokenize": {"messages": [TURN]},
    "/chat_tokenize": {"messages": [TURN]},
    "/detokenize": {"tokens": [5]},
    "/v1/chat/completions": {"messages": [TURN], "stream_options": {}, "structured_outputs": {}},
    "/v1/completions": {"prompt": "Hi", "stream_options": {}, "structured_outputs": {}},
    "/v1/responses": {"input": "Hi", "text": {}, "stream_options": {}, "structured_outputs": {}},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/classify": {"input": "Hi"},
    "/v1/messages": {
        "messages": [TURN],
        "max_tokens": 5,
        "tools": [{"name": "f", "input_schema": {}}],
        "tool_choice": {"type": "auto"},
        "output_config": {},
    },
    "/v1/messages/count_tokens": {"messages": [TURN], "tools": [{"name": "f", "input_schema": {}}]},
}
"""A body for each route, with the nested objects that it may have."""
BODIES = {
    each.path: each.body
    for each in dialect_endpoints()
    if isinstance(each.body, type) and issubclass(each.body, msgspec.Struct)
}


def structs(kind: Any) -> Iterator[inspect.StructType]:
    """Yield the types of the objects in a body."""
    if isinstance(kind, inspect.StructType):
        yield kind
        for field in kind.fields:
            yield from structs(field.type)
    for name in ("type", "item_type"):
        if isinstance(getattr(kind, name, None), inspect.Type):
            yield from structs(getattr(kind, name))
    for each in getattr(kind, "types", ()):
        yield from structs(each)


@pytest.mark.parametrize("path", BODIES)
def test_every_optional_field_may_be_null(path):
    for struct in structs(inspect.type_info(BODIES[path])):
        for field in struct.fields:
            if not field.required:
                msgspec.convert(None, kind_of(struct.cls, field.name))


def kind_of(struct: type[msgspec.Struct], name: str) -> Any:
    return next(each.type for each in msgspec.structs.fields(struct) if each.name == name)


def nulled(value: Any, kind: inspect.Type) -> Any:
    """Return JSON with each optional field that it lacks set to null."""
    if isinstance(kind, inspect.Metadata):
        return nulled(value, kind.type)
    if isinstance(kind, inspect.UnionType):
        fitting = inspect.StructType if isinstance(value, dict) else inspect.ListType
        found = [each for each in kind.types if isinstance(each, fitting)]
        return nulled(value, found[0]) if found else value
    if isinstance(kind, inspect.ListType) and isinstance(value, list):
        return [nulled(item, kind.item_type) for item in value]
    if isinstance(kind, inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field for field in kind.fields}
        return {name: nulled(value[name], field.type) if name in value else None for name, field in fields.items()}
    return value


@pytest.mark.parametrize("path", BODIES)
def test_a_body_of_nulls_is_answered_as_without_them(server, path):
    server.backend.model_infos = server.backend.model_infos[:1]
    body = SMALLEST[path]
    full = nulled(body, inspect.type_info(BODIES[path]))
    assert len(json.dumps(full)) > len(json.dumps(body)) and "null" in json.dumps(full)
    plain, nulls = post(server, path, body), post(server, path, full)
    assert (plain.status_code, nulls.status_code) == (200, 200), nulls.text
    assert "x-moesaic-ignored-fields" not in nulls.headers
    requests = [msgspec.to_builtins(each) for each in server.backend.requests]
    if requests and "seed" not in requests[0]["sampling"]:
        assert requests[0] == requests[1]


def test_null_in_the_dictionaries_of_a_body(server):
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}, "index": None}
    turns = [
        TURN | {"name": None, "tool_calls": None, "content": [{"type": "text", "text": "Hi", "cache_control": None}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "a", "content": "2", "name": None},
    ]
    tool = {"type": "function", "function": TOOL["function"] | {"strict": None, "description": None}}
    schema = {"name": "n", "schema": {"type": "object"}, "strict": None, "description": None}
    body = {"messages": turns, "tools": [tool], "response_format": {"type": "json_schema", "json_schema": schema}}
    response = post(server, "/v1/chat/completions", body)
    assert response.status_code == 200 and "x-moesaic-ignored-fields" not in response.headers
    item = {"type": None, "id": None, "status": None, "role": "user", "content": "Hi"}
    assert post(server, "/v1/responses", {"input": [item]}).status_code == 200


# Unknown fields


def test_unknown_fields_are_named_in_a_header_and_once_in_the_log(server, caplog):
    body = {"prompt": "Hi", "max_tokns": 5, "echoo": None, "tags": [], "stream_options": {"a": 1}, "x\r\ny: é": 1}
    with caplog.at_level("WARNING", "moesaic.serve"):
        for _ in range(2):
            response = post(server, "/v1/completions", body)
            assert response.status_code == 200
            assert response.headers["x-moesaic-ignored-fields"] == "max_tokns, stream_options.a, x??y???"
    told = [record.field for record in caplog.records if hasattr(record, "field")]
    assert told == ["max_tokns", "stream_options.a", "(no plain name)"]
    turns = [TURN | {"mood": "glad"}, TURN | {"mood": "sad"}]
    streamed = post(server, "/v1/chat/completions", {"messages": turns, "stream": True})
    assert streamed.headers["x-moesaic-ignored-fields"] == "messages[].mood"
    many = post(server, "/v1/completions", {"prompt": "Hi"} | {f"field{index}": 1 for index in range(99)})
    assert len(many.headers["x-moesaic-ignored-fields"].split(", ")) == 16


def test_the_body_of_another_route_is_checked_as_that_routes_body(server):
    response = post(server, "/invocations", {"messages": [TURN], "mood": "glad"})
    assert response.headers["x-moesaic-ignored-fields"] == "mood"


def test_fields_without_an_effect_on_the_answer_are_known(server):
    body = {"messages": [TURN], "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert "x-moesaic-ignored-fields" not in post(server, "/v1/chat/completions", body).headers
    for path, more in (("/v1/completions", {"prompt": "Hi"}), ("/v1/responses", {"input": "Hi"})):
        response = post(server, path, {"prompt_cache_key": "k", "safety_identifier": "s", "metadata": {}} | more)
        assert response.status_code == 200 and "x-moesaic-ignored-fields" not in response.headers
    claude = {"messages": [TURN], "max_tokens": 3, "metadata": {"user_id": "u"}, "service_tier": "auto"}
    cached = {"name": "f", "input_schema": {}, "cache_control": {"type": "ephemeral"}}
    response = post(server, "/v1/messages", claude | {"tools": [cached]})
    assert response.status_code == 200 and "x-moesaic-ignored-fields" not in response.headers


def test_strict_fields_refuses_unknown_fields():
    with running(ScriptedBackend, Settings(strict_fields=True)) as server:
        response = post(server, "/v1/chat/completions", {"messages": [TURN | {"mood": "glad"}]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[].mood")
        assert not server.backend.requests
        assert (
            "max_tokns" in post(server, "/generate", {"inputs": "Hi", "parameters": {"max_tokns": 5}}).json()["error"]
        )
        assert post(server, "/v1/chat/completions", {"messages": [TURN], "max_tokns": None}).status_code == 200


# Routes agree


def test_tokenize_counts_what_a_chat_counts(tales):
    call = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    history = [
        {"role": "developer", "content": "Be kind."},
        TURN,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "2"},
    ]
    continued = {"messages": [TURN, {"role": "assistant", "content": "Hel"}], "continue_final_message": True}
    for body in (
        {"messages": [TURN], "tools": [TOOL]},
        {"messages": [TURN], "tools": [TOOL], "tool_choice": "none"},
        {"messages": history, "tools": [TOOL]},
        {"messages": history},
        continued,
        {"messages": continued["messages"], "add_generation_prompt": False},
    ):
        chat = post(tales, "/v1/chat/completions", body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
        assert post(tales, "/tokenize", body).json()["count"] == chat
        assert len(post(tales, "/chat_tokenize", body).json()["tokenize_response"]) == chat


def test_max_completion_tokens_of_completions(server):
    server.backend.script = Script(pieces=["a"] * 9)
    body = {"prompt": "Hi", "max_tokens": 2, "max_completion_tokens": 5}
    assert post(server, "/v1/completions", body).json()["usage"]["completion_tokens"] == 5


BAD_SCHEMA = {"properties": {"a": {"type": "strin"}}}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD_SCHEMA}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [TURN], "response_format": SCHEMA_FORMAT}, "response_format"),
        ("/v1/completions", {"prompt": "Hi", "response_format": SCHEMA_FORMAT}, "response_format"),
        ("/v1/chat/completions", {"messages": [TURN], "guided_json": BAD_SCHEMA}, "guided_json"),
        ("/v1/completions", {"prompt": "Hi", "guided_regex": "("}, "guided_regex"),
        ("/v1/completions", {"prompt": "Hi", "structured_outputs": {"regex": "("}}, "structured_outputs"),
        (
            "/v1/responses",
            {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "n", "schema": BAD_SCHEMA}}},
            "text.format",
        ),
    ],
)
def test_an_error_in_a_grammar_names_the_field_that_set_it(tales, path, body, param):
    error = post(tales, path, body).json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: cannot be compiled")


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", {"messages": [TURN]}), ("/v1/completions", {"prompt": ["Hi", "Ho"]})]
)
def test_continuous_usage_stats(server, path, body):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = events(post(server, path, body | {"n": 2, "stream": True, "stream_options": options}).text)
    used = [json.loads(chunk)["usage"] for chunk in chunks]
    counts = [each["completion_tokens"] for each in used]
    assert counts == sorted(counts) and counts[-1] == json.loads(last)["usage"]["completion_tokens"] > 0
    assert all(each["total_tokens"] == each["prompt_tokens"] + each["completion_tokens"] for each in used)
    *chunks, _ = events(
        post(server, path, body | {"stream": True, "stream_options": options | {"include_usage": None}}).text
    )
    assert not any(json.loads(chunk).get("usage") for chunk in chunks)


# Words and tokens that must not, or may only, come


def told(tales, path="/v1/chat/completions", **more):
    body = {"max_tokens": 30, "temperature": 0, "return_token_ids": True} | more
    asked = {"messages": [TURN | {"content": "Tell a story of a king."}]} if "chat" in path else {"prompt": "Once"}
    response = post(tales, path, body | asked)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["message"]["content"] if "chat" in path else choice["text"], choice["token_ids"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bad_words_are_not_generated(tales, path):
    text, _ = told(tales, path)
    words = sorted({word for word in text.replace(".", " ").replace(",", " ").split() if word.isalpha()})[:6]
    other, _ = told(tales, path, bad_words=words)
    assert words and not set(words) & set(other.replace(".", " ").replace(",", " ").split())
    assert told(tales, path, bad_words=["zebra crossing"])[0] == text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_only_allowed_tokens_are_generated(tales, path):
    allowed = [200, 300, 400]
    assert set(told(tales, path, allowed_token_ids=allowed, temperature=1)[1]) <= set(allowed)
    wrong = {"messages": [TURN], "prompt": "Hi", "allowed_token_ids": []}
    assert post(tales, path, wrong).json()["error"]["param"] == "allowed_token_ids"
    assert post(tales, path, wrong | {"allowed_token_ids": [10**6]}).json()["error"]["param"] == "allowed_token_ids"


# Many answers


def ask_for(server, n):
    return httpx.post(
        f"{server.url}/v1/completions", json={"prompt": "Hi", "n": n}, headers={"authorization": "Bearer a"}
    )


def test_128_answers_within_the_limits_of_the_key():
    def of(**limits):
        return Keys((Key("anna", keys.digest("a"), **limits),))

    with running(ScriptedBackend, keys=of(concurrent=16, requests_per_minute=20)) as server:
        assert len(ask_for(server, 128).json()["choices"]) == 128
        assert [ask_for(server, n).status_code for n in (8, 24, 1, 1)] == [200, 200, 429, 429]
    with running(ScriptedBackend, keys=of(concurrent=2)) as server:
        assert [ask_for(server, n).status_code for n in (16, 1, 17)] == [200, 200, 400]
        refused = ask_for(server, 17).json()["error"]
        assert refused["param"] == "n" and "16 answers at a time" in refused["message"]
        assert not server.app.services.keys._running


def test_128_answers_of_a_real_model(tales):
    body = {"prompt": "Once", "n": 128, "max_tokens": 2, "temperature": 1, "seed": 5}
    assert len(post(tales, "/v1/completions", body).json()["choices"]) == 128
