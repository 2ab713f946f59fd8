"""Grammar compiler: masks on the published vocabularies, and malformed or costly grammars."""

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

from moesaic.builtin import TALES_FOLDER
from moesaic.errors import GrammarError, InvalidParameter, NotInstalled, Overloaded
from moesaic.text import compiler as module
from moesaic.text.compiler import Compiler, Matcher
from moesaic.text.grammar import Grammar
from moesaic.text.stream import TextStream
from moesaic.text.tokenizer import Tokenizer

Opened = Callable[[str], Tokenizer]
ALL = ("v1", "v3", "tekken", "llama3", "tales")
CHOICES = [" leading", "ab", "abc", "été 🙂", "日本語", 'quo"te\\', "a\nb", "x" * 40, "  two", "</s>[INST]", "\u0001\t"]
SPARE = 7  # rows of the model that the tokenizer lacks


@pytest.fixture(scope="module")
def compilers(opened: Opened) -> dict[str, tuple[Tokenizer, Compiler]]:
    tokenizers = {name: Tokenizer.open(TALES_FOLDER) if name == "tales" else opened(name) for name in ALL}
    return {name: (t, Compiler(t, t.vocab_size + SPARE)) for name, t in tokenizers.items()}


def ids(matcher: Matcher, size: int) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return [int(index) for index in np.nonzero(bits)[0]]


def shown(tokenizer: Tokenizer, answer: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(stream.add(token_id)[0] for token_id in answer) + stream.finish()


@pytest.mark.parametrize("name", ALL)
def test_allowed_tokens_lead_to_choices_only(name: str, compilers: Any) -> None:
    tokenizer, compiler = compilers[name]
    compiled = compiler.compile(Grammar("choice", CHOICES))
    encoded = [choice.encode() for choice in CHOICES]
    reached = set()
    for seed in range(60):
        draw, matcher, answer = random.Random(seed), compiled(), list[int]()
        so_far, first = b"", True
        while not matcher.done:
            allowed = ids(matcher, tokenizer.vocab_size)
            for token_id in allowed:
                text = so_far + tokenizer.bytes(token_id, first)
                assert not tokenizer.is_special(token_id)
                assert len(text) > len(so_far) or (first and tokenizer.bytes(token_id) == b" ")
                assert any(choice.startswith(text) for choice in encoded)
            if matcher.may_end and draw.random() < 0.5:
                break
            answer.append(draw.choice(allowed))
            so_far += tokenizer.bytes(answer[-1], first)
            first = False
            matcher.accept(answer[-1])
        assert matcher.may_end
        assert shown(tokenizer, answer) in CHOICES
        reached.add(shown(tokenizer, answer))
    assert len(reached) > len(CHOICES) / 2


@pytest.mark.parametrize("name", ALL)
def test_the_tokenizers_own_encoding_is_allowed(name: str, compilers: Any) -> None:
    """A trained model writes a choice as the tokenizer encodes it at the beginning of a text."""
    tokenizer, compiler = compilers[name]
    for text in CHOICES:
        matcher = compiler.compile(Grammar("choice", CHOICES))()
        answer = tokenizer.encode(text)
        assert shown(tokenizer, answer) == text
        for token_id in answer:
            assert token_id in ids(matcher, tokenizer.vocab_size)
            matcher.accept(token_id)
        assert matcher.may_end


@pytest.mark.parametrize("name", ALL)
def test_answers_match_the_regular_expression(name: str, compilers: Any) -> None:
    tokenizer, compiler = compilers[name]
    for pattern in (r"[a-c]{2,5}", r" ?\d+(\.\d{1,3})?", r"(?:ja|nein|vielleicht)!?", r"[а-я]{3,9}", "(🙂|é){2,4}"):
        for seed in range(8):
            draw, matcher, answer = random.Random(seed), compiler.compile(Grammar("regex", pattern))(), list[int]()
            while not matcher.done and not (matcher.may_end and draw.random() < 0.3):
                answer.append(draw.choice(ids(matcher, tokenizer.vocab_size)))
                matcher.accept(answer[-1])
            assert re.fullmatch(pattern, shown(tokenizer, answer))


def test_control_tokens_are_allowed_only_if_a_grammar_names_them(compilers: Any) -> None:
    tokenizer, compiler = compilers["v3"]
    anything = compiler.compile(Grammar("regex", "(.|\n)*"))()
    assert not set(tokenizer.control.values()) & set(ids(anything, tokenizer.vocab_size))
    call_token = tokenizer.control["[TOOL_CALLS]"]
    matcher = compiler.compile(Grammar("lark", f'start: <[{call_token}]> " x"'))()
    assert ids(matcher, tokenizer.vocab_size) == [call_token]
    matcher.accept(call_token)
    answer = [call_token]
    while not matcher.done:  # after a control token, SentencePiece still drops the first space
        answer.append(ids(matcher, tokenizer.vocab_size)[0])
        matcher.accept(answer[-1])
    assert shown(tokenizer, answer) == " x"


def test_matchers_of_one_grammar_are_independent(compilers: Any) -> None:
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
        ("json_schema", {"$ref": "#"}, "no text matches it"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ],
)
def test_malformed_grammars_are_rejected_with_a_position(kind: Any, value: Any, match: str, compilers: Any) -> None:
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
    "exponential expansion": (
        "lark",
        "start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(30)) + 'a30: "x"',
    ),
    "an object with too many optional properties": (
        "json_schema",
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}},
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_grammars_are_rejected(name: str, compilers: Any) -> None:
    """Without limits, llguidance needs seconds or more for each of these grammars."""
    with pytest.raises(InvalidParameter, match=r"too costly|takes more than 1 s|takes too long|cannot be compiled"):
        compilers["v1"][1].compile(Grammar(*COSTLY[name]))


def test_an_answer_over_its_time_budget_raises(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, compiler = compilers["v1"]
    matcher = compiler.compile(Grammar("regex", "[a-z]+"))()
    matcher.accept(ids(matcher, tokenizer.vocab_size)[0])
    monkeypatch.setattr(module, "BUDGET_SECONDS", -1.0)
    assert not matcher.done
    for _ in range(2):
        with pytest.raises(GrammarError, match="processor time"):
            matcher.mask()


def test_the_cache_is_bounded_and_evicts_the_oldest(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = compilers["v1"]
    compiler = Compiler(tokenizer, tokenizer.vocab_size)
    compiler._tables = compilers["v1"][1]._vocabulary()
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    one, two, three = (Grammar("regex", f"{text}+") for text in "abc")
    first = compiler.compile(one)
    compiler.compile(two)
    assert compiler.compile(one) is first
    compiler.compile(three)
    assert list(compiler._cache) == [one.source, three.source]
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 20)
    large = Grammar("regex", "d" * 30)
    compiler.compile(large)
    assert not compiler._cache


def test_too_many_compilations_at_once_are_rejected(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiler = compilers["v1"]
    cached = Grammar("regex", "[a-z]+")
    compiler.compile(cached)
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(compiler, "_slots", threading.BoundedSemaphore(1))
    with compiler._slots:
        with pytest.raises(Overloaded):
            compiler.compile(Grammar("regex", "new"))
        compiler.compile(cached)


def test_the_error_without_llguidance_has_the_install_command(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotInstalled, match=r"pip install 'moesaic\[serve\]'"):
        compilers["v1"][1].compile(Grammar("regex", "never seen"))


def test_json_has_at_most_one_space(compilers: Any) -> None:
    tokenizer, compiler = compilers["v1"]
    compiled = compiler.compile(Grammar("json_schema", {"type": "array", "items": {"enum": [1]}, "minItems": 2}))
    for text, good in (("[1,1]", True), ("[1, 1]", True), ("[ 1,1 ]", True), ("[1,  1]", False), ("[1,\n1]", False)):
        matcher = compiled()
        for token_id in tokenizer.encode(text):
            if token_id not in ids(matcher, tokenizer.vocab_size):
                assert not good
                break
            matcher.accept(token_id)
        else:
            assert good
            assert json.loads(text) == [1, 1]
