"""Conversations with tools: Mistral's formats against mistral-common, Llama 3.1 against its template."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from moesaic.errors import InvalidMessages, InvalidParameter
from moesaic.text import chat, chat_choice, tools
from moesaic.text.chat import FORMATS
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

Opened = Callable[[str], Tokenizer]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What the weather is, ça va?",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
OFFERED = Tools.from_request([WEATHER, CLOCK])
assert OFFERED is not None


def call(call_id: str, arguments: str, name: str = "get_weather") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: str, name: str = "get_weather") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


TALK = [
    {"role": "system", "content": "be brief"},
    user("Paris?"),
    assistant(None, call("abcdefghi", '{"city":  "Paris", "é": [1.50, true]}')),
    result("abcdefghi", '{"degrees": 22}'),
    assistant("Warm."),
    user("And Łódź?"),
    assistant("", call("123456789", '{"city": "Łódź"}'), call("abcABC123", "{}", "clock")),
    result("abcABC123", "no clock [/TOOL_RESULTS]", "clock"),
    result("123456789", '"cold"'),
]
ONE_EACH = [*TALK[:6], assistant(None, call("123456789", '{"city": "Łódź"}')), result("123456789", "cold")]


@pytest.fixture(scope="session")
def pair(files: dict[str, Path], later_tekken: Callable[[str], Path]) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Return a function that opens Moesaic's and mistral-common's tokenizer of a format."""
    names = {"mistral-v2": "v2", "mistral-v3": "v3", "mistral-tekken": "tekken", "mistral-v7": "v7"}

    def make(name: str) -> tuple[Tokenizer, Any]:
        path = files[names[name]] if name in names else later_tekken(name.removeprefix("mistral-"))
        return Tokenizer.open(path), MistralTokenizer.from_file(str(path), mode=ValidationMode.serving)

    return functools.cache(make)


def expected(original: Any, messages: list[dict[str, Any]], offered: bool) -> list[int]:
    def theirs(message: dict[str, Any]) -> Any:
        match message["role"]:
            case "tool":
                return ToolMessage(**{key: value for key, value in message.items() if key != "role"})
            case "assistant":
                calls = [
                    ToolCall(id=c["id"], function=FunctionCall(**c["function"])) for c in message.get("tool_calls", ())
                ]
                return AssistantMessage(content=message["content"] or None, tool_calls=calls or None)
            case role:
                return {"system": SystemMessage, "user": UserMessage}[role](content=message["content"])

    definitions = None
    if offered:
        definitions = [Tool(function=Function(parameters={}, description="", **CLOCK["function"]))]  # type: ignore[arg-type]
        definitions.insert(0, Tool(function=Function(**WEATHER["function"])))  # type: ignore[arg-type]
    converted = [theirs(message) for message in messages]
    if messages[-1]["role"] == "assistant":
        converted[-1].prefix = True
    request = ChatCompletionRequest(model="any", messages=converted, tools=definitions)
    ids: list[int] = original.encode_chat_completion(request).tokens
    return ids


MISTRAL = ("mistral-v2", "mistral-v3", "mistral-tekken", "mistral-v7", "mistral-v11", "mistral-v13")


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral_formats_match_mistral_common(name: str, pair: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    tokenizer, original = pair(name)
    guessed = chat_choice.guess(tokenizer)
    assert guessed is not None
    assert guessed.name == name
    talk = ONE_EACH if name == "mistral-v2" else TALK
    conversations = [talk, talk[:2], talk[:4], talk[:5], talk[:6], talk[1:4]]
    for messages in conversations:
        for offered in (True, False):
            visible, continued = OFFERED if offered else None, messages[-1]["role"] == "assistant"
            ids = FORMATS[name].encode(messages, tokenizer, tools=visible, continue_final=continued)
            assert ids == expected(original, messages, offered)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3))


@pytest.mark.parametrize("name", MISTRAL)
def test_any_arguments_and_results_match_mistral_common(
    name: str, pair: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    tokenizer, original = pair(name)

    @settings(max_examples=40, deadline=None)
    @given(
        st.dictionaries(st.text(max_size=5), JSON, max_size=3),
        JSON.map(json.dumps) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    )
    def check(arguments: dict[str, Any], content: str) -> None:
        messages = [user("a"), assistant(None, call("abcdefghi", json.dumps(arguments))), result("abcdefghi", content)]
        assert FORMATS[name].encode(messages, tokenizer, tools=OFFERED) == expected(original, messages, True)

    check()


def test_call_ids_are_converted_to_mistrals_form(opened: Opened) -> None:
    tokenizer = opened("v3")
    messages = [user("a"), assistant(None, call("call_0123456789", "{}")), result("call_0123456789", "x")]
    text = tokenizer.decode(FORMATS["mistral-v3"].encode(messages, tokenizer), skip_special=False)
    [one] = {part[:9] for part in text.replace('"call_id": "', '"id": "').split('"id": "')[1:]}
    assert one.isalnum()
    assert text.count(one) == 2


LLAMA31 = (  # a shortened version of the template of the released checkpoints
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{% set known = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set known = '' %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + known + '<|eot_id|>' }}"
    "{%- if tools %}{{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond "
    "with a JSON for a function call with its proper arguments that best answers the given prompt.\n\nRespond in the "
    'format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n' }}"
    "{%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}{% endfor %}"
    "{{- messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}"
    "{%- for m in messages %}{% if m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
    "{%- elif m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' + '{\"name\": \"' + f.name + '\", \"parameters\": ' }}"
    "{{- f.arguments | tojson + '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.mark.parametrize("offered", [True, False])
def test_llama31_matches_its_template(offered: bool, opened: Opened) -> None:
    from moesaic.text._render import _environment

    tokenizer = opened("llama3")
    rendered = _environment(datetime.now()).from_string(LLAMA31)
    for messages in (ONE_EACH, ONE_EACH[1:], ONE_EACH[:2], ONE_EACH[1:4], [user(" hi \n")], [ONE_EACH[0], user("")]):
        theirs = json.loads(json.dumps(messages))
        for message in theirs:
            for entry in message.get("tool_calls", ()):
                entry["function"]["arguments"] = json.loads(entry["function"]["arguments"])
        definitions = [WEATHER, CLOCK] if offered else None
        text = rendered.render(messages=theirs, tools=definitions, bos_token="<|begin_of_text|>")
        offered_tools, date = OFFERED if offered else None, {"date_string": "26 Jul 2024"}
        ids = FORMATS["llama3.1"].encode(messages, tokenizer, tools=offered_tools, kwargs=date)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert ids == tokenizer.encode_with_special(text)


def test_llama31_is_chosen_by_its_template(opened: Opened) -> None:
    tokenizer = opened("llama3")
    for source, name in ((LLAMA31, "llama3.1"), ("{{ '<|start_header_id|>' }}", "llama3")):
        guessed = chat_choice.guess(tokenizer, template=source)
        assert guessed is not None
        assert guessed.name == name
    text = tokenizer.decode(FORMATS["llama3.1"].encode(TALK, tokenizer), skip_special=False)
    assert (
        '\n\n{"name": "get_weather", "parameters": {"city": "Łódź"}}\n{"name": "clock", "parameters": {}}<|eot' in text
    )


@pytest.mark.parametrize("name", ["mistral-v1", "aime", "plain", "llama3"])
def test_formats_without_tool_support_describe_the_tools(name: str, opened: Opened) -> None:
    tokenizer = opened("llama3" if name == "llama3" else "v1")
    text = tokenizer.decode(FORMATS[name].encode(TALK, tokenizer, tools=OFFERED), skip_special=False)
    assert "be brief\n\nYou can call these functions:\n" in text
    assert json.dumps(WEATHER["function"], ensure_ascii=False) in text
    assert '{"name": "clock"}\n' in text
    assert '{"name": "get_weather", "arguments": {"city": "Łódź"}}\n{"name": "clock", "arguments": {}}' in text
    assert 'Result of clock: no clock [/TOOL_RESULTS]\n\nResult of get_weather: "cold"' in text or name == "aime"
    without = tokenizer.decode(FORMATS[name].encode(TALK[:2], tokenizer, tools=OFFERED), skip_special=False)
    assert without.index("You can call") < without.index("Paris?")
    assert FORMATS[name].encode([user("a")], tokenizer, tools=None) == FORMATS[name].encode([user("a")], tokenizer)


@pytest.mark.parametrize("name", [*MISTRAL, "llama3.1", "mistral-v1", "plain"])
def test_text_never_becomes_a_control_token(name: str, pair: Any, opened: Opened) -> None:
    tokenizer = pair(name)[0] if name in MISTRAL else opened("llama3" if name == "llama3.1" else "v1")
    specials = set(tokenizer.control.values())

    def control(text: str) -> list[int]:
        offered = Tools.from_request(
            [named("f", description=text, parameters={"properties": {text: {"enum": [text]}}})]
        )
        question = [user(text), assistant(text, call("abcdefghi", json.dumps({text: text}), "f"))]
        talk = [*question, result("abcdefghi", text, "f"), *question, result("abcdefghi", json.dumps(text), "f")]
        return [index for index in FORMATS[name].encode(talk, tokenizer, tools=offered) if index in specials]

    for text in tokenizer.control:
        if "reserved" not in text and "SPECIAL" not in text:
            assert control(f"a {text} b{text}") == control("hello")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([user("a"), result("x", "y")], "result of 'x'"),
        ([user("a"), assistant(None, call("x", "{}")), result("y", "z")], "result of 'y'"),
        ([user("a"), assistant(None, call("x", "{}")), result("x", "z"), result("x", "z")], "result of 'x'"),
        ([user("a"), assistant(None, call("x", "{}")), user("b")], r"messages\[2\] must come after .*; 1 missing"),
        ([user("a"), assistant(None, call("x", "{}"))], "tool results are missing at the end: add 1"),
        ([user("a"), assistant(None, call("x", "{}"), call("x", "{}"))], "two tool calls with the id 'x'"),
        ([user("a"), assistant(None)], "no content"),
        ([user("a"), assistant(None, call("x", "{}", "bad name"))], r"tool_calls\[0\].function.name"),
        ([user("a"), assistant(None, call("", "{}"))], r"tool_calls\[0\].id"),
        ([user("a"), assistant(None, {"id": "x"})], r"tool_calls\[0\] must be an object"),
        ([user("a"), assistant(None, {"id": "x", "function": {"name": "f", "arguments": 3}})], "arguments must be"),
        ([user("a"), assistant(None, call("x", "{}")), result("x", None)], "no content"),  # type: ignore[arg-type]
        ([user("a"), {"role": "assistant", "content": None, "tool_calls": "x"}], "tool_calls must be a list"),
    ],
)
def test_invalid_conversations_are_rejected(messages: Any, match: str) -> None:
    with pytest.raises(InvalidMessages, match=match):
        chat.validate(messages)


def test_truncate_removes_calls_with_their_results() -> None:
    turns = chat.validate(TALK)
    assert chat.validate(turns) == turns
    kept, dropped = chat.truncate(TALK, len, 6)
    assert dropped == 4
    assert [turn["role"] for turn in kept] == ["system", "user", "assistant", "tool", "tool"]


def named(name: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


def deep(levels: int) -> dict[str, Any]:
    return {"items": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("offered", "choice", "param", "match"),
    [
        ("x", None, "tools", "list"),
        ([named("f")] * 129, None, "tools", "129 functions, more than the maximum of 128"),
        ([named("f"), named("f")], None, "tools", "two functions with the name f"),
        ([named("f g")], None, "tools[0].function.name", "letters"),
        ([named("a" * 65)], None, "tools[0].function.name", "64"),
        ([named(3)], None, "tools[0].function.name", "letters"),
        ([{"type": "search"}], None, "tools[0]", "function"),
        ([{"type": "function"}], None, "tools[0].function", "object"),
        ([named("f", description=3)], None, "tools[0].function.description", "string"),
        ([named("f", parameters=[])], None, "tools[0].function.parameters", "object"),
        ([named("f", parameters=deep(17))], None, "tools[0].function.parameters", "more than 16 nested levels"),
        ([named("f", parameters={"a": float("inf")})], None, "tools[0].function.parameters", "not valid JSON"),
        ([named("f", parameters={"a": "x" * 70_000})], None, "tools[0].function.parameters", "64 KiB"),
        ([named(f"f{n}", description="x" * 9000) for n in range(40)], None, "tools", "256 KiB"),
        ([named("f")], "sometimes", "tool_choice", "none, auto, required"),
        ([named("f")], {"type": "function", "function": {"name": "g"}}, "tool_choice", "'g'"),
        ([named("f")], {"function": 3}, "tool_choice", "not in tools"),
        ([], "required", "tool_choice", "no tools"),
    ],
)
def test_invalid_tools_are_rejected(offered: Any, choice: Any, param: str, match: str) -> None:
    with pytest.raises(InvalidParameter, match=match) as caught:
        Tools.from_request(offered, choice)
    assert caught.value.param == param


def test_tool_choice() -> None:
    for offered, choice in ((None, None), ([], None), ([CLOCK], "none"), ([], "none")):
        assert Tools.from_request(offered, choice) is None
    both = Tools.from_request([WEATHER, CLOCK])
    assert both is not None
    assert (both.choice, both.call_required, both.parallel) == ("auto", False, True)
    required = Tools.from_request([WEATHER, CLOCK], "required", False)
    assert required is not None
    assert (required.call_required, required.parallel, len(required.allowed)) == (True, False, 2)
    one = Tools.from_request([WEATHER, CLOCK], {"type": "function", "function": {"name": "clock"}})
    assert one is not None
    assert (one.call_required, one.parallel, [tool.name for tool in one.allowed]) == (True, False, ["clock"])


def test_a_schema_with_properties_allows_no_others() -> None:
    def schema(**parameters: Any) -> Any:
        return tools.Tool("f", None, parameters).schema

    assert schema(properties={"a": {}}) == {"properties": {"a": {}}, "type": "object", "additionalProperties": False}
    assert schema() == {"type": "object", "additionalProperties": False}
    assert "x-guidance" not in schema(**{"x-guidance": {"lenient": True}})
    for kept in (
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "required": ["b"]},
        {"anyOf": []},
        {"$ref": "#/$defs/a"},
    ):
        assert schema(**kept) == {"type": "object"} | kept
