"""Tests of OpenAI's Responses API: replies, the order of events, and stored responses."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest

from moesaic.backend import ModelInfo, ToolCall
from moesaic.errors import NotFound, NumericalError, Overloaded
from moesaic.serve import keys
from moesaic.serve.response_store import ResponseStore, StoredResponse
from moesaic.serve.settings import Settings
from tests.support.backend import Script
from tests.support.http import post
from tests.support.server import running

BODY = {"model": "scripted", "input": "Hi"}
TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
CALLS = (
    ToolCall(0, "call_a", "weather", '{"city":'),
    ToolCall(0, arguments=' "Oslo"}'),
    ToolCall(1, "call_b", "weather", "{}"),
)


def create(server, body, path="/v1/responses", **options):
    return post(server, path, body, **options)


def get(server, path, **options):
    return httpx.get(server.url + path, timeout=30, **options)


def stream(server, body):
    """Return the events of a streamed reply without their sequence numbers; check that those are in order."""
    response = create(server, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    assert [event.pop("sequence_number") for event in events] == list(range(len(events)))
    return events


def kinds(events):
    return [event["type"].removeprefix("response.") for event in events]


def test_a_reply_has_the_responses_shape(server):
    reply = create(server, BODY | {"metadata": {"a": "b"}, "instructions": "Be kind.", "temperature": 0.5}).json()
    assert (reply["object"], reply["status"], reply["error"]) == ("response", "completed", None)
    assert reply["id"].startswith("resp_") and reply["metadata"] == {"a": "b"}
    [item] = reply["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello, world!", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    assert reply["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 6,
    }
    [request] = server.backend.requests
    assert request.messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert request.sampling == {"temperature": 0.5}


def test_a_stream_has_the_events_of_the_responses_api(server):
    events = stream(server, BODY)
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 4,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == [] and events[3]["part"]["text"] == ""
    assert "".join(event["delta"] for event in events[4:8]) == "Hello, world!" == events[8]["text"]
    whole = events[-1]["response"]
    assert whole["output"] == [events[-2]["item"]] and whole["usage"]["total_tokens"] == 6
    assert whole["id"] == events[0]["response"]["id"]
    assert get(server, f"/v1/responses/{whole['id']}").json() == whole


def test_max_output_tokens_ends_as_incomplete(server):
    reply = create(server, BODY | {"max_output_tokens": 2}).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["status"] == "incomplete"
    events = stream(server, BODY | {"max_output_tokens": 2})
    assert kinds(events)[-1] == "incomplete" and "completed" not in kinds(events)


def test_tool_calls(server):
    server.backend.script = Script(pieces=("Let me see.",), calls=CALLS)
    body = BODY | {"tools": [TOOL]}
    output = create(server, body).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[1].pop("id").startswith("fc_")
    call = {"type": "function_call", "status": "completed", "call_id": "call_a", "name": "weather"}
    assert output[1] == call | {"arguments": '{"city": "Oslo"}'}
    events = stream(server, body)
    assert kinds(events)[5:] == [
        *("output_text.done", "content_part.done", "output_item.done", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert added[1]["item"]["arguments"] == "" and added[1]["item"]["status"] == "in_progress"
    done = [event for event in events if event["type"].endswith("arguments.done")]
    assert [event["arguments"] for event in done] == ['{"city": "Oslo"}', "{}"]
    function = {name: TOOL[name] for name in ("name", "description", "parameters")}
    assert server.backend.requests[0].tools == ({"type": "function", "function": function},)


def test_logprobs(server):
    body = BODY | {"top_logprobs": 1}
    [part] = create(server, body).json()["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["Hello", ", ", "world", "!"]
    assert part["logprobs"][0]["top_logprobs"] == [{"token": "Hello", "logprob": -0.25, "bytes": list(b"Hello")}]
    deltas = [event for event in stream(server, body) if event["type"].endswith("text.delta")]
    assert [len(event["logprobs"]) for event in deltas] == [1] * 4
    included = create(server, BODY | {"include": ["message.output_text.logprobs"]}).json()["output"][0]["content"][0]
    assert included["logprobs"][0]["top_logprobs"] == []
    assert server.backend.requests[-1].sampling == {"logprobs": 0}


def test_items_become_messages(server):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Oslo?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "call_a", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "call_b", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_a", "output": "rain"},
        {"type": "function_call_output", "call_id": "call_b", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "function_call", "call_id": "call_c", "name": "weather", "arguments": "{}"},
    ]
    choice = {"type": "function", "name": "weather"}
    body = BODY | {"input": items, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    assert create(server, body).status_code == 200
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"id": f"call_{name}", "type": "function", "function": function} for name in "abc"]
    [request] = server.backend.requests
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "call_a", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_b", "content": "sun"},
        {"role": "assistant", "content": "", "tool_calls": calls[2:]},
    )
    assert (
        request.tool_choice == {"type": "function", "function": {"name": "weather"}} and not request.parallel_tool_calls
    )


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_object", {})),
        ({"type": "json_schema", "name": "x", "schema": {"type": "object"}}, ("json_schema", {"type": "object"})),
    ],
)
def test_text_formats(server, form, grammar):
    assert create(server, BODY | {"text": {"format": form}}).json()["text"]["format"] == form
    assert server.backend.requests[0].grammar == grammar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "content"),
        ({"input": [{"role": "king", "content": "Hi"}]}, "king"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "not supported"),
        ({"input": [{"type": "web_search_call"}]}, "web_search_call"),
        ({"input": [{"type": ["x"], "content": "x"}]}, "unsupported type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "arguments"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"n": 2}, "must be 1"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"text": {"format": {"type": "poem"}}}, "text.format"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"truncation": "some"}, "truncation"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_invalid_requests_are_refused(server, change, message):
    response = create(server, BODY | change)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert not server.backend.requests


def test_previous_response_id_continues_a_conversation(server):
    first = create(server, BODY | {"instructions": "Be kind."}).json()
    body = BODY | {"input": "And?", "previous_response_id": first["id"], "instructions": "Be brief."}
    second = create(server, body).json()
    assert second["previous_response_id"] == first["id"]
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, world!"}]
    instructions = [{"role": "system", "content": "Be brief."}]  # instructions apply to one response only
    assert list(server.backend.requests[1].messages) == [*instructions, *history, {"role": "user", "content": "And?"}]
    third = BODY | {"input": "So?", "previous_response_id": second["id"]}
    assert stream(server, third)
    assert [turn["content"] for turn in server.backend.requests[2].messages][-3:] == ["And?", "Hello, world!", "So?"]


def test_tool_results_follow_stored_calls(server):
    server.backend.script = Script(pieces=(), calls=CALLS)
    first = create(server, BODY | {"tools": [TOOL]}).json()
    results = [{"type": "function_call_output", "call_id": f"call_{name}", "output": "rain"} for name in "ab"]
    assert create(server, BODY | {"input": results, "previous_response_id": first["id"]}).status_code == 200
    turns = server.backend.requests[1].messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["call_a", "call_b"]


def test_stored_responses_can_be_read_and_deleted(server):
    whole = create(server, BODY).json()
    path = f"/v1/responses/{whole['id']}"
    assert get(server, path).json() == whole
    cancelled = create(server, {}, f"{path}/cancel")
    assert cancelled.status_code == 400 and "has ended" in cancelled.json()["error"]["message"]
    assert get(server, f"{path}?stream=true").status_code == 400
    deleted = {"id": whole["id"], "object": "response", "deleted": True}
    assert httpx.delete(server.url + path).json() == deleted
    for response in (get(server, path), httpx.delete(server.url + path), create(server, {}, f"{path}/cancel")):
        assert response.status_code == 404 and response.json()["error"]["code"] is None


def test_store_false_stores_nothing(server):
    whole = create(server, BODY | {"store": False}).json()
    assert whole["store"] is False and get(server, f"/v1/responses/{whole['id']}").status_code == 404


def test_input_items(server):
    items = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "id": None}, BODY["input"]]
    items[2] = {"role": "user", "content": items[2], "id": "msg_mine"}
    path = f"/v1/responses/{create(server, BODY | {'input': items}).json()['id']}/input_items"
    listed = get(server, path).json()
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == ["Hi", "two", "one"] and listed["first_id"] == "msg_mine" and not listed["has_more"]
    page = get(server, f"{path}?order=asc&limit=1").json()
    assert [item["content"] for item in page["data"]] == [[{"type": "input_text", "text": "one"}]] and page["has_more"]
    rest = get(server, f"{path}?order=asc&after={page['last_id']}").json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["two", "Hi"]
    assert get(server, f"{path}?after=msg_mine&order=asc").json()["data"] == []
    for wrong in ("order=up", "limit=0", "limit=x", "after=nothing"):
        assert get(server, f"{path}?{wrong}").status_code == 400


def test_keys_cannot_read_each_others_responses():
    (anna_key, anna), (ben_key, ben) = keys.new("anna"), keys.new("ben")
    with running(keys=keys.Keys((anna, ben))) as server:
        as_anna, as_ben = ({"headers": {"authorization": f"Bearer {key}"}} for key in (anna_key, ben_key))
        name = create(server, BODY, **as_anna).json()["id"]
        path = f"/v1/responses/{name}"
        assert get(server, path, **as_anna).status_code == 200
        assert get(server, path, **as_ben).status_code == 404
        assert get(server, f"{path}/input_items", **as_ben).status_code == 404
        assert httpx.delete(server.url + path, **as_ben).status_code == 404
        assert create(server, BODY | {"previous_response_id": name}, **as_ben).status_code == 400
        assert get(server, path, **as_anna).status_code == 200


def test_the_store_evicts_the_oldest_of_the_same_owner():
    entry = StoredResponse({"text": "x" * 100}, (), ())
    store = ResponseStore(2, 10 * entry.size())
    for name in "abc":
        store.put("anna", name, entry)
    store.put("ben", "a", entry)
    assert store.get("anna", "b") and store.get("anna", "c") and store.get("ben", "a")
    with pytest.raises(NotFound):
        store.get("anna", "a")
    small = ResponseStore(100, 2 * entry.size())
    small.put("anna", "a", entry)
    small.put("anna", "b", replace(entry, shown={"text": "x" * 150}))
    with pytest.raises(NotFound):
        small.get("anna", "a")
    small.put("anna", "c", replace(entry, shown={"text": "x" * 500}))  # larger than the whole store
    small.put("anna", "d", entry)
    assert small.get("anna", "d")
    assert small._owners["anna"].size == entry.size()


def test_kept_responses_limits_the_store():
    with running(settings=Settings(kept_responses=1)) as server:
        first, second = (create(server, BODY).json()["id"] for _ in range(2))
        assert get(server, f"/v1/responses/{first}").status_code == 404
        assert get(server, f"/v1/responses/{second}").status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_backend_refusals_become_http_errors(server, streamed):
    server.backend.script = Script(refusal=Overloaded("full"))
    response = create(server, BODY | {"stream": streamed})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("error", [NumericalError("NaN"), RuntimeError("secret")])
def test_an_error_in_a_stream_fails_the_response(server, error):
    server.backend.script = Script(error=error)
    events = stream(server, BODY)
    assert kinds(events)[-2:] == ["output_text.delta", "failed"]
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
    assert "secret" not in failed["error"]["message"]
    assert failed["output"][0]["status"] == "incomplete" and failed["output"][0]["content"][0]["text"]
    assert get(server, f"/v1/responses/{failed['id']}").status_code == 404
    assert create(server, BODY).status_code == 500


def test_truncation_auto_drops_the_oldest_messages(server):
    server.backend.model_infos = [ModelInfo("scripted", context=12)]
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"{number} x x"} for number in range(5)]
    body = BODY | {"input": [{"role": "system", "content": "brief"}, *turns], "max_output_tokens": 3}
    assert create(server, body).status_code == 200
    assert len(server.backend.requests[0].messages) == 6
    assert create(server, body | {"truncation": "auto"}).status_code == 200
    contents = [turn["content"] for turn in server.backend.requests[1].messages]
    assert contents == ["brief", "4 x x"]
    server.backend.model_infos = [ModelInfo("scripted", context=15)]
    assert create(server, body | {"truncation": "auto"}).status_code == 200
    assert [turn["content"] for turn in server.backend.requests[2].messages] == ["brief", "2 x x", "3 x x", "4 x x"]


def test_streamed_and_whole_replies_are_equal(tales):
    body = {"input": "Tell a story.", "temperature": 0, "max_output_tokens": 30}
    whole = create(tales, body).json()
    events = stream(tales, body)
    joined = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert joined == whole["output"][0]["content"][0]["text"] and len(joined) > 20
    assert whole["status"] == "incomplete" == events[-1]["response"]["status"]
    continued = create(tales, body | {"previous_response_id": whole["id"], "input": "And then?"}).json()
    assert continued["usage"]["input_tokens"] > whole["usage"]["total_tokens"]
