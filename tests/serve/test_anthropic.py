"""Tests of Anthropic's Messages API: replies, streams, content blocks, tools and errors."""

from __future__ import annotations

import json

import httpx
import pytest

from moesaic.backend import ToolCall
from moesaic.errors import NumericalError, Overloaded, Unavailable
from moesaic.serve import keys
from tests.support.backend import Script
from tests.support.http import post
from tests.support.server import running

BODY = {"model": "scripted", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {}}}
CALLS = (
    ToolCall(0, "call_a", "weather", '{"city":'),
    ToolCall(0, arguments=' "Oslo"}'),
    ToolCall(1, "call_b", "weather", "{}"),
)


def send(server, body, path="/v1/messages", headers=None):
    return post(server, path, body, headers={"anthropic-version": "2023-06-01"} | (headers or {}))


def stream(server, body):
    """Return the data of the events of a streamed reply; check that each event has the name of its type."""
    response = send(server, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    return events


def test_a_reply_has_anthropics_shape(server):
    server.backend.script = Script(cached=1)
    response = send(server, BODY)
    reply = response.json()
    assert reply.pop("id").startswith("msg_") and response.headers["request-id"]
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [{"type": "text", "text": "Hello, world!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
            "output_tokens": 4,
        },
    }


def test_a_stream_has_anthropics_events(server):
    events = stream(server, BODY)
    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start", "ping"),
        *["content_block_delta"] * 4,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    begin = events[0]["message"]
    assert (begin["content"], begin["stop_reason"], begin["usage"]["input_tokens"]) == ([], None, 2)
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert "".join(event["delta"]["text"] for event in events[3:7]) == "Hello, world!"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 4


@pytest.mark.parametrize(
    ("script", "more", "reason"),
    [
        (Script(), {"max_tokens": 2}, ("max_tokens", None)),
        (Script(stop="END"), {"stop_sequences": ["END"]}, ("stop_sequence", "END")),
        (Script(calls=CALLS), {"tools": [TOOL]}, ("tool_use", None)),
    ],
)
def test_stop_reasons(server, script, more, reason):
    server.backend.script = script
    reply = send(server, BODY | more).json()
    assert (reply["stop_reason"], reply["stop_sequence"]) == reason
    delta = stream(server, BODY | more)[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == reason


def test_tool_calls(server):
    server.backend.script = Script(pieces=("Let me see.",), calls=CALLS)
    reply = send(server, BODY | {"tools": [TOOL]}).json()
    assert reply["content"] == [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_b", "name": "weather", "input": {}},
    ]
    events = stream(server, BODY | {"tools": [TOOL]})
    blocks = [event for event in events if event["type"].startswith("content_block")]
    assert [(event["type"].removeprefix("content_block_"), event["index"]) for event in blocks] == [
        *(("start", 0), ("delta", 0), ("stop", 0)),
        *(("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)),
        *(("start", 2), ("delta", 2), ("stop", 2)),
    ]
    assert blocks[3]["content_block"] == {"type": "tool_use", "id": "call_a", "name": "weather", "input": {}}
    assert "".join(event["delta"]["partial_json"] for event in blocks[4:6]) == '{"city": "Oslo"}'


def test_a_reply_with_only_a_tool_call(server):
    server.backend.script = Script(pieces=(), calls=CALLS[:2])
    assert [block["type"] for block in send(server, BODY).json()["content"]] == ["tool_use"]
    assert [event["type"] for event in stream(server, BODY)][1:3] == ["content_block_start", "ping"]


def test_a_truncated_tool_call_has_empty_input(server):
    server.backend.script = Script(pieces=(), calls=CALLS[:1])
    assert send(server, BODY).json()["content"][0]["input"] == {}


def test_the_backend_receives_all_parameters(server):
    body = BODY | {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, text("Be kind.")],
        "temperature": 0.5,
        "top_p": 0,
        "top_k": 3,
        "stop_sequences": ["END", ""],
        "metadata": {"user_id": "x"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    }
    assert send(server, body).status_code == 200
    [request] = server.backend.requests
    assert request.messages[0] == {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert request.sampling == {"max_tokens": 50, "temperature": 0.5, "top_p": 1e-9, "top_k": 3, "stop": ("END",)}
    schema = TOOL["input_schema"]
    function = {"name": "weather", "description": "Tells it.", "parameters": schema}
    assert request.tools == ({"type": "function", "function": function},)
    assert request.tool_choice == {"type": "function", "function": {"name": "weather"}}
    assert not request.parallel_tool_calls and not request.continue_final
    assert request.grammar == ("json_schema", {"type": "object"})


def text(content):
    return {"type": "text", "text": content}


def test_tool_results_become_tool_messages(server):
    calls = [
        text("Let me see."),
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Oslo"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "call_a", "content": [text("rain"), text("wind")]},
        {"type": "tool_result", "tool_use_id": "call_b"},
        text("And now?"),
    ]
    turns = [{"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    assert send(server, BODY | {"messages": BODY["messages"] + turns}).status_code == 200
    function = {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert server.backend.requests[0].messages == (
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "call_a", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "rain\n\nwind"},
        {"role": "tool", "tool_call_id": "call_b", "content": ""},
        {"role": "user", "content": "And now?"},
    )


def test_a_last_assistant_message_is_continued(server):
    turns = [*BODY["messages"], {"role": "assistant", "content": "Hel"}]
    assert send(server, BODY | {"messages": turns}).status_code == 200
    assert server.backend.requests[0].continue_final


@pytest.mark.parametrize(
    ("choice", "expected"),
    [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none"), (None, "auto")],
)
def test_tool_choice(server, choice, expected):
    assert send(server, BODY | {"tools": [TOOL], "tool_choice": choice}).status_code == 200
    assert server.backend.requests[0].tool_choice == expected


RESULT = {"type": "tool_result", "tool_use_id": "call_a"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}]}, "tool_result"),
        ({"messages": [{"role": "user", "content": [RESULT | {"content": 5}]}]}, "neither text nor a list of blocks"),
        ({"messages": [{"role": "user", "content": [RESULT | {"content": ["x"]}]}]}, "not an object"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "king"),
        ({"system": [IMAGE]}, "system"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{"name": "nothing"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "time"}}, "'time'"),
        ({"output_config": {"format": {"type": "poem"}}}, "json_schema"),
    ],
)
def test_invalid_requests_are_refused(server, change, message):
    response = send(server, BODY | change)
    assert response.status_code == 400, response.text
    reply = response.json()
    assert (reply["type"], reply["error"]["type"]) == ("error", "invalid_request_error")
    assert message in reply["error"]["message"]
    assert not server.backend.requests


def test_count_tokens(server):
    body = {"model": "scripted", "system": "Be brief.", "messages": [{"role": "user", "content": "one two three"}]}
    assert send(server, body, "/v1/messages/count_tokens").json() == {"input_tokens": 6}
    assert not server.backend.requests


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full"), 429, "rate_limit_error"),
        (Unavailable("loading"), 503, "overloaded_error"),
        (NumericalError("NaN"), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_backend_refusals_become_http_errors(server, error, status, kind, streamed):
    server.backend.script = Script(refusal=error)
    response = send(server, BODY | {"stream": streamed})
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert ("retry-after" in response.headers) == (status != 500)


def test_an_error_event_ends_a_stream(server):
    server.backend.script = Script(error=NumericalError("the model computed NaN"))
    events = stream(server, BODY)
    error = {"type": "api_error", "message": "the model computed NaN"}
    assert events[-1] == {"type": "error", "error": error}
    assert not {"message_stop", "message_delta"} & {event["type"] for event in events}
    assert send(server, BODY).status_code == 500


def test_routing_errors_have_anthropics_shape(server):
    assert send(server, BODY | {"model": "other-1"}).json()["error"]["type"] == "not_found_error"
    for response in (httpx.get(server.url + "/v1/messages"), send(server, BODY, "/v1/messages/batches")):
        assert response.json()["type"] == "error", response.text
    assert "type" not in send(server, BODY, "/v1/nothing").json()


def test_the_x_api_key_header_authenticates():
    written, key = keys.new("anna")
    with running(keys=keys.Keys((key,))) as server:
        assert send(server, BODY).json()["error"]["type"] == "authentication_error"
        assert send(server, BODY, headers={"x-api-key": written}).status_code == 200


def test_streamed_and_whole_replies_are_equal(tales):
    body = {"max_tokens": 30, "temperature": 0, "messages": [{"role": "user", "content": "Tell a story."}]}
    whole = send(tales, body).json()
    events = stream(tales, body)
    joined = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert joined == whole["content"][0]["text"] and len(joined) > 20
    counted = send(tales, body, "/v1/messages/count_tokens").json()["input_tokens"]
    begin = events[0]["message"]["usage"]["input_tokens"]
    usage = whole["usage"]
    assert begin == counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
