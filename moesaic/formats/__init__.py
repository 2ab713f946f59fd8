"""Weight formats: each file is one way to store a weight.

A file ``formats/<name>.py`` defines a frozen dataclass ``class Format(WeightFormat)``, whose fields are the parameters
of the format, all with defaults:

    layout(shape)                 {part: (shape, dtype)} of a weight of this logical shape
    quantize(weight)              {part: tensor} of a plain weight
    unpack(parts, shape, dtype)   the plain weight, within the format's error

A part is one of the tensors that make up a weight. The reference backend needs nothing else. A fast backend adds its
own reader under the same name. This module does not know what a weight is used for.

Legend: a logical shape is [out, in], or [experts, out, in] for a stack.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic import registry
from moesaic.errors import InvalidParameter, NotFound
from moesaic.formats._codes import Codes

__all__ = ["Codes", "Layout", "Packed", "Shape", "Slot", "WeightFormat", "load"]

Shape = tuple[int, ...]
Layout = Mapping[str, tuple[Shape, torch.dtype]]


@dataclass(frozen=True)
class WeightFormat:
    """A way to store a weight: a name and parameters. Formats with equal names and parameters are equal."""

    name: ClassVar[str]
    """Name of the format and stem of its file."""

    error: ClassVar[float]
    """Upper bound of the relative error of quantization, unless the format's parameters change it."""

    def largest_error(self) -> float:
        """Return an upper bound of the relative error |w' - w| / |w| of quantizing a normally distributed weight."""
        return self.error

    def __str__(self) -> str:
        """Return the format as text that ``load`` reads: its name, and the parameters that are not the defaults."""
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return ":".join((self.name, *(f"{field.name}={value}" for field, value in fields if value != field.default)))

    def layout(self, shape: Shape) -> Layout:
        """Return the shape and dtype of each part (tensor) that stores a weight of logical ``shape``, by its name."""
        raise NotImplementedError

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts (tensors) that store ``weight`` [..., out, in] in this format, by name.

        Each matrix [out, in] along the leading axes is quantized independently.
        """
        raise NotImplementedError

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the plain weight of logical ``shape`` in ``dtype`` that ``parts`` store.

        With an unquantized format, gradients flow from the result to ``parts``.
        """
        raise NotImplementedError

    def rows(self, parts: Mapping[str, Tensor], shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows ``ids`` [T] of the plain weight [out, in] that ``parts`` store, in ``dtype``: [T, in]."""
        return F.embedding(ids, self.unpack(parts, shape, dtype))

    def empty(self, shape: Shape, device: torch.device | str | None = None) -> Packed:
        """Return a weight of logical ``shape`` in this format, with uninitialized memory on ``device``.

        ``device`` may be ``meta``; None is torch's default device.
        """
        layout = self.layout(shape)
        return Packed(self, shape, {part: torch.empty(s, dtype=t, device=device) for part, (s, t) in layout.items()})

    def pack(self, weight: Tensor) -> Packed:
        """Return ``weight`` quantized to this format."""
        return Packed(self, tuple(weight.shape), self.quantize(weight))

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes that a weight of logical ``shape`` takes in this format, without allocating it."""
        return sum(math.prod(s) * t.itemsize for s, t in self.layout(shape).values())


class Packed(nn.Module):
    """A weight in some format: its parts by name, and its logical shape [..., out, in].

    It is an ``nn.Module`` so that device moves, the meta device and optimizers see the parts. It is never called.
    Parts are parameters without gradient; training code switches the gradient on.

    Kernels read the memory of the parts. A part is therefore compared with the format's ``layout`` whenever it is set
    or moved, and not in every call of an op.

    Raises:
        InvalidParameter: a part is unknown or not contiguous, or its shape or dtype is not that of ``layout``.
    """

    format: WeightFormat
    """Format of the weight."""

    name: str
    """Name and parameters of the format; ops choose a backend by it."""

    shape: Shape
    """Logical shape: [out, in], or [experts, out, in] for a stack."""

    device: torch.device
    """Device of the parts."""

    def __init__(self, weight_format: WeightFormat, shape: Shape, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.format, self.name = weight_format, str(weight_format)
        self.shape = tuple(shape)
        for part, tensor in parts.items():
            self.register_parameter(part, nn.Parameter(tensor.contiguous(), requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set one of the tensors that make up the weight; ``module.<name> = parameter`` also calls this method."""
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
        layout = self.format.layout(self.shape)
        if part not in layout:
            raise InvalidParameter("weight", f"{self.name} has no part {part!r}; its parts: {', '.join(layout)}")
        shape, dtype = layout[part]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
            actual = f"{tuple(tensor.shape)} {tensor.dtype}" + ("" if tensor.is_contiguous() else ", not contiguous")
            raise InvalidParameter("weight", f"{self.name} part {part!r} is {actual}; expected {tuple(shape)} {dtype}")

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that make up the weight, by name."""
        # named_parameters() is too slow here: this runs for every weight in every step.
        return {part: tensor for part, tensor in self._parameters.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32, index: int | None = None) -> Tensor:
        """Return the plain weight [..., out, in] in ``dtype``; with ``index``, only that entry of a stack."""
        parts, shape = self.parts(), self.shape
        if index is not None:
            parts, shape = {part: tensor[index] for part, tensor in parts.items()}, shape[1:]
        return self.format.unpack(parts, shape, dtype)

    def entry(self, index: int) -> Packed:
        """Return entry ``index`` of this stack as a weight of its own, in the same memory."""
        return Packed(self.format, self.shape[1:], {part: tensor[index] for part, tensor in self.parts().items()})

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows ``ids`` [T] of this weight [out, in], dequantized to ``dtype``: [T, in]."""
        return self.format.rows(self.parts(), self.shape, ids, dtype)

    @torch.no_grad()
    def store(self, weight: Tensor, index: int | None = None) -> None:
        """Overwrite this weight, or entry ``index`` of a stack, with ``weight`` quantized to its format."""
        self.overwrite(self.format.quantize(weight), index)

    @torch.no_grad()
    def overwrite(self, parts: Mapping[str, Tensor], index: int | None = None) -> None:
        """Overwrite the parts of this weight, or of entry ``index`` of a stack, with ``parts`` of the same layout."""
        for part, tensor in parts.items():
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
    """Function that stores the slice in the model, quantized to the format of the model's weight."""
    format: WeightFormat | None = None
    """Format of the model's weight; None: a float32 parameter."""
    store_codes: Callable[[Codes], None] | None = None
    """Function that stores the codes of a slice that the file has in ``format``; None for a float32 parameter."""
    weight: Packed | Tensor | None = None
    """The model's weight, or the stack of weights, that the slice is stored in."""
    entry: int | None = None
    """The entry of the stack; None if ``weight`` is no stack."""


def load(text: str) -> WeightFormat:
    """Return the format that ``text`` names: a name, or a name with parameters such as ``grouped:bits=4:group=128``.

    Raises:
        NotFound: there is no such format; the message lists the available ones.
        InvalidParameter: a parameter is unknown or has no valid value.
    """
    name, *parameters = text.split(":")
    if name not in registry.names("formats"):
        raise NotFound(f"formats has no entry {name!r}; available: {', '.join(registry.names('formats'))}")
    kind: type[WeightFormat] = registry.load("formats", name).Format
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    values = {}
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise InvalidParameter("format", f"{name} has no parameter {key!r}; its parameters: {known}")
        values[key] = int(value) if value.isdigit() and isinstance(defaults[key], int) else value
    return kind(**values)
