"""Reads and writes safetensors files.

A file holds eight bytes with the length of the header, a JSON header with names, dtypes, shapes and offsets, and the
data. The header is checked before data is read. This module does not depend on the meaning of tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.checkpoints._views import Index, TensorInfo, View, bounds
from moesaic.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Limit for the length of a header, the same as in the reference implementation."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFiles:
    """The tensors of several safetensors files, which can be read by name, in the order of the data on disk.

    Only the file that was read last is mapped.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or two files hold the same tensor.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._mapped: tuple[Path, Any] | None = None
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        for name, info in header(path).items():
            if name in self.tensors:
                raise CheckpointError(path, f"{name} is also in {self.tensors[name].file.name}")
            self.tensors[name] = info
        self._map(path)  # runs the checks of the safetensors library

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return tensor ``name``, or the part that ``index`` selects; it shares memory with the mapped file."""
        info = self.tensors[name]
        part = bounds(index, info.shape)
        file = self._map(info.file)
        if part == bounds(None, info.shape):
            whole: Tensor = file.get_tensor(name)
            return whole
        cut: Tensor = file.get_slice(name)[part]
        return cut

    def _map(self, path: Path) -> Any:
        """Return the mapped file at ``path`` and close the one mapped before; tensors that were read stay valid."""
        if self._mapped is None or self._mapped[0] != path:
            self.close()
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(path, f"not a safetensors file: {error}") from error
            file.__enter__()  # type: ignore[no-untyped-call]
            self._mapped = (path, file)
        return self._mapped[1]

    def close(self) -> None:
        """Close the mapped file; tensors that were read stay valid."""
        if self._mapped is not None:
            self._mapped[1].__exit__(None, None, None)
            self._mapped = None


def header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the header of ``path`` declares, in the order of their data.

    Raises:
        CheckpointError: the file cannot be read, or the header is damaged or does not fit the size of the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            entries, data = _entries(path, file, size)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    infos = [(*_checked(path, name, entry, data), name) for name, entry in entries.items()]
    return {name: info for _, info, name in sorted(infos, key=lambda item: item[0])}


def _entries(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Return the entries of the header without its metadata, and the number of data bytes after the header."""
    if size < 8:
        raise CheckpointError(path, f"truncated: {size} bytes are too few for a safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(path, f"truncated or damaged: a header of {length} bytes in a file of {size}")
    try:
        entries = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"damaged: the header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CheckpointError(path, "damaged: the header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries, size - 8 - length


def _checked(path: Path, name: str, entry: Any, data: int) -> tuple[int, TensorInfo]:
    """Return the offset of the data and the description of one header entry, or raise CheckpointError."""
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"damaged: the header entry of {name} is incomplete") from error
    if code not in DTYPES:
        raise CheckpointError(path, f"{name} has the unknown dtype {code!r}; known dtypes: {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(path, f"damaged: the header entry of {name} has an invalid shape or offset")
    needed = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != needed:
        raise CheckpointError(path, f"damaged: {name} {list(shape)} needs {needed} bytes, but has {end - begin}")
    if end > data:
        raise CheckpointError(
            path, f"truncated: {name} ends at byte {end}, but there are only {data} bytes of data; fetch it again"
        )
    return begin, TensorInfo(shape, DTYPES[code], path)


def head(entries: Mapping[str, Any], aligned: int) -> bytes:
    """Return the beginning of a file up to the data: length and header, padded to a multiple of ``aligned`` bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % aligned)
    return struct.pack("<Q", len(text)) + text


def write_file(
    path: Path,
    views: Mapping[str, View],
    on_write: Callable[[int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``views`` to ``path``, one tensor in memory at a time.

    Tensors with larger elements come first, so that each is aligned to its element size. ``on_write`` is called with
    the number of bytes of each tensor. ``metadata`` is added to that of the header.
    """
    order = sorted(views, key=lambda name: -views[name].info.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        info = views[name].info
        entries[name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    with path.open("wb") as file:
        file.write(head(entries, 8))
        for name in order:
            tensor = views[name].read().contiguous()
            assert tensor.shape == views[name].info.shape and tensor.dtype == views[name].info.dtype
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if on_write is not None:
                on_write(tensor.nbytes)
