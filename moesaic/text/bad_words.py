"""Words that an answer must not contain.

A word is found where whole tokens, one after another, spell the word, or the word with a space in front. It does not
matter how it is split into tokens. A token that contains the word, such as "category" for "cat", is allowed. vLLM's
``bad_words`` has the same meaning, but forbids only one way to split the word.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

from moesaic.text.tokenizer import Tokenizer

_INDEXES: WeakKeyDictionary[Tokenizer, dict[bytes, tuple[int, ...]]] = WeakKeyDictionary()


class BadWords:
    """Function from the tokens generated so far to the token ids that would complete a forbidden word.

    It keeps no state between calls, so it also works for an answer that another server continues.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], rows: int) -> None:
        """Create the function.

        Args:
            tokenizer: the tokenizer of the model.
            words: the forbidden words.
            rows: number of token ids that the model has logits for; higher ids are never returned.
        """
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
        """Return the token ids that must not follow ``generated``, because they would complete a forbidden word."""
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
    """Return the ids of all tokens by their bytes, without special tokens; the result is cached by tokenizer."""
    if tokenizer not in _INDEXES:
        found: dict[bytes, tuple[int, ...]] = {}
        for token_id in range(tokenizer.vocab_size):
            if not tokenizer.is_special(token_id):
                piece = tokenizer.bytes(token_id)
                found[piece] = (*found.get(piece, ()), token_id)
        _INDEXES[tokenizer] = found
    return _INDEXES[tokenizer]


def _forms(word: str) -> set[bytes]:
    """Return the UTF-8 bytes of ``word`` without and with a space in front; a word of only spaces stays as it is."""
    text = word.encode("utf-8", "replace")
    bare = text.lstrip(b" ")
    return {bare, b" " + bare} if bare else {text}
