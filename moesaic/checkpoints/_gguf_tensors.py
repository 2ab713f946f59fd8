"""Reads tensors from GGUF files: only the rows that are asked for are read.

Floats keep their dtype. Blocks of codes are read as bytes; a ``BlockView`` decodes them, or returns their codes. This
module does not depend on the names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoints._gguf_blocks import DECODERS, BlockDecoder
from moesaic.checkpoints._views import Index, Stored, TensorInfo, View, bounds
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats.grouped import Format
from moesaic.gguf import GgufFile, StoredTensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types that store floats without quantization."""


class GgufTensors:
    """The tensors of several GGUF files, which can be read by name, in the order of the data on disk.

    The last axis of a quantized tensor is the bytes of a row. ``view`` returns its weights.

    Raises:
        CheckpointError: a type is not supported, or two files hold the same tensor.
    """

    def __init__(self, opened: Sequence[GgufFile]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.quantized = False
        """Whether any of the tensors is quantized."""
        self._stored: dict[str, StoredTensor] = {}
        self._mapped: tuple[Path, Tensor] | None = None
        for file in opened:
            for name, tensor in sorted(file.tensors.items(), key=lambda item: item[1].offset):
                if name in self.tensors:
                    raise CheckpointError(file.path, f"{name} is also in {self.tensors[name].file.name}")
                self._add(file.path, tensor)

    def _add(self, path: Path, tensor: StoredTensor) -> None:
        kind = tensor.type.name
        if kind not in PLAIN and kind not in DECODERS:
            supported = ", ".join((*PLAIN, *DECODERS))
            raise CheckpointError(
                path, f"{tensor.name} has type {kind}, which is not supported; use one of {supported}"
            )
        self.quantized |= kind in DECODERS
        row_bytes = tensor.shape[-1] // tensor.type.elements * tensor.type.nbytes
        quantized = TensorInfo((*tensor.shape[:-1], row_bytes), torch.uint8, path)
        self.tensors[tensor.name] = TensorInfo(tensor.shape, PLAIN[kind], path) if kind in PLAIN else quantized
        self._stored[tensor.name] = tensor

    def view(self, name: str) -> View:
        """Return a view of the weights of tensor ``name``."""
        rows, kind = Stored(self, name), self._stored[name].type.name
        return rows if kind in PLAIN else BlockView(rows, DECODERS[kind])

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return tensor ``name``, or the part that ``index`` selects; it shares the mapped file's memory."""
        info, stored = self.tensors[name], self._stored[name]
        data = self._map(info.file)[stored.offset : stored.offset + stored.nbytes]
        return data.view(info.dtype).reshape(info.shape)[bounds(index, info.shape)]

    def _map(self, path: Path) -> Tensor:
        """Return the bytes of the file ``path``, which is mapped into memory.

        The file that was mapped before is released. Tensors that were read from it stay valid.
        """
        if self._mapped is None or self._mapped[0] != path:
            try:
                data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(path, "cannot be mapped") from error
            self._mapped = (path, data)
        return self._mapped[1]

    def close(self) -> None:
        """Release the mapped file."""
        self._mapped = None


class BlockView:
    """View of the weights [..., rows, columns] float32 whose rows consist of blocks.

    ``format`` keeps the codes and scales of the blocks.
    """

    def __init__(self, rows: View, decoder: BlockDecoder) -> None:
        """Create a view of ``rows``, the bytes [..., rows, bytes of a row] uint8."""
        self._rows, self._decoder = rows, decoder
        *leading, nbytes = rows.info.shape
        columns = nbytes // decoder.type.nbytes * decoder.type.elements
        self.info = TensorInfo((*leading, columns), torch.float32, rows.info.file)
        self.format: Format = decoder.format
        self.kind = decoder.type.name

    def rearranged(self, change: Callable[[View], View]) -> BlockView:
        """Return a view of the weights after ``change``, which selects or reorders rows."""
        return BlockView(change(self._rows), self._decoder)

    def read(self, index: Index | None = None) -> Tensor:
        columns = bounds(index, self.info.shape)[-1]
        begin = columns.start // self._decoder.type.elements * self._decoder.type.elements
        return self._decoder.decode_rows(self._blocks(index))[..., columns.start - begin : columns.stop - begin]

    def codes(self, index: Index | None = None) -> Codes:
        """Return the codes and scales of the weights, or of the part that ``index`` selects.

        Raises:
            CheckpointError: the part begins or ends within a block.
        """
        columns, size = bounds(index, self.info.shape)[-1], self._decoder.type.elements
        if columns.start % size or columns.stop % size:
            raise CheckpointError(self.info.file, f"cannot be cut at columns {columns.start} and {columns.stop}")
        return self._decoder.unpack_rows(self._blocks(index))

    def _blocks(self, index: Index | None) -> Tensor:
        """Return the blocks [..., rows, blocks, bytes] that hold the part that ``index`` selects."""
        *leading, columns = bounds(index, self.info.shape)
        size, nbytes = self._decoder.type.elements, self._decoder.type.nbytes
        first, last = columns.start // size, -(-columns.stop // size)
        rows = self._rows.read((*leading, slice(first * nbytes, last * nbytes)))
        return rows.reshape(*rows.shape[:-1], last - first, nbytes)


def rearranged(view: View, change: Callable[[View], View]) -> View:
    """Return ``view`` after ``change``, which selects or reorders rows; quantized weights keep their codes."""
    return view.rearranged(change) if isinstance(view, BlockView) else change(view)
