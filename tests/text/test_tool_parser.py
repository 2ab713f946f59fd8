"""Tool call parser: calls are found however the text is cut, and forced calls are parsed back."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.builtin import TALES_FOLDER
from moesaic.text import syntax
from moesaic.text.chat import FORMATS
from moesaic.text.compiler import Compiler
from moesaic.text.stream import Detokenizer
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tool_parser import ToolCallParser
from moesaic.text.tools import CallPart, ToolCall, Tools, join_calls
from tests.support.tool_calls import OFFERED, SYNTAXES, Script, parse, script, without_ids

ONE = Tools.from_request([{"type": "function", "function": {"name": "f"}}], "auto", False)
assert ONE is not None
F = ("f", {"a": 1})
W = ("get_weather", {"city": 'Łódź {]"\\'})
IT_S = ("f", {"a": "it's", "b": [True, None]})
W_JSON = json.dumps(W[1], ensure_ascii=False)

# "@W" stands for the arguments of W.
WITH_CALLS: list[tuple[str, str, list[Any]]] = [
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', [F]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": @W}]', [F, W]),
    ("mistral", 'Let me see. [TOOL_CALLS][{"arguments": {"a": 1}, "name": "f"}] done', ["Let me see. ", F, " done"]),
    ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {"a": 1}}', [F]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "{\\"a\\": 1}"}]', [F]),
    ("mistral", '[TOOL_CALLS][{"name": "f"}]', [("f", {})]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, ', [F]),
    ("mistral-11", 'Hm.[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]@W', ["Hm.", F, W]),
    ("mistral-13", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS] @W', [F, W]),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', [F]),
    ("llama", '<|python_tag|>{\n  "type": "function",\n  "name": "f",\n  "parameters": {"a": 1}\n}', [F]),
    ("llama", '{"name": "f", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": @W}', [F, W]),
    ("llama", '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', [F]),
    ("plain", ' \n{"name": "f", "arguments": {"a": 1}}\n{"name": "get_weather", "arguments": @W}\n', [F, W]),
    ("plain", '[{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": @W}]', [F, W]),
    ("plain", 'I shall.\n\n  {"name": "f", "arguments": {"a": 1}}\nDone.', ["I shall.\n\n  ", F, "\nDone."]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"nam', [F, ', {"nam']),
    ("mistral-13", '[TOOL_CALLS]f[ARGS]{"a": [TOOL_CALLS]f[ARGS]{"a": 1}', [("f", '{"a": '), F]),
    ("plain", '{"name": "f", "arguments": {"a": 1}} is what I would call', [F, " is what I would call"]),
    ("plain", "", []),
    # what is no strict JSON
    ("mistral", "[TOOL_CALLS] [{'name': 'f', 'arguments': {'a': 1}}]", [F]),
    ("mistral", """[TOOL_CALLS][{'name': 'f', 'arguments': {'a': "it's", 'b': [True, None]}}]""", [IT_S]),
    ("mistral", """[TOOL_CALLS][{"name": "f", "arguments": {"a": 'it\\'s', "b": [True, None]}}]""", [IT_S]),
    ("mistral-13", "[TOOL_CALLS]f[ARGS]{'a': 1}", [F]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "x\n\ty\x01"}}]', [("f", {"a": "x\n\ty\x01"})]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "{\'a\': 1}"}]', [F]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": ""}]', [("f", {})]),
    # what has begun as a call remains one
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": NaN}}]', [("f", '{"a": NaN}')]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1e999}}]', [("f", {"a": float("inf")})]),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1 2], "b": ""}}, {"name": "f"}]',
        [("f", '{"a": [1 2], "b": ""}'), ("f", {})],
    ),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1', [("f", '{"a": 1')]),
    ("plain", '{"name": "f", "arguments": {"a": 1}', [F]),
    ("plain", '{"name": "f", "arguments": {"a": 1}\nDone.', [F, "Done."]),
    ("plain", '{"name": "f", "arguments": {"a": 1}; {"name": "f", "arguments": {"a": 1}}', [F, F]),
    ("plain", '{"name": "f", "arguments": {"a": 1}, "description": "x"}', [F]),
]

WITHOUT_CALLS = [  # the text must be returned unchanged
    ("mistral", "No tools: [1, {2}] </s>"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": [1]}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "{]"}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "{} {}"}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": null}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arg'),
    ("mistral", '[TOOL_CALLS][{"arguments": {"a": NaN}, "name": "f"}]'),
    ("mistral", '[TOOL_CALLS][{"arguments": {"a": 1}}]'),
    ("mistral", '[TOOL_CALLS][{"name": ["f"]}]'),
    ("mistral-11", "[TOOL_CALLS]f[CALL_ID]abc"),
    ("mistral-11", "[TOOL_CALLS]not a name[ARGS]{}"),
    ("mistral-11", "[ARGS]{}[CALL_ID]"),
    ("mistral-13", "[TOOL_CALLS]f[ARGS]12"),
    ("llama", '<|python_tag|>print({"name": 1})'),
    ("llama", '{"answer": {"name": "f"}}'),
    ("llama", '{"name": "f", "description": "x", "parameters": {}}'),
    ("plain", "  Once {upon} a time"),
    ("plain", "{"),
    ("plain", '[1, 2]\n{"x": 1}'),
]


@pytest.mark.parametrize(
    ("name", "text", "expected"), [*WITH_CALLS, *((name, text, [text]) for name, text in WITHOUT_CALLS)]
)
def test_calls_are_found_however_the_text_is_cut(name: str, text: str, expected: list[Any]) -> None:
    form = SYNTAXES[name]
    parts = script(text.replace("@W", W_JSON), form)
    assert without_ids(parse(form, parts)) == expected
    assert without_ids(parse(form, [(c, special) for t, special in parts for c in ([t] if special else t)])) == expected

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def cut(data: st.DataObject) -> None:
        pieces: Script = []
        for whole, special in parts:
            ends = data.draw(st.sets(st.integers(0, len(whole)))) if not special else set()
            bounds = [0, *sorted(ends), len(whole)]
            pieces += [(whole[a:b], special) for a, b in itertools.pairwise(bounds)]
        assert without_ids(parse(form, pieces)) == expected

    cut()


ATOMS = [
    '{"name": "f", "arguments": {"a": 1}}',
    "{",
    "}",
    "[",
    "]",
    '"',
    "name",
    ":",
    ",",
    "\\",
    "\n",
    " ",
    "f",
    "x",
    "é",
]


@pytest.mark.parametrize("name", SYNTAXES)
def test_any_text_is_parsed_without_loss_or_error(name: str) -> None:
    form = SYNTAXES[name]
    tokens = [(token, True) for token in form.control_tokens]
    atoms = st.sampled_from([*((atom, False) for atom in ATOMS), *tokens, *tokens, ("[TOOL_RESULTS]", True)])

    @settings(max_examples=300, deadline=None)
    @given(st.lists(atoms, max_size=14))
    def check(parts: Script) -> None:
        parsed = parse(form, parts)
        if not any(isinstance(part, ToolCall) for part in parsed):
            assert "".join(part for part in parsed if isinstance(part, str)) == "".join(text for text, _ in parts)
        for part in parsed:
            if isinstance(part, ToolCall):
                assert part.name in ("f", "get_weather")
                assert part.arguments.startswith("{")

    check()


def test_text_that_cannot_start_a_call_is_returned_at_once() -> None:
    parser = ToolCallParser(syntax.PLAIN, OFFERED)
    assert parser.add_text("Once ") == ["Once "]
    assert parser.add_text("upon {") == ["upon {"]
    assert parser.add_text("a}\n  ") == ["a}\n  "]
    assert parser.add_text('{"na') == []
    assert parser.add_text("ture") == ['{"nature']
    parser = ToolCallParser(syntax.LLAMA, OFFERED)
    assert parser.add_text('{"no') == ['{"no']
    parser = ToolCallParser(syntax.MISTRAL, OFFERED)
    assert parser.add_text('{"name": ') == ['{"name": ']


def test_a_call_is_returned_as_it_comes() -> None:
    parser = ToolCallParser(syntax.MISTRAL, OFFERED)
    parser.add_control_token("[TOOL_CALLS]")
    assert parser.add_text('[{"name": "f", "id": "abcABC123", "arguments": ') == []
    assert parser.add_text('{"a": "x') == [CallPart(0, '{"a": "x', "abcABC123", "f")]
    assert parser.add_text("y\\u00") == [CallPart(0, "y")]
    assert parser.add_text("e9") == [CallPart(0, "\\u00e9")]
    assert parser.add_text('"}') == [CallPart(0, '"}')]
    assert parser.add_text(', "x": {"y": 1}}, {"arguments": {}, "name": "') == []
    [second] = parser.add_text('f"')
    assert isinstance(second, CallPart)
    assert (second.index, second.name, second.arguments) == (1, "f", "{}")
    assert not parser.satisfied


def test_without_parallel_calls_one_call_satisfies() -> None:
    parser = ToolCallParser(syntax.PLAIN, ONE)
    assert not parser.satisfied
    assert len(parser.add_text('{"name": "f", "arguments": {}}\n{"name": "f", "argum')) == 1
    assert parser.satisfied
    assert parser.finish() == []
    parser = ToolCallParser(syntax.MISTRAL_13, ONE)
    for token, text in (("[TOOL_CALLS]", "f"), ("[ARGS]", '{"a"'), ("[TOOL_CALLS]", "f"), ("[ARGS]", "{}")):
        parser.add_control_token(token)
        assert not parser.satisfied or token == "[TOOL_CALLS]" or text == "{}"
        parser.add_text(text)
    assert parser.satisfied


def test_call_ids_follow_the_format_and_valid_ids_are_kept() -> None:
    written = ("abcABC123", "abcABC123", "call_1", None)
    text = json.dumps([{"name": "f", "id": call_id} for call_id in written])
    calls = parse(syntax.MISTRAL, [("[TOOL_CALLS]", True), (text, False)])
    ids = [call.id for call in calls if isinstance(call, ToolCall)]
    assert ids[0] == "abcABC123"
    assert len(set(ids)) == 4
    assert all(call_id.isalnum() and len(call_id) == 9 for call_id in ids)
    [other] = parse(syntax.LLAMA, [('{"name": "f", "parameters": {}}', False)])
    assert isinstance(other, ToolCall)
    assert other.id.startswith("call_")


def test_parsing_time_is_linear_in_the_length() -> None:
    """Parse 250,000 characters; with quadratic cost this would take minutes."""
    long = '{"name": "f", "arguments": {"a": "' + "x" * 250_000 + '"}}'
    [call] = parse(syntax.PLAIN, [(long, False)])
    assert isinstance(call, ToolCall)
    parse(syntax.PLAIN, [("{" + " " * 250_000, False)])


SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "$defs": {"city": {"type": "string", "maxLength": 10}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("name", ["plain", "mistral-v3", "llama3.1", "mistral-v11", "mistral-v13"])
def test_forced_calls_are_parsed_back(name: str) -> None:
    """Generate answers by a random walk through the grammar, and parse them."""
    builtin = Tokenizer.open(TALES_FOLDER)
    form = FORMATS[name]
    control = {**builtin.control, **{token: 4 + index for index, token in enumerate(form.syntax.control_tokens)}}
    tokenizer: Any = Renamed(builtin, control)
    tools = Tools.from_request([WEATHER, CLOCK], "required")
    assert tools is not None
    compiled = Compiler(tokenizer, tokenizer.vocab_size).compile(form.forced_call_grammar(tokenizer, tools))
    names = {token_id: name for name, token_id in control.items()}
    for seed in range(6):
        draw, matcher, parser = random.Random(seed), compiled(), form.tool_call_parser(tokenizer, tools)
        detokenizer, parts = Detokenizer(tokenizer), list[str | CallPart]()
        while not matcher.done and not (matcher.may_end and draw.random() < 0.5):
            bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
            token_id = int(draw.choice(np.nonzero(bits)[0].tolist()))
            matcher.accept(token_id)
            if names.get(token_id) in parser.control_tokens:
                parts += parser.add_control_token(names[token_id])
            else:
                parts += parser.add_text(detokenizer.add(token_id))
        parts += parser.finish()
        calls = join_calls(part for part in parts if isinstance(part, CallPart))
        assert calls
        assert not "".join(part for part in parts if isinstance(part, str)).strip()
        for call in calls:
            schema = {"get_weather": SCHEMA, "clock": {"maxProperties": 0}}[call.name]
            jsonschema.validate(json.loads(call.arguments), schema)


class Renamed:
    """Tokenizer in which some ids are control tokens with given names."""

    def __init__(self, tokenizer: Tokenizer, control: dict[str, int]) -> None:
        self._tokenizer, self.control = tokenizer, control

    def is_special(self, token_id: int) -> bool:
        return token_id in self.control.values() or self._tokenizer.is_special(token_id)

    def bytes(self, token_id: int, first: bool = False) -> bytes:
        name = next((name for name, other in self.control.items() if other == token_id), None)
        return name.encode() if name is not None else self._tokenizer.bytes(token_id, first)

    def piece(self, token_id: int) -> str:
        return self.bytes(token_id).decode("utf-8", "replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
