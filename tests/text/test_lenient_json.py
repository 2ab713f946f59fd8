"""Reader of objects as models write them: strict JSON comes out as it was, and what is nearly JSON becomes JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.text.lenient_json import MAX_DEPTH, MAX_KEY, LenientJson

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
objects = st.dictionaries(texts, values, max_size=4)


def read(text: str) -> tuple[str, LenientJson]:
    """Return what comes out, and the reader after the last character."""
    reader, out = LenientJson(), ""
    for index, char in enumerate(text):
        assert not reader.complete, f"complete before {text[index:]!r}"
        out += reader.add(char)
    return out, reader


def parsed(text: str) -> Any:
    out, reader = read(text)
    assert reader.complete, text
    return json.loads(out, parse_constant=None)


@given(objects, st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_strict_json_is_returned_as_it_is(value: Any, indent: Any, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    out, reader = read(text)
    assert (out, reader.complete) == (text, True)


@given(objects)
def test_a_python_dictionary_becomes_json(value: Any) -> None:
    assert parsed(repr(value)) == value


@given(
    st.lists(st.sampled_from([*"{}[]\"'\\:,ux1e-.", "\n", "\x00", "true", "None", "d83d", "é", '"a"', "'a'"])).map(
        "".join
    )
)
def test_any_text_is_json_if_it_is_complete_and_unchanged_if_it_is_invalid(text: str) -> None:
    reader, out = LenientJson(), ""
    for char in "{" + text:
        out += reader.add(char)
        if reader.complete:
            assert isinstance(json.loads(out), dict)
            out.encode()
            return
        if reader.invalid:
            break
    assert reader.invalid or len(out) <= 6 * len(text) + 1


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("'a\nb\tc\x01'", "a\nb\tc\x01"),
        ('"a\r\nb"', "a\r\nb"),
        (r""" 'say "hi"' """, 'say "hi"'),
        (r""" 'it\'s' """, "it's"),
        (r""" "it\'s" """, "it's"),
        (r""" '\x41\U0001f98a\\' """, "A🦊\\"),
        (r""" "C:\Users\x" """, "C:\\Users\\x"),
        (r""" "\u12" """, "\\u12"),
        (r""" "\d+" """, "\\d+"),
        (r""" "\ud83e\udd8a" """, "🦊"),
        (r""" "\ud83e and \udd8a" """, "\ufffd and \ufffd"),
        (r""" "\ud83e\ud83e\udd8a\ud83e" """, "\ufffd🦊\ufffd"),
        (r""" "\ud83e\n" """, "\ufffd\n"),
        (" [True, False, None, -1.5e+3]", [True, False, None, -1500.0]),
        ("1" * 400, int("1" * 400)),
    ],
)
def test_what_models_write(written: str, value: Any) -> None:
    assert parsed('{"a": ' + written + "}") == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[",
            "1",
            '"',
            "x",
            "{1",
            "{,",
            "{]",
            '{"a",',
            '{"a" 1',
            '{"a":}',
            '{"a":,',
            '{"a": 1 2',
            '{"a": 1,}',
            '{"a": [1,]',
        ),
        *(
            '{"a": 01}',
            '{"a": 1.}',
            '{"a": NaN,',
            '{"a": -Infinity}',
            '{"a": 1e999}',
            '{"a": tru}',
            '{"a": [1}',
            "{'a': 'it's",
        ),
        '{"a": ' + "1" * 5000,
        '{"a": ' + "[" * MAX_DEPTH,
    ],
)
def test_invalid_text_is_known_at_once_and_returned_as_it_is(text: str) -> None:
    reader, out = LenientJson(), ""
    for index, char in enumerate(text):
        out += reader.add(char)
        assert reader.invalid == (index == len(text) - 1) or len(text) > 5000 or text.endswith("s")
    assert reader.invalid
    assert out == text.replace("'", '"', 4) if "'" in text else out == text


def test_reading_goes_on_behind_an_invalid_value() -> None:
    reader = LenientJson()
    assert "".join(map(reader.add, '{"a": {"b": NaN, [x]}')) == '{"a": {"b": NaN, [x]}'
    assert (reader.invalid, reader.depth, reader.keys) == (True, 1, ['"a"'])
    reader.recover()
    assert "".join(map(reader.add, ", 'c': 1}")) == ', "c": 1}'
    assert reader.complete


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"a": 12', "12"),
        ('{"a": tr', "tr"),
        ('{"a": Fal', "fal"),
        ('{"a": Non', "nul"),
        ('{"a": "x', ""),
        ('{"a": 1 ', ""),
    ],
)
def test_what_is_held_back_is_flushed_at_the_end(text: str, rest: str) -> None:
    _, reader = read(text)
    assert reader.flush() == rest


def test_long_keys_are_not_recorded() -> None:
    out, reader = read('{"' + "x" * 100_000 + '": 1')
    assert len(out) > 100_000
    assert len(reader.keys[0]) == MAX_KEY
