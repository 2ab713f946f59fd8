"""What every reader of a tokenizer file hands over, and the pieces the readers share.

Knows the two families of vocabulary: byte-level BPE (a piece is a string of bytes) and SentencePiece
BPE (a piece is text in which U+2581 stands for a space, with single bytes to fall back to). Does not
know any file layout.
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
MAX_FILE_BYTES = 128 << 20  # the largest published tokenizer file has about 35 MB
MAX_IDS = 1 << 21


def _one_for_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece shows every byte that belongs to no character; Python's "replace" (and so tiktoken)
# shows one mark for a character that was cut short.
codecs.register_error("moesaic.one_for_each", _one_for_each)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file, read: enough to encode and to decode exactly.

    ``core`` turns text without special tokens into ids (a ``tokenizers.Tokenizer``). Where
    ``escape`` is set it has no idea of spaces: text is escaped, and prefixed, before it gets there.
    """

    core: Any
    pieces: Sequence[bytes | None]  # id -> the bytes it stands for (a control token: its name); None: no such id
    control: Mapping[str, int]  # special tokens by name
    bos_id: int | None
    eos_ids: frozenset[int]
    escape: bool = False  # spaces become U+2581 before ``core`` sees the text
    dummy: bool = False  # ... and one more is put in front
    bare: Any = None  # ``core`` without a leading space of its own, where ``core`` adds one
    once: bool = False  # the leading space belongs to the beginning of a text only, not to what follows a special token
    strip: bool = False  # decoding drops that leading space again
    unstripped: frozenset[int] = frozenset()  # ids that keep it
    fixed: Mapping[str, int] = field(default_factory=dict)  # pieces found in text before anything is merged
    errors: str = "replace"  # codec error handler for bytes that are no text
    version: str | None = None  # as the file says it ("v3"), where it does


def byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    table |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def merges(ranked: Iterable[str], known: Container[str]) -> list[tuple[str, str]]:
    """Return the BPE merges of a vocabulary that only ranks its pieces.

    Such a file says which piece wins, not of which two it was made: every split into two known
    pieces may lead to it.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a tokenizer file.

    Raises:
        TokenizerError: not a readable file, empty, or larger than any tokenizer is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(path, f"cannot be read ({error.strerror})") from error
    if not data:
        raise TokenizerError(path, "the file is empty")
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(path, f"larger than {MAX_FILE_BYTES >> 20} MiB, which no tokenizer is")
    return data


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever the ``tokenizers`` library throws at a file, its panics included, into a TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # The library raises bare Exception, and its panics are no Exception at all.
        if type(error) is Exception or type(error).__name__ == "PanicException" or isinstance(error, ValueError):
            raise TokenizerError(path, f"not understood: {first_line(error)}") from error
        raise


def first_line(error: BaseException) -> str:
    """Return the first 200 characters of the first line of an error's message."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
