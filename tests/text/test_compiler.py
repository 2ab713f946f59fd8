"""Masks on the published vocabularies against the definition, and grammars that mean harm."""

from __future__ import annotations

import builtins
import json
import random
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesaic.errors import GrammarError, InvalidParameter, NotInstalled, Overloaded
from moesaic.llm import BUILT_IN
from moesaic.text import compiler as module
from moesaic.text.compiler import Compiler, Matcher
from moesaic.text.grammar import Grammar
from moesaic.text.stream import TextStream
from moesaic.text.tokenizer import Tokenizer

Opened = Callable[[str], Tokenizer]
ALL = ("v1", "v3", "tekken", "llama3", "built-in")
CHOICES = [" leading", "ab", "abc", "été 🙂", "日本語", 'quo"te\\', "a\nb", "x" * 40, "  two", "</s>[INST]", "\u0001\t"]
SPARE = 7  # rows that the model has beyond the tokenizer's


@pytest.fixture(scope="module")
def compilers(opened: Opened) -> dict[str, tuple[Tokenizer, Compiler]]:
    tokenizers = {name: Tokenizer.open(BUILT_IN) if name == "built-in" else opened(name) for name in ALL}
    return {name: (t, Compiler(t, t.vocab_size + SPARE)) for name, t in tokenizers.items()}


def ids(matcher: Matcher, size: int) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return [int(id) for id in np.nonzero(bits)[0]]


def shown(tokenizer: Tokenizer, said: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(stream.add(id)[0] for id in said) + stream.finish()


@pytest.mark.parametrize("name", ALL)
def test_what_is_allowed_leads_to_a_choice_and_every_choice_is_reached(name: str, compilers: Any) -> None:
    tokenizer, compiler = compilers[name]
    compiled = compiler.compile(Grammar("choice", CHOICES))
    wanted = [choice.encode() for choice in CHOICES]
    reached = set()
    for seed in range(60):
        draw, matcher, said = random.Random(seed), compiled(), list[int]()
        so_far, first = b"", True
        while not matcher.done:
            allowed = ids(matcher, tokenizer.vocab_size)
            for id in allowed:
                text = so_far + tokenizer.bytes(id, first)
                assert not tokenizer.is_special(id)
                assert len(text) > len(so_far) or (first and tokenizer.bytes(id) == b" ")
                assert any(choice.startswith(text) for choice in wanted)
            if matcher.may_end and draw.random() < 0.5:
                break
            said.append(draw.choice(allowed))
            so_far += tokenizer.bytes(said[-1], first)
            first = False
            matcher.accept(said[-1])
        assert matcher.may_end
        assert shown(tokenizer, said) in CHOICES
        reached.add(shown(tokenizer, said))
    assert len(reached) > len(CHOICES) / 2


@pytest.mark.parametrize("name", ALL)
def test_the_tokenizers_own_way_to_write_a_choice_is_allowed(name: str, compilers: Any) -> None:
    """As a model writes it that was trained on this vocabulary: the answer begins a text."""
    tokenizer, compiler = compilers[name]
    for text in CHOICES:
        matcher = compiler.compile(Grammar("choice", CHOICES))()
        said = tokenizer.encode(text)
        assert shown(tokenizer, said) == text
        for id in said:
            assert id in ids(matcher, tokenizer.vocab_size)
            matcher.accept(id)
        assert matcher.may_end


@pytest.mark.parametrize("name", ALL)
def test_regular_expressions(name: str, compilers: Any) -> None:
    tokenizer, compiler = compilers[name]
    for pattern in (r"[a-c]{2,5}", r" ?\d+(\.\d{1,3})?", r"(?:ja|nein|vielleicht)!?", r"[а-я]{3,9}", "(🙂|é){2,4}"):
        for seed in range(8):
            draw, matcher, said = random.Random(seed), compiler.compile(Grammar("regex", pattern))(), list[int]()
            while not matcher.done and not (matcher.may_end and draw.random() < 0.3):
                said.append(draw.choice(ids(matcher, tokenizer.vocab_size)))
                matcher.accept(said[-1])
            assert re.fullmatch(pattern, shown(tokenizer, said))


def test_control_tokens_come_only_where_a_lark_grammar_names_them(compilers: Any) -> None:
    tokenizer, compiler = compilers["v3"]
    anything = compiler.compile(Grammar("regex", "(.|\n)*"))()
    assert not set(tokenizer.control.values()) & set(ids(anything, tokenizer.vocab_size))
    called = tokenizer.control["[TOOL_CALLS]"]
    matcher = compiler.compile(Grammar("lark", f'start: <[{called}]> " x"'))()
    assert ids(matcher, tokenizer.vocab_size) == [called]
    matcher.accept(called)
    said = [called]
    while not matcher.done:  # behind a control token SentencePiece still drops the space of what comes first
        said.append(ids(matcher, tokenizer.vocab_size)[0])
        matcher.accept(said[-1])
    assert shown(tokenizer, said) == " x"


def test_answers_of_one_grammar_do_not_disturb_each_other(compilers: Any) -> None:
    tokenizer, compiler = compilers["v1"]
    compiled = compiler.compile(Grammar("choice", CHOICES))
    one, other = compiled(), compiled()
    before = ids(other, tokenizer.vocab_size)
    one.accept(ids(one, tokenizer.vocab_size)[0])
    assert ids(other, tokenizer.vocab_size) == before
    assert ids(compiled(), tokenizer.vocab_size) == before


@pytest.mark.parametrize(
    ("kind", "value", "match"),
    [
        ("regex", "ab(c", "at character 3 of the expression: unclosed group"),
        ("regex", "(?=a)b", "character 1 .*look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "()", "only the empty text"),
        ("regex", "a[^\\x00-\\x{10FFFF}]", "."),
        ("lark", 'start: "a" b', 'line 1, character 8: unknown name: "b"'),
        ("lark", 'start: "a"\nb: (', "line 2"),
        ("lark", 'x: "a"', "start"),
        ("json_schema", {"type": "strin"}, "at #: Invalid type: strin"),
        (
            "json_schema",
            {"properties": {"ok": {}, "a": {"items": {"anyOf": [{"type": "null"}, {"type": "strin"}]}}}},
            "at #/properties/a/items/anyOf/1: Invalid type",
        ),
        ("json_schema", {"properties": {"a": {"pattern": "x("}}}, "#/properties/a: at character 2 of .*unclosed"),
        ("json_schema", {"$defs": {"t": {"if": {}}}, "items": {"$ref": "#/$defs/t"}}, "#/.defs/t: .*if"),
        ("json_schema", {"properties": {"a": {"uniqueItems": True}}}, "#/properties/a: Unimplemented.*uniqueItems"),
        ("json_schema", {"$ref": "#/$defs/nope"}, "nope"),
        ("json_schema", {"$ref": "http://127.0.0.1:1/x.json"}, "not present"),
        ("json_schema", {"$ref": "file:///etc/passwd"}, "not present"),
        ("json_schema", {"$ref": "#"}, "nothing can satisfy it"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ],
)
def test_bad_grammars_are_refused_and_say_where(kind: Any, value: Any, match: str, compilers: Any) -> None:
    with pytest.raises(InvalidParameter, match=match) as caught:
        compilers["v1"][1].compile(Grammar(kind, value, "response_format"))
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


COSTLY = {
    "a regular product": ("json_schema", {"type": "integer", "multipleOf": 999983}),
    "intersections": (
        "json_schema",
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + n)}.{{{n + 5}}}"} for n in range(20)]},
    ),
    "repetitions of repetitions": ("regex", "(a{1000}){1000}"),
    "alternatives without end": (
        "lark",
        "start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(30)) + 'a30: "x"',
    ),
    "an object of too many optional members": (
        "json_schema",
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}},
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_grammars_are_refused(name: str, compilers: Any) -> None:
    """Each of these keeps llguidance busy for seconds, or for ever, when nobody stops it."""
    with pytest.raises(InvalidParameter, match=r"too costly|takes more than 1 s|not understood"):
        compilers["v1"][1].compile(Grammar(*COSTLY[name]))


def test_an_answer_that_has_become_too_costly_ends(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, compiler = compilers["v1"]
    matcher = compiler.compile(Grammar("regex", "[a-z]+"))()
    matcher.accept(ids(matcher, tokenizer.vocab_size)[0])
    monkeypatch.setattr(module, "SECONDS_AT_ONCE", -1.0)
    assert not matcher.done
    for _ in range(2):
        with pytest.raises(GrammarError, match="processor time"):
            matcher.mask()


def test_the_cache_is_bounded_and_keeps_what_was_used_last(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = compilers["v1"]
    compiler = Compiler(tokenizer, tokenizer.vocab_size)
    compiler._tables = compilers["v1"][1]._vocabulary()
    monkeypatch.setattr(module, "CACHED", 2)
    one, two, three = (Grammar("regex", f"{text}+") for text in "abc")
    first = compiler.compile(one)
    compiler.compile(two)
    assert compiler.compile(one) is first
    compiler.compile(three)
    assert list(compiler._known) == [one.source, three.source]
    monkeypatch.setattr(module, "CACHED_BYTES", 20)
    large = Grammar("regex", "d" * 30)
    compiler.compile(large)
    assert not compiler._known


def test_only_so_many_are_compiled_at_once(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiler = compilers["v1"]
    known = Grammar("regex", "[a-z]+")
    compiler.compile(known)
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(compiler, "_turns", threading.BoundedSemaphore(1))
    with compiler._turns:
        with pytest.raises(Overloaded):
            compiler.compile(Grammar("regex", "new"))
        compiler.compile(known)


def test_without_llguidance_the_error_says_how_to_get_it(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotInstalled, match=r"pip install 'moesaic\[serve\]'"):
        compilers["v1"][1].compile(Grammar("regex", "never seen"))


def test_json_is_written_with_one_space_at_most(compilers: Any) -> None:
    tokenizer, compiler = compilers["v1"]
    compiled = compiler.compile(Grammar("json_schema", {"type": "array", "items": {"enum": [1]}, "minItems": 2}))
    for text, good in (("[1,1]", True), ("[1, 1]", True), ("[ 1,1 ]", True), ("[1,  1]", False), ("[1,\n1]", False)):
        matcher = compiled()
        for id in tokenizer.encode(text):
            if id not in ids(matcher, tokenizer.vocab_size):
                assert not good
                break
            matcher.accept(id)
        else:
            assert good
            assert json.loads(text) == [1, 1]
