"""Tokenizer: text to token ids and back, with one interface for all vocabularies.

This module selects the tokenizer file of a directory and turns ids into bytes. The readers of the file formats are
``_sentencepiece``, ``_tiktoken``, ``_tokenizer_json`` and ``_gguf_vocabulary``. The names of special tokens in a text
are encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from moesaic import gguf
from moesaic.errors import InvalidRequest, TokenizerError
from moesaic.text import _gguf_vocabulary, _sentencepiece, _tiktoken, _tokenizer_json
from moesaic.text._vocabulary import SPACE, Vocabulary, first_line, read_bounded

# In order of preference: a pattern is used only if no file matches an earlier one.
FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tekken*.json", "*.model.v*")


class Tokenizer:
    """Tokenizer that encodes and decodes exactly like the one that the checkpoint was trained with.

    ``vocab_size`` is the highest id plus one, and ``base_size`` is the same without added tokens. ``control`` maps the
    names of special tokens to their ids. ``bos_id`` is the beginning-of-text token, or None. ``eos_ids`` are the
    end-of-text tokens that the tokenizer's files name; generation_config.json may name more. ``version`` is Mistral's
    tokenizer version if the file states one, otherwise None. Instances are thread-safe.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size = len(vocabulary.pieces)
        added = vocabulary.added_ids.union(vocabulary.control.values(), vocabulary.user_defined.values())
        base = (token_id for token_id in range(self.vocab_size - 1, -1, -1) if token_id not in added)
        self.base_size = next((token_id + 1 for token_id in base if vocabulary.pieces[token_id] is not None), 0)
        self.control: Mapping[str, int] = vocabulary.control
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.version = vocabulary.version
        self.strips_space = vocabulary.strip_prefix
        self.byte_errors = vocabulary.byte_errors
        self.byte_level = not vocabulary.escape_spaces and not vocabulary.strip_prefix
        self._special = frozenset(vocabulary.control.values())
        self._vocabulary = vocabulary
        self._user_defined = _any_of(vocabulary.user_defined)
        self._control = _any_of(vocabulary.control)

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """Return the tokenizer in a file or in the directory of a checkpoint.

        Raises:
            TokenizerError: there is no tokenizer, there are several of the same kind, or it cannot be reproduced
                exactly.
        """
        file = find(path) if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(file, "no such file")
        if gguf.is_gguf(file):
            return cls(_gguf_vocabulary.read(gguf.files(file)[0]))
        return cls(_read(file, read_bounded(file)))

    def encode(self, text: str, *, bos: bool = False, prefix: bool = True) -> list[int]:
        """Return the token ids of ``text``; names of special tokens in it are plain text.

        Unpaired surrogates become U+FFFD.

        Args:
            text: the text to encode.
            bos: whether to add the beginning-of-text token in front.
            prefix: whether to add the leading space of SentencePiece; use False for text that continues a text.

        Raises:
            InvalidRequest: the ``tokenizers`` library fails for this text.
        """
        text = _without_surrogates(text)
        v = self._vocabulary
        ids = (
            self._escaped(text, prefix)
            if v.escape_spaces
            else _run(v.core if prefix or v.core_without_prefix is None else v.core_without_prefix, text)
        )
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_with_special(self, text: str, guard: str = "") -> list[int]:
        """Return the token ids of a text in which names of special tokens become special tokens.

        Use it for a rendered template and never for user input. ``guard`` is removed from the text after the special
        tokens are found; a caller inserts it into names that must stay text.
        """
        ids: list[int] = []
        for index, part in enumerate(self._control.split(text) if self._control else [text]):
            if index % 2:
                ids.append(self.control[part])
            elif part:
                part = part.replace(guard, "") if guard else part
                ids += self.encode(part, prefix=not ids or not self._vocabulary.prefix_only_first)
        return ids

    def find_special(self, text: str) -> Iterator[re.Match[str]]:
        """Yield a match for each name of a special token in ``text``."""
        return self._control.finditer(text) if self._control else iter(())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not valid UTF-8 become U+FFFD, and unknown ids are ignored.

        With ``skip_special=False`` the text includes the names of special tokens.
        """
        parts: list[str] = []
        at_start = self.strips_space
        for special, run in groupby(ids, self.is_special):
            if special and skip_special:
                continue
            pieces = [
                self.bytes(token_id, at_start and index == 0 and not special) for index, token_id in enumerate(run)
            ]
            parts.append(b"".join(pieces).decode("utf-8", self.byte_errors))
            at_start = False
        return "".join(parts)

    def is_special(self, token_id: int) -> bool:
        """Return whether ``token_id`` is a special token or no token at all; a model may have logits for more ids."""
        if token_id in self._special or not 0 <= token_id < self.vocab_size:
            return True
        return self._vocabulary.pieces[token_id] is None

    def bytes(self, token_id: int, first: bool = False) -> bytes:
        """Return the bytes of a token, or of the name of a special token; none for an id that is not a token.

        ``first`` means that the token begins a text: SentencePiece then drops a leading space.
        """
        piece = self._vocabulary.pieces[token_id] if 0 <= token_id < self.vocab_size else None
        if piece and first and self.strips_space and piece[:1] == b" ":
            return piece if token_id in self._vocabulary.keeps_space else piece[1:]
        return piece or b""

    def piece(self, token_id: int) -> str:
        """Return the text of one token for display; incomplete characters become U+FFFD."""
        return self.bytes(token_id).decode("utf-8", self.byte_errors)

    def _escaped(self, text: str, prefix: bool) -> list[int]:
        v = self._vocabulary
        if prefix and v.add_prefix and text:
            text = " " + text
        text = text.replace(" ", SPACE)
        if self._user_defined is None:
            return _run(v.core, text)
        ids: list[int] = []
        for index, part in enumerate(self._user_defined.split(text)):
            ids += [v.user_defined[part]] if index % 2 else _run(v.core, part)
        return ids


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that holds the vocabulary of the checkpoint at ``path``.

    Return None if the folder has another tokenizer file, or no GGUF file.

    Raises:
        CheckpointError: a folder without another vocabulary holds several GGUF models, or a part is missing.
    """
    if path.is_dir() and any(any(path.glob(pattern)) for pattern in FILES):
        return None
    return gguf.vocabulary(path)


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return a regular expression that captures any of the names, the longest first; None if there are no names."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _run(core: Any, text: str) -> list[int]:
    try:
        ids: list[int] = core.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # panics of the library derive from BaseException
            raise
        raise InvalidRequest(f"the text cannot be tokenized: {first_line(error)}") from error
    return ids


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def find(folder: Path) -> Path:
    """Return the file that holds the tokenizer of the checkpoint in ``folder``.

    Raises:
        TokenizerError: there is no tokenizer, or there are several of the same kind.
        CheckpointError: the folder has no vocabulary but those of several GGUF models, or a part is missing.
    """
    for pattern in FILES:
        matches = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(matches) > 1:
            names = ", ".join(path.name for path in matches)
            raise TokenizerError(folder, f"has more than one tokenizer: name one of {names}")
        if matches:
            return matches[0]
    if (file := gguf_file(folder)) is not None:
        return file
    raise TokenizerError(folder, f"has no tokenizer: add one of {', '.join((*FILES, gguf.VOCABULARY))}")


def _read(path: Path, data: bytes) -> Vocabulary:
    if data[:1] == b"{":
        reader = _tiktoken.read_tekken if b'"default_num_special_tokens"' in data else _tokenizer_json.read
    else:
        reader = _tiktoken.read_ranks if _tiktoken.is_ranks(data) else _sentencepiece.read
    return reader(path, data)
