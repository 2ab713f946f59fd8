"""Tool calls in answers that max_tokens cuts, in each API, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from moesaic.backend import Delta, ToolCall
from moesaic.serve.dialects._arguments import parse_partial
from moesaic.serve.dialects._response import OutputItems
from moesaic.serve.dialects.anthropic import ContentBlocks
from tests.support.tool_answers import APIS, CUT, STREAMED, ToolAnswer, ask, read

LIMITS = (1, 4, 9, 13, 17, 20, 26, 33, 40, 55)


@pytest.fixture
def client(tales) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tales.url) as client:
        yield client


def as_anthropic(answer: ToolAnswer) -> list[list[str]]:
    """Return the calls of an answer as a whole answer of Anthropic's API has them: with complete members only."""
    calls = [(name, parse_partial(arguments)) for name, arguments in answer.calls]
    return [[name, json.dumps(value, ensure_ascii=False)] for name, value in calls]


@pytest.mark.parametrize("api", APIS)
def test_a_cut_answer_says_so_and_has_no_text(client, api):
    longest = ask(client, "chat", max(LIMITS)).calls
    shown = set()
    for limit in LIMITS:
        whole, streamed = ask(client, api, limit), ask(client, api, limit, stream=True)
        for answer in (whole, streamed):
            assert answer.reason in CUT
            assert answer.text == ""
        assert whole.calls == (as_anthropic(streamed) if api == "anthropic" else streamed.calls)
        assert [name for name, _ in streamed.calls] == [name for name, _ in longest][: len(streamed.calls)]
        for (_, arguments), (_, other) in zip(streamed.calls, longest, strict=False):
            assert other.startswith(arguments)
        shown.add(tuple(arguments for _, arguments in streamed.calls))
    assert () in shown and len(shown) > len(LIMITS) // 2


@pytest.mark.parametrize("api", APIS)
def test_arguments_are_streamed_in_parts(client, api):
    answer = ask(client, api, 300, stream=True)
    assert answer.parts > 2 * len(answer.calls)


@pytest.mark.parametrize("api", APIS)
def test_a_call_that_is_whole_is_no_cut_answer(client, api):
    only_one = {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    more = only_one if api == "anthropic" else {"parallel_tool_calls": False}
    for stream in (False, True):
        answer = ask(client, api, 300, stream=stream, **more)
        assert answer.reason in ("tool_calls", "completed", "tool_use")
        [(name, arguments)] = answer.calls
        assert (name, json.loads(arguments)["a"]) == ("f", 1)


@pytest.mark.parametrize(
    ("api", "stop", "reason"),
    [("chat", {"stop": '"b"'}, "stop"), ("anthropic", {"stop_sequences": ['"b"']}, "stop_sequence")],
)
def test_a_stop_string_within_a_call_is_no_call(client, api, stop, reason):
    for stream in (False, True):
        answer = ask(client, api, 300, stream=stream, **stop)
        assert (answer.reason, answer.text) == (reason, "")
        assert [name for name, _ in answer.calls] == ["f"]


def test_text_in_the_event_that_ends_a_call_comes_behind_the_call():
    deltas = [
        Delta(0, calls=(ToolCall(0, "call_a", "f", '{"a":'),)),
        Delta(0, "Done.", calls=(ToolCall(0, arguments=" 1}"), ToolCall(1, "call_b", "f", "{}"))),
    ]
    blocks, items = ContentBlocks(), OutputItems(None)
    events = [event for delta in deltas for event in blocks.add(delta)]
    assert STREAMED["anthropic"](read(b"".join(events).decode())).calls == [["f", '{"a": 1}'], ["f", "{}"]]
    assert [block["type"] for block in blocks.whole()] == ["tool_use", "text", "tool_use"]
    kinds = [kind for delta in deltas for kind, _ in items.add(delta)]
    assert kinds.index("function_call_arguments.done") < kinds.index("output_text.delta")
    assert [item["type"] for item in items.items] == ["function_call", "message", "function_call"]


@pytest.mark.parametrize(
    ("written", "members"),
    [
        ("", {}),
        ('{"a": 1, "b": "x', {"a": 1}),
        ('{"a": 1, "b": [1, {"c": "}", "d": 2', {"a": 1, "b": [1, {"c": "}", "d": 2}]}),
        ('{"a": [1, tr', {"a": [1]}),
        ('{"a": {"b": "\\"', {"a": {}}),
        ('{"a": 12', {"a": 12}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": NaN, "b": 1}', {}),
        ("[1]", {}),
    ],
)
def test_complete_members_of_cut_arguments(written, members):
    assert parse_partial(written) == members
