"""How texts are cut into the windows in which a model's predictions are measured: two conventions.

``documents``: each text is a document of its own, BOS + text + EOS. Its windows do not overlap, and each token but the
document's first is predicted once, from the tokens before it in its window (Hugging Face's "perplexity of fixed-length
models" with stride = length).

``llama.cpp``: that of llama.cpp's program ``llama-perplexity``. All texts are one stream of tokens, which begins with
BOS if the vocabulary has one, and is cut into windows of ``length`` tokens; an incomplete last window is left out. BOS
replaces the first token of each window. The model reads the whole window, and only the predictions after its first half
count: tokens ``length // 2 + 1`` to ``length - 1``. So each counted token has at least half a window of context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.text.tokenizer import Tokenizer
from moesaic.token_rows import check_ids

CONVENTIONS = ("documents", "llama.cpp")
SEPARATOR = "\n\n"
"""Text between two documents in the stream of the convention llama.cpp."""
MIN_LENGTH = {"documents": 1, "llama.cpp": 3}
"""Shortest window in which a prediction counts."""
STEP_TOKENS = 2048
"""Maximum tokens computed at once, but at least one window; limits the memory of activations."""


class Window(NamedTuple):
    """Tokens that the model reads, and the tokens to predict after the last ``len(targets)`` of them."""

    ids: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Corpus:
    """Texts as windows."""

    windows: tuple[Window, ...]
    documents: int
    bytes: int
    """Size in UTF-8 of the text that is predicted."""
    convention: str
    length: int
    """Tokens of a window."""

    def steps(self) -> Iterator[list[Window]]:
        """Yield the windows in groups of at most ``STEP_TOKENS`` tokens, in order."""
        step: list[Window] = []
        size = 0
        for window in self.windows:
            if step and size + len(window.ids) > STEP_TOKENS:
                yield step
                step, size = [], 0
            step.append(window)
            size += len(window.ids)
        if step:
            yield step


def corpus(texts: Sequence[str], tokenizer: Tokenizer, rows: int, length: int, convention: str = "documents") -> Corpus:
    """Return ``texts`` as windows of ``length`` tokens.

    Args:
        texts: the documents.
        tokenizer: the model's tokenizer.
        rows: the number of token ids that the model has.
        length: tokens of a window.
        convention: one of ``CONVENTIONS``.

    Raises:
        InvalidParameter: the convention is unknown, the windows are too short for it, or the model lacks a token.
        InvalidRequest: the texts are empty, or too short for the convention.
    """
    if convention not in CONVENTIONS:
        raise InvalidParameter("convention", f"is {convention!r}, expected {' or '.join(CONVENTIONS)}")
    if length < MIN_LENGTH[convention]:
        raise InvalidParameter("length", f"is {length}, expected at least {MIN_LENGTH[convention]} tokens")
    cut = _documents if convention == "documents" else _stream
    windows, size = cut(texts, tokenizer, rows, length)
    if not windows or not size:
        raise InvalidRequest("there is no text to predict")
    return Corpus(tuple(windows), len(texts), size, convention, length)


def document(tokenizer: Tokenizer, text: str, rows: int) -> list[int]:
    """Return the ids of a text between BOS and EOS, which are left out if the model, with ``rows`` ids, has none."""
    ends = sorted(token_id for token_id in tokenizer.eos_ids if token_id < rows)
    return [*tokenizer.encode(text, bos=True), *ends[:1]]


def document_windows(ids: list[int], length: int) -> Iterator[Window]:
    """Yield the windows of at most ``length`` tokens of a document with these ids."""
    for start in range(0, len(ids) - 1, length):
        targets = ids[start + 1 : start + 1 + length]
        yield Window(ids[start : start + len(targets)], targets)


def _documents(texts: Sequence[str], tokenizer: Tokenizer, rows: int, length: int) -> tuple[list[Window], int]:
    """Return the windows of the convention ``documents``, and the size of the texts in bytes."""
    windows: list[Window] = []
    for text in texts:
        ids = document(tokenizer, text, rows)
        check_ids("file", ids, tokenizer, rows)
        windows += document_windows(ids, length)
    return windows, sum(len(text.encode("utf-8", "replace")) for text in texts)


def _stream(texts: Sequence[str], tokenizer: Tokenizer, rows: int, length: int) -> tuple[list[Window], int]:
    """Return the windows of the convention ``llama.cpp``, and the size of the predicted tokens in bytes."""
    text = SEPARATOR.join(texts).removesuffix("\n")  # llama.cpp drops one line break at the end of a file
    if not text:
        return [], 0
    ids = tokenizer.encode(text, bos=True)
    check_ids("file", ids, tokenizer, rows)
    if len(ids) < 2 * length:
        raise InvalidRequest(
            f"the text has {len(ids)} tokens, but the convention llama.cpp needs two windows, {2 * length} tokens: "
            "add text, or choose a smaller length"
        )
    windows = [_half_window(ids[start : start + length], tokenizer.bos_id) for start in _starts(ids, length)]
    return windows, sum(len(tokenizer.bytes(token_id)) for window in windows for token_id in window.targets)


def _starts(ids: list[int], length: int) -> range:
    return range(0, len(ids) - length + 1, length)


def _half_window(ids: list[int], bos_id: int | None) -> Window:
    """Return a window of the stream. Its last token is only predicted, since no counted prediction reads it."""
    read = ids[:-1] if bos_id is None else [bos_id, *ids[1:-1]]
    return Window(read, ids[len(ids) // 2 + 1 :])
