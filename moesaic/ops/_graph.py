"""The interface of recorded computations, and the memory and the checks that recording needs."""

from __future__ import annotations

import bisect
import weakref
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
        with torch._C.DisableTorchFunction():  # this is no function of the computation
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


READS_NO_DATA = frozenset(
    "__get__ __len__ data_ptr dim element_size get_device is_complex is_contiguous is_floating_point nelement numel "
    "size storage_offset stride untyped_storage".split()
)
"""Functions of tensors whose results do not depend on their numbers; ``__get__`` reads an attribute."""


class OnlyViews(TorchFunctionMode):
    """Allows no function of torch but views, which are what they were when the ops of a graph run again.

    A mode for dispatched operations (``TorchDispatchMode``) would see more, but it imports torch's compiler, which
    takes a second and much memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        result = None if in_place else func(*args, **(kwargs or {}))
        if in_place or not (name in READS_NO_DATA or _is_view(result, args)):
            raise NotRecordable(f"{name} is no op of moesaic.ops")
        return result


def _is_view(result: Any, args: Any) -> bool:
    """Return whether ``result`` has tensors, and all of them share the memory of one of the arguments."""
    found = result if isinstance(result, tuple | list) else (result,)
    if not found or not all(isinstance(each, Tensor) for each in found):
        return False
    given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
    return all(each.untyped_storage().data_ptr() in given for each in found)
