"""Weight formats: each file is one way to store a weight.

A file ``formats/<name>.py`` defines ``class Format(Packed)``:

    layout(shape)                 {part: (shape, dtype)} of a weight of this logical shape
    quantize(weight)              {part: tensor} of a plain weight
    unpack(parts, shape, dtype)   the plain weight, within the format's error

The reference backend needs nothing else. A fast backend adds its own reader under the same name. This module does
not know what a weight is used for.

Legend: a logical shape is [out, in], or [experts, out, in] for a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from moesaic import registry
from moesaic.errors import InvalidParameter

Shape = tuple[int, ...]
Layout = Mapping[str, tuple[Shape, torch.dtype]]


class Packed(nn.Module):
    """A weight in some format: its named parts and its logical shape [..., out, in].

    It is an ``nn.Module`` so that device moves, the meta device and optimizers see the parts. It is never called.
    Parts are parameters without gradient; training code switches the gradient on.

    Kernels read the parts' memory. A part is therefore compared with ``layout`` whenever it is set or moved, and not
    in every call of an op.

    Raises:
        InvalidParameter: a part is unknown or not contiguous, or its shape or dtype is not that of ``layout``.
    """

    name: ClassVar[str]
    """Name of the format and stem of its file."""

    error: ClassVar[float]
    """Upper bound of the relative error |w' - w| / |w| of quantizing a normally distributed weight."""

    shape: Shape
    """Logical shape: [out, in], or [experts, out, in] for a stack."""

    device: torch.device
    """Device of the parts."""

    def __init__(self, shape: Shape, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for part, tensor in parts.items():
            self.register_parameter(part, nn.Parameter(tensor.contiguous(), requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set a part; assignment to an attribute of the part's name comes here too."""
        if param is not None:
            self._check(name, param)
            self.device = param.device
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move the parts, as ``nn.Module.to`` does, and check them again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.parts().items():
            self._check(name, tensor)
            self.device = tensor.device
        return self

    def _check(self, part: str, tensor: Tensor) -> None:
        layout = self.layout(self.shape)
        if part not in layout:
            raise InvalidParameter("weight", f"{self.name} has no part {part!r}; its parts: {', '.join(layout)}")
        shape, dtype = layout[part]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
            actual = f"{tuple(tensor.shape)} {tensor.dtype}" + ("" if tensor.is_contiguous() else ", not contiguous")
            raise InvalidParameter("weight", f"{self.name} part {part!r} is {actual}; expected {tuple(shape)} {dtype}")

    @classmethod
    def layout(cls, shape: Shape) -> Layout:
        """Return the shape and dtype of each part of a weight with this logical ``shape``."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of ``weight`` [..., out, in]; entries along the leading axes are packed independently."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the plain weight of logical ``shape`` in ``dtype``. Unquantized formats are differentiable."""
        raise NotImplementedError

    @classmethod
    def empty(cls, shape: Shape, device: torch.device | str | None = None) -> Self:
        """Return a weight of logical ``shape`` with uninitialized memory on any device, including ``meta``."""
        layout = cls.layout(shape)
        return cls(shape, {part: torch.empty(s, dtype=t, device=device) for part, (s, t) in layout.items()})

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Return ``weight`` quantized to this format."""
        return cls(tuple(weight.shape), cls.quantize(weight))

    @classmethod
    def nbytes(cls, shape: Shape) -> int:
        """Return the size in bytes of a weight with this logical ``shape``, without allocating it."""
        return sum(math.prod(s) * t.itemsize for s, t in cls.layout(shape).values())

    def parts(self) -> dict[str, Tensor]:
        """Return the parts by name."""
        # named_parameters() is too slow here: this runs for every weight in every step.
        return {part: tensor for part, tensor in self._parameters.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32, index: int | None = None) -> Tensor:
        """Return the plain weight [..., out, in] in ``dtype``, or entry ``index`` of a stack."""
        parts, shape = self.parts(), self.shape
        if index is not None:
            parts, shape = {part: tensor[index] for part, tensor in parts.items()}, shape[1:]
        return self.unpack(parts, shape, dtype)

    @torch.no_grad()
    def store(self, weight: Tensor, index: int | None = None) -> None:
        """Quantize ``weight`` into this memory, or into entry ``index`` of a stack."""
        for part, tensor in self.quantize(weight).items():
            target = self.parts()[part]
            (target if index is None else target[index]).copy_(tensor)


@dataclass(frozen=True)
class Slot:
    """The part of a model that one checkpoint tensor fills.

    A reader reads only the slice ``index`` of the tensor, so a rank never reads or holds more than its shard.
    """

    name: str
    """Name of the tensor in Hugging Face's classic scheme, which all checkpoint layouts are translated to."""
    shape: Shape
    """Shape of the full tensor."""
    index: tuple[slice, ...]
    """Slice of the tensor that this rank holds."""
    store: Callable[[Tensor], None]
    """Stores the slice in the model."""


def load(name: str) -> type[Packed]:
    """Return the format called ``name``.

    Raises:
        NotFound: there is no such format; the message lists the available ones.
    """
    packed: type[Packed] = registry.load("formats", name).Format
    return packed
