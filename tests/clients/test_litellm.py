"""litellm, which translates between dialects: OpenAI's and Anthropic's give the same answers."""

from __future__ import annotations

import pytest

from moesaic.backend import ToolCall
from tests.support.backend import Script
from tests.support.client import environment, run

pytestmark = pytest.mark.clients
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="module")
def python():
    return environment("litellm", "litellm==1.106.2", "mcp==2.3.0")  # it asks for mcp where tools are


def test_a_real_model(python, served):
    found = run(python, "litellm_client.py", served, "model", **OFFLINE)
    assert found["text"] and found["texts"] == [found["text"]] * 4
    assert found["usage"] == [24, 24] and found["reasons"] == ["length", "length"]
    assert found["prompts"][0] == found["prompts"][1] and found["completion"]
    assert found["vectors"] == [256, 256]


def test_tools(python, scripted):
    parts = (ToolCall(0, "call_a", "weather", '{"city":'), ToolCall(0, arguments=' "Oslo"}'))
    scripted.backend.script = Script(pieces=(), calls=parts)
    found = run(python, "litellm_client.py", scripted.url, "tools", **OFFLINE)
    assert found == [["tool_calls", "call_a", "weather", {"city": "Oslo"}]] * 4


def test_refusals(python, scripted):
    assert run(python, "litellm_client.py", scripted.url, "refusals", **OFFLINE) == [404, 404]
