"""The interface of recorded computations, and the memory and the checks that recording needs."""

from __future__ import annotations

import bisect
import weakref
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Result = TypeVar("Result", covariant=True)

ALIGNMENT = 64


class Graph(Protocol[Result]):
    """A computation that runs again in one call, on the same tensors (the term is CUDA's)."""

    @property
    def result(self) -> Result:
        """What the computation returned. Each replay overwrites its tensors."""

    @property
    def nbytes(self) -> int:
        """Memory of the results and of what is computed on the way, in bytes."""

    def replay(self) -> None:
        """Compute ``result`` from what the tensors that were read in the recording hold now."""


class Arena:
    """Memory for the tensors of a recording, which its replays use again.

    The memory of a tensor that nobody refers to any more is given to a later one. This is right for replays too,
    because they run the ops in the same order.
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []  # (bytes, index), sorted
        self.buffers: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor with uninitialized memory."""
        size = max(1, torch.Size(shape).numel()) * dtype.itemsize
        index = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
        memory = self.buffers[index][:size]  # an object of its own, which the tensor and its views keep alive
        weakref.finalize(memory, self._give_back, index)
        with _disable_current_modes():  # torch would see a constant
            return torch.from_numpy(memory).view(dtype)[: torch.Size(shape).numel()].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all memory."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def _take(self, size: int) -> int:
        place = bisect.bisect_left(self._free, (size, 0))
        if place < len(self._free):
            return self._free.pop(place)[1]
        memory = np.empty(size + ALIGNMENT, np.uint8)
        offset = -memory.ctypes.data % ALIGNMENT
        self.buffers.append(memory[offset : offset + size])
        return len(self.buffers) - 1

    def _give_back(self, index: int) -> None:
        bisect.insort(self._free, (self.buffers[index].nbytes, index))


class NotRecordable(Exception):
    """A computation does something that a graph cannot repeat."""


VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "alias as_strided detach expand permute select slice split split_with_sizes squeeze t transpose unbind "
        "unsqueeze view _reshape_alias _unsafe_view"
    ).split()
)


class OnlyViews(TorchDispatchMode):
    """Allows no operation of torch but views, which are what they were when the ops of a graph run again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        if name in VIEWS:
            return func(*args, **kwargs)
        with self:  # an operation such as flatten may consist of views
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise NotRecordable(f"{name} is no op of moesaic.ops")
        return result
