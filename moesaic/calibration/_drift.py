"""Corrects weights for the drift of their inputs: QEP, arXiv:2504.09629.

The inputs x of a layer come from layers that are quantized already. They differ from the inputs x* of the same tokens
in the unquantized model, and so do the hidden states h to which the outputs are added. Before the weight W is rounded,
it is moved towards the one whose outputs on x repair this best. With dx = x* - x, dh = h* - h and sums over the tokens:

    W + SHARE (W sum(dx x^T) + sum(dh x^T)) (sum(x x^T) + damping)^-1

A whole correction fits the calibration text and loses on others; half of it does not.

Legend: T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.5
"""Share of the drift that is corrected."""
DAMPING = 0.01
"""What is added to the diagonal of the Hessian, as a fraction of its mean."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a layer for some tokens.

    Attributes:
        found: those of the quantized model [T, columns].
        expected: those of the unquantized model [T, columns].
        missing: what the hidden states lack to which the outputs are added [T, d]; None if that is another layer's.
    """

    found: Tensor
    expected: Tensor
    missing: Tensor | None = None

    def weighted(self, factors: Tensor) -> Inputs:
        """Return the inputs times a factor [T] for each token."""
        missing = None if self.missing is None else self.missing * factors[:, None]
        return Inputs(self.found * factors[:, None], self.expected * factors[:, None], missing)


@dataclass
class Moments:
    """Sums over the inputs of a layer: x x^T, dx x^T [columns, columns] and dh x^T [d, columns], float32."""

    hessian: Tensor
    drift: Tensor
    missing: Tensor | None = None

    @classmethod
    def of(cls, parts: Iterable[Inputs]) -> Moments:
        """Return the sums over some inputs, which are read one after another."""
        found: Moments | None = None
        for part in parts:
            x = part.found.float()
            left = [x, part.expected.float() - x, *([] if part.missing is None else [part.missing.float()])]
            if found is None:
                found = cls(*(rows.T @ x for rows in left))
            else:
                for total, rows in zip(found._totals(), left, strict=True):
                    total.addmm_(rows.T, x)
        assert found is not None, "there are no inputs"
        return found

    def _totals(self) -> list[Tensor]:
        return [self.hessian, self.drift, *([] if self.missing is None else [self.missing])]


class Correction:
    """Moves the weights of layers with the same inputs."""

    def __init__(self, moments: Moments, hessian: Tensor) -> None:
        """Prepare the correction for a Hessian [columns, columns]: that of ``moments``, or one with more tokens."""
        self._moments = moments
        damped = hessian.double()
        mean = damped.diagonal().mean()
        damped.diagonal().add_(torch.where(mean > 0, DAMPING * mean, 1.0))
        self._factor = torch.linalg.cholesky(damped)

    def apply(self, weight: Tensor) -> Tensor:
        """Return a corrected weight [rows, columns] in float32."""
        weight = weight.float()
        lost = weight @ self._moments.drift
        if self._moments.missing is not None:
            lost += self._moments.missing
        return weight + SHARE * torch.cholesky_solve(lost.T.double(), self._factor).T.float()
