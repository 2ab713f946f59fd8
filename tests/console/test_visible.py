"""Escaping of control characters."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from moesaic.console.visible import one_line, visible


@given(st.text())
def test_control_characters_are_escaped(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not [c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI")]
    shown.encode("utf-8")  # unpaired surrogates are escaped, too


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf"))))
def test_other_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


def test_escape_notation() -> None:
    assert visible("a\x1b[2J\x9b\u202e\ta\n") == "a\\x1b[2J\\x9b\\u202e\ta\n"
    assert visible("👩\u200d👧 क्\u200dष") == "👩\u200d👧 क्\u200dष"  # joiners are part of the text


def test_one_line() -> None:
    assert one_line(" a\nb\r\n\x1bc ") == "a b \\x1bc"
