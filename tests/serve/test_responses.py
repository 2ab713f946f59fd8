"""OpenAI's Responses API over a scripted model: shapes, events in their order, and what is kept for whom."""

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
from tests.support.server import running

ASK = {"model": "scripted", "input": "Hi"}
TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
CALLS = (
    ToolCall(0, "call_a", "weather", '{"city":'),
    ToolCall(0, arguments=' "Oslo"}'),
    ToolCall(1, "call_b", "weather", "{}"),
)


def post(server, body, path="/v1/responses", **options):
    return httpx.post(server.url + path, json=body, timeout=30, **options)


def get(server, path, **options):
    return httpx.get(server.url + path, timeout=30, **options)


def stream(server, body):
    """Return the events of an answer, each without its number, which are in order."""
    answer = post(server, body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    assert [event.pop("sequence_number") for event in found] == list(range(len(found)))
    return found


def kinds(found):
    return [event["type"].removeprefix("response.") for event in found]


def test_a_reply_has_the_responses_shape(server):
    found = post(server, ASK | {"metadata": {"a": "b"}, "instructions": "Be kind.", "temperature": 0.5}).json()
    assert (found["object"], found["status"], found["error"]) == ("response", "completed", None)
    assert found["id"].startswith("resp_") and found["metadata"] == {"a": "b"}
    [item] = found["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello, world!", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    assert found["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 6,
    }
    [ask] = server.backend.requests
    assert ask.messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert ask.sampling == {"temperature": 0.5}


def test_a_stream_has_the_events_of_the_responses_api(server):
    found = stream(server, ASK)
    assert kinds(found) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 4,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert found[0]["response"]["status"] == "in_progress" and found[0]["response"]["output"] == []
    assert found[2]["item"]["content"] == [] and found[3]["part"]["text"] == ""
    assert "".join(event["delta"] for event in found[4:8]) == "Hello, world!" == found[8]["text"]
    whole = found[-1]["response"]
    assert whole["output"] == [found[-2]["item"]] and whole["usage"]["total_tokens"] == 6
    assert whole["id"] == found[0]["response"]["id"]
    assert get(server, f"/v1/responses/{whole['id']}").json() == whole


def test_max_output_tokens_ends_as_incomplete(server):
    found = post(server, ASK | {"max_output_tokens": 2}).json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"
    events = stream(server, ASK | {"max_output_tokens": 2})
    assert kinds(events)[-1] == "incomplete" and "completed" not in kinds(events)


def test_tool_calls(server):
    server.backend.script = Script(pieces=("Let me see.",), calls=CALLS)
    body = ASK | {"tools": [TOOL]}
    found = post(server, body).json()["output"]
    assert [item["type"] for item in found] == ["message", "function_call", "function_call"]
    assert found[1].pop("id").startswith("fc_")
    call = {"type": "function_call", "status": "completed", "call_id": "call_a", "name": "weather"}
    assert found[1] == call | {"arguments": '{"city": "Oslo"}'}
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
    body = ASK | {"top_logprobs": 1}
    [part] = post(server, body).json()["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["Hello", ", ", "world", "!"]
    assert part["logprobs"][0]["top_logprobs"] == [{"token": "Hello", "logprob": -0.25, "bytes": list(b"Hello")}]
    deltas = [event for event in stream(server, body) if event["type"].endswith("text.delta")]
    assert [len(event["logprobs"]) for event in deltas] == [1] * 4
    included = post(server, ASK | {"include": ["message.output_text.logprobs"]}).json()["output"][0]["content"][0]
    assert included["logprobs"][0]["top_logprobs"] == []
    assert server.backend.requests[-1].sampling == {"logprobs": 0}


def test_items_become_messages(server):
    given = [
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
    body = ASK | {"input": given, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    assert post(server, body).status_code == 200
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"id": f"call_{name}", "type": "function", "function": function} for name in "abc"]
    [ask] = server.backend.requests
    assert ask.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "call_a", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_b", "content": "sun"},
        {"role": "assistant", "content": "", "tool_calls": calls[2:]},
    )
    assert ask.tool_choice == {"type": "function", "function": {"name": "weather"}} and not ask.parallel_tool_calls


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_object", {})),
        ({"type": "json_schema", "name": "x", "schema": {"type": "object"}}, ("json_schema", {"type": "object"})),
    ],
)
def test_text_formats(server, form, grammar):
    assert post(server, ASK | {"text": {"format": form}}).json()["text"]["format"] == form
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
    answer = post(server, ASK | change)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert not server.backend.requests


def test_previous_response_id_continues_a_conversation(server):
    first = post(server, ASK | {"instructions": "Be kind."}).json()
    body = ASK | {"input": "And?", "previous_response_id": first["id"], "instructions": "Be brief."}
    second = post(server, body).json()
    assert second["previous_response_id"] == first["id"]
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, world!"}]
    told = [{"role": "system", "content": "Be brief."}]  # instructions are for one answer alone
    assert list(server.backend.requests[1].messages) == [*told, *said, {"role": "user", "content": "And?"}]
    third = ASK | {"input": "So?", "previous_response_id": second["id"]}
    assert stream(server, third)
    assert [turn["content"] for turn in server.backend.requests[2].messages][-3:] == ["And?", "Hello, world!", "So?"]


def test_tool_results_follow_stored_calls(server):
    server.backend.script = Script(pieces=(), calls=CALLS)
    first = post(server, ASK | {"tools": [TOOL]}).json()
    results = [{"type": "function_call_output", "call_id": f"call_{name}", "output": "rain"} for name in "ab"]
    assert post(server, ASK | {"input": results, "previous_response_id": first["id"]}).status_code == 200
    turns = server.backend.requests[1].messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["call_a", "call_b"]


def test_stored_responses_can_be_read_and_deleted(server):
    whole = post(server, ASK).json()
    path = f"/v1/responses/{whole['id']}"
    assert get(server, path).json() == whole
    cancelled = post(server, {}, f"{path}/cancel")
    assert cancelled.status_code == 400 and "has ended" in cancelled.json()["error"]["message"]
    assert get(server, f"{path}?stream=true").status_code == 400
    deleted = {"id": whole["id"], "object": "response", "deleted": True}
    assert httpx.delete(server.url + path).json() == deleted
    for answer in (get(server, path), httpx.delete(server.url + path), post(server, {}, f"{path}/cancel")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] is None


def test_store_false_stores_nothing(server):
    whole = post(server, ASK | {"store": False}).json()
    assert whole["store"] is False and get(server, f"/v1/responses/{whole['id']}").status_code == 404


def test_input_items(server):
    given = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "id": None}, ASK["input"]]
    given[2] = {"role": "user", "content": given[2], "id": "msg_mine"}
    path = f"/v1/responses/{post(server, ASK | {'input': given}).json()['id']}/input_items"
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
    (mine, one), (theirs, two) = keys.new("anna"), keys.new("ben")
    with running(keys=keys.Keys((one, two))) as server:
        as_one, as_two = ({"headers": {"authorization": f"Bearer {key}"}} for key in (mine, theirs))
        name = post(server, ASK, **as_one).json()["id"]
        path = f"/v1/responses/{name}"
        assert get(server, path, **as_one).status_code == 200
        assert get(server, path, **as_two).status_code == 404
        assert get(server, f"{path}/input_items", **as_two).status_code == 404
        assert httpx.delete(server.url + path, **as_two).status_code == 404
        assert post(server, ASK | {"previous_response_id": name}, **as_two).status_code == 400
        assert get(server, path, **as_one).status_code == 200


def test_the_store_evicts_the_oldest_of_the_same_owner():
    entry = StoredResponse({"text": "x" * 100}, (), ())
    kept = ResponseStore(2, 10 * entry.size())
    for name in "abc":
        kept.put("anna", name, entry)
    kept.put("ben", "a", entry)
    assert kept.get("anna", "b") and kept.get("anna", "c") and kept.get("ben", "a")
    with pytest.raises(NotFound):
        kept.get("anna", "a")
    small = ResponseStore(100, 2 * entry.size())
    small.put("anna", "a", entry)
    small.put("anna", "b", replace(entry, shown={"text": "x" * 150}))
    with pytest.raises(NotFound):
        small.get("anna", "a")
    small.put("anna", "c", replace(entry, shown={"text": "x" * 500}))  # larger than all room
    small.put("anna", "d", entry)
    assert small.get("anna", "d")
    assert small._owners["anna"].size == entry.size()


def test_kept_responses_limits_the_store():
    with running(settings=Settings(kept_responses=1)) as server:
        first, second = (post(server, ASK).json()["id"] for _ in range(2))
        assert get(server, f"/v1/responses/{first}").status_code == 404
        assert get(server, f"/v1/responses/{second}").status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_backend_refusals_become_http_errors(server, streamed):
    server.backend.script = Script(refusal=Overloaded("full"))
    answer = post(server, ASK | {"stream": streamed})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("error", [NumericalError("NaN"), RuntimeError("secret")])
def test_an_error_in_a_stream_fails_the_response(server, error):
    server.backend.script = Script(error=error)
    found = stream(server, ASK)
    assert kinds(found)[-2:] == ["output_text.delta", "failed"]
    failed = found[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
    assert "secret" not in failed["error"]["message"]
    assert failed["output"][0]["status"] == "incomplete" and failed["output"][0]["content"][0]["text"]
    assert get(server, f"/v1/responses/{failed['id']}").status_code == 404
    assert post(server, ASK).status_code == 500


def test_truncation_auto_drops_the_oldest_messages(server):
    server.backend.model_infos = [ModelInfo("scripted", context=12)]
    turns = [{"role": ("user", "assistant")[place % 2], "content": f"{place} x x"} for place in range(5)]
    body = ASK | {"input": [{"role": "system", "content": "brief"}, *turns], "max_output_tokens": 3}
    assert post(server, body).status_code == 200
    assert len(server.backend.requests[0].messages) == 6
    assert post(server, body | {"truncation": "auto"}).status_code == 200
    kept = [turn["content"] for turn in server.backend.requests[1].messages]
    assert kept == ["brief", "4 x x"]
    server.backend.model_infos = [ModelInfo("scripted", context=15)]
    assert post(server, body | {"truncation": "auto"}).status_code == 200
    assert [turn["content"] for turn in server.backend.requests[2].messages] == ["brief", "2 x x", "3 x x", "4 x x"]


def test_streamed_and_whole_replies_are_equal(tales):
    body = {"input": "Tell a story.", "temperature": 0, "max_output_tokens": 30}
    whole = post(tales, body).json()
    found = stream(tales, body)
    joined = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert joined == whole["output"][0]["content"][0]["text"] and len(joined) > 20
    assert whole["status"] == "incomplete" == found[-1]["response"]["status"]
    goes_on = post(tales, body | {"previous_response_id": whole["id"], "input": "And then?"}).json()
    assert goes_on["usage"]["input_tokens"] > whole["usage"]["total_tokens"]
