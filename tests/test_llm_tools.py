"""Tool calls: required ones on random models, and calls that a model writes by itself."""

from __future__ import annotations

import json
import re
import shutil

import jsonschema
import pytest

from moesaic import LLM, Grammar, errors
from moesaic.text.tools import Tools, join_calls

HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "$defs": {"city": {"type": "string", "maxLength": 10}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
BOTH = [WEATHER, CLOCK]
BAD = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}
WAYS = [{"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}]


@pytest.fixture(scope="module", params=["tales", "mistral-v1", "mistral-v3"])
def llm(request, talker, mistral3):
    folder = {"tales": "tales", "mistral-v1": talker, "mistral-v3": mistral3}[request.param]
    with LLM.load(folder, chat_format=None if folder == "tales" else request.param) as llm:
        yield llm


def valid(answer, schemas):
    """Assert that an answer consists of calls only, with arguments that match their schemas."""
    assert answer.reason == "stop"
    assert answer.text.strip() == ""
    assert answer.calls
    for call in answer.calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert len({call.id for call in answer.calls}) == len(answer.calls)


ALL = {"get_weather": SCHEMA, "clock": {"type": "object", "maxProperties": 0}}


def test_required_call_is_made(llm):
    for way in WAYS:
        answer = llm.chat(HELLO, tools=BOTH, tool_choice="required", parallel_tool_calls=False, max_tokens=300, **way)
        valid(answer, ALL)
        assert len(answer.calls) == 1


def test_parallel_calls_are_made_if_allowed(llm):
    found = set()
    for seed in range(6):
        answer = llm.chat(HELLO, tools=BOTH, tool_choice="required", temperature=1.5, seed=seed, max_tokens=1500)
        valid(answer, ALL)
        found.add(len(answer.calls))
    assert max(found) > 1


def test_named_function_is_called(llm):
    for tool, name in ((WEATHER, "get_weather"), (CLOCK, "clock")):
        choice = {"type": "function", "function": {"name": tool["function"]["name"]}}
        answer = llm.chat(HELLO, tools=BOTH, tool_choice=choice, temperature=1.5, seed=3, max_tokens=300)
        valid(answer, ALL)
        assert [call.name for call in answer.calls] == [name]


def test_call_ids_follow_the_chat_format(llm):
    answer = llm.chat(HELLO, tools=[CLOCK], tool_choice="required", temperature=0, max_tokens=300)
    form = r"[a-zA-Z0-9]{9}" if llm.format.name == "mistral-v3" else r"call_[a-zA-Z0-9]{24}"
    assert all(re.fullmatch(form, call.id) for call in answer.calls)


def test_control_token_of_calls_is_not_shown(mistral3):
    with LLM.load(mistral3) as llm:
        assert llm.format.name == "mistral-v3"
        answer = llm.chat(HELLO, tools=[CLOCK], tool_choice="required", temperature=0, max_tokens=300)
        assert answer.tokens[0].id == llm.tokenizer.control["[TOOL_CALLS]"]
        assert answer.text == ""


def test_streamed_calls_equal_those_of_the_answer(llm):
    options = {"tools": BOTH, "tool_choice": "required", "temperature": 1.5, "seed": 5, "max_tokens": 600}
    whole = llm.chat(HELLO, **options)
    pieces = list(llm.chat(HELLO, stream=True, **options))
    parts = [part for piece in pieces for part in piece.calls]
    named = [(call.name, call.arguments) for call in join_calls(parts)]
    assert named == [(call.name, call.arguments) for call in whole.calls]
    assert len(parts) > 2 * len(whole.calls), "the arguments do not come in parts"
    assert [token.id for piece in pieces for token in piece.tokens] == [token.id for token in whole.tokens]


def test_each_of_n_answers_calls(llm):
    answer = llm.chat(HELLO, tools=BOTH, tool_choice="required", temperature=1.5, seed=2, n=3, max_tokens=900)
    for each in (answer, *answer.alternatives):
        valid(each, ALL)


def test_conversation_continues_after_calls(llm):
    answer = llm.chat(HELLO, tools=BOTH, tool_choice="required", temperature=0, max_tokens=900)
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.calls
    ]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22 °C"} for call in answer.calls]
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    prompt = llm.tokenizer.decode(llm.encode_chat(messages), skip_special=False)
    assert prompt.count("22 °C") == len(calls)
    assert llm.chat(messages, tools=BOTH, max_tokens=8).tokens


def test_truncated_call_is_no_text(llm):
    options = {"tools": [WEATHER], "tool_choice": "required", "temperature": 1.5, "seed": 1}
    whole = llm.chat(HELLO, **options, max_tokens=600)
    shown = []
    for max_tokens in range(1, min(64, len(whole.tokens)), 3):
        answer = llm.chat(HELLO, **options, max_tokens=max_tokens)
        assert (answer.reason, answer.text) == ("length", "")
        for call, other in zip(answer.calls, whole.calls, strict=False):
            assert call.name == other.name and other.arguments.startswith(call.arguments)
        shown.append(tuple(call.arguments for call in answer.calls))
    assert shown[0] == () and len(set(shown)) > 6


def test_auto_does_not_require_calls_and_none_hides_tools(llm):
    plain = llm.encode_chat(HELLO)
    assert llm.encode_chat(HELLO, tools=Tools.from_request(BOTH, "none")) == plain
    silent = llm.chat(HELLO, tools=BOTH, tool_choice="none", temperature=0, max_tokens=12)
    assert silent.text == llm.chat(HELLO, temperature=0, max_tokens=12).text
    told = llm.tokenizer.decode(llm.encode_chat(HELLO, tools=Tools.from_request(BOTH)), skip_special=False)
    assert '"name": "get_weather"' in told
    answer = llm.chat(HELLO, tools=BOTH, temperature=0, max_tokens=12)
    assert answer.tokens
    assert answer.calls == ()


def test_voluntary_calls_are_found(llm, monkeypatch):
    """With tool_choice auto the model decides; here a grammar without tools makes it write a call."""
    written = '{"name": "get_weather", "arguments": {"city": "Łódź", "days": 2}}'
    syntax = llm.format.tool_syntax(llm.tokenizer)
    mark = f"<[{llm.tokenizer.control[syntax.start_token]}]> " if syntax.start_token else ""
    free = f"[{written}]" if syntax.start_token else written
    script = Grammar("lark", f'start: "Well.\\n" {mark}{json.dumps(free, ensure_ascii=False)}')
    answer = llm.chat(HELLO, tools=BOTH, grammar=script, temperature=0, max_tokens=300)
    assert answer.text == "Well.\n"
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
        ("get_weather", {"city": "Łódź", "days": 2})
    ]
    twice = Grammar(
        "lark", f'start: {mark}"[" {json.dumps(written, ensure_ascii=False)} ", " {json.dumps(written)} "]"'
    )
    answer = llm.chat(HELLO, tools=BOTH, grammar=twice, parallel_tool_calls=False, temperature=0, max_tokens=900)
    assert (len(answer.calls), answer.reason) == (1, "stop")


def test_stop_string_ends_text_before_a_control_token(mistral3):
    with LLM.load(mistral3) as llm:
        mark = llm.tokenizer.control["[TOOL_CALLS]"]
        script = Grammar("lark", f'start: "ab" <[{mark}]> "[{{\\"name\\": \\"clock\\"}}]"')
        answer = llm.chat(HELLO, tools=BOTH, grammar=script, stop=("abc",), temperature=0)
        assert (answer.text, [call.name for call in answer.calls]) == ("ab", ["clock"])
        answer = llm.chat(HELLO, tools=BOTH, grammar=script, stop=("ab",), temperature=0)
        assert (answer.text, answer.calls, answer.stop) == ("", (), "ab")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tools": BOTH, "tool_choice": "required", "grammar": Grammar("json_object")}, "tool_choice: cannot"),
        ({"tool_choice": "required"}, "tool_choice: is required"),
        (
            {"tools": [CLOCK, BAD], "tool_choice": "required"},
            r"tools\[1\].function.parameters: .*#/properties/a: Invalid",
        ),
    ],
)
def test_invalid_requests_are_refused_before_running(llm, options, match):
    before = llm.engine.stats().prompt_tokens
    with pytest.raises(errors.InvalidParameter, match=match):
        llm.chat(HELLO, **options)
    assert llm.engine.stats().prompt_tokens == before


# A template with tools in the form of Hermes, as text: the tokenizer has no control tokens for it.
HERMES = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def hermes(talker, tmp_path_factory):
    folder = shutil.copytree(talker, tmp_path_factory.mktemp("hermes") / "model")
    (folder / "chat_template.jinja").write_text(HERMES)
    with LLM.load(folder) as llm:
        assert llm.format.name == "template"
        yield llm


def test_own_template_takes_tools(hermes):
    call = {"id": "x", "function": {"name": "clock", "arguments": '{"zone": "</s>"}'}}
    talk = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]
    talk.append({"role": "tool", "tool_call_id": "x", "content": "noon"})

    def text(ids):  # SentencePiece begins with a blank behind a special token
        return hermes.tokenizer.decode(ids, skip_special=False).replace("</s> ", "</s>")

    prompt = text(hermes.encode_chat(talk, tools=Tools.from_request([CLOCK])))
    assert f"{json.dumps(CLOCK)}\n<user>{HELLO[0]['content']}</s>" in prompt
    assert '<tool_call>\n{"name": "clock", "arguments": {"zone": "</s>"}}\n</tool_call></s>' in prompt
    assert prompt.endswith("<tool>noon</s><assistant>")
    continued = hermes.encode_chat([*HELLO, {"role": "assistant", "content": "It is "}], continue_final=True)
    assert text(continued).endswith("</s><assistant>It is ")


def test_own_template_makes_the_calls_of_its_form(hermes):
    answer = hermes.chat(HELLO, tools=BOTH, tool_choice="required", temperature=0, max_tokens=400)
    valid(answer, ALL)
    text = hermes.tokenizer.decode([token.id for token in answer.tokens])
    assert text.startswith('<tool_call>\n{"name": "')
    written = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    script = Grammar("lark", f"start: {json.dumps(written)}")
    answer = hermes.chat(HELLO, tools=BOTH, grammar=script, temperature=0, max_tokens=400)
    assert (answer.text, [call.name for call in answer.calls]) == ("", ["clock"])
