"""Vocabulary that the readers of tokenizer files return, and helpers that the readers share.

There are two families. In byte-level BPE, tokens are byte strings. In SentencePiece BPE, tokens are text with U+2581
for a space, and a character without a token becomes single bytes. This module does not depend on any file layout.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import TokenizerError

SPACE = "\u2581"  # how SentencePiece writes a space
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
MAX_FILE_BYTES = 128 << 20  # the largest published tokenizer files have about 35 MB
MAX_IDS = 1 << 21


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece writes one U+FFFD for each invalid byte. Python's "replace", and therefore tiktoken, writes one
# U+FFFD for a whole truncated character.
codecs.register_error("moesaic.replace_each_byte", _replace_each_byte)


@dataclass(frozen=True)
class Vocabulary:
    """Contents of a tokenizer file: all that is needed to encode and decode exactly as the original tokenizer."""

    core: Any
    """The ``tokenizers.Tokenizer`` that turns text without special tokens into ids."""
    pieces: Sequence[bytes | None]
    """Bytes of each token by id; for a control token, the bytes of its name; None for an id that no token has."""
    control: Mapping[str, int]
    """Ids of the control tokens by name."""
    bos_id: int | None
    eos_ids: frozenset[int]
    escape_spaces: bool = False
    """Whether spaces must be replaced by U+2581 before ``core`` encodes the text."""
    add_prefix: bool = False
    """Whether a space must be added in front of the text before ``core`` encodes it."""
    core_without_prefix: Any = None
    """A variant of ``core`` that adds no leading space; None if ``core`` adds none."""
    prefix_only_first: bool = False
    """Whether the leading space is added only at the beginning of a text, and not after a special token."""
    strip_prefix: bool = False
    """Whether decoding removes the space at the beginning of a text."""
    keeps_space: frozenset[int] = frozenset()
    """Ids of tokens whose leading space decoding keeps even at the beginning of a text."""
    user_defined: Mapping[str, int] = field(default_factory=dict)
    """Ids, by text, of the tokens that are found in a text before any merge."""
    added_ids: frozenset[int] = frozenset()
    """Ids of the tokens that were added after the vocabulary was trained. Control tokens may be missing."""
    byte_errors: str = "replace"
    """Name of the codec error handler with which bytes that are not valid UTF-8 are decoded."""
    version: str | None = None
    """Version of the tokenizer as the file states it, for example "v3"; None if it states none."""


def byte_alphabet() -> list[str]:
    """Return, for each byte in order, the printable character that stands for it in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    table |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def merges(ranked: Iterable[str], vocabulary: Container[str]) -> list[tuple[str, str]]:
    """Return the BPE merges of a vocabulary whose file ranks the tokens but lists no merges.

    ``ranked`` has the tokens' texts, the one to merge first at the beginning. The file does not say from which two
    parts a token is merged. Every split into two tokens of the ``vocabulary`` is therefore a merge.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a tokenizer file.

    Raises:
        TokenizerError: the file cannot be read, is empty, or is larger than ``MAX_FILE_BYTES``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(path, f"cannot be read ({error.strerror})") from error
    if not data:
        raise TokenizerError(path, "the file is empty; download it again")
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(path, f"larger than {MAX_FILE_BYTES >> 20} MiB: it is not a tokenizer file")
    return data


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Return a context that turns errors of the ``tokenizers`` library, also Rust panics, into TokenizerError.

    ``path`` is the tokenizer file that the error names.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # The library raises plain Exception; its panics derive from BaseException.
        if type(error) is Exception or type(error).__name__ == "PanicException" or isinstance(error, ValueError):
            raise TokenizerError(path, f"cannot be parsed: {first_line(error)}") from error
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, at most 200 characters."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
