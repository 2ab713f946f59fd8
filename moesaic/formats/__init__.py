"""What a weight is made of: one file = one way to store a weight.

A file ``formats/<name>.py`` defines ``class Format(Packed)``:

    layout(shape)                 {part: (shape, dtype)} that a weight of this logical shape occupies
    quantize(weight)              {part: tensor} of a plain weight
    unpack(parts, shape, dtype)   the plain weight again, as near as the format allows

That is all a format owes; the reference backend works from it. A fast backend adds a tile
reader under the same stem. Nothing here knows what a weight is used for.

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

Shape = tuple[int, ...]
Layout = Mapping[str, tuple[Shape, torch.dtype]]


class Packed(nn.Module):
    """A weight in some format: its named parts, and the logical shape [..., out, in] they stand for.

    It is an ``nn.Module`` so that device moves, the meta device and optimizers see the parts;
    it is never called. Parts are parameters without gradient until somebody trains them.
    """

    name: ClassVar[str]
    """The format's name, its file's stem."""

    error: ClassVar[float]
    """The most that quantizing changes a weight drawn from a normal distribution, |w' - w| / |w|."""

    shape: Shape

    def __init__(self, shape: Shape, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for part, tensor in parts.items():
            self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def layout(cls, shape: Shape) -> Layout:
        """Return the shape and dtype of each part of a weight of logical ``shape``."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of ``weight`` [..., out, in]; leading axes are packed independently."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the plain weight of logical ``shape`` in ``dtype``; differentiable where the format is."""
        raise NotImplementedError

    @classmethod
    def empty(cls, shape: Shape, device: torch.device | str | None = None) -> Self:
        """Return a weight of logical ``shape`` with unset memory, on any device, ``meta`` included."""
        layout = cls.layout(shape)
        return cls(shape, {part: torch.empty(s, dtype=t, device=device) for part, (s, t) in layout.items()})

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Return ``weight`` in this format."""
        return cls(tuple(weight.shape), cls.quantize(weight))

    @classmethod
    def nbytes(cls, shape: Shape) -> int:
        """Return the bytes that a weight of logical ``shape`` occupies, without making one."""
        return sum(math.prod(s) * t.itemsize for s, t in cls.layout(shape).values())

    def parts(self) -> dict[str, Tensor]:
        """Return the parts by name."""
        # Not named_parameters(): this is called for every weight of every step.
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
    """A place in a model that one tensor of a checkpoint fills.

    ``shape`` is the full tensor's, ``index`` the part of it that this rank holds, and ``store``
    takes exactly that part. A reader therefore never reads, and a rank never holds, more than
    its share.
    """

    name: str
    """The tensor's name in Hugging Face's classic scheme, the common language of all layouts."""
    shape: Shape
    index: tuple[slice, ...]
    store: Callable[[Tensor], None]


def load(name: str) -> type[Packed]:
    """Return the format called ``name``.

    Raises:
        NotFound: there is no such format; the message names those there are.
    """
    packed: type[Packed] = registry.load("formats", name).Format
    return packed
