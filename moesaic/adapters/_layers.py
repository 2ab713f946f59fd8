"""Layers with a low-rank adapter, which stand in the place of the layers of a model.

The matrices are float32. Their products with activations are computed in the dtype of these.

Legend: T tokens, d hidden size, f intermediate size, r rank, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moesaic import ops
from moesaic.formats import Packed, Slot
from moesaic.models import Experts
from moesaic.models._layers import Linear

STACKS = {"w1": "gate", "w2": "down", "w3": "up"}
"""The stacks of ``Experts`` by the names of their weights in checkpoints."""


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter: y = W x + scale B (A x)."""

    def __init__(self, base: Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale, self.active = base, scale, True
        rows, columns = base.weight.shape
        self.a = _uniform((rank, columns), base.weight.device, generator)
        self.b = _zeros((rows, rank), base.weight.device)

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def weight(self) -> Packed:
        return self.base.weight

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y: Tensor = self.base(x, dtype)
        if not self.active:
            return y
        return y + _product(x, self.a, self.b, self.scale).to(y.dtype)

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return A and B by name."""
        return {f"{self.name}.a": self.a, f"{self.name}.b": self.b}

    def slots(self) -> Iterator[Slot]:
        return self.base.slots()


class AdaptedExperts(nn.Module):
    """Experts with adapters for some of their matrices: A [E, r, in] and B [E, out, r]."""

    def __init__(
        self, base: Experts, parts: Sequence[str], rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base, self.scale, self.active = base, scale, True
        self.parts = tuple(parts)
        """Names of the matrices that have an adapter, among w1, w2 and w3."""
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for part in parts:
            stack: Packed = getattr(base, STACKS[part])
            experts, rows, columns = stack.shape
            self.a[STACKS[part]] = _uniform((experts, rank, columns), stack.device, generator)
            self.b[STACKS[part]] = _zeros((experts, rows, rank), stack.device)

    @property
    def name(self) -> str:
        return self.base.name

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        base = self.base
        if not self.active:
            return base(x, ids, scores)  # type: ignore[no-any-return]
        # The gradient of indexing one entry would be a stack of zeros; that of ``unbind`` is one stack for all.
        pairs = {stack: (self.a[stack].unbind(0), self.b[stack].unbind(0)) for stack in self.a}

        def delta(stack: str, expert: int, x: Tensor) -> Tensor | None:
            if stack not in pairs:
                return None
            a, b = pairs[stack]
            return _product(x, a[expert], b[expert], self.scale)

        return ops.experts(x, base.gate, base.up, base.down, ids, scores, delta)

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return A and B of each part by name."""
        found = {}
        for part in self.parts:
            found[f"{self.name}.{part}.a"] = self.a[STACKS[part]]
            found[f"{self.name}.{part}.b"] = self.b[STACKS[part]]
        return found

    def slots(self) -> Iterator[Slot]:
        return self.base.slots()


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale B A x for each row of x [T, in]: [T, out]."""
    return x @ a.T.to(x.dtype) @ (b.T * scale).to(x.dtype)


def _uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> nn.Parameter:
    bound = shape[-1] ** -0.5
    drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)  # on the CPU: the same on every device
    return nn.Parameter(drawn.to(device))


def _zeros(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))
