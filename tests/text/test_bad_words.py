"""Words that an answer must not have, against a search through all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.builtin import TALES_FOLDER
from moesaic.text.bad_words import BadWords
from moesaic.text.tokenizer import Tokenizer
from tests.support.require import package_folder

FILES = {
    "tales": lambda: TALES_FOLDER,
    "sentencepiece": lambda: package_folder("mistral_common") / "data/tokenizer.model.v1",
    "tekken": lambda: package_folder("mistral_common") / "data/tekken_240911.json",
}


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request) -> Tokenizer:
    return Tokenizer.open(Path(FILES[request.param]()))


@pytest.mark.parametrize("word", ["king", " ship", "a kind queen", "é", "日本", "🙂!"])
def test_no_way_to_write_a_word_is_left(tokenizer, word):
    banned = BadWords(tokenizer, (word,), tokenizer.vocab_size)
    for text in (word.strip(), f" {word.strip()}", f"so {word.strip()}"):
        ids = tokenizer.encode(text)
        assert ids[-1] in banned(ids[:-1])
    letters = [tokenizer.encode(letter, prefix=False) for letter in word.strip()]
    by_letter = [token_id for ids in letters for token_id in ids]
    assert by_letter[-1] in banned(by_letter[:-1])
    assert tokenizer.encode("sea")[-1] not in banned(())


def test_a_word_inside_a_longer_token_is_allowed(tokenizer):
    longer = tokenizer.encode("kingdom", prefix=False)
    if len(longer) == 1:
        assert longer[0] not in BadWords(tokenizer, ("king",), tokenizer.vocab_size)(())
    assert not BadWords(tokenizer, (), tokenizer.vocab_size)(tokenizer.encode("any text"))


def test_tokens_without_a_row_are_left_out(tokenizer):
    [token_id] = BadWords(tokenizer, ("a",), tokenizer.vocab_size)(()) & set(tokenizer.encode("a", prefix=False))
    assert token_id not in BadWords(tokenizer, ("a",), token_id)(())


TALES = Tokenizer.open(TALES_FOLDER)
SOME = TALES.encode("Once there was a king who had a ship and a queen", prefix=False)
FORBIDDEN = BadWords(TALES, ("a king", "ship", "en"), TALES.vocab_size)


@given(st.lists(st.sampled_from(SOME), max_size=8), st.sampled_from(SOME))
@settings(max_examples=200)
def test_a_token_is_forbidden_if_a_run_of_tokens_reads_as_a_word(begun, token_id):
    ids = [*begun, token_id]
    runs = {b"".join(map(TALES.bytes, ids[start:])) for start in range(len(ids))}
    words = {form for word in (b"a king", b"ship", b"en") for form in (word, b" " + word)}
    assert (token_id in FORBIDDEN(begun)) == bool(runs & words)
