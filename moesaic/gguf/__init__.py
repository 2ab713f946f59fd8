"""GGUF files: reads and writes the header, which holds typed metadata and the position of each tensor.

A file holds a magic number, a version, the counts of tensors and of metadata values, the metadata, the descriptions of
the tensors, and the data of the tensors, each at a multiple of the alignment. The header is checked completely before
anything is used. Each count or length in it is compared with the bytes that are left before it is used. Long values
stay in the mapped file until they are asked for. This module does not decode tensors and does not know any model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.errors import CheckpointError
from moesaic.gguf._files import MAGIC, VOCABULARY, candidates, files, is_gguf, part_name, split_name, vocabulary
from moesaic.gguf._types import FIRST_FOREIGN_TYPE, FOREIGN_TYPES, TYPES, BlockType
from moesaic.gguf._write import NewTensor, Value, encode, header, padding, split_records

__all__ = [
    "TYPES",
    "VOCABULARY",
    "Array",
    "BlockType",
    "GgufFile",
    "NewTensor",
    "StoredTensor",
    "Text",
    "Value",
    "candidates",
    "encode",
    "files",
    "header",
    "is_gguf",
    "padding",
    "part_name",
    "split_name",
    "split_records",
    "vocabulary",
]

VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20
MAX_TENSORS = MAX_VALUES = 1 << 16
MAX_NAME_BYTES = 1 << 10
"""Maximum length in bytes of the name of a tensor or of a metadata value."""
MAX_TEXT_BYTES = 16 << 20
MAX_ELEMENTS = 1 << 22
"""Maximum number of elements of an array."""
MAX_DIMENSIONS = 4
ALIGNMENTS = tuple(1 << bits for bits in range(3, 13))
DEFAULT_ALIGNMENT = 32

_NUMBERS = {code: struct.Struct("<" + letter) for code, letter in enumerate("BbHhIif?")} | {
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_TEXT, _ARRAY = 8, 9
_COUNT, _CODE = _NUMBERS[10], _NUMBERS[4]


class Array(NamedTuple):
    """An array in the metadata that is not read yet: type code and number of its elements, and its offset in bytes."""

    kind: int
    length: int
    offset: int


class Text(NamedTuple):
    """A text in the metadata that is not read yet: its offset in the file and its length, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """Description of a tensor.

    ``shape`` has the outermost axis first. ``offset`` is the position of the data in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.elements * self.type.nbytes


class GgufFile(AbstractContextManager["GgufFile"]):
    """The header of a GGUF file. The file is mapped until it is closed, and long values are read when asked for.

    Attributes:
        path: the file.
        metadata: every metadata value by its key; texts and arrays are read by ``text``, ``texts`` and ``numbers``.
        tensors: description of each tensor by its name, in the order of the header.
        header_bytes: length of the header in bytes.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of another version, or exceeds a limit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = {}
        self.tensors: Mapping[str, StoredTensor] = {}
        self._map = _map(path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        reader = _Reader(self.path, self._map)
        tensors, values = reader.counts()
        metadata: dict[str, Any] = {}
        self._records: dict[str, slice] = {}
        self._values_begin = reader.offset
        for _ in range(values):
            begin = reader.offset
            key = reader.name("key")
            if key in metadata:
                raise reader.damaged(f"it holds {key!r} twice")
            metadata[key] = reader.value(reader.number(_CODE), key)
            self._records[key] = slice(begin, reader.offset)
        self._values_end = reader.offset
        self.metadata = metadata
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if alignment not in ALIGNMENTS:
            raise reader.damaged(f"general.alignment is {alignment!r}, not a power of two from 8 to 4096")
        found = [reader.tensor(alignment) for _ in range(tensors)]
        self.header_bytes = reader.offset
        data = -(-reader.offset // alignment) * alignment
        self.tensors = _placed(found, data, len(self._map), reader)

    def text(self, key: str) -> str | None:
        """Return the text that the metadata holds under ``key``, or None if there is none.

        Raises:
            CheckpointError: the value is not a text, or not UTF-8.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, Text):
            raise CheckpointError(self.path, f"{key} is {value!r}, expected a text")
        try:
            return self._map[value.offset : value.offset + value.length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(self.path, f"{key} is not UTF-8: the file is damaged") from error

    def texts(self, key: str, limit: int) -> list[bytes]:
        """Return the array of texts that the metadata holds under ``key``, as bytes; empty if there is no such key.

        Raises:
            CheckpointError: the value is not an array of texts, or has more than ``limit`` elements.
        """
        array = self._array(key, {_TEXT}, limit)
        out, data, offset, unpack = [], self._map, array.offset, _COUNT.unpack_from
        for _ in range(array.length):
            begin = offset + 8
            offset = begin + unpack(data, offset)[0]
            out.append(data[begin:offset])
        return out

    def numbers(self, key: str, limit: int) -> tuple[Any, ...]:
        """Return the array of numbers that the metadata holds under ``key``; empty if there is no such key.

        Raises:
            CheckpointError: the value is not an array of numbers, or has more than ``limit`` elements.
        """
        array = self._array(key, _NUMBERS.keys(), limit)
        return struct.unpack_from(f"<{array.length}{_NUMBERS[array.kind].format[1:]}", self._map, array.offset)

    def _array(self, key: str, kinds: Collection[int], limit: int) -> Array:
        value = self.metadata.get(key, Array(min(kinds), 0, 0))
        if not isinstance(value, Array) or value.kind not in kinds or value.length > limit:
            raise CheckpointError(
                self.path, f"{key} is {value!r}, expected an array of the documented type with at most {limit} elements"
            )
        return value

    def record(self, key: str) -> bytes:
        """Return the bytes of the metadata value ``key`` with its key, as they are in the file."""
        return self._map[self._records[key]]

    def header_without_tensors(self) -> bytes:
        """Return the bytes of a complete GGUF file with the same metadata and no tensors."""
        head = self._map[:8] + _COUNT.pack(0) + _COUNT.pack(len(self.metadata))
        return head + self._map[self._values_begin : self._values_end]

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Reader:
    """Reads a header from its beginning; every length is compared with the bytes left before it is used."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.offset = path, 0
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)

    def damaged(self, problem: str) -> CheckpointError:
        """Return an error that says that the file is damaged, for the caller to raise."""
        return CheckpointError(self.path, f"damaged: {problem}; fetch it again")

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self._data, self._advance(layout.size))
        return value

    def _advance(self, nbytes: int) -> int:
        """Move the position ``nbytes`` bytes forward, within the header; return the position before."""
        begin = self.offset
        if nbytes > self._end - begin:
            if self._end < len(self._data):
                raise self.damaged(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB")
            raise self.damaged(f"it ends within its header, which needs {nbytes} bytes at byte {begin}")
        self.offset = begin + nbytes
        return begin

    def counts(self) -> tuple[int, int]:
        """Read the fixed part of the header; return the numbers of tensors and of metadata values."""
        magic = self._data[: len(MAGIC)]
        if magic != MAGIC:
            raise CheckpointError(self.path, f"is not a GGUF file: it begins with {magic!r}")
        self._advance(len(MAGIC))
        version = self.number(_CODE)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in VERSIONS:
                raise CheckpointError(self.path, "is big-endian; fetch or convert to a little-endian file")
            raise CheckpointError(self.path, f"has version {version} of GGUF; versions 2 and 3 are supported")
        tensors, values = self.number(_COUNT), self.number(_COUNT)
        # A tensor takes at least 33 bytes, a value at least 14.
        for count, limit, least, what in (
            (tensors, MAX_TENSORS, 33, "tensors"),
            (values, MAX_VALUES, 14, "metadata values"),
        ):
            if count > limit or count * least > self._end - self.offset:
                raise self.damaged(f"it announces {count} {what}")
        return tensors, values

    def name(self, what: str) -> str:
        """Read the name of a metadata value or a tensor; ``what`` is the kind of name, for the error."""
        length = self.number(_COUNT)
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.damaged(f"a {what} has {length} bytes at byte {self.offset}")
        begin = self._advance(length)
        try:
            return self._data[begin : self.offset].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a {what} is not UTF-8 at byte {begin}") from error

    def value(self, kind: int, key: str) -> Any:
        """Read the value of ``key``, of the type ``kind``: a number, or the position of a text or an array."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            length = self.number(_COUNT)
            if length > MAX_TEXT_BYTES:
                raise self.damaged(f"{key!r} announces a text of {length} bytes")
            return Text(self._advance(length), length)
        if kind == _ARRAY:
            return self._array(key)
        raise self.damaged(f"{key!r} has the unknown type {kind}")

    def _array(self, key: str) -> Array:
        kind, count = self.number(_CODE), self.number(_COUNT)
        size = _NUMBERS[kind].size if kind in _NUMBERS else 8
        if kind != _TEXT and kind not in _NUMBERS:
            raise self.damaged(f"{key!r} is an array of the unsupported type {kind}")
        if count > MAX_ELEMENTS or count * size > self._end - self.offset:
            raise self.damaged(f"{key!r} announces an array of {count} elements")
        array = Array(kind, count, self.offset)
        if kind == _TEXT:
            self._skip_texts(key, count)
        else:
            self._advance(count * size)
        return array

    def _skip_texts(self, key: str, count: int) -> None:
        data, offset, unpack = self._data, self.offset, _COUNT.unpack_from
        longest = 0
        try:
            for _ in range(count):
                (length,) = unpack(data, offset)
                if length > longest:
                    longest = length
                offset += 8 + length
        except (struct.error, OverflowError) as error:
            raise self.damaged(f"it ends within the texts of {key!r}") from error
        if longest > MAX_TEXT_BYTES:
            raise self.damaged(f"a text of {key!r} announces {longest} bytes")
        self._advance(offset - self.offset)

    def tensor(self, alignment: int) -> StoredTensor:
        """Read the description of a tensor; its offset is counted from the beginning of the data."""
        name = self.name("tensor name")
        dimensions = self.number(_CODE)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.damaged(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.number(_COUNT) for _ in range(dimensions))[::-1]
        code, offset = self.number(_CODE), self.number(_COUNT)
        if code not in TYPES:
            known = FOREIGN_TYPES.get(code, "a type of ik_llama.cpp" if code >= FIRST_FOREIGN_TYPE else "unknown")
            raise CheckpointError(self.path, f"{name!r} has type {code} ({known}); use a file without this type")
        kind = TYPES[code]
        if 0 in shape or shape[-1] % kind.elements:
            raise self.damaged(f"{name!r} has shape {list(shape)}, which {kind.name} cannot store")
        if offset % alignment:
            raise self.damaged(f"{name!r} begins at byte {offset} of the data, not at a multiple of {alignment}")
        return StoredTensor(name, shape, kind, offset)


def _placed(found: Sequence[StoredTensor], data: int, size: int, reader: _Reader) -> dict[str, StoredTensor]:
    """Return the tensors by name, with offsets from the beginning of the file; check that none overlap."""
    placed = {
        tensor.name: StoredTensor(tensor.name, tensor.shape, tensor.type, data + tensor.offset) for tensor in found
    }
    if len(placed) != len(found):
        raise reader.damaged("two tensors have the same name")
    end = data
    for tensor in sorted(placed.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise reader.damaged(f"{tensor.name!r} overlaps another tensor")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise CheckpointError(
                reader.path, f"truncated: {tensor.name!r} ends at byte {end}, but the file has {size}; fetch it again"
            )
    return placed


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size < len(MAGIC):
                raise CheckpointError(path, "is not a GGUF file: it is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
