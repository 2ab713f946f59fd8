"""Words that an answer must not have.

A word is found where a run of whole tokens reads as the word, or as the word with a space in front, however it is split
into tokens. A token that has the word inside, such as "category" for "cat", is allowed. The meaning follows vLLM's
``bad_words``, which forbids one way to split the word.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

from moesaic.text.tokenizer import Tokenizer

_INDEXES: WeakKeyDictionary[Tokenizer, dict[bytes, tuple[int, ...]]] = WeakKeyDictionary()


class BadWords:
    """The token ids that would complete a word, for any beginning of an answer.

    It depends on the generated tokens only, so an answer that is continued elsewhere has the same words.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], rows: int) -> None:
        """Prepare for an answer of a model with this number of rows without these words."""
        self._tokenizer = tokenizer
        self._completing: dict[bytes, set[int]] = {}  # beginning of a word -> ids that complete it
        forms = {form for word in words for form in _forms(word)}
        self._longest = max(map(len, forms), default=0)
        ids_by_bytes = _ids_by_bytes(tokenizer)
        for form in forms:
            for split in range(len(form)):
                if ids := [token_id for token_id in ids_by_bytes.get(form[split:], ()) if token_id < rows]:
                    self._completing.setdefault(form[:split], set()).update(ids)

    def __call__(self, generated: Sequence[int]) -> Collection[int]:
        """Return the token ids that must not follow the generated tokens."""
        banned = set(self._completing.get(b"", ()))
        end = b""
        for token_id in reversed(generated):
            end = self._tokenizer.bytes(token_id) + end
            if len(end) >= self._longest:
                break
            if end:
                banned |= self._completing.get(end, set())
        return banned


def _ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, tuple[int, ...]]:
    """Return the ids of the tokens that have these bytes, without special tokens. They are found once."""
    if tokenizer not in _INDEXES:
        found: dict[bytes, tuple[int, ...]] = {}
        for token_id in range(tokenizer.vocab_size):
            if not tokenizer.is_special(token_id):
                piece = tokenizer.bytes(token_id)
                found[piece] = (*found.get(piece, ()), token_id)
        _INDEXES[tokenizer] = found
    return _INDEXES[tokenizer]


def _forms(word: str) -> set[bytes]:
    """Return the bytes of a word without and with a space in front; of spaces alone, only themselves."""
    text = word.encode("utf-8", "replace")
    bare = text.lstrip(b" ")
    return {bare, b" " + bare} if bare else {text}
