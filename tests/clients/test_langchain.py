"""langchain-openai: chat, streams, batches, responses, embeddings, tools and structured output."""

from __future__ import annotations

import pytest

from moesaic.backend import ToolCall
from tests.support.backend import Script
from tests.support.client import environment, run

pytestmark = pytest.mark.clients
OSLO = {"name": "Oslo", "people": 700000}


@pytest.fixture(scope="module")
def python():
    return environment("langchain", "langchain-openai==1.7.3")


def test_a_real_model(python, served):
    found = run(python, "langchain_client.py", served, "model", "tales")
    assert found["text"] and found["alike"] and found["response"] and found["response_stream"]
    assert (found["tokens"], found["streamed_tokens"], found["reason"]) == (24, 24, "length")
    assert found["vectors"] == [256, 256]


def test_tools(python, scripted):
    scripted.backend.script = Script(
        pieces=(), calls=(ToolCall(0, "call_a", "weather", '{"city":'), ToolCall(0, arguments=' "Oslo"}'))
    )
    found = run(python, "langchain_client.py", scripted.url, "tools", "scripted")
    assert found == {name: {"calls": [["call_a", "weather", {"city": "Oslo"}]], "alike": True} for name in found}
    for ask in (scripted.backend.requests[2], scripted.backend.requests[5]):
        assert [turn["role"] for turn in ask.messages] == ["user", "assistant", "tool"]
        assert ask.messages[2]["content"] == "rain in Oslo"


def test_structured_output(python, scripted):
    scripted.backend.script = Script(pieces=('{"name": ', '"Oslo", ', '"people": 700000}'))
    assert run(python, "langchain_client.py", scripted.url, "parse", "scripted") == OSLO
    assert scripted.backend.requests[0].grammar[0] == "json_schema"
    scripted.backend.script = Script(
        pieces=(), calls=(ToolCall(0, "call_a", "City", '{"name": "Oslo", "people": 700000}'),)
    )
    assert run(python, "langchain_client.py", scripted.url, "function", "scripted") == OSLO


def test_structured_output_of_a_real_model(python, served):
    assert set(run(python, "langchain_client.py", served, "parse", "tales")) == {"name", "people"}
