"""Tests of grammars and tool calls over HTTP, with the model tales."""

from __future__ import annotations

import json

import httpx
import jsonschema
import pytest

from tests.support.server import Server

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "🦊", "hen"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Look at an animal.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait"}},
]
BODY = {"messages": [{"role": "user", "content": "What is there?"}], "max_tokens": 300, "seed": 3}


def ask(tales: Server, **body):
    return httpx.post(tales.url + "/v1/chat/completions", json=BODY | body, timeout=120)


@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json", "value": SCHEMA}},
        {"guided_json": SCHEMA},
    ],
)
def test_a_json_schema_constrains_the_reply(tales, constraint):
    [choice] = ask(tales, **constraint).json()["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_guided_choice(tales):
    [choice] = ask(tales, guided_choice=["yes", "no"]).json()["choices"]
    assert choice["message"]["content"] in ("yes", "no")


def test_an_invalid_schema_is_400(tales):
    response = ask(tales, guided_json={"properties": {"a": {"type": "strin"}}})
    assert response.status_code == 400
    assert "#/properties/a: Invalid type: strin" in response.json()["error"]["message"]


def test_a_required_tool_call(tales):
    [choice] = ask(tales, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    assert call["type"] == "function" and call["id"]
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, SCHEMA if call["function"]["name"] == "look" else {"maxProperties": 0})


def test_a_streamed_tool_call_and_its_result(tales):
    named = {"type": "function", "function": {"name": "look"}}
    response = ask(tales, tools=TOOLS, tool_choice=named, stream=True)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert {call["index"] for call in calls} == {0}
    arguments = "".join(call["function"].get("arguments", "") for call in calls)
    jsonschema.validate(json.loads(arguments), SCHEMA)
    assert not "".join(choice["delta"].get("content") or "" for choice in choices).strip()
    assert choices[-1]["finish_reason"] == "tool_calls"
    function = {"name": "look", "arguments": arguments}
    conversation = [
        *BODY["messages"],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": calls[0]["id"], "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "It runs."},
    ]
    assert ask(tales, messages=conversation, tools=TOOLS, max_tokens=5).status_code == 200
    refused = ask(tales, messages=conversation[:2])
    assert refused.status_code == 400
    assert "tool results are missing" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_invalid_tools_are_refused(tales, body, param):
    response = ask(tales, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
