"""Writes the header of a GGUF file: metadata and the descriptions of tensors. The caller writes the data of tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moesaic.gguf._files import MAGIC
from moesaic.gguf._types import TYPES, BlockType

VERSION = 3
ALIGNMENT = 32
"""The data of each tensor begins at a multiple of this number of bytes."""
Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""A metadata value. An int is stored as uint32, or as int32 in an array, and a float as float32."""
_UINT16, _UINT32, _INT32, _FLOAT32, _BOOL, _TEXT, _ARRAY = 2, 4, 5, 6, 7, 8, 9
_CODES = {kind: code for code, kind in TYPES.items()}


class NewTensor(NamedTuple):
    """Description of a tensor to write; ``shape`` has the outermost axis first."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    nbytes: int


def record(key: str, value: Value) -> bytes:
    """Return the bytes of one metadata value with its key."""
    return _text(key) + _value(value)


def header(records: Iterable[bytes], tensors: Sequence[NewTensor]) -> bytes:
    """Return the bytes of a file up to the data of the first tensor.

    The data of the tensors must follow in the same order, each padded to ``ALIGNMENT`` bytes.
    """
    values = list(records)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values)), *values]
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]
        parts += [_text(tensor.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", _CODES[tensor.type], offset))
        offset += tensor.nbytes + padding(tensor.nbytes)
    head = b"".join(parts)
    return head + bytes(padding(len(head)))


def padding(nbytes: int) -> int:
    """Return the number of bytes that must follow ``nbytes`` bytes up to the next multiple of ``ALIGNMENT``."""
    return -nbytes % ALIGNMENT


def encode(values: Mapping[str, Value]) -> dict[str, bytes]:
    """Return the bytes of each metadata value, by its key."""
    return {key: record(key, value) for key, value in values.items()}


def split_records(number: int, count: int, tensors: int) -> list[bytes]:
    """Return the metadata values of file ``number``, from 0 on, of ``count`` files that hold ``tensors`` in total."""
    return [
        _text("split.no") + struct.pack("<IH", _UINT16, number),
        _text("split.count") + struct.pack("<IH", _UINT16, count),
        _text("split.tensors.count") + struct.pack("<Ii", _INT32, tensors),
    ]


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    first = value[0] if value else ""
    if isinstance(first, str):
        return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(_text(str(item)) for item in value)
    kind, letter = (_FLOAT32, "f") if isinstance(first, float) else (_INT32, "i")
    return struct.pack(f"<IIQ{len(value)}{letter}", _ARRAY, kind, len(value), *value)
