"""Rotary position embedding: from configuration to frequencies.

RoPE is arXiv:2104.09864. Llama 3.1's scaling follows the code that Meta published with the weights: long wavelengths
are stretched by ``factor``, short ones are unchanged, and the band between them is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.models._config import Keys


@dataclass(frozen=True)
class Rope:
    """Parameters of rotary position embedding with the base ``theta``.

    ``kind`` is ``default``, ``linear`` or ``llama3``. The other fields apply to some kinds only.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> Tensor:
        """Return the rotation angle per position, in radians, of each pair of values of a head: [D/2] float32."""
        inverse = self.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _llama3(self, inverse: Tensor) -> Tensor:
        turns = self.original_length * inverse / (2 * math.pi)  # full turns within the original context
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * (keep + (1 - keep) / self.factor)


def read(keys: Keys, theta: float) -> Rope:
    """Return the RoPE parameters of a configuration, in the old style (rope_scaling) or the new one (rope_parameters).

    ``theta`` is the base if the configuration has none.
    """
    new = keys.get("rope_parameters")
    scaling: Mapping[str, Any] = new or keys.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise keys.fail(f"rope_scaling is {scaling!r}, expected an object")
    base = keys.number("rope_theta", theta)
    inner = Keys({"rope_theta": base} | dict(scaling), Path(keys.path))
    kind = inner.get("rope_type", inner.get("type", "default"))
    inner.get("type")
    inner.only("partial_rotary_factor", 1.0)
    rope = _kinds(inner, kind)
    inner.finish()
    return rope


def _kinds(keys: Keys, kind: Any) -> Rope:
    theta = keys.number("rope_theta")
    if kind in ("default", "linear"):
        keys.get("original_max_position_embeddings")  # a record: these kinds do not use it
    if kind == "default":
        keys.only("factor", 1.0)
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor=keys.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            factor=keys.number("factor"),
            low_freq_factor=keys.number("low_freq_factor"),
            high_freq_factor=keys.number("high_freq_factor"),
            original_length=keys.integer("original_max_position_embeddings"),
        )
    raise keys.fail(f"rope type {kind!r} changes the computation; only default, linear and llama3 are supported")
