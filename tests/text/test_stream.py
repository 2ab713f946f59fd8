"""Incremental detokenization and stop strings, for any ids and any cut of the text."""

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesaic.errors import InvalidParameter
from moesaic.text.stream import Detokenizer, StopStrings, TextStream
from moesaic.text.tokenizer import Tokenizer
from tests.support.require import package_folder

NAMES = ("v1", "v2", "v3", "v7", "tekken", "llama3")
Opened = Callable[[str], Tokenizer]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip_special", [True, False])
def test_joined_pieces_equal_the_decoded_text(name: str, skip_special: bool, opened: Opened) -> None:
    tokenizer = opened(name)
    some = st.one_of(st.integers(-2, tokenizer.vocab_size + 2), st.integers(0, 1300))

    def check(ids: Sequence[int]) -> None:
        detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        shown = [detokenizer.add(token_id) for token_id in ids]
        assert "".join(shown) + detokenizer.finish() == tokenizer.decode(ids, skip_special=skip_special)

    settings(max_examples=150, deadline=None)(given(st.lists(some, max_size=15))(check))()
    settings(max_examples=100, deadline=None)(given(st.text(max_size=40))(lambda text: check(tokenizer.encode(text))))()


@pytest.mark.parametrize("name", NAMES)
def test_only_complete_characters_are_returned(name: str, opened: Opened) -> None:
    tokenizer = opened(name)
    text = "Grüße 🙂‍↕️ 𐍈 鿿 日本 ꙮ 🇩🇪"
    detokenizer, shown = Detokenizer(tokenizer), ""
    for token_id in tokenizer.encode(text):
        shown += detokenizer.add(token_id)
        assert text.startswith(shown)
    assert shown == text  # no complete character is held back
    assert detokenizer.finish() == ""


def test_invalid_bytes_become_replacement_characters(opened: Opened) -> None:
    tokenizer = opened("v1")
    byte = {value: 3 + value for value in range(256)}
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add(byte[b]) for b in (0xF0, 0x9F, 0x99, 0x82)] == ["", "", "", "🙂"]
    assert [detokenizer.add(byte[b]) for b in (0xF0, 0x9F, 0x41)] == ["", "", "\ufffd\ufffdA"]
    assert detokenizer.add(byte[0xFF]) == "\ufffd"
    assert detokenizer.add(byte[0xE2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_cost_per_token_does_not_depend_on_the_length(opened: Opened) -> None:
    tokenizer = opened("v1")
    decoded: list[int] = []

    class Counting(Tokenizer):
        def bytes(self, token_id: int, first: bool = False) -> bytes:
            decoded.append(token_id)
            return super().bytes(token_id, first)

    counting = Counting(tokenizer._vocabulary)
    detokenizer = Detokenizer(counting)
    for token_id in [1000] * 500:
        detokenizer.add(token_id)
    assert len(decoded) == 500


def _stop_at(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    strings, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = strings.add(piece)
        shown += text
        if stopped:
            return shown, True
    shown += strings.finish()
    return shown, strings.stopped is not None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text(alphabet="abc", max_size=3), max_size=12),
)
@example(["bcda", "cd"], ["abcd", "b"])
@example(["bcda", "cd"], ["abcd", "a"])
@example(["bcda", "cd"], ["abcd"])
@example(["aab"], ["a", "a", "a", "b"])
def test_text_ends_at_the_earliest_stop_string(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    starts = [start for stop in stops if (start := whole.find(stop)) >= 0]
    assert _stop_at(stops, pieces) == (whole[: min(starts, default=None)], bool(starts))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_only_a_possible_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    strings, shown, seen = StopStrings(stops), "", ""
    for character in text:
        piece, stopped = strings.add(character)
        shown, seen = shown + piece, seen + character
        if stopped:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops) or any(stop in held for stop in stops)


def test_text_stream_decodes_and_stops(opened: Opened) -> None:
    tokenizer = opened("v1")
    ids = tokenizer.encode("Once there was a rabbit.\nUser: and then? 🙂")
    stream = TextStream(tokenizer, ["\nUser:"])
    shown = ""
    for token_id in ids:
        text, stopped = stream.add(token_id)
        shown += text
        if stopped:
            break
    assert (shown, stream.stopped) == ("Once there was a rabbit.", "\nUser:")
    assert stream.add(ids[0]) == ("", True)
    assert stream.finish() == ""

    stream = TextStream(tokenizer, ["🙂🙂"])
    parts = [stream.add(token_id)[0] for token_id in ids]
    assert "🙂" not in "".join(parts)  # it may be the first half of the stop string
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)
    assert stream.stopped is None


NAMED_STOPS = ("<|eot_id|>", "b<|eot_id|>", "<|eot_id|>a", "a<|eot_id|><|eom_id|>b", "ab", "eot_id")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]), max_size=9),
    st.lists(st.sampled_from(NAMED_STOPS), max_size=3, unique=True),
    st.booleans(),
)
@example(["a", "<|eot_id|>", "<|eom_id|>", "b"], ["a<|eot_id|><|eom_id|>b"], True)
def test_stop_strings_match_special_tokens_that_are_left_out(parts, stops, include) -> None:  # type: ignore[no-untyped-def]
    tokenizer = _llama3()
    whole, removed = (
        "".join(parts),
        [name for name in ("<|eot_id|>", "<|eom_id|>") if not any(name in s for s in stops)],
    )
    searched = whole.replace("<|python_tag|>", "")
    for name in removed:
        searched = searched.replace(name, "")
    starts = [(searched.find(stop), stop) for stop in stops if stop in searched and stop != "eot_id"]
    stream, shown = TextStream(tokenizer, stops, included=stops if include else ()), ""
    for part in parts:
        shown += stream.add(tokenizer.control.get(part) or tokenizer.encode(part)[0])[0]
    shown += stream.finish()
    start, stop = min(starts, default=(len(searched), None))
    expected = searched[:start].replace("<|eot_id|>", "").replace("<|eom_id|>", "")
    assert (shown, stream.stopped) == (expected + (stop if include and stop else ""), stop)


@functools.cache
def _llama3() -> Tokenizer:
    return Tokenizer.open(package_folder("llama_models") / "llama3" / "tokenizer.model")


def test_an_empty_stop_string_is_rejected() -> None:
    with pytest.raises(InvalidParameter, match="stop"):
        StopStrings(["a", ""])
