"""Reads tensors from GGUF files: only the rows that are asked for are read, and decoded to floats.

Floats keep their dtype; blocks of codes become float32, without any rounding beyond the one that the type defines. This
module does not depend on the names of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoints._gguf_blocks import DECODERS
from moesaic.checkpoints._views import Index, TensorInfo, bounds
from moesaic.errors import CheckpointError
from moesaic.gguf import GgufFile, StoredTensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types that store floats without quantization."""


class GgufTensors:
    """The tensors of several GGUF files, which can be read by name, in the order of the data on disk.

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
        self.tensors[tensor.name] = TensorInfo(tensor.shape, PLAIN.get(kind, torch.float32), path)
        self._stored[tensor.name] = tensor

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return tensor ``name``, or the part that ``index`` selects; plain floats share the mapped file's memory."""
        info, stored = self.tensors[name], self._stored[name]
        part = bounds(index, info.shape)
        data = self._map(info.file)[stored.offset : stored.offset + stored.nbytes]
        if stored.type.name in PLAIN:
            return data.view(info.dtype).reshape(info.shape)[part]
        size, columns = stored.type.elements, part[-1]
        # The blocks that hold the columns are decoded completely, and cut afterwards.
        first, last = columns.start // size, -(-columns.stop // size)
        blocks = data.reshape(*info.shape[:-1], -1, stored.type.nbytes)[(*part[:-1], slice(first, last))]
        rows = DECODERS[stored.type.name].decode_rows(blocks)
        return rows[..., columns.start - first * size : columns.stop - first * size]

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
