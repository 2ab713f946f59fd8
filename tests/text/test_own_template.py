"""Templates as chat formats: tools, calls in the history, continued answers, and variables of the request."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import InvalidMessages, InvalidParameter
from moesaic.text import chat_choice, own_template, syntax, template_kwargs
from moesaic.text._render import _environment
from moesaic.text.chat import FORMATS, ChatFormat
from moesaic.text.template import special_names
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools, join_calls
from tests.support.tokenizers import LLAMA3, byte_tokenizer
from tests.text.test_chat_choice import CHATML
from tests.text.test_chat_tools import CLOCK, LLAMA31, OFFERED, WEATHER, assistant, call, result, user

Opened = Callable[[str], Tokenizer]

# The template of Hermes and Qwen models, shortened.
HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content + '\n\n' }}{%- endif %}{{- '# Tools\n<tools>' }}"
    "{%- for t in tools %}{{- '\n' + t | tojson }}{%- endfor %}"
    "{{- '\n</tools>\nAnswer with <tool_call></tool_call> tags.<|im_end|>\n' }}{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or "
    "(m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\n' + m.content }}{%- endif %}{%- for c in m.tool_calls %}"
    '{{- \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    "not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    user("Paris?"),
    assistant("Let me see.", call("call_1", '{"city": "Łódź <|im_end|>"}'), call("call_2", "{}", "clock")),
    result("call_1", '{"degrees": 22} <|im_start|>'),
    result("call_2", "noon", "clock"),
]


@pytest.fixture
def hermes(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>")


def recognized(folder: Path, tokenizer: Tokenizer, source: str) -> ChatFormat:
    (folder / "chat_template.jinja").write_text(source)
    return chat_choice.recognize(tokenizer, folder)


def rendered(source: str, tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the text that transformers makes of a template, with the arguments of calls as objects."""
    theirs = json.loads(json.dumps(messages))
    for message in theirs:
        for entry in message.get("tool_calls", ()):
            entry["function"]["arguments"] = json.loads(entry["function"]["arguments"])
    names = special_names(tokenizer)
    values = {"bos_token": names["bos"], "eos_token": names["eos"], "add_generation_prompt": True, "tools": None}
    text: str = _environment(datetime.now()).from_string(source).render(values | {"messages": theirs} | options)
    return text


def test_a_format_without_tools_leaves_them_to_the_template(hermes: Tokenizer, tmp_path: Path) -> None:
    form = recognized(tmp_path, hermes, HERMES)
    assert (form.name, form.note) == ("chatml", "")
    assert form.tool_syntax(hermes) is syntax.HERMES
    definitions = [WEATHER, CLOCK]
    for messages, tools in ((TALK, OFFERED), (TALK, None), (TALK[:2], OFFERED), (TALK[1:2], None)):
        ids = form.encode(messages, hermes, tools=tools)
        expected = rendered(HERMES, hermes, messages, tools=definitions if tools else None)
        assert hermes.decode(ids, skip_special=False) == expected
    tokens = [each for each in form.encode(TALK, hermes, tools=OFFERED) if hermes.is_special(each)]
    assert len(tokens) == 2 * 5 + 1  # each turn begins and ends, and no name in a message is a token


def test_plain_conversations_start_no_process(hermes: Tokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    form = recognized(tmp_path, hermes, HERMES)
    monkeypatch.setattr(own_template.template, "encode", lambda *_, **__: pytest.fail("the template was rendered"))
    ids = form.encode(TALK[:2], hermes)
    assert ids == FORMATS["chatml"].encode(TALK[:2], hermes)


def test_variables_of_the_template_are_passed_on(hermes: Tokenizer, tmp_path: Path) -> None:
    form = recognized(tmp_path, hermes, HERMES)

    def text(**kwargs: Any) -> str:
        return hermes.decode(form.encode([user("Hi")], hermes, kwargs=kwargs), skip_special=False)

    plain = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text(enable_thinking=False) == plain + "<think>\n\n</think>\n\n"
    assert text(enable_thinking=True) == text(unknown=1) == text() == plain


def test_variables_never_become_control_tokens(hermes: Tokenizer, tmp_path: Path) -> None:
    form = recognized(tmp_path, hermes, "{{ who }}{{ (more or 0) | tojson }}{{ messages[0].content }}")
    kwargs = {"who": "<|im_end|>", "more": {"<|im_start|>": ["<|im_end|>", 1, None]}}
    ids = form.encode([user("Hi")], hermes, kwargs=kwargs)
    assert not any(map(hermes.is_special, ids))
    assert hermes.decode(ids) == '<|im_end|>{"<|im_start|>": ["<|im_end|>", 1, null]}Hi'


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("content", ["It is", "It is ", " It  is\n", "", "s", "<|im_end|>", "assistant"])
def test_an_answer_is_continued_as_transformers_does(content: str, trims: bool, hermes: Tokenizer) -> None:
    source = CHATML.replace("m['content']", "(m['content'] | trim)") if trims else CHATML
    form = own_template.chat_format(own_template.examine(source, hermes), hermes)
    messages = [user("2+2?"), assistant(content)]
    text = hermes.decode(form.encode(messages, hermes, continue_final=True), skip_special=False)
    head = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert text == (head + content.lstrip() if trims else head + content).rstrip() if trims else head + content


def test_a_template_that_hides_the_last_message_cannot_continue_it(hermes: Tokenizer) -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    form = own_template.chat_format(own_template.examine(source, hermes), hermes)
    with pytest.raises(InvalidMessages, match="does not show the last message"):
        form.encode([user("a"), assistant("b")], hermes, continue_final=True)


def test_a_template_without_tools_gets_them_in_words(hermes: Tokenizer) -> None:
    form = own_template.chat_format(own_template.examine("{{ messages[-1].content }}" + CHATML, hermes), hermes)
    text = hermes.decode(form.encode(TALK, hermes, tools=OFFERED), skip_special=False)
    assert "You can call these functions:" in text
    assert "Result of clock: noon" in text
    assert form.tool_syntax(hermes) is syntax.PLAIN


@pytest.mark.parametrize(
    ("source", "specials", "expected"),
    [
        ("<tool_call> </tool_call>", (), syntax.HERMES),
        ("[TOOL_CALLS]", ("[TOOL_CALLS]",), syntax.MISTRAL),
        ("[TOOL_CALLS]", (), syntax.PLAIN),
        ("[TOOL_CALLS][CALL_ID][ARGS]", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), syntax.MISTRAL_11),
        ("[TOOL_CALLS][ARGS]", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), syntax.MISTRAL_13),
        ("<|python_tag|>", LLAMA3, syntax.LLAMA),
        ('{"name": function}', LLAMA3, syntax.PLAIN),
    ],
)
def test_form_of_calls_is_recognized(
    source: str, specials: tuple[str, ...], expected: syntax.Syntax, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(tmp_path, ("</s>", *specials), None, "</s>")
    assert own_template.call_syntax(source, tokenizer) == expected


def test_mistral_templates_get_ids_of_nine_characters(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
        "{{ raise_exception('ids have length 9') }}{% endif %}{{ c | tojson }}{% endfor %}{% elif m.role == 'tool' %}"
        "{{ m.tool_call_id }}={{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}{{ tools | tojson }}"
    )
    tokenizer = byte_tokenizer(tmp_path, ("</s>", "[TOOL_CALLS]"), None, "</s>")
    form = own_template.chat_format(own_template.examine(source, tokenizer), tokenizer)
    text = tokenizer.decode(form.encode(TALK, tokenizer, tools=OFFERED))
    found = json.loads(text.partition("Paris?")[2].partition("}}{")[0] + "}}")
    assert len(found["id"]) == 9
    assert f"{found['id']}=" in text


def test_the_date_of_llama31_is_set_by_the_request(opened: Opened, tmp_path: Path) -> None:
    tokenizer = opened("llama3")
    own = recognized(tmp_path, tokenizer, LLAMA31)
    for form in (FORMATS["llama3.1"], own):

        def text(kwargs: Any = None, form: ChatFormat = form) -> str:
            return tokenizer.decode(form.encode([user("Hi")], tokenizer, kwargs=kwargs, now=datetime(2026, 12, 3)))

        assert "Today Date: 03 Dec 2026\n" in text()
        assert "Today Date: 1 May 1999 <|eot_id|>\n" in text({"date_string": "1 May 1999 <|eot_id|>"})
        with pytest.raises(InvalidParameter, match="date_string must be a text"):
            text({"date_string": 3})
    today = datetime.now().strftime("%Y")
    assert today in tokenizer.decode(FORMATS["llama3.1"].encode([user("Hi")], tokenizer))


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 0


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ([1], "must be an object"),
        ({"messages": []}, "must not set messages"),
        ({"tools": []}, "must not set tools"),
        ({"add_generation_prompt": False}, "must not set add_generation_prompt"),
        ({"raise_exception": 1}, "must not set raise_exception"),
        ({"a b": 1}, "not a variable's name"),
        ({"a": "x" * 70_000}, "longer than 64 KiB"),
        ({"a": deep(20)}, "more than 16 nested levels"),
        ({"a": float("nan")}, "cannot be written as JSON"),
        ({"a": object()}, "cannot be written as JSON"),
    ],
)
def test_invalid_variables_are_refused(kwargs: Any, match: str, hermes: Tokenizer) -> None:
    with pytest.raises(InvalidParameter, match=match) as caught:
        FORMATS["chatml"].encode([user("Hi")], hermes, kwargs=kwargs)
    assert caught.value.param == "chat_template_kwargs"


def test_variables_that_nothing_reads_are_told_once(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(template_kwargs, "_told", set())
    monkeypatch.setattr(template_kwargs.log, "propagate", True)
    for _ in range(3):
        assert template_kwargs.check({"tone": 1, "date_string": "x"}, "chatml", {"date_string"})
    assert [record.getMessage() for record in caplog.records] == [
        "ignored a variable that the chat format does not read: tone, chatml"
    ]
    for number in range(2 * template_kwargs.MAX_TOLD):
        template_kwargs.check({f"x{number}": 1}, "chatml", ())
    assert len(caplog.records) == template_kwargs.MAX_TOLD


WRITTEN = 'I will.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n<tool_call>\n' + (
    '{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("inline", [False, True])
def test_calls_between_tags_are_found(size: int, inline: bool, hermes: Tokenizer) -> None:
    form = replace(FORMATS["chatml"], syntax=syntax.HERMES)
    assert OFFERED is not None
    parser = form.tool_call_parser(hermes, OFFERED)
    written = WRITTEN.replace(".\n<", ". <").replace("\n", "") if inline else WRITTEN
    parts: list[Any] = []
    for start in range(0, len(written), size):
        parts += parser.add_text(written[start : start + size])
    parts += parser.finish()
    calls = join_calls(part for part in parts if not isinstance(part, str))
    assert [(each.name, json.loads(each.arguments)) for each in calls] == [
        ("clock", {}),
        ("get_weather", {"city": "Łódź"}),
    ]
    assert "".join(part for part in parts if isinstance(part, str)).strip() == "I will."


@pytest.mark.parametrize("text", ["a < b", "a <tool", "a </tool_ b", "{", "no call\n<"])
def test_text_that_is_no_tag_is_kept(text: str, hermes: Tokenizer) -> None:
    form = replace(FORMATS["chatml"], syntax=syntax.HERMES)
    assert OFFERED is not None
    parser = form.tool_call_parser(hermes, OFFERED)
    parts = [part for char in text for part in parser.add_text(char)] + parser.finish()
    assert "".join(map(str, parts)) == text


@pytest.mark.parametrize("end", range(1, len("<tool_call>") + 1))
def test_a_tag_that_was_cut_is_no_text(end: int, hermes: Tokenizer) -> None:
    assert OFFERED is not None
    parser = replace(FORMATS["chatml"], syntax=syntax.HERMES).tool_call_parser(hermes, OFFERED)
    assert "".join(map(str, [*parser.add_text("Yes.\n" + "<tool_call>"[:end]), *parser.finish(cut=True)])) == "Yes.\n"


@pytest.mark.parametrize("special", [False, True])
def test_a_required_call_has_its_tags(special: bool, tmp_path: Path) -> None:
    names = ("<|im_end|>", *(("<tool_call>", "</tool_call>") if special else ()))
    tokenizer = byte_tokenizer(tmp_path, names, None, "<|im_end|>")
    required = Tools.from_request([CLOCK], "required", False)
    assert required is not None
    rule = syntax.forced_grammar(syntax.HERMES, required, tokenizer.control).value
    opening, closing = (
        ('<[257]> "\\n"', '"\\n" <[258]>') if special else ('"<tool_call>" "\\n"', '"\\n" "</tool_call>"')
    )
    assert opening in rule
    assert closing in rule
