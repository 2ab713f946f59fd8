"""Calls in a stream of text, however it is cut, and the grammars that force them."""

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

from moesaic.llm import BUILT_IN
from moesaic.text import syntax
from moesaic.text.calls import Calls, Part
from moesaic.text.chat import FORMATS
from moesaic.text.compiler import Compiler
from moesaic.text.stream import Detokenizer
from moesaic.text.syntax import Syntax
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Call, Tools

OFFERED = Tools.of([{"type": "function", "function": {"name": name}} for name in ("f", "get_weather")])
assert OFFERED is not None
ONE = Tools.of([{"type": "function", "function": {"name": "f"}}], "auto", False)
assert ONE is not None
SYNTAXES = {
    "plain": syntax.PLAIN,
    "llama": syntax.LLAMA,
    "mistral": syntax.MISTRAL,
    "mistral-11": syntax.MISTRAL_11,
    "mistral-13": syntax.MISTRAL_13,
}
Script = list[tuple[str, bool]]  # text, and whether it is a control token


def script(text: str, form: Syntax) -> Script:
    """Split a text at the names of the syntax's marks."""
    parts: Script = [(text, False)]
    for mark in form.marks:
        split: Script = []
        for part, special in parts:
            pieces = [part] if special else part.split(mark)
            for place, piece in enumerate(pieces):
                split += [(mark, True)] if place else []
                split.append((piece, special))
        parts = split
    return [part for part in parts if part[0]]


def read(form: Syntax, parts: Script, offered: Tools = OFFERED) -> list[Part]:
    """Return what comes out, neighbouring texts joined."""
    calls, out = Calls(form, offered), list[Part]()
    pieces = [calls.mark(text) if special else calls.add(text) for text, special in parts]
    for part in (part for piece in [*pieces, calls.finish()] for part in piece):
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return out


def plain(parts: list[Part]) -> list[Any]:
    """Return parts without ids that were made up."""
    return [part if isinstance(part, str) else (part.name, json.loads(part.arguments)) for part in parts]


F = ("f", {"a": 1})
W = ("get_weather", {"city": 'Łódź {]"\\'})
W_JSON = json.dumps(W[1], ensure_ascii=False)

# "@W" stands for the arguments of W.
FOUND: list[tuple[str, str, list[Any]]] = [
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
    ("mistral-13", '[TOOL_CALLS]f[ARGS]{"a": [TOOL_CALLS]f[ARGS]{"a": 1}', ['[TOOL_CALLS]f[ARGS]{"a": ', F]),
    ("plain", '{"name": "f", "arguments": {"a": 1}} is what I would call', [F, " is what I would call"]),
    ("plain", "", []),
]

STAYS = [  # text, to the letter
    ("mistral", "No tools: [1, {2}] </s>"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": [1]}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": NaN}}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1e999}}]'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1'),
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
    ("plain", '{"name": "f", "arguments": {"a": 1}'),
]


@pytest.mark.parametrize(("name", "text", "expected"), [*FOUND, *((name, text, [text]) for name, text in STAYS)])
def test_found_however_the_text_is_cut(name: str, text: str, expected: list[Any]) -> None:
    form = SYNTAXES[name]
    parts = script(text.replace("@W", W_JSON), form)
    assert plain(read(form, parts)) == expected
    assert plain(read(form, [(c, special) for t, special in parts for c in ([t] if special else t)])) == expected

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def cut(data: st.DataObject) -> None:
        pieces: Script = []
        for whole, special in parts:
            ends = data.draw(st.sets(st.integers(0, len(whole)))) if not special else set()
            bounds = [0, *sorted(ends), len(whole)]
            pieces += [(whole[a:b], special) for a, b in itertools.pairwise(bounds)]
        assert plain(read(form, pieces)) == expected

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
def test_nothing_is_lost_and_nothing_raises(name: str) -> None:
    form = SYNTAXES[name]
    marks = [(mark, True) for mark in form.marks]
    atoms = st.sampled_from([*((atom, False) for atom in ATOMS), *marks, *marks, ("[TOOL_RESULTS]", True)])

    @settings(max_examples=300, deadline=None)
    @given(st.lists(atoms, max_size=14))
    def check(parts: Script) -> None:
        found = read(form, parts)
        if not any(isinstance(part, Call) for part in found):
            assert "".join(part for part in found if isinstance(part, str)) == "".join(text for text, _ in parts)
        for part in found:
            if isinstance(part, Call):
                assert part.name in ("f", "get_weather")
                assert isinstance(json.loads(part.arguments), dict)

    check()


def test_text_that_cannot_be_a_call_goes_out_at_once() -> None:
    calls = Calls(syntax.PLAIN, OFFERED)
    assert calls.add("Once ") == ["Once "]
    assert calls.add("upon {") == ["upon {"]
    assert calls.add("a}\n  ") == ["a}\n  "]
    assert calls.add('{"na') == []
    assert calls.add("ture") == ['{"nature']
    calls = Calls(syntax.LLAMA, OFFERED)
    assert calls.add('{"no') == ['{"no']
    calls = Calls(syntax.MISTRAL, OFFERED)
    assert calls.add('{"name": ') == ['{"name": ']


def test_each_call_comes_as_soon_as_it_is_whole() -> None:
    calls = Calls(syntax.MISTRAL, OFFERED)
    calls.mark("[TOOL_CALLS]")
    assert calls.add('[{"name": "f", "arguments": {}') == []
    [first] = calls.add("}, ")
    assert isinstance(first, Call)
    assert not calls.satisfied


def test_one_call_may_be_all_that_is_wanted() -> None:
    calls = Calls(syntax.PLAIN, ONE)
    assert not calls.satisfied
    calls.add('{"name": "f", "arguments": {}}')
    assert calls.satisfied


def test_ids_are_of_the_formats_style_and_the_models_own_where_they_are() -> None:
    given = ("abcABC123", "abcABC123", "call_1", None)
    text = json.dumps([{"name": "f", "id": id} for id in given])
    calls = read(syntax.MISTRAL, [("[TOOL_CALLS]", True), (text, False)])
    ids = [call.id for call in calls if isinstance(call, Call)]
    assert ids[0] == "abcABC123"
    assert len(set(ids)) == 4
    assert all(id.isalnum() and len(id) == 9 for id in ids)
    [other] = read(syntax.LLAMA, [('{"name": "f", "parameters": {}}', False)])
    assert isinstance(other, Call)
    assert other.id.startswith("call_")


def test_a_long_value_takes_time_in_proportion() -> None:
    """A quarter of a million letters; with a copy for each this would be minutes."""
    long = '{"name": "f", "arguments": {"a": "' + "x" * 250_000 + '"}}'
    [call] = read(syntax.PLAIN, [(long, False)])
    assert isinstance(call, Call)
    read(syntax.PLAIN, [("{" + " " * 250_000, False)])


SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "$defs": {"city": {"type": "string", "maxLength": 10}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("name", ["plain", "mistral-v3", "llama3.1", "mistral-v11", "mistral-v13"])
def test_forced_calls_are_found_again(name: str) -> None:
    """Without a model: a random walk through the grammar, read back by the parser."""
    builtin = Tokenizer.open(BUILT_IN)
    form = FORMATS[name]
    control = {**builtin.control, **{mark: 4 + place for place, mark in enumerate(form.syntax.marks)}}
    tokenizer: Any = Renamed(builtin, control)
    tools = Tools.of([WEATHER, CLOCK], "required")
    assert tools is not None
    compiled = Compiler(tokenizer, tokenizer.vocab_size).compile(form.forced(tokenizer, tools))
    names = {id: mark for mark, id in control.items()}
    for seed in range(6):
        draw, matcher, calls, parts = random.Random(seed), compiled(), form.calls(tokenizer, tools), list[Part]()
        text = Detokenizer(tokenizer)
        while not matcher.done and not (matcher.may_end and draw.random() < 0.5):
            bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
            id = int(draw.choice(np.nonzero(bits)[0].tolist()))
            matcher.accept(id)
            parts += calls.mark(names[id]) if names.get(id) in calls.marks else calls.add(text.add(id))
        parts += calls.finish()
        assert parts
        for call in parts:
            assert isinstance(call, Call)
            jsonschema.validate(
                json.loads(call.arguments), {"get_weather": SCHEMA, "clock": {"maxProperties": 0}}[call.name]
            )


class Renamed:
    """A tokenizer some of whose ids are control tokens of other names."""

    def __init__(self, tokenizer: Tokenizer, control: dict[str, int]) -> None:
        self._tokenizer, self.control = tokenizer, control

    def is_special(self, id: int) -> bool:
        return id in self.control.values() or self._tokenizer.is_special(id)

    def bytes(self, id: int, first: bool = False) -> bytes:
        name = next((name for name, other in self.control.items() if other == id), None)
        return name.encode() if name is not None else self._tokenizer.bytes(id, first)

    def piece(self, id: int) -> str:
        return self.bytes(id).decode("utf-8", "replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
