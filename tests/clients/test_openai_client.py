"""The openai package: chat, completions, embeddings, responses, tools, parsed answers and typed errors."""

from __future__ import annotations

import json

import pytest

from moesaic.backend import ToolCall
from moesaic.errors import NumericalError, Overloaded
from tests.support.backend import Script
from tests.support.client import environment, run

pytestmark = pytest.mark.clients
CALLS = (
    ToolCall(0, "call_a", "weather", '{"city":'),
    ToolCall(0, arguments=' "Oslo"}'),
    ToolCall(1, "call_b", "weather", '{"city": "Rome"}'),
)
CALLED = [["call_a", "weather", '{"city": "Oslo"}'], ["call_b", "weather", '{"city": "Rome"}']]
CITY = ('{"name": ', '"Oslo", ', '"people": 700000}')


@pytest.fixture(scope="module")
def python():
    return environment("openai", "openai==3.54.0")


@pytest.fixture(scope="module")
def seen(python, served):
    return run(python, "openai_model.py", served)


def test_chat(seen):
    found = seen["chat"]
    assert found["text"] and found["alike"]
    assert (found["reason"], found["tokens"], found["streamed_tokens"]) == ("length", 24, 24)
    assert found["several"] == [0, 1, 2] and found["different"] > 1
    assert found["logprobs"] == [3] * 4


def test_completions(seen):
    found = seen["complete"]
    assert found["text"].startswith("Once upon a") and found["first"] is None
    assert set(found["tops"]) <= {2, 3} and found["alike"] and found["several"] == 2


def test_models_and_embeddings(seen):
    assert seen["models"] == ["tales"] and seen["model"] == "tales"
    assert seen["embed"] == {"same": True, "count": 2}


def test_responses(seen):
    found = seen["respond"]
    assert found["text"] == seen["chat"]["text"]
    assert (found["status"], found["reason"]) == ("incomplete", "max_output_tokens")
    steps = "created in_progress output_item.added content_part.added output_text.delta output_text.done"
    expected = [*steps.split(), "content_part.done", "output_item.done", "incomplete"]
    assert [kind.removeprefix("response.") for kind in found["kinds"]] == expected
    assert found["numbered"] and found["longer"] and found["same"]
    assert found["items"] == ["And then?"]
    assert found["gone"] == ["NotFoundError", 404, None, None]
    assert found["cancel"][:2] == ["BadRequestError", 400]
    assert found["background"][:3] == ["BadRequestError", 400, "background"]


def test_refusals(seen):
    assert seen["refusals"] == {
        "model": ["NotFoundError", 404, None, "model_not_found"],
        "value": ["BadRequestError", 400, "temperature", None],
        "role": ["BadRequestError", 400, None, None],
        "long": ["BadRequestError", 400, None, "context_length_exceeded"],
    }


def test_tools(python, scripted):
    scripted.backend.script = Script(pieces=("Let me see.",), calls=CALLS)
    found = run(python, "openai_scripted.py", scripted.url, "chat-tools")
    assert (found["reason"], found["calls"], found["alike"]) == ("tool_calls", CALLED, True)
    assert "tool_calls.function.arguments.delta" in found["kinds"]
    found = run(python, "openai_scripted.py", scripted.url, "response-tools")
    assert (found["calls"], found["alike"], found["status"]) == (CALLED, True, "completed")
    assert "response.function_call_arguments.done" in found["kinds"]
    assert [turn["role"] for turn in scripted.backend.requests[-1].messages] == ["user", "assistant", "tool", "tool"]


def test_parsed_answers(python, scripted):
    scripted.backend.script = Script(pieces=CITY)
    found = run(python, "openai_scripted.py", scripted.url, "parse")
    assert found["chat"] == found["response"] == {"name": "Oslo", "people": 700000}
    for ask in scripted.backend.requests:
        kind, schema = ask.grammar
        assert kind == "json_schema" and set(schema["properties"]) == {"name", "people"}


def test_parsed_answers_of_a_real_model(python, served):
    found = run(python, "openai_scripted.py", served, "parse", "tales")
    assert set(found["chat"]) == set(found["response"]) == {"name", "people"}


def test_a_real_model_calls_a_tool_if_it_must(python, served):
    found = run(python, "openai_scripted.py", served, "forced", "tales")
    assert found["chat"][0] == found["response"][0] == "weather"
    for _, arguments in found.values():
        assert set(json.loads(arguments)) == {"city"}


def test_a_full_server_is_asked_again(python, scripted):
    scripted.backend.script = Script(refusal=Overloaded("full"))
    found = run(python, "openai_scripted.py", scripted.url, "busy")
    assert found["status"] == 429 and "full" in found["message"]
    assert len(scripted.backend.requests) == 3


def test_a_stream_that_breaks(python, scripted):
    scripted.backend.script = Script(error=NumericalError("the model computed NaN"))
    found = run(python, "openai_scripted.py", scripted.url, "broken")
    assert found["chat"] == ["", "Hello", ", ", "world", "!", "APIError"]
    assert found["response"][-1] == "response.failed" and "response.completed" not in found["response"]
