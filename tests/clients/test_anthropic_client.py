"""The anthropic package: messages whole and streamed, tools, parsed answers, counting and typed errors."""

from __future__ import annotations

import pytest

from moesaic.backend import ToolCall
from moesaic.errors import NumericalError, Overloaded
from tests.support.backend import Script
from tests.support.client import environment, run

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def python():
    return environment("anthropic", "anthropic==2.12.0")


def test_messages(python, served):
    found = run(python, "anthropic_model.py", served)
    assert found["text"] and found["alike"] and found["reason"] == "max_tokens"
    assert found["usage"] == [24, 24] and found["counted"] == found["read"]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert found["kinds"] == ["message_start", *block, "message_delta", "message_stop"]  # it swallows the ping
    assert found["goes_on"] and found["stopped"] == ["stop_sequence", "the", False]
    assert found["models"] == ["tales"] and found["created"] >= 2026
    assert found["model"] == ["NotFoundError", 404, "not_found_error"]
    assert found["value"] == found["image"] == ["BadRequestError", 400, "invalid_request_error"]


def test_tools(python, scripted):
    parts = (
        ToolCall(0, "call_a", "weather", '{"city":'),
        ToolCall(0, arguments=' "Oslo"}'),
        ToolCall(1, "call_b", "weather", "{}"),
    )
    scripted.backend.script = Script(pieces=("Let me see.",), calls=parts)
    found = run(python, "anthropic_scripted.py", scripted.url, "tools")
    assert (found["reason"], found["alike"]) == ("tool_use", True)
    assert found["calls"] == [["call_a", "weather", {"city": "Oslo"}], ["call_b", "weather", {}]]
    first, _, last = scripted.backend.requests
    assert first.tool_choice == "required"
    assert [turn["role"] for turn in last.messages] == ["user", "assistant", "tool", "tool"]


def test_parsed_answers(python, scripted):
    scripted.backend.script = Script(pieces=('{"name": ', '"Oslo", ', '"people": 700000}'))
    assert run(python, "anthropic_scripted.py", scripted.url, "parse") == {"name": "Oslo", "people": 700000}
    kind, schema = scripted.backend.requests[0].grammar
    assert kind == "json_schema" and set(schema["properties"]) == {"name", "people"}


def test_a_full_server_is_asked_again(python, scripted):
    scripted.backend.script = Script(refusal=Overloaded("full"))
    assert run(python, "anthropic_scripted.py", scripted.url, "busy") == 429
    assert len(scripted.backend.requests) == 3


def test_a_stream_that_breaks(python, scripted):
    scripted.backend.script = Script(error=NumericalError("the model computed NaN"))
    assert run(python, "anthropic_scripted.py", scripted.url, "broken") == ["Hello", ", ", "world", "!", "api_error"]
