"""instructor: pydantic models out of answers, by schema, by JSON and by a tool."""

from __future__ import annotations

import pytest

from moesaic.backend import ToolCall
from tests.support.backend import Script
from tests.support.client import environment, run

pytestmark = pytest.mark.clients
OSLO = {"name": "Oslo", "people": 700000}


@pytest.fixture(scope="module")
def python():
    return environment("instructor", "instructor==1.17.0", "openai==3.3.0")


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON", "TOOLS"])
def test_modes(python, scripted, mode):
    text, call = (
        '{"name": "Oslo", "people": 700000}',
        ToolCall(0, "call_a", "City", '{"name": "Oslo", "people": 700000}'),
    )
    scripted.backend.script = Script(pieces=(), calls=(call,)) if mode == "TOOLS" else Script(pieces=(text,))
    assert run(python, "instructor_client.py", scripted.url, mode, "scripted") == OSLO
    [ask] = scripted.backend.requests
    if mode == "TOOLS":
        assert ask.tool_choice == {"type": "function", "function": {"name": "City"}}
    else:
        assert ask.grammar[0] == ("json_schema" if mode == "JSON_SCHEMA" else "json_object")


def test_a_real_model(python, served):
    assert set(run(python, "instructor_client.py", served, "JSON_SCHEMA", "tales")) == {"name", "people"}
