"""Means and quantiles of a sample of numbers, with the standard error of a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An estimate and its standard error, which is 0 for fewer than two numbers."""

    value: float
    standard_error: float

    @classmethod
    def mean(cls, numbers: Tensor) -> Estimate:
        """Return the mean of ``numbers`` [N], in float64, as an estimate that takes them as independent."""
        error = float(numbers.std(correction=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
        return cls(float(numbers.mean()), error)

    def exponential(self) -> Estimate:
        """Return the exponential, with the standard error of its first-order expansion."""
        return Estimate(math.exp(self.value), math.exp(self.value) * self.standard_error)

    def root(self) -> Estimate:
        """Return the square root, with the standard error of its first-order expansion."""
        root = math.sqrt(self.value)
        return Estimate(root, self.standard_error / (2 * root) if root else 0.0)


def quantile(numbers: Tensor, fraction: float) -> float:
    """Return the quantile ``fraction`` of ``numbers`` [N], between two of them by linear interpolation."""
    return float(np.quantile(numbers.numpy(), fraction))  # torch.quantile takes at most 16 million numbers
