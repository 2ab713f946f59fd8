"""One interface over every vocabulary: text in, ids out, and back.

Knows which file of a directory is the tokenizer and how ids become bytes. Does not know how a file
is laid out (``_sentencepiece``, ``_tiktoken``, ``_tokenizer_json``) nor what a conversation is
(``chat``). Text is only ever text: a special token's name inside it is encoded letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from moesaic.errors import InvalidRequest, TokenizerError
from moesaic.text import _sentencepiece, _tiktoken, _tokenizer_json
from moesaic.text._vocabulary import SPACE, Vocabulary, first_line, read_bounded

# In the order of preference; a later one is looked at only where no earlier one exists.
FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tekken*.json", "*.model.v*")


class Tokenizer:
    """Encodes and decodes exactly as the tokenizer that the checkpoint was trained with.

    ``vocab_size`` is the highest id + 1, ``control`` maps special tokens to their ids, ``eos_ids``
    are the ends of text that the tokenizer's own files name (a generation config may know more),
    ``version`` is Mistral's tokenizer version where the file states one. Safe to share among threads.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size = len(vocabulary.pieces)
        self.control: Mapping[str, int] = vocabulary.control
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.version = vocabulary.version
        self.strips_space = vocabulary.strip
        self.byte_errors = vocabulary.errors
        self.byte_level = not vocabulary.escape and not vocabulary.strip
        self._special = frozenset(vocabulary.control.values())
        self._vocabulary = vocabulary
        longest_first = sorted(vocabulary.fixed, key=len, reverse=True)
        self._fixed = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        by_length = sorted(vocabulary.control, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """Return the tokenizer in a file, or the one in a checkpoint's directory.

        Raises:
            TokenizerError: there is none, or more than one of the same kind, or it cannot be read exactly.
        """
        file = _find(path) if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(file, "no such file")
        return cls(_read(file, read_bounded(file)))

    def encode(self, text: str, *, bos: bool = False, prefix: bool = True) -> list[int]:
        """Return the ids of ``text``, special tokens in it taken as plain text.

        With ``prefix`` off, the space that SentencePiece puts in front of a text is not added: that
        is how text continues a text. A half surrogate, which is no character, becomes U+FFFD.

        Raises:
            InvalidRequest: the text breaks the ``tokenizers`` library.
        """
        text = _without_surrogates(text)
        v = self._vocabulary
        ids = self._escaped(text, prefix) if v.escape else _run(v.core if prefix or v.bare is None else v.bare, text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_marked(self, text: str, mark: str = "") -> list[int]:
        """Return the ids of a text whose special tokens *are* special: a rendered template, never user input.

        ``mark`` is dropped from the text after the special tokens have been found, so that a caller
        can break a token's name that is meant as text.
        """
        ids: list[int] = []
        for place, part in enumerate(self._control.split(text) if self._control else [text]):
            if place % 2:
                ids.append(self.control[part])
            elif part:
                part = part.replace(mark, "") if mark else part
                ids += self.encode(part, prefix=not ids or not self._vocabulary.once)
        return ids

    def find_control(self, text: str) -> Iterator[re.Match[str]]:
        """Yield where names of special tokens stand in ``text``."""
        return self._control.finditer(text) if self._control else iter(())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        Without ``skip_special`` the names of special tokens stand in the text.
        """
        parts: list[str] = []
        fresh = self.strips_space
        for special, run in groupby(ids, self.is_special):
            if special and skip_special:
                continue
            pieces = [self.bytes(id, fresh and place == 0 and not special) for place, id in enumerate(run)]
            parts.append(b"".join(pieces).decode("utf-8", self.byte_errors))
            fresh = False
        return "".join(parts)

    def is_special(self, id: int) -> bool:
        """Whether ``id`` is a special token, or no token at all (a model may have more rows than pieces)."""
        return id in self._special or not 0 <= id < self.vocab_size or self._vocabulary.pieces[id] is None

    def bytes(self, id: int, first: bool = False) -> bytes:
        """Return exactly what ``id`` stands for, a special token's name, or nothing for an id that is no token.

        ``first`` asks for it at the beginning of a text, where a SentencePiece loses its leading space.
        """
        piece = self._vocabulary.pieces[id] if 0 <= id < self.vocab_size else None
        if piece and first and self.strips_space and piece[:1] == b" " and id not in self._vocabulary.unstripped:
            return piece[1:]
        return piece or b""

    def piece(self, id: int) -> str:
        """Return the text of one id for display: half characters show as U+FFFD."""
        return self.bytes(id).decode("utf-8", self.byte_errors)

    def _escaped(self, text: str, prefix: bool) -> list[int]:
        v = self._vocabulary
        if prefix and v.dummy and text:
            text = " " + text
        text = text.replace(" ", SPACE)
        if self._fixed is None:
            return _run(v.core, text)
        ids: list[int] = []
        for place, part in enumerate(self._fixed.split(text)):
            ids += [v.fixed[part]] if place % 2 else _run(v.core, part)
        return ids


def _run(core: Any, text: str) -> list[int]:
    try:
        ids: list[int] = core.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library's panics are no Exception
            raise
        raise InvalidRequest(f"the text cannot be tokenized: {first_line(error)}") from error
    return ids


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _find(folder: Path) -> Path:
    for pattern in FILES:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise TokenizerError(folder, f"has more than one tokenizer: name one of {names}")
        if found:
            return found[0]
    raise TokenizerError(folder, f"has no tokenizer: none of {', '.join(FILES)}")


def _read(path: Path, data: bytes) -> Vocabulary:
    if data[:1] == b"{":
        reader = _tiktoken.read_tekken if b'"default_num_special_tokens"' in data else _tokenizer_json.read
    else:
        reader = _tiktoken.read_ranks if _tiktoken.is_ranks(data) else _sentencepiece.read
    return reader(path, data)
