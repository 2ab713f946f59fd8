"""Tool calls in answers that are cut: what a call is cut to is a call, and never text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.text import syntax
from moesaic.text.tool_parser import ToolCallParser
from moesaic.text.tools import CallPart, ToolCall, Tools, join_calls
from tests.support.tool_calls import OFFERED, SYNTAXES, Script, parse, script, without_ids

REQUIRED = Tools.from_request(
    [{"type": "function", "function": {"name": name}} for name in ("f", "get_weather")], "required"
)
assert REQUIRED is not None

ANSWERS = [  # calls, and the text before them
    ("plain", '{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}\n{"name": "get_weather", "arguments": {}}', ""),
    ("plain", "I shall.\n\n{'name': 'f', 'arguments': {'a': True}}", "I shall.\n\n"),
    ("plain", '[{"arguments": {"a": 1}, "name": "f"}, {"name": "get_weather", "arguments": {"b": 2}}]', ""),
    ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": -1.5e3}}', ""),
    ("llama", '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', ""),
    (
        "mistral",
        'Hm. [TOOL_CALLS] [{"name": "f", "arguments": {"a": "é\\u00e9"}, "id": "abcABC123"}, {"name": "f"}]',
        "Hm. ",
    ),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "{\\"a\\": 1}"}]', ""),
    ("mistral-11", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": null}[TOOL_CALLS]get_weather[ARGS]{}', ""),
    ("mistral-13", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS] {"b": "c"}', ""),
]


def prefixes(text: str, name: str) -> list[Script]:
    """Return an answer cut at each position; a control token is one position."""
    items = [
        (char, special) for part, special in script(text, SYNTAXES[name]) for char in ([part] if special else part)
    ]
    return [items[:end] for end in range(len(items) + 1)]


def is_prefix(cut: list[ToolCall], whole: list[ToolCall]) -> bool:
    """Return whether the calls are those of the whole answer, the last one with a beginning of its arguments."""
    pairs = list(zip(cut, whole, strict=False))
    return (
        len(cut) <= len(whole)
        and all(one.name == other.name and other.arguments.startswith(one.arguments) for one, other in pairs)
        and all(one.arguments == other.arguments for one, other in pairs[:-1])
    )


@pytest.mark.parametrize(("name", "text", "before"), ANSWERS)
@pytest.mark.parametrize("offered", [OFFERED, REQUIRED], ids=["auto", "required"])
def test_a_cut_call_is_no_text_at_any_position(name: str, text: str, before: str, offered: Tools) -> None:
    whole = [part for part in parse(SYNTAXES[name], script(text, SYNTAXES[name])) if isinstance(part, ToolCall)]
    shown = set()
    for parts in prefixes(text, name):
        parsed = parse(SYNTAXES[name], parts, offered, cut=True)
        calls = [part for part in parsed if isinstance(part, ToolCall)]
        assert before.startswith("".join(part for part in parsed if isinstance(part, str)))
        assert is_prefix(calls, whole)
        shown.add(tuple(call.arguments for call in calls))
    assert len(shown) > 3 or '"{' in text, "the arguments do not come in parts"


@pytest.mark.parametrize(("name", "text", "before"), ANSWERS)
def test_a_required_call_is_no_text_however_the_answer_ends(name: str, text: str, before: str) -> None:
    for parts in prefixes(text.removeprefix(before), name):
        assert not [part for part in parse(SYNTAXES[name], parts, REQUIRED) if isinstance(part, str)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("plain", '{"na', []),
        ("plain", "[", []),
        ("plain", '{"name": "get_w', []),
        ("plain", '{"name": "f"', [("f", "")]),
        ("plain", '{"arguments": {"a": 1}, "na', []),
        ("plain", " \n", [" \n"]),
        ("plain", '{"name": "Anna"', ['{"name": "Anna"']),
        ("mistral", "[TOOL_CALLS]", []),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"nam', [("f", {"a": 1})]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": Fal', [("f", '{"a": fal')]),
        ("mistral-11", "[TOOL_CALLS]get", []),
        ("mistral-11", "[TOOL_CALLS]f[CALL_ID]abc", [("f", "")]),
        ("mistral-11", "[TOOL_CALLS]fly[CALL_ID]abc", []),
        ("mistral-13", "[TOOL_CALLS]f[ARGS]", [("f", "")]),
        ("mistral-13", "[TOOL_CALLS]f[ARGS]{", [("f", "{")]),
    ],
)
def test_what_is_left_of_a_cut_call(name: str, text: str, expected: list[Any]) -> None:
    assert without_ids(parse(SYNTAXES[name], script(text, SYNTAXES[name]), cut=True)) == expected


values = st.dictionaries(
    st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3
)
WRAPPERS = {
    "plain": ('{"name": "f", "arguments": ', "}"),
    "llama": ('<|python_tag|>{"name": "f", "parameters": ', "}"),
    "mistral": ('[TOOL_CALLS][{"name": "f", "arguments": ', "}]"),
    "mistral-13": ("[TOOL_CALLS]f[ARGS]", ""),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_arguments_come_in_parts_that_join_to_them(name: str) -> None:
    form, (head, tail) = SYNTAXES[name], WRAPPERS[name]

    @settings(max_examples=60, deadline=None)
    @given(values, st.booleans(), st.data())
    def check(value: dict[str, Any], python: bool, data: st.DataObject) -> None:
        written = repr(value) if python else json.dumps(value, ensure_ascii=False)
        parts = script(head, form) + [(char, False) for char in written + tail]
        [whole] = parse(form, [*script(head, form), (written + tail, False)])
        assert isinstance(whole, ToolCall)
        assert json.loads(whole.arguments) == value
        assert python or whole.arguments == written
        assert without_ids(parse(form, parts)) == [("f", value)]
        cut = parse(form, parts[: data.draw(st.integers(0, len(parts)))], cut=True)
        assert is_prefix([part for part in cut if isinstance(part, ToolCall)], [whole])
        assert not [part for part in cut if isinstance(part, str)]

    check()


def test_a_stream_and_the_answer_have_the_same_parts() -> None:
    parser = ToolCallParser(syntax.PLAIN, OFFERED)
    stream = [part for char in '{"name": "f", "arguments": {"a": 12' for part in parser.add_text(char)]
    stream += parser.finish(cut=True)
    assert [part.arguments for part in stream if isinstance(part, CallPart)] == [*'{"a":', " ", "12"]
    [call] = join_calls(part for part in stream if isinstance(part, CallPart))
    assert (call.name, call.arguments, call.whole) == ("f", '{"a": 12', False)
